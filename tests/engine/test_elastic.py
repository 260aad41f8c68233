"""A checkpoint belongs to no number of ranks and no ZeRO stage: saved on some, loaded on others, nothing is lost."""

import json
from pathlib import Path

import pytest
import torch
from rank_training import ROWS, SPLITTING, start, train

from internlm2.engine.base import KINDS
from internlm2.engine.checkpoint import CheckpointWriter
from internlm2.engine.checkpoint_format import CheckpointError, step_directory
from internlm2.engine.checkpoint_reader import CheckpointReader, restore_newest
from tests.ranks import run_ranks


def leg(name: str, directory: str, steps: int, seed: int = 0, rows: int = ROWS, asynchronous: bool = True, **changes):
    """Go on from the newest checkpoint, save at once what was loaded (below `directory`/copies), train and save."""
    engine = start(name, seed, **changes)
    state, skipped = restore_newest(engine, Path(directory))
    assert skipped == []
    if state is not None:
        assert state["position"] == engine.step * rows
        copies = CheckpointWriter(Path(directory) / "copies", rank=engine.rank, world_size=engine.world_size)
        copies.save(engine, {"position": state["position"]})
        copies.wait()
    writer = CheckpointWriter(
        Path(directory), rank=engine.rank, world_size=engine.world_size, keep_last=9, asynchronous=asynchronous
    )
    engine.reduce_sum([0.0])  # the first rank's writer has cleared the directory before any rank saves
    records = train(engine, steps, rows)
    writer.save(engine, {"position": engine.step * rows})
    writer.wait()
    return records


def leg_with(name, directory, steps, changes):
    return leg(name, directory, steps, **changes)


def assert_same_state(one: Path, other: Path) -> None:
    """Weights and moments bit for bit, and everything else that a run goes on from."""
    first, second = CheckpointReader(one), CheckpointReader(other)
    assert first.shapes == second.shapes
    for name in first.shapes:
        for kind in KINDS:
            assert torch.equal(first.full(name, kind), second.full(name, kind)), (name, kind)
    assert first.state["engine"] == second.state["engine"]
    assert first.state["position"] == second.state["position"]


def walk(directory: Path, legs: list) -> list[list[float]]:
    """The records of legs (name, ranks, steps, changes), each in ranks of its own, loading what the last one saved."""
    records: list[list[float]] = []
    for name, ranks, steps, changes in legs:
        done = len(records)
        records += run_ranks(leg_with, ranks, name, str(directory), steps, {"seed": done, **changes})[0]
        if done:
            assert_same_state(step_directory(directory, done), step_directory(directory / "copies", done))
    return records


def assert_same_curve(records: list, expected: list) -> None:
    for ours, theirs in zip(records, expected, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=SPLITTING)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
        assert ours[2:4] == theirs[2:4]


def test_four_ranks_zero3_to_two_zero1_to_one_single_to_three_zero2(tmp_path):
    expected = train(start("single"), 20)
    legs = [("zero3", 4, 5, {}), ("zero1", 2, 5, {}), ("single", 1, 5, {}), ("zero2", 3, 5, {})]
    assert_same_curve(walk(tmp_path, legs), expected)
    index = json.loads((step_directory(tmp_path, 5) / "index.json").read_text())
    assert [name for name in sorted(index["files"]) if name.startswith("rank")] == [
        f"rank{rank:05d}.safetensors" for rank in range(4)
    ]


@pytest.mark.slow
def test_bf16_offload_and_hierarchical_sharding_share_the_format(tmp_path):
    """In bf16 the fp32 masters are what is kept: a run that changes engines is the run that does not, bit for bit."""
    bf16 = {"dtype": "bf16"}
    expected = train(start("single", **bf16), 12)
    legs = [("zero1", 1, 4, bf16), ("zero3", 1, 4, {**bf16, "offload": "optimizer"}), ("single", 1, 4, bf16)]
    walked = walk(tmp_path / "one", legs)
    assert [record[0] for record in walked] == [record[0] for record in expected]
    groups = [
        ("zero1", 4, 4, {**bf16, "shard_group": 2}),
        ("zero3", 4, 4, {**bf16, "shard_group": 2}),
        ("zero2", 4, 4, {**bf16, "shard_group": 2, "offload": "optimizer"}),
    ]
    for ours, theirs in zip(walk(tmp_path / "groups", groups), expected, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-2)
    index = json.loads((step_directory(tmp_path / "groups", 4) / "index.json").read_text())
    sizes = {name: entry["bytes"] for name, entry in index["files"].items() if name.startswith("rank")}
    assert sizes["rank00002.safetensors"] < 100 < sizes["rank00001.safetensors"]  # a copy of the shards is not saved


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_resume_on_the_same_ranks_is_bit_exact(name, tmp_path):
    straight = run_ranks(leg, 2, name, str(tmp_path / "straight"), 6)
    legs = [(name, 2, 3, {"asynchronous": False}), (name, 2, 3, {})]
    assert walk(tmp_path / "broken", legs) == straight[0]
    assert_same_state(step_directory(tmp_path / "straight", 6), step_directory(tmp_path / "broken", 6))


@pytest.mark.slow
def test_sixty_four_ranks_to_sixteen(tmp_path):
    """64 real ranks, many of them with pieces of a parameter or none, and more ranks than some parameters' elements."""
    expected = train(start("single"), 6, rows=64)
    assert_same_curve(walk(tmp_path, [("zero1", 64, 3, {"rows": 64}), ("zero3", 16, 3, {"rows": 64})]), expected)
    index = json.loads((step_directory(tmp_path, 3) / "index.json").read_text())
    assert index["world_size"] == 64


def lopsided(directory: str):
    """Rank 1 cannot write. The failed save is told to all at the next one, and the one after works."""
    import errno

    from internlm2.engine import checkpoint

    engine = start("zero2")
    writer = CheckpointWriter(Path(directory), rank=engine.rank, world_size=engine.world_size)
    engine.reduce_sum([0.0])
    train(engine, 1)
    write, full = checkpoint.write_fragments, engine.rank == 1
    if full:

        def fail(path, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        checkpoint.write_fragments = fail
    writer.save(engine, {"position": 1})
    train(engine, 1)
    told = ""
    try:
        writer.save(engine, {"position": 2})
    except checkpoint.CheckpointError as error:
        told = str(error)
    checkpoint.write_fragments = write
    writer.save(engine, {"position": 2})
    writer.wait()
    return told


def test_a_full_disk_under_one_rank_fails_the_save_on_all(tmp_path):
    first, second = run_ranks(lopsided, 2, str(tmp_path))
    assert "the rank of rank00001.safetensors could not write its part" in first
    assert "is full" in second
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["step_00000002"]


def spoilt(directory: str):
    """Rank 1 owns a weight that is not a number: neither rank saves, and what was saved before stays."""
    engine = start("zero1")
    writer = CheckpointWriter(Path(directory), rank=engine.rank, world_size=engine.world_size, keep_last=1)
    engine.reduce_sum([0.0])
    train(engine, 1)
    writer.save(engine, {"position": 1})
    train(engine, 1)
    if engine.rank == 1:
        next(iter(engine.fragments(("exp_avg_sq",)))).view[3] = float("nan")
    try:
        writer.save(engine, {"position": 2})
    except CheckpointError as error:
        return str(error)
    return ""


def test_weights_that_are_no_numbers_on_one_rank_are_saved_by_none(tmp_path):
    first, second = run_ranks(spoilt, 2, str(tmp_path))
    assert "a tensor of another rank is not finite" in first
    assert "exp_avg_sq of" in second
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]
