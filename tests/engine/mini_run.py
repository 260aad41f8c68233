"""Run by test_whole_run.py: a loop over engine, checkpoints, metrics, lock and signals, interrupted in many ways.

`main` forks one child a start, so that torch is imported once, and prints their exit codes: [code or -signal, ...].
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_training import Model, cross_entropy, make_engine, make_rows, split

from internlm2.config import WandbConfig
from internlm2.engine.base import LossSum
from internlm2.engine.checkpoint import CheckpointWriter
from internlm2.engine.checkpoint_reader import restore_newest
from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import Metrics
from internlm2.run.signals import StopSignals

STEPS, EVERY = 30, 4


def loss_fn(model, batch):
    """One poisoned step in the middle, which is skipped."""
    loss = cross_entropy(model, batch)
    return LossSum(loss.sum * (float("nan") if loss_fn.step == 10 else 1.0), loss.tokens, loss.parts)


def run_once(path: Path, dtype: str, interruption: tuple[int, signal.Signals] | None) -> int:
    """Train to the end, or send ourselves a signal during step `interruption[0]`; returns the exit code."""
    run = RunDirectory(path)
    with run.lock(), StopSignals() as stop:
        engine = make_engine(Model(), dtype=dtype, steps=STEPS, spike_factor=2.0)
        state, _ = restore_newest(engine, run.checkpoints)
        metrics = Metrics(run, WandbConfig(mode="disabled", project="x"), config={})
        metrics.truncate_after(engine.step)
        assert state is None or state["position"] == engine.step * 4
        writer = CheckpointWriter(run.checkpoints)
        while engine.step < STEPS:
            loss_fn.step = engine.step
            result = engine.train_step(split(make_rows(4, seed=engine.step), 2), loss_fn)
            if interruption is not None and engine.step == interruption[0]:
                os.kill(os.getpid(), interruption[1])
            values = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr, "applied": result.applied}
            metrics.record(engine.step, values | result.parts, {"seconds": 0.0})
            if stop.requested or engine.step % EVERY == 0 or engine.step == STEPS:
                writer.save(engine, {"position": engine.step * 4})
            if stop.requested:
                break
        writer.wait()
        metrics.close()
        return stop.exit_code


def main(root: Path, dtype: str) -> None:
    torch.set_num_threads(1)
    make_engine()  # torch's first optimizer imports a second's worth of modules: once, here, not in every child
    term, kill, interrupt = signal.SIGTERM, signal.SIGKILL, signal.SIGINT
    starts = [("straight", None)] + [("broken", i) for i in ((3, kill), (13, kill), (18, term), (25, interrupt), None)]
    codes = []
    for name, interruption in starts:
        child = os.fork()
        if child == 0:
            os._exit(run_once(root / name, dtype, interruption))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    for folder, precision in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        main(Path(folder), precision)
