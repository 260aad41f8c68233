"""Run by test_checkpoint.py: fork a child that saves without pause, kill -9 it at a random moment, report what is left.

Prints one JSON line a round: {"saved": steps that the child reported as published, "found": the newest step that loads
or null, "right": its content is that step's, "debris": hidden directories that the kill left, "left": of these after
the next start, "kept": steps on disk}.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_training import make_engine

from internlm2.engine.checkpoint import CheckpointWriter
from internlm2.engine.checkpoint_format import list_checkpoints
from internlm2.engine.checkpoint_reader import CheckpointReader, find_newest


def fill(engine, step: int) -> None:
    """A state that tells its step in every element, so that a mix of two saves cannot pass."""
    for fragment in engine.fragments():
        fragment.view.fill_(float(step))
    engine.step = step


def save_for_ever(directory: Path, start: int, pipe: int) -> None:
    engine = make_engine()
    writer = CheckpointWriter(directory, keep_last=2)
    for step in range(start, start + 100_000):
        fill(engine, step)
        writer.save(engine, {"position": step * 10})
        if step > start:
            os.write(pipe, f"{step - 1}\n".encode())


def main(directory: Path, rounds: int, seed: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    engine = make_engine()
    published = 0
    for _ in range(rounds):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(directory, published + 1, write_end)
        os.close(write_end)
        time.sleep(chance.uniform(0.01, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read_end) as lines:
            saved = [int(line) for line in lines.read().split()]
        debris = len(list(directory.glob(".step_*"))) if directory.exists() else 0
        path, _ = find_newest(directory)
        right, found = True, None
        if path is not None:
            reader = CheckpointReader(path)
            reader.restore(engine)
            found = reader.step
            values = {float(v) for f in engine.fragments() for v in (f.view.min(), f.view.max())}
            right = values == {float(found)} and reader.state["position"] == found * 10
            published = found
        CheckpointWriter(directory)  # as the next start of the run does
        left = len(list(directory.glob(".step_*")))
        record = {"saved": saved, "found": found, "right": right, "debris": debris, "left": left}
        print(json.dumps(record | {"kept": [step for step, _ in list_checkpoints(directory)]}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
