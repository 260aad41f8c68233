"""One training step of a few ranks of a large job, on shapes, and the shares of all its ranks.

python train.py stage=pretrain_4k model=20b engine=zero1 engine.recompute=full cluster.gpus=1024 dry_run=true
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any, TextIO

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from internlm2.config import Config, ConfigError
from internlm2.config.precision import settled_dtype
from internlm2.config.zero import check_ranks
from internlm2.data.batch import PackedBatch
from internlm2.dry_run.hollow import as_rank, hollow
from internlm2.dry_run.shares import Piece, check_cover, check_rows, flat_pieces, sharded_pieces
from internlm2.engine.base import Engine
from internlm2.engine.build import build_engine
from internlm2.model.transformer import CausalLM
from internlm2.plan.memory import Memory
from internlm2.plan.plan import plan_stage
from internlm2.run.ranks import Ranks
from internlm2.stages.pretrain import token_loss

GIB = 2**30


@dataclass(frozen=True)
class Rehearsed:
    """What one rank did: the pieces of parameters that it owns, bytes at rest and at the peak of a step."""

    rank: int
    pieces: list[Piece]
    shapes: dict[str, tuple[int, ...]]
    order: list[list[str]]  # names in DeepSpeed's groups, in its order; empty for ZeRO 3
    resting: int
    peak: int
    seconds: float


def dry_run(configs: Sequence[Config], out: TextIO | None = None) -> None:
    """Rehearse each supervised stage as a job of `cluster.gpus` ranks. Raises ConfigError where something is off."""
    stream = sys.stdout if out is None else out
    for config in configs:
        if config.stage.kind == "ppo":
            raise ConfigError("dry_run=true rehearses supervised stages; for stage=ppo use plan=true.")
        print("\n".join(rehearse(config)), file=stream)


def rehearse(config: Config) -> list[str]:
    """One stage; returns what to print."""
    config.engine.dtype = settled_dtype(config.engine.dtype, "cuda")  # whatever this machine has
    ranks, train = config.cluster.gpus, config.train
    check_ranks(config, ranks)
    groups = ranks // config.engine.sequence_parallel
    for step in (0, 1, train.total_steps - 1):
        check_rows(step * train.rows_per_step, train.rows_per_step, groups)
    rehearsed = rehearse_ranks(config, sample(ranks))
    owned = all_pieces(config, rehearsed[0])
    for one in rehearsed:
        if sorted(one.pieces) != sorted(owned[one.rank % len(owned)]):
            raise ConfigError(f"rank {one.rank}: its engine owns other pieces than the sharding of all ranks says.")
    check_cover(owned, rehearsed[0].shapes)
    planned = plan_stage(config).configured
    return describe(config, rehearsed, owned, None if planned is None else planned.memory)


def sample(ranks: int) -> list[int]:
    """The ranks that take a step: the first and the last. Sharding makes the others lie between them."""
    return sorted({0, ranks - 1})


def rehearse_ranks(config: Config, ranks: Sequence[int]) -> list[Rehearsed]:
    """Each rank in a process of its own, forked from this one: DeepSpeed keeps groups for the life of a process."""
    if config.engine.name != "single":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        for module in ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"):
            importlib.import_module(module)  # once for all, and the latter before tensors lose their contents
    gc.collect()
    gc.freeze()  # what is imported by now: DeepSpeed collects often, and would walk through all of it each time
    context = multiprocessing.get_context("fork")
    with context.Pool(min(len(ranks), os.cpu_count() or 1), maxtasksperchild=1) as pool:
        return pool.starmap(rehearse_rank, [(config, rank) for rank in ranks], chunksize=1)


def rehearse_rank(config: Config, rank: int) -> Rehearsed:
    """Build the engine as `rank` of the job and take one step."""
    started, ranks = time.perf_counter(), config.cluster.gpus
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(as_rank(rank, ranks, config.cluster.gpus_per_node))
        loaded(config, place)
        mode = stack.enter_context(hollow())
        engine = build(config)
        for micro_batches in (1, passes(config)):  # the second finds the optimizer's state and buffers in place
            gc.collect()  # cycles would hold what the step before has left
            resting = mode.live
            mode.reset_peak()
            engine.train_step([batch(config)] * micro_batches, token_loss)
        pieces = [Piece(f.name, f.offset, f.view.numel()) for f in engine.fragments(("weight",))]
        return Rehearsed(
            rank, pieces, engine.shapes(), group_order(engine), resting, mode.peak, time.perf_counter() - started
        )


def loaded(config: Config, place: Ranks) -> None:
    """Join DeepSpeed to the ranks before tensors lose their contents."""
    if config.engine.name == "single":
        return
    from internlm2.engine.deepspeed_settings import import_deepspeed

    import_deepspeed(torch.device("cpu"), place)


def build(config: Config) -> Engine:
    """The stage's model and engine, with the operator that a GPU's attention looks like from outside."""
    engine = deepcopy(config.engine)
    engine.device = "cpu"
    model = CausalLM(config.model, attention="native", recompute=engine.recompute)
    return build_engine(model, engine, config.optim, config.train.total_steps)


def passes(config: Config) -> int:
    """Micro-batches of a rank's step; more than two would repeat the second."""
    groups = config.cluster.gpus // config.engine.sequence_parallel
    rows = -(-config.train.rows_per_step // groups)
    return min(2, -(-rows // config.train.micro_batch))


def batch(config: Config) -> PackedBatch:
    """Full rows without contents; where they begin is real."""
    rows, length = config.train.micro_batch, config.train.seq_len
    ids = torch.zeros(rows * length, dtype=torch.int64)
    with unset_fake_temporarily():
        bounds = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
        each = torch.zeros(rows, dtype=torch.int32)
    made = HollowBatch(ids, ids.clone(), bounds, length, each, each.long())
    made.__dict__["loss_tokens"] = rows * length
    return made


class HollowBatch(PackedBatch):
    """A batch that is on the device already: its bounds stay on the host."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "HollowBatch":
        return self


def group_order(engine: Any) -> list[list[str]]:
    """Names in the order in which DeepSpeed lays parameters out for ZeRO 1 and 2."""
    partitions = getattr(engine, "_partitions", None)
    if partitions is None or partitions.stage == 3:
        return []
    optimizer = partitions.optimizer
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    return [[partitions.names[id(parameter)] for parameter in group] for group in groups]


def all_pieces(config: Config, one: Rehearsed) -> list[list[Piece]]:
    """The pieces of every rank of a sharding group, by arithmetic."""
    group = config.engine.zero.shard_group or config.cluster.gpus
    if config.engine.name == "single":
        return [[Piece(name, 0, prod(shape)) for name, shape in one.shapes.items()]]
    if config.engine.name == "zero3":
        return sharded_pieces(one.shapes, config.cluster.gpus)
    sizes = [{name: prod(one.shapes[name]) for name in names} for names in one.order]
    return flat_pieces(sizes, group, alignment(config))


def alignment(config: Config) -> int:
    """Elements to which DeepSpeed rounds a partition, so that NCCL's messages start at 4 bytes."""
    return 2


def describe(
    config: Config, rehearsed: Sequence[Rehearsed], owned: Sequence[Sequence[Piece]], planned: Memory | None
) -> list[str]:
    """What was found, as text."""
    ranks = config.cluster.gpus
    sizes = [sum(piece.length for piece in pieces) for pieces in owned]
    rows = config.train.rows_per_step
    lines = [
        f"{config.stage.name}: {config.model.name}, engine={config.engine.name}, {ranks:,} ranks, on shapes alone",
        f"  rows      {rows:,} a step, each on one of {ranks // config.engine.sequence_parallel:,} groups of ranks",
        f"  sharding  {len(rehearsed[0].shapes):,} parameters in {sum(map(len, owned)):,} pieces on {len(owned):,} "
        f"ranks ({min(sizes):,} to {max(sizes):,} elements each): every element once, no hole in a checkpoint's index",
    ]
    for one in rehearsed:
        lines.append(
            f"  rank {one.rank:<5} {one.resting / GIB:.2f} GiB at rest, {one.peak / GIB:.2f} GiB at the peak of a step "
            f"({one.seconds:.0f} s)"
        )
    if planned is not None:
        peak = max(one.peak for one in rehearsed)
        lines.append(
            f"  plan      {planned.allocated / GIB:.2f} GiB of tensors at the peak "
            f"({planned.allocated / peak - 1:+.1%}), {planned.total / GIB:.2f} with context and fragmentation"
        )
    return lines
