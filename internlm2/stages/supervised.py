"""The loop of the supervised stages: data -> loss -> step -> log -> save. A stage builds a `Job`; `train` runs it."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from rich.console import Console

from internlm2.config import Config, ConfigError, TrainConfig
from internlm2.engine.base import Batch, Engine, LossFunction, StepResult
from internlm2.engine.checkpoint import CheckpointWriter
from internlm2.engine.checkpoint_format import CheckpointError, list_checkpoints
from internlm2.engine.checkpoint_reader import restore_newest
from internlm2.run.console import StepProgress, step_line
from internlm2.run.directory import RunDirectory
from internlm2.run.heartbeat import Heartbeat
from internlm2.run.metrics import Metrics
from internlm2.run.signals import StopSignals
from internlm2.run.stragglers import Stragglers
from internlm2.run.throughput import Throughput, causal_pairs

log = logging.getLogger(__name__)


class SequenceBatch(Batch, Protocol):
    """A micro-batch of packed sequences."""

    @property
    def cu_seqlens(self) -> torch.Tensor: ...  # [n + 1] int32
    @property
    def sources(self) -> torch.Tensor: ...  # [n] int32: index into the stream's `source_names`


class Stream(Protocol):
    """Training data as a function of a position, of which a checkpoint keeps no more than that."""

    source_names: list[str]

    def micro_batches(
        self, position: int, train: TrainConfig, rank: int, world_size: int
    ) -> Sequence[SequenceBatch]: ...

    def next_position(self, position: int, train: TrainConfig) -> int: ...

    def state(self, position: int) -> dict[str, Any]: ...

    def check_fingerprint(self, saved: Mapping[str, Any], on_change: str = "refuse") -> list[str]: ...


def loss_tokens(result: StepResult) -> dict[str, Any]:
    """What a step of a language model records beside its loss."""
    return {"loss_tokens": result.loss_tokens}


@dataclass
class Job:
    """What a stage hands to the loop. `position` counts what training has consumed, over all ranks: rows, or batches
    of pairs.
    """

    config: Config
    run: RunDirectory
    engine: Engine
    stream: Stream
    loss: LossFunction
    validate: Callable[[], dict[str, Any]]
    throughput: Throughput
    metrics: Metrics
    measures: Callable[[StepResult], dict[str, Any]] = loss_tokens
    position: int = 0
    tokens: int = 0
    best: dict[str, Any] | None = None  # step and loss of the lowest validation, where the config keeps it
    writer: CheckpointWriter = field(init=False)
    stragglers: Stragglers = field(init=False)

    def __post_init__(self) -> None:
        checkpoint = self.config.checkpoint
        self.stragglers = Stragglers(self.config.engine.straggler_factor)
        self.writer = CheckpointWriter(
            self.run.checkpoints,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            keep_last=checkpoint.keep_last,
            keep_every=checkpoint.keep_every,
            asynchronous=checkpoint.asynchronous,
        )

    def batches(self) -> Sequence[SequenceBatch]:
        """This rank's micro-batches of the step at `position`."""
        engine = self.engine
        return self.stream.micro_batches(self.position, self.config.train, engine.data_rank, engine.data_ranks)

    def is_best(self, measured: dict[str, Any]) -> bool:
        """Is this validation the best so far, and to be kept? Its checkpoint then outlives all later ones."""
        if not self.config.checkpoint.keep_best:
            return False
        loss = validation_loss(measured)
        if self.best is not None and not loss < self.best["loss"]:
            return False
        self.keep({"step": self.engine.step, "loss": loss})
        return True

    def keep(self, best: dict[str, Any] | None) -> None:
        """The best validation so far, as just found or as a checkpoint says."""
        self.best = best
        self.writer.protected = set() if best is None else {best["step"]}

    def save(self) -> None:
        state = {"tokens": self.tokens, "data": self.stream.state(self.position)}
        self.writer.save(self.engine, state | ({} if self.best is None else {"best": self.best}))


def train(job: Job, console: Console) -> StopSignals:
    """Train to the last step or a signal; either way the step is saved. Raises TrainingStopped, CheckpointError."""
    engine, config, total = job.engine, job.config, job.config.train.total_steps
    alive = Heartbeat(job.run.path, engine.rank, engine.world_size, config.engine.hang_seconds)
    with StopSignals() as stop, alive, StepProgress(console, config.stage.name, total, engine.step) as progress:
        while engine.step < total:
            started = time.perf_counter()
            batches = job.batches()
            result = engine.train_step(batches, job.loss)
            job.position = job.stream.next_position(job.position, config.train)
            alive.beat(f"step {engine.step}")
            if result.verdict == "rollback":
                roll_back(job, result)
                continue
            values, timing = describe_step(job, batches, result, time.perf_counter() - started)
            last = engine.step == total
            asked, best = stop.agree(engine.reduce_sum), False
            if due(config.validate.every, engine.step) or last:
                values["validation"] = job.validate()
                best = job.is_best(values["validation"])
                alive.beat(f"the validation of step {engine.step}")
            job.metrics.record(engine.step, values, timing)
            if due(config.run.log_every, engine.step) or last or not result.applied:
                report_step(job, result, values, timing)
            if due(config.checkpoint.every, engine.step) or last or asked or best:
                job.save()
                alive.beat(f"the save of step {engine.step}")
            progress.advance(engine.step, job.throughput.seconds_left(total - engine.step))
            if asked:
                break
        job.writer.wait()
    return stop


def resume(job: Job) -> bool:
    """Go on from the newest whole checkpoint of this run, if there is one. ConfigError where the config forbids it."""
    steps = [float(step) for step, _ in list_checkpoints(job.run.checkpoints)] if job.engine.rank == 0 else []
    found, newest = (int(number) for number in job.engine.reduce_sum([len(steps), max(steps, default=0.0)]))
    if found and not job.config.resume:
        raise ConfigError(f"resume=false, but {job.run.path} holds a run up to step {newest}: choose another name=.")
    state, _ = restore_newest(job.engine, job.run.checkpoints)
    if found and state is None:
        raise CheckpointError(
            f"None of the {found} checkpoints in {job.run.checkpoints} can be read: move them away to start anew."
        )
    if state is not None:
        job.stream.check_fingerprint(state["data"], job.config.data.on_change)
        job.position, job.tokens = state["data"]["position"], state["tokens"]
        job.keep(state.get("best"))
    job.metrics.truncate_after(job.engine.step)
    return state is not None


def roll_back(job: Job, result: StepResult) -> None:
    """Weights and optimizer of the newest checkpoint; the data since then, with the bad step's, stay behind."""
    job.writer.wait()
    state, _ = restore_newest(job.engine, job.run.checkpoints, after_rollback=True)
    if state is None:
        raise CheckpointError(
            f"engine.on_nonfinite=rollback: {result.reason}, and there is no checkpoint yet to return to."
        )
    job.tokens = state["tokens"]
    job.keep(state.get("best"))
    job.metrics.truncate_after(job.engine.step)
    log.warning("%s; back to step %d, data goes on at row %d", result.reason, job.engine.step, job.position)


def describe_step(
    job: Job, batches: Sequence[SequenceBatch], result: StepResult, seconds: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records of one step: what is a function of config, seed and data, and what the machine decided."""
    by_source = [0] * len(job.stream.source_names)
    pairs = tokens = 0
    for batch in batches:
        lengths = batch.cu_seqlens.diff().tolist()
        pairs, tokens = pairs + causal_pairs(lengths), tokens + sum(lengths)
        for source, length in zip(batch.sources.tolist(), lengths):
            by_source[source] += length
    sums = job.engine.sum_over_data([float(number) for number in (pairs, tokens, *by_source)])
    pairs, tokens, *by_source = (int(number) for number in sums)
    job.tokens += tokens
    values = {
        "loss": result.loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        **job.measures(result),
        "tokens": job.tokens,
        "position": job.position,
        "source_tokens": dict(zip(job.stream.source_names, by_source)),
    }
    if not result.applied:
        values |= {"applied": False, "reason": result.reason}
    slow = job.stragglers.observe(job.engine.step, job.engine.rank_seconds())
    return values, job.throughput.measure(seconds, tokens, pairs) | slow


def validation_loss(measured: Mapping[str, Any]) -> float:
    """One number of a validation: the mean loss over its sources, each by its tokens or pairs."""
    parts = [part for part in measured.values() if isinstance(part, Mapping) and "loss" in part]
    if not parts:
        return float(measured["loss"])
    weights = [part.get("tokens", part.get("pairs", 1)) for part in parts]
    return sum(part["loss"] * weight for part, weight in zip(parts, weights)) / sum(weights)


def report_step(job: Job, result: StepResult, values: dict[str, Any], timing: dict[str, Any]) -> None:
    note = f"accuracy {values['accuracy']:.1%}" if "accuracy" in values else ""
    line = step_line(
        job.engine.step,
        job.config.train.total_steps,
        loss=result.loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens_per_second=timing["tokens_per_second"],
        mfu=timing["mfu"],
        memory_bytes=timing["memory_bytes"],
        seconds_left=job.throughput.seconds_left(job.config.train.total_steps - job.engine.step),
        note=note if result.applied else f"not applied: {result.reason}",
    )
    log.info(line)


def due(every: int | None, step: int) -> bool:
    """Is `step` a multiple of `every`? Never where that is null."""
    return every is not None and step % every == 0
