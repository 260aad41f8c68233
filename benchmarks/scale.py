"""What many ranks cost: ZeRO on one rank against single, saving in a thread, resuming, more ranks.

    python benchmarks/scale.py [--model tiny] [--seq-len 256] [--steps 6] [--rounds 4] [--ranks 1 2 4 8] [--json FILE]

Ranks are processes forked on this machine and joined by gloo, one thread each, so their number beyond the cores costs
what the cores cannot give: the last table counts processor seconds of all ranks for the same work, which more ranks
should not raise. Overhead is the ratio of interleaved rounds in one process. Save stall: seconds for which training
waits in `CheckpointWriter.save`, against a step. Resume: from the start of restoring to the end of it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from optimizer import OPTIM

from internlm2.config import EngineConfig, ModelConfig
from internlm2.config.compose import load_group
from internlm2.config.zero import ZeroConfig
from internlm2.data.batch import PackedBatch
from internlm2.engine.base import Engine, LossSum
from internlm2.engine.build import build_engine
from internlm2.engine.checkpoint import CheckpointWriter
from internlm2.engine.checkpoint_reader import restore_newest
from internlm2.model.transformer import CausalLM
from internlm2.run.ranks import Ranks

ROWS = 8  # of a step, over all ranks


def engine_of(name: str, model: ModelConfig, dtype: str) -> Engine:
    """An engine around random weights; schedule and guard do not matter here."""
    zero = ZeroConfig("none", None, False, "fp32", 500_000_000, 500_000_000, 1_000_000_000, 100_000)
    settings = EngineConfig(
        name=name,
        device="cpu",
        dtype=dtype,
        attention="auto",
        recompute="none",
        threads=1,
        on_nonfinite="stop",
        spike_factor=None,
        max_bad_steps=1,
        sequence_parallel=1,
        collective_seconds=600.0,
        hang_seconds=None,
        straggler_factor=1.5,
        zero=zero,
    )
    return build_engine(CausalLM.from_config(model, seed=0), settings, OPTIM, 10_000)


def token_loss(model: torch.nn.Module, batch: PackedBatch) -> LossSum:
    return LossSum(model(batch.ids, batch.cu_seqlens, batch.max_seqlen, batch.labels), batch.loss_tokens)


def rows_of(engine: Engine, model: ModelConfig, seq_len: int, step: int) -> list[PackedBatch]:
    """This rank's rows of a step: random tokens."""
    rows = []
    for row in range(engine.data_rank, ROWS, engine.data_ranks):
        draw = torch.Generator().manual_seed(1000 * step + row)
        ids = torch.randint(0, model.vocab_size, (seq_len,), generator=draw)
        bounds, zeros = torch.tensor([0, seq_len], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        rows.append(PackedBatch(ids, ids.roll(-1), bounds, seq_len, zeros, zeros.long()))
    return rows


def timed(engine: Engine, model: ModelConfig, seq_len: int, steps: int) -> tuple[float, float]:
    """(wall, processor) seconds of a step of this rank."""
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(steps):
        engine.train_step(rows_of(engine, model, seq_len, step), token_loss)
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def overhead(model: ModelConfig, seq_len: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, single and ZeRO on one rank, interleaved; medians of processor time."""
    engines = {name: engine_of(name, model, "bf16") for name in ("single", "zero1", "zero2", "zero3")}
    found: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            seconds = timed(engine, model, seq_len, steps)[1]
            if number:  # the first round pays for what is made once
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def saving(model: ModelConfig, seq_len: int, steps: int, name: str) -> dict[str, Any]:
    """Seconds of a step, of a save in a thread and of one that is waited for, and of resuming."""
    engine = engine_of(name, model, "bf16")
    found: dict[str, Any] = {"step": timed(engine, model, seq_len, steps)[0]}
    ranks = {"rank": engine.rank, "world_size": engine.world_size}
    folder = [tempfile.mkdtemp(prefix="scale-")] if engine.rank == 0 else [""]
    if dist.is_initialized():
        dist.broadcast_object_list(folder)
    for way in ("async", "sync"):
        writer = CheckpointWriter(Path(folder[0]) / way, asynchronous=way == "async", **ranks)
        engine.reduce_sum([0.0])
        stalls = []
        for _ in range(3):
            started = time.perf_counter()
            writer.save(engine, {"position": 0})
            stalls.append(time.perf_counter() - started)
            found[f"step while saving {way}"] = timed(engine, model, seq_len, steps)[0]
        writer.wait()
        found[f"save stall {way}"] = statistics.median(stalls)
    started = time.perf_counter()
    restore_newest(engine, Path(folder[0]) / "sync")
    found["resume"] = time.perf_counter() - started
    found["megabytes"] = sum(f.view.numel() * 4 for f in engine.fragments()) * engine.world_size / 1e6
    return found


def scaling(model: ModelConfig, seq_len: int, steps: int, name: str) -> dict[str, Any]:
    """Wall seconds of a step, and processor seconds of all ranks together."""
    engine = engine_of(name, model, "bf16")
    timed(engine, model, seq_len, 1)
    wall, cpu = timed(engine, model, seq_len, steps)
    return {"wall": wall, "processor": engine.reduce_sum([cpu])[0]}


def on_ranks(function: Callable[..., dict[str, Any]], count: int, *arguments: Any) -> dict[str, Any]:
    """`function` on each of `count` forked ranks; what the first returned."""
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                os.environ.update(Ranks(rank, count, rank, count).environment())
                store = f"file://{folder}/rendezvous"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
                result = function(*arguments)
                if rank == 0:
                    (folder / "result.json").write_text(json.dumps(result))
                dist.barrier()
                code = 0
            except BaseException:
                traceback.print_exc()  # the process ends before Python would
            finally:
                os._exit(code)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise RuntimeError(f"{function.__name__} on {count} ranks failed: see the message above.")
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", dest="json_file", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch._dynamo  # noqa: F401  both would otherwise be imported by every rank

    model = load_group(ModelConfig, f"model/{given.model}")
    size = (model, given.seq_len, given.steps)
    setting = f"{given.model}, {ROWS} rows of {given.seq_len}, bf16, CPU"
    records = []

    def note(work: str, rival: str, ours: float, theirs: float, unit: str, ranks: int) -> None:
        ratio = theirs / ours if ours else float("inf")
        print(f"{work:44} {ours:9.4f} {unit:4} {rival:28} {theirs:9.4f}   ratio {ratio:6.2f}")
        record = {"work": work, "rival": rival, "ours": ours, "theirs": theirs, "unit": unit, "ratio": ratio}
        records.append(record | {"threads": ranks, "setting": setting})

    seconds = on_ranks(overhead, 1, *size, given.rounds)
    for name in ("zero1", "zero2", "zero3"):
        note(f"a step, {name} on one rank", "single", seconds[name], seconds["single"], "s", 1)
    for name, ranks in (("single", 1), ("zero1", 2)):
        found = on_ranks(saving, ranks, *size, name)
        what = f"save stall, {name} on {ranks} rank{'s' * (ranks > 1)}, in a thread"
        note(what, "waited for", found["save stall async"], found["save stall sync"], "s", ranks)
        note(f"resume, {name}, {found['megabytes']:.0f} MB", "a step", found["resume"], found["step"], "s", ranks)
    for name in ("zero1", "zero3"):
        first = None
        for ranks in given.ranks:
            found = on_ranks(scaling, ranks, *size, name)
            first = first or found
            note(
                f"processor time of a step, {name} on {ranks} rank{'s' * (ranks > 1)}",
                f"on {given.ranks[0]}",
                found["processor"],
                first["processor"],
                "s",
                ranks,
            )
    if given.json_file is not None:
        given.json_file.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
