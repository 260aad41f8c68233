"""The stage that measures two others: which lengths, how many needles, what the figures say, what is missing."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from internlm2.config import ConfigError
from internlm2.config.compose import CONF, register_schema, to_config
from internlm2.config.length_proof import LengthProofConfig
from internlm2.model.export import export_weights
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import model_weights
from internlm2.run.directory import RunDirectory
from internlm2.run.report import write_report
from internlm2.run.stage_summary import figure_fault, read_stage
from internlm2.stages import length_proof
from tests.evaluate.conftest import small_config
from tests.evaluate.conftest import tokenizer as tokenizer

SETTINGS = LengthProofConfig("pretrain_4k", "pretrain_32k", [1, 2], [0, 100], 2, 2.0)


@pytest.fixture(scope="module")
def root(tokenizer, tmp_path_factory):
    """Two finished stages with random weights, trained to 96 and to 192 tokens as they say."""
    root = tmp_path_factory.mktemp("runs") / "proof"
    for stage, length in (("pretrain_4k", 96), ("pretrain_32k", 192)):
        model = CausalLM.from_config(small_config(max_position_embeddings=length), seed=3)
        export_weights(model_weights(model), root / stage, tokenizer=tokenizer.path)
    return root


def composed(root):
    from hydra import compose, initialize_config_dir

    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        keys = [
            "stage=length_proof",
            "experiment=length_proof",
            f"root={root.parent}",
            "name=proof",
            "engine.dtype=fp32",
        ]
        return replace(to_config(compose("train", overrides=keys)), length_proof=SETTINGS)


def test_the_stage_writes_maps_and_comparisons(root):
    directory = RunDirectory(root / "length_proof")
    assert length_proof.run(composed(root), directory, Console(quiet=True)) == 0
    stage = read_stage(directory.path)
    assert [figure_fault(figure) for figure in stage.figures] == [None] * 5
    by_name = {figure["title"]: figure for figure in stage.figures}
    compared = by_name["Needles found by length, mean over depths"]
    assert [line["x"] for line in compared["series"]] == [[96, 192], [96, 192, 384], [96, 192, 384]]
    assert len(compared["headline"]) == 6
    losses = by_name["Loss of the secret by its position"]["series"]
    assert [len(line["y"]) for line in losses] == [2, 3, 3]
    # Within the length of training, dynamic NTK changes nothing; beyond it, it does.
    assert losses[1]["y"][:2] == pytest.approx(losses[2]["y"][:2], abs=1e-4)
    assert losses[1]["y"][2] != pytest.approx(losses[2]["y"][2], abs=1e-4)
    page = write_report(root).read_text()
    assert "Needle in a haystack: pretrain_32k with dynamic NTK" in page


def test_repeats_fall_with_the_length():
    assert [length_proof.repeats_at(length, 1024, 4) for length in (128, 1024, 2048, 4096, 8192)] == [4, 4, 2, 1, 1]


def test_a_missing_stage_is_named(root, tmp_path):
    config = composed(root)
    with pytest.raises(ConfigError, match="pretrain_4k, which is not there: run stage=pretrain_4k first"):
        length_proof.run(config, RunDirectory(tmp_path / "other" / "length_proof"), Console(quiet=True))


def test_dynamic_ntk_is_a_change_of_the_table_alone(root):
    model = CausalLM.from_config(small_config(), seed=3)
    twin = length_proof.with_dynamic_ntk(model, 2.0)
    ids, bounds = torch.arange(20), torch.tensor([0, 20], dtype=torch.int32)
    assert torch.equal(twin(ids, bounds), model(ids, bounds))
    assert twin.config.rope_scaling.kind == "dynamic"
