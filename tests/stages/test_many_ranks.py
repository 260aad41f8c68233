"""The stages on several forked ranks: one run directory, and the records of one process."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from internlm2.config.compose import compose_stages, register_schema
from internlm2.config.zero import check_ranks
from internlm2.engine.checkpoint_format import list_checkpoints
from internlm2.model.weights import load_model
from internlm2.run.metrics import read_records
from internlm2.run.ranks import from_environment
from internlm2.stages.recipe import run_stages
from internlm2.stages.supervised import Job
from tests.ranks import Forked
from tests.stages.conftest import REPOSITORY, TINY
from tests.stages.test_sft import base, dialogs  # noqa: F401 (fixtures)

SPLITTING = 3e-5  # the round-off of splitting a batch in another way


def run_rank(overrides: list[str], folder: str) -> None:
    """What train.py does in a rank, in a process that has everything imported; the log goes to `folder`."""
    os.chdir(REPOSITORY)
    with (
        open(Path(folder) / f"console_{from_environment().rank}.txt", "a") as console,
        contextlib.redirect_stdout(console),
    ):
        register_schema()
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            composed = compose("train", overrides=overrides, return_hydra_config=True)
            HydraConfig.instance().set_config(composed)
            configs = compose_stages(without_hydra(composed), composed.hydra)
            for config in configs:
                check_ranks(config, from_environment().world_size)
            run_stages(configs)


def run_preempted_rank(overrides: list[str], folder: str) -> None:
    """Rank 1, and no other, gets SIGUSR1 while it makes the batches of its fourth step."""
    make = Job.batches

    def batches(job):
        if job.engine.step == 3 and job.engine.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return make(job)

    Job.batches = batches
    run_rank(overrides, folder)


def without_hydra(composed):
    from omegaconf import open_dict

    copy = composed.copy()
    with open_dict(copy):
        del copy["hydra"]
    return copy


def start(command, root: Path, ranks: int, *overrides: str, function=run_rank) -> Forked:
    root.mkdir(exist_ok=True)
    words = command(root, "generation.max_rows=4", *overrides)
    search = f"hydra.searchpath=[file://{words[words.index('--config-dir') + 1]}]"
    return Forked(function, ranks, [search, *words[words.index("--config-dir") + 2 :]], str(root))


def finish(command, root: Path, ranks: int, *overrides: str) -> Path:
    """Run to the end; returns the directory of the stage."""
    start(command, root, ranks, *overrides).results(300)
    return root / "smoke"


def same_records(ours: Path, theirs: Path, keys: tuple[str, ...] = ("tokens", "position", "loss_tokens")) -> None:
    one, other = read_records(ours / "metrics.jsonl"), read_records(theirs / "metrics.jsonl")
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=SPLITTING)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert {key: a[key] for key in keys if key in b} == {key: b[key] for key in keys if key in b}
        assert a.keys() == b.keys()


SHORT = ("train.steps=8", "train.micro_batch=1", "run.samples=['def main']", "run.sample_tokens=4", "optim.eps=1e-6")


@pytest.fixture(scope="module")
def single(command, tmp_path_factory) -> Path:
    """Eight steps of pretraining in one process."""
    return finish(command, tmp_path_factory.mktemp("single"), 1, *SHORT, "checkpoint.export=true") / "pretrain_4k"


@pytest.mark.parametrize(
    ("engine", "overrides"),
    [
        ("zero3", ["checkpoint.keep_best=true", "validate.every=3"]),
        pytest.param("zero1", ["model.kv_heads=2", "engine.sequence_parallel=2"], marks=pytest.mark.slow),
    ],
)
def test_pretraining_on_two_ranks(command, single, tmp_path, engine, overrides):
    """One log, one set of records, an export and samples, all from the first rank; a checkpoint from both."""
    if "model.kv_heads=2" in overrides:
        single = finish(command, tmp_path / "one", 1, *SHORT, "model.kv_heads=2") / "pretrain_4k"
    run = finish(command, tmp_path / "two", 2, *SHORT, f"engine={engine}", "checkpoint.export=true", *overrides)
    stage = run / "pretrain_4k"
    if not overrides[0].startswith("checkpoint"):
        same_records(stage, single)
    assert sorted(file.name for file in (stage / "checkpoints/step_00000008").glob("rank*")) == [
        "rank00000.safetensors",
        "rank00001.safetensors",
    ]
    assert (stage / "export/model.safetensors.index.json").exists() or list((stage / "export").glob("*.safetensors"))
    assert (stage / "report.html").exists()
    assert len(list((stage / "samples").glob("*.txt"))) == 1
    assert (tmp_path / "two/console_1.txt").read_text() == ""  # a second rank has nothing to say
    log = (stage / "log.txt").read_text()
    assert f"engine {engine} over 2 ranks" in log
    timing = read_records(stage / "timing.jsonl")
    assert {record["rank_seconds"]["slowest_rank"] for record in timing} <= {0, 1}
    if engine == "zero3":
        best = min(
            (record for record in read_records(stage / "metrics.jsonl") if "validation" in record),
            key=lambda record: record["validation"]["only"]["loss"],
        )
        steps = [step for step, _ in list_checkpoints(stage / "checkpoints")]
        assert best["step"] in steps
        state = json.loads((stage / f"checkpoints/step_{steps[-1]:08d}/state.json").read_text())
        assert state["best"]["step"] == best["step"]


def test_preemption_on_one_rank_saves_on_all_and_other_ranks_go_on(command, single, tmp_path):
    """SIGUSR1 to rank 1 alone: both save and ask to be started again; one process then ends the same run."""
    forked = start(command, tmp_path, 2, *SHORT, "engine=zero2", function=run_preempted_rank)
    assert forked.wait() == [128 + signal.SIGUSR1] * 2
    stage = tmp_path / "smoke/pretrain_4k"
    assert "asks for a new start" in (stage / "log.txt").read_text()
    assert [step for step, _ in list_checkpoints(stage / "checkpoints")] == [4]
    finish(command, tmp_path, 1, *SHORT)
    assert "resumed at step 4 of 8" in (stage / "log.txt").read_text()
    same_records(stage, single)


def test_a_directory_in_use_is_refused_by_all_ranks(command, tmp_path):
    from internlm2.run.directory import RunDirectory

    with RunDirectory(tmp_path / "smoke/pretrain_4k").lock():
        forked = start(command, tmp_path, 2, *SHORT, "engine=zero1")
        assert forked.wait() == [1, 1]
    told = [(forked.folder / f"{rank}.error").read_text() for rank in range(2)]
    assert "is in use by another run (process" in told[0]
    assert "see the message of rank 0" in told[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=single"], "engine=single is one process, but the launcher started 2"),
        (["engine=zero1", "train.batch_tokens=64"], "1 rows of train.seq_len a step, fewer than the 2 ranks"),
        (
            ["engine=zero1", "engine.zero.shard_group=3"],
            "engine.zero.shard_group=3 must divide the 2 ranks: use 1 or 2",
        ),
    ],
)
def test_ranks_that_do_not_fit(command, tmp_path, overrides, message):
    forked = start(command, tmp_path, 2, "train.micro_batch=1", *overrides)
    assert forked.wait() == [1, 1]
    assert message in (forked.folder / "1.error").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "engine"), [("lora", "zero3"), ("qlora", "zero1"), ("none", "zero2")])
def test_fine_tuning_on_two_ranks(base, dialogs, tmp_path, adapter, engine):  # noqa: F811
    """Adapters on frozen weights that are sharded, or quantized: records, samples and the merged export."""
    kept = [text for text in TINY if not text.startswith(("stage=", "run.samples", "checkpoint.export", "train.steps"))]
    words = ["stage=sft", "data=talk", *kept, f"hydra.searchpath=[file://{dialogs}]", f"init_from={base}"]
    words += [f"adapter={adapter}", "adapter.rank=4", "optim.lr=0.01", "train.micro_batch=1", "train.steps=6"]
    words += ["optim.eps=1e-6", "run.samples=[add 3 and 4]", "run.sample_tokens=4"]
    stages = []
    for ranks, name in ((1, "single"), (2, engine)):
        root = tmp_path / name
        root.mkdir()
        Forked(run_rank, ranks, [*words, f"root={root}", f"engine={name}"], str(root)).results(300)
        stages.append(root / "smoke/sft")
    same_records(stages[1], stages[0])
    samples = [sorted((stage / "samples").glob("*.txt")) for stage in stages]
    assert [file.name for file in samples[0]] == [file.name for file in samples[1]]
    assert len(samples[0]) == 2
    one, other = (load_model(stage / "export") for stage in stages)
    for (key, ours), theirs in zip(other.named_parameters(), one.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3), key
    assert (stages[1] / "adapter").exists() == (adapter != "none")
