"""A round of PPO on two ranks is the round of one: same draws, same losses, one run directory."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from internlm2.engine.checkpoint_reader import CheckpointReader
from internlm2.run.directory import RunDirectory
from internlm2.run.ranks import from_environment
from internlm2.stages.ppo_round import run_round
from tests.ranks import run_ranks
from tests.stages.test_ppo_round import caches, composed, policy  # noqa: F401 (fixtures)

SETTINGS = ["ppo.iterations=2", "ppo.critic_warmup=1", "engine.threads=1", "ppo.micro_batch_tokens=90"]


def play(folder, start, cache, *overrides):
    """On each rank."""
    ranks = from_environment()
    config = composed(f"init_from={start}", f"data.cache_dir={cache}", *SETTINGS, *overrides)
    directory = RunDirectory(Path(folder), writes=ranks.is_first)
    with open(f"{folder}.{ranks.rank}.txt", "w", encoding="utf-8") as file:
        return run_round(config, directory, Console(file=file), policy=Path(start)).code


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flat(value, prefix=""):
    """{dotted key: number} of a record."""
    found = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found |= flat(item, f"{prefix}{key}.")
        elif isinstance(item, (int, float)):
            found[prefix + key] = item
    return found


@pytest.fixture(scope="module")
def single(tmp_path_factory, policy, caches):  # noqa: F811
    folder = tmp_path_factory.mktemp("single") / "round"
    assert play(str(folder), str(policy), str(caches)) == 0
    return folder


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_two_ranks(name, single, tmp_path, policy, caches):  # noqa: F811
    folder = tmp_path / "round"
    codes = run_ranks(play, 2, str(folder), str(policy), str(caches), f"engine={name}")
    assert codes == [0, 0]
    ours, theirs = records(folder), records(single)
    assert [record["step"] for record in ours] == [0, 1, 2, 3]
    # Answers and scores are the same; the largest drift is a rank's own; KL of a few answers is over more of them.
    own = ("drift", "kl_exact", "pretrain", "loss", "kl", "lr", "grad_norm")
    for mine, other in zip(ours[1:], theirs[1:]):
        mine, other = flat(mine), flat(other)
        for key in ("score", "length", "ended", "value_loss", "critic_grad_norm", "prompt_position", "answers"):
            assert mine[key] == pytest.approx(other[key], rel=2e-3, abs=1e-4), key
        for key in mine.keys() & other.keys():
            if key.startswith("domains.") and not any(part in key for part in own):
                assert mine[key] == pytest.approx(other[key], rel=2e-3, abs=1e-3), key
    # One rank's checkpoint is the other's: it holds the whole of both models.
    shapes = CheckpointReader(folder / "checkpoints/step_00000003").shapes
    assert shapes == CheckpointReader(single / "checkpoints/step_00000003").shapes
    assert (folder / "export/model.safetensors").exists()
