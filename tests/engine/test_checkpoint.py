"""Checkpoints: exact, elastic, complete or invisible."""

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_training import Model, cross_entropy, make_engine, make_rows, split

from internlm2.engine import checkpoint, checkpoint_format
from internlm2.engine.base import Fragment
from internlm2.engine.checkpoint import CheckpointWriter
from internlm2.engine.checkpoint_format import CheckpointError, list_checkpoints, pack_generator, unpack_generator
from internlm2.engine.checkpoint_reader import CheckpointReader, find_fault, find_newest, restore_newest

REPOSITORY = Path(__file__).resolve().parents[2]


def train(engine, steps: int) -> list[float]:
    """Data are a function of the step alone."""
    return [
        engine.train_step(split(make_rows(4, seed=step), 2), cross_entropy).loss
        for step in range(engine.step, engine.step + steps)
    ]


def snapshot(engine) -> dict[tuple[str, str], torch.Tensor]:
    return {(f.name, f.kind): f.view.clone() for f in engine.fragments()}


def steps_in(directory: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(directory)]


def save_steps(directory: Path, steps: list[int], **options) -> CheckpointWriter:
    engine = make_engine()
    writer = CheckpointWriter(directory, asynchronous=False, **options)
    for step in steps:
        train(engine, step - engine.step)
        writer.save(engine, {"position": step * 4})
    return writer


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_resume_is_bit_exact(tmp_path, dtype, asynchronous):
    straight = make_engine(dtype=dtype, spike_factor=3.0)
    losses = train(straight, 12)
    first = make_engine(dtype=dtype, spike_factor=3.0)
    writer = CheckpointWriter(tmp_path, asynchronous=asynchronous)
    train(first, 5)
    writer.save(first, {"position": 20, "stage": {"best": 1.25}})
    at_save = snapshot(first)
    train(first, 3)  # goes on while the thread writes, and is then lost
    writer.wait()

    again = make_engine(Model(seed=9), dtype=dtype, spike_factor=3.0)
    state, skipped = restore_newest(again, tmp_path)
    assert skipped == []
    assert (state["step"], state["position"], state["stage"]) == (5, 20, {"best": 1.25})
    assert again.state_dict()["adam_step"] == 5
    assert all(torch.equal(at_save[key], value) for key, value in snapshot(again).items())
    assert train(again, 7) == losses[5:]
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), straight.model.parameters(), strict=True))
    assert again.guard == straight.guard


def test_files_are_plain_safetensors_with_hashes(tmp_path):
    save_steps(tmp_path, [2])
    path = tmp_path / "step_00000002"
    assert sorted(entry.name for entry in path.iterdir()) == ["index.json", "rank00000.safetensors", "state.json"]
    tensors = load_file(path / "rank00000.safetensors")
    assert tensors["norm.weight|exp_avg|0"].shape == (12,)
    assert all(t.ndim == 1 and t.dtype == torch.float32 for t in tensors.values())
    index = json.loads((path / "index.json").read_text())
    assert index["parameters"]["tok_embeddings.weight"] == [29, 12]
    assert (index["format"], index["world_size"]) == (1, 1)
    digest = subprocess.run(["sha256sum", path / "rank00000.safetensors"], capture_output=True, text=True, check=True)
    assert index["files"]["rank00000.safetensors"]["sha256"] == digest.stdout.split()[0]
    engine = make_engine()
    restore_newest(engine, tmp_path)
    assert all(torch.equal(w, engine.model.get_parameter(name)) for name, w in CheckpointReader(path).weights())
    assert [name for name, _ in CheckpointReader(path).weights()] == list(engine.shapes())


@dataclass
class FakeRank:
    """One rank of an engine whose whole state is given; it owns what `cuts` says."""

    tensors: dict[str, torch.Tensor]
    owned: list[Fragment]
    step: int = 7
    saves: bool = True
    loaded: dict = field(default_factory=dict)

    def fragments(self, kinds=()):
        return iter(self.owned)

    def shapes(self):
        return {name.split("|")[0]: tuple(t.shape) for name, t in self.tensors.items()}

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state, after_rollback=False):
        self.loaded = state

    def fragments_changed(self):
        pass

    def reduce_sum(self, values):
        return list(values)


def partition(tensors: dict[str, torch.Tensor], ranks: int, cuts: list[list[float]]) -> list[FakeRank]:
    """Cut every flattened tensor at the shares `cuts[i]` and deal the pieces to the ranks in turn."""
    dealt: list[list[Fragment]] = [[] for _ in range(ranks)]
    number = 0
    for (key, tensor), shares in zip(tensors.items(), cuts, strict=True):
        name, kind = key.split("|")
        flat = tensor.view(-1)
        edges = sorted({0, flat.numel(), *(round(share * flat.numel()) for share in shares)})
        for low, high in pairwise(edges):
            dealt[number % ranks].append(Fragment(name, kind, low, tuple(tensor.shape), flat[low:high]))
            number += 1
    return [FakeRank(tensors, owned) for owned in dealt]


shapes = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=4)
shares = st.lists(st.floats(0, 1), max_size=5)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), shapes=shapes, writers=st.integers(1, 5), readers=st.integers(1, 5))
def test_any_partition_reads_back_on_any_other(tmp_path_factory, data, shapes, writers, readers):
    directory = tmp_path_factory.mktemp("elastic")
    generator = torch.Generator().manual_seed(len(shapes))
    keys = [f"layer.{i}.weight|{kind}" for i in range(len(shapes)) for kind in ("weight", "exp_avg", "exp_avg_sq")]
    tensors = {key: torch.randn(shapes[i // 3], generator=generator) for i, key in enumerate(keys)}
    draw = lambda: data.draw(st.lists(shares, min_size=len(keys), max_size=len(keys)))  # noqa: E731
    saving = [CheckpointWriter(directory, rank=rank, world_size=writers) for rank in range(writers)]
    for writer, rank in zip(saving, partition(tensors, writers, draw()), strict=True):
        writer.save(rank, {"position": 3})
    for writer in saving:
        writer.wait()

    path, skipped = find_newest(directory)
    assert path is not None
    assert skipped == []
    restored = {key: torch.full_like(tensor, torch.nan) for key, tensor in tensors.items()}
    for rank in partition(restored, readers, draw()):
        CheckpointReader(path).restore(rank)
        assert rank.loaded == {"step": 7}
    assert all(torch.equal(tensors[key], restored[key]) for key in keys)
    assert torch.equal(CheckpointReader(path).full("layer.0.weight"), tensors["layer.0.weight|weight"])


def test_nothing_is_published_before_every_rank_is_complete(tmp_path, monkeypatch):
    tensors = {"w|weight": torch.arange(10.0)}
    ranks = partition(tensors, 2, [[0.5]])
    gate = threading.Event()
    write = checkpoint.write_fragments

    def slow(path, content):
        if "rank00001" in path.name:
            gate.wait(10)
        return write(path, content)

    monkeypatch.setattr(checkpoint, "write_fragments", slow)
    writers = [CheckpointWriter(tmp_path, rank=rank, world_size=2) for rank in range(2)]
    for writer, rank in zip(writers, ranks, strict=True):
        writer.save(rank, {})
    writers[0]._thread.join(0.3)
    assert writers[0]._thread.is_alive()
    assert steps_in(tmp_path) == []
    gate.set()
    for writer in writers:
        writer.wait()
    assert steps_in(tmp_path) == [7]


def test_a_rank_that_cannot_write_fails_the_save_on_rank_0_at_once(tmp_path, monkeypatch):
    write = checkpoint.write_fragments

    def full(path, content):
        if "rank00001" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(checkpoint, "write_fragments", full)
    ranks = partition({"w|weight": torch.arange(10.0)}, 2, [[0.5]])
    writers = [CheckpointWriter(tmp_path, rank=rank, world_size=2) for rank in range(2)]
    for writer, rank in zip(writers, ranks, strict=True):
        writer.save(rank, {})
    with pytest.raises(CheckpointError, match=r"rank00001\.safetensors could not write"):
        writers[0].wait()
    with pytest.raises(CheckpointError, match=r"disk of .* is full"):
        writers[1].wait()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_never_writes_is_named(tmp_path):
    writer = CheckpointWriter(tmp_path, rank=0, world_size=2, timeout_seconds=0.1)
    writer.save(partition({"w|weight": torch.ones(4)}, 2, [[0.5]])[0], {})
    with pytest.raises(CheckpointError, match=r"1 of 2 ranks .*rank00001"):
        writer.wait()
    assert list(tmp_path.iterdir()) == []


def test_retention(tmp_path):
    writer = save_steps(tmp_path, [1, 2, 3, 4, 5, 6, 7], keep_last=2, keep_every=3)
    assert steps_in(tmp_path) == [3, 6, 7]
    writer.protected.add(7)
    engine = make_engine()
    for step in (8, 9, 10):
        engine.step = step
        writer.save(engine, {})
    assert steps_in(tmp_path) == [3, 6, 7, 9, 10]


def test_retention_does_not_count_later_steps_of_an_abandoned_attempt(tmp_path):
    """Resumed at 2 because 9 is damaged: with keep_last=1 the good new one must stay, not the damaged later one."""
    save_steps(tmp_path, [2, 9])
    (tmp_path / "step_00000009" / "rank00000.safetensors").write_bytes(b"x")
    save_steps(tmp_path, [3], keep_last=1)
    path, skipped = find_newest(tmp_path)
    assert path == tmp_path / "step_00000003"
    assert len(skipped) == 1
    assert "step_00000009: rank00000.safetensors is truncated: 1 of" in skipped[0]


def test_a_step_can_be_saved_again(tmp_path):
    save_steps(tmp_path, [2])
    (tmp_path / "step_00000002" / "state.json").write_text("{}")
    save_steps(tmp_path, [2])
    assert find_fault(tmp_path / "step_00000002") is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000002"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    save_steps(tmp_path, [2])
    os.rename(tmp_path / "step_00000002", tmp_path / ".step_00000002.replaced")
    (tmp_path / ".step_00000003.partial1").mkdir()
    CheckpointWriter(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("kind", ["weight", "exp_avg_sq"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_state_that_is_not_finite_is_never_saved(tmp_path, kind, value):
    save_steps(tmp_path, [2], keep_last=1)
    engine = make_engine()
    engine.step = 3
    next(f for f in engine.fragments([kind]) if f.name == "output.weight").view[5] = value
    with pytest.raises(CheckpointError, match=rf"Step 3 was not saved: {kind} of output.weight is not finite"):
        CheckpointWriter(tmp_path, keep_last=1).save(engine, {})
    assert find_newest(tmp_path) == (tmp_path / "step_00000002", [])


def test_large_but_finite_state_is_saved(tmp_path):
    engine = make_engine()
    next(engine.fragments(["weight"])).view[:5] = 3e38  # its norm overflows fp32
    CheckpointWriter(tmp_path, asynchronous=False).save(engine, {})
    assert steps_in(tmp_path) == [0]


def test_disk_full_in_the_thread(tmp_path, monkeypatch):
    """Writes go to /dev/full, which answers as a full disk does."""
    save_steps(tmp_path, [2])
    before = {file: file.read_bytes() for file in (tmp_path / "step_00000002").iterdir()}
    engine = make_engine()
    engine.step = 3
    writer = CheckpointWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_format, "open", lambda path, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
        writer.save(engine, {})
        writer._thread.join()
    with pytest.raises(CheckpointError, match=r"Step 3 was not saved: the disk of .* is full .*checkpoint\.keep_last"):
        writer.save(engine, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000002"]
    assert before == {file: file.read_bytes() for file in (tmp_path / "step_00000002").iterdir()}
    writer.save(engine, {})  # the disk has space again
    writer.wait()
    assert steps_in(tmp_path) == [2, 3]


def test_disk_really_full(tmp_path):
    """A tmpfs of 64 KiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        engine = make_engine()
        writer = CheckpointWriter(disk, keep_last=5, asynchronous=False)

        def save_until_full():
            while engine.step < 20:
                engine.step += 1
                writer.save(engine, {})

        with pytest.raises(CheckpointError, match="is full"):
            save_until_full()
        assert engine.step > 1
        assert steps_in(disk) == list(range(1, engine.step))
        assert not list(disk.glob(".*"))
        assert find_newest(disk) == (disk / f"step_{engine.step - 1:08d}", [])
    finally:
        subprocess.run(["umount", disk], check=True)


def damage_flip(path: Path) -> str:
    file = path / "rank00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    return "rank00000.safetensors is corrupted"


def damage_truncate(path: Path) -> str:
    file = path / "rank00000.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    return "rank00000.safetensors is truncated"


def damage_longer(path: Path) -> str:
    with open(path / "state.json", "a") as file:
        file.write(" ")
    return "state.json is too long"


def damage_missing(path: Path) -> str:
    (path / "rank00000.safetensors").unlink()
    return "rank00000.safetensors is missing"


def damage_index(path: Path) -> str:
    os.truncate(path / "index.json", 40)
    return "index.json is corrupted"


def damage_no_index(path: Path) -> str:
    (path / "index.json").unlink()
    return "it is incomplete: no index.json"


def damage_format(path: Path) -> str:
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(index | {"format": 2}))
    return "its format is 2, this version reads 1"


DAMAGE = [damage_flip, damage_truncate, damage_longer, damage_missing, damage_index, damage_no_index, damage_format]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_named_and_the_one_before_is_taken(tmp_path, damage):
    save_steps(tmp_path, [2, 4])
    reason = damage(tmp_path / "step_00000004")
    engine = make_engine()
    state, skipped = restore_newest(engine, tmp_path)
    assert state["step"] == engine.step == 2
    assert len(skipped) == 1
    assert reason in skipped[0]
    assert str(tmp_path / "step_00000004") in skipped[0]


class Ranks:
    """reduce_sum over threads: each call waits for every rank, as a collective does."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.given = count, threading.Barrier(count, timeout=10), {}

    def sum_for(self, rank: int):
        def reduce_sum(values):
            self.given[rank] = list(values)
            self.barrier.wait()
            total = [sum(column) for column in zip(*self.given.values(), strict=True)]
            self.barrier.wait()
            return total

        return reduce_sum

    def run(self, work) -> list:
        with ThreadPoolExecutor(self.count) as pool:
            return [f.result() for f in [pool.submit(work, rank, self.sum_for(rank)) for rank in range(self.count)]]


def test_ranks_share_the_hashing_and_agree(tmp_path):
    save_steps(tmp_path, [2, 4])
    damage_flip(tmp_path / "step_00000004")
    found = Ranks(3).run(lambda rank, total: find_newest(tmp_path, rank=rank, world_size=3, reduce_sum=total))
    assert [path for path, _ in found] == [tmp_path / "step_00000002"] * 3
    reasons = [skipped[0].split(": ", 1)[1] for _, skipped in found]
    assert sorted(reasons) == ["another rank found a fault."] * 2 + [
        "rank00000.safetensors is corrupted: its SHA-256 is not the one in index.json."
    ]


def test_ranks_agree_where_one_sees_an_older_directory(tmp_path):
    """A network file system may show rank 1 less than rank 0: nobody takes what one of them does not see."""
    save_steps(tmp_path / "new", [2, 4])
    save_steps(tmp_path / "old", [2])
    folders = [tmp_path / "new", tmp_path / "old"]
    found = Ranks(2).run(lambda rank, total: find_newest(folders[rank], rank=rank, world_size=2, reduce_sum=total))
    assert [path.name for path, _ in found] == ["step_00000002"] * 2
    assert (
        Ranks(2).run(lambda rank, total: find_newest(tmp_path, rank=rank, world_size=2, reduce_sum=total))
        == [(None, [])] * 2
    )


def test_nothing_to_restore_leaves_the_engine_alone(tmp_path):
    engine = make_engine()
    before = snapshot(engine)
    assert restore_newest(engine, tmp_path / "nowhere") == (None, [])
    assert all(torch.equal(before[key], value) for key, value in snapshot(engine).items())


def test_another_vocabulary_or_model_is_one_sentence(tmp_path):
    save_steps(tmp_path, [2])
    engine = make_engine(Model(vocabulary=31))
    before = snapshot(engine)
    with pytest.raises(
        CheckpointError, match=r"tok_embeddings\.weight with shape \[29, 12\] but this model has \[31, 12\]"
    ):
        restore_newest(engine, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in snapshot(engine).items())
    reader = CheckpointReader(tmp_path / "step_00000002")
    with pytest.raises(CheckpointError, match=r"has no tensor extra\.weight"):
        reader.check_shapes(reader.shapes | {"extra.weight": (3,)})
    with pytest.raises(CheckpointError, match=r"holds norm\.weight, which this model does not train"):
        reader.check_shapes({name: shape for name, shape in reader.shapes.items() if name != "norm.weight"})
    with pytest.raises(CheckpointError, match=r"no complete checkpoint"):
        CheckpointReader(tmp_path / "elsewhere")


def test_a_gap_between_fragments_is_found(tmp_path):
    tensors = {"w|weight": torch.arange(10.0)}
    rank = partition(tensors, 1, [[0.5]])[0]
    rank.owned = rank.owned[:1]
    CheckpointWriter(tmp_path, asynchronous=False).save(rank, {})
    with pytest.raises(CheckpointError, match=r"holds 5 of the 10 elements of w \(weight\)"):
        CheckpointReader(tmp_path / "step_00000007").full("w")


def test_state_must_be_json(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        CheckpointWriter(tmp_path).save(make_engine(), {"best": float("nan")})
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        CheckpointWriter(tmp_path).save(make_engine(), {"path": Path("x")})
    assert list(tmp_path.iterdir()) == []


def test_generators_survive_as_text():
    generator = torch.Generator().manual_seed(5)
    torch.rand(13, generator=generator)
    text = json.loads(json.dumps(pack_generator(generator)))
    expected = torch.rand(9, generator=generator)
    other = torch.Generator()
    unpack_generator(text, other)
    assert torch.equal(torch.rand(9, generator=other), expected)


@pytest.mark.parametrize("rounds", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_leaves_a_loadable_newest(tmp_path, rounds):
    script = Path(__file__).with_name("kill_while_saving.py")
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{script.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "checkpoints"), str(rounds), "11"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    records = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(records) == rounds
    assert any(record["debris"] for record in records), "no kill came in the middle of a save: the test shows nothing"
    for record in records:
        assert record["right"], record
        assert record["left"] == 0
        if record["saved"]:
            assert record["found"] is not None
            assert record["found"] >= max(record["saved"]), "a published checkpoint was lost"
