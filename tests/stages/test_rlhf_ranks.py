"""The reward model and PPO on forked ranks: the records of one process."""

from pathlib import Path

import pytest
from rich.console import Console

from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import read_records
from internlm2.run.ranks import from_environment
from internlm2.stages.ppo_round import run_round
from tests.ranks import run_ranks
from tests.stages.test_many_ranks import SPLITTING, run_rank
from tests.stages.test_ppo_round import SHAPE, caches, composed, policy  # noqa: F401 (two of them are fixtures)

ROUND = [
    "ppo.iterations=6",
    "ppo.critic_warmup=1",
    "ppo.kl.exact_rows=2",
    "optim.eps=1e-6",
    "ppo.critic.optim.eps=1e-6",
]


def play(root: str, overrides: list[str]) -> int:
    """One round of PPO on this rank."""
    config = composed(*overrides)
    directory = RunDirectory(Path(root) / "round", writes=from_environment().is_first)
    with open(Path(root) / f"console_{from_environment().rank}.txt", "a", encoding="utf-8") as file:
        return run_round(config, directory, Console(file=file), policy=Path(config.init_from)).code


def round_records(root: Path, ranks: int, *overrides: str) -> list[dict]:
    root.mkdir()
    assert run_ranks(play, ranks, str(root), list(overrides), seconds=240) == [0] * ranks
    return read_records(root / "round/metrics.jsonl")


def assert_close(ours, theirs, path: str = "") -> None:
    """Equal up to the round-off of splitting a batch, wherever a number stands in the records."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=10 * SPLITTING, rel=1e-3), path
    else:
        assert ours == theirs, path


@pytest.fixture(scope="module")
def one_process(policy, caches, tmp_path_factory):  # noqa: F811
    """The round in one process, and what all rounds share."""
    shared = [f"init_from={policy}", f"data.cache_dir={caches}", *ROUND]
    return round_records(tmp_path_factory.mktemp("one") / "run", 1, *shared), shared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["engine=zero3", "frozen.shard=true"]),
        (4, ["engine=zero2"]),
    ],
    ids=lambda value: str(value),
)
def test_a_round_of_ppo(one_process, ranks, overrides, tmp_path):
    """Any number of ranks draws the same answers, scores them alike and takes the same steps."""
    expected, shared = one_process
    found = round_records(tmp_path / "run", ranks, *shared, *overrides)
    assert len(found) == len(expected) == 8
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("score", "kl", "value_loss", "loss", "held_out", "domains", "lr", "prompt_position", "tokens"):
            if key in theirs:
                assert_close(ours[key], theirs[key], f"step {theirs['step']}: {key}")


RM = [
    "stage=rm",
    "data=preferences",
    "data.weights.rm.docstrings=0",
    "data.weights.rm.conflicts=1",
    *SHAPE,
    "model.initializer_range=0.02",
    "engine.dtype=fp32",
    "engine.device=cpu",
    "engine.threads=1",
    "optim.eps=1e-6",
    "optim.lr=1e-3",
    "train.seq_len=64",
    "train.batch_tokens=512",
    "train.steps=12",
    "data.validation_fraction=0.005",
]


def train_rm(root: Path, ranks: int, *overrides: str) -> Path:
    root.mkdir()
    run_ranks(run_rank, ranks, [*RM, f"root={root}", *overrides], str(root), seconds=240)
    return next(root.glob("*/rm"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [(2, ["engine=zero3"]), (2, ["engine=zero1", "model.kv_heads=2", "engine.sequence_parallel=2"])],
    ids=lambda value: str(value),
)
def test_the_reward_model(ranks, overrides, policy, caches, tmp_path):  # noqa: F811
    """Pairs of uneven lengths, dealt to the ranks; the swap of conditions and the export come from the first."""
    shared = [f"init_from={policy}", f"data.cache_dir={caches}"]
    if "model.kv_heads=2" in overrides:
        shared = ["init_from=null", "data.tokenizer.kind=toy", "model.kv_heads=2", shared[1]]
    expected = read_records(train_rm(tmp_path / "one", 1, *shared) / "metrics.jsonl")
    stage = train_rm(tmp_path / "several", ranks, *shared, *overrides)
    found = read_records(stage / "metrics.jsonl")
    assert len(found) == len(expected) == 12
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=SPLITTING)
        assert ours["position"] == theirs["position"]
        # A rank without a pair of a step has a batch of one token.
        assert theirs["tokens"] <= ours["tokens"] <= theirs["tokens"] + theirs["step"]
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=1e-9)
    assert_close(found[-1]["validation"], expected[-1]["validation"])
    assert (stage / "reward.json").exists()
    assert list((stage / "export").glob("*.safetensors"))
