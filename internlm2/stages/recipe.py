"""Run stages in order, each handing over to the next: what is complete is skipped, what was interrupted goes on.

python train.py stage=recipe model=tiny preset=demo
"""

import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from internlm2.config import Config
from internlm2.config.precision import settled_dtype
from internlm2.engine import process_group
from internlm2.engine.build import prepare_device
from internlm2.engine.checkpoint_format import CheckpointError
from internlm2.engine.guard import TrainingStopped
from internlm2.run.console import duration, logging_to, quantity
from internlm2.run.directory import RunDirectory, RunLocked
from internlm2.run.evaluation_section import gains
from internlm2.run.provenance import record_end
from internlm2.run.ranks import from_environment
from internlm2.run.report import write_report, write_stage_report
from internlm2.run.stage_summary import read_stage
from internlm2.stages import conflict, length_proof, ppo, pretrain, reward, sft
from internlm2.stages.preparation import is_complete

log = logging.getLogger(__name__)

STAGES = {
    "pretrain": pretrain.run,
    "sft": sft.run,
    "reward": reward.run,
    "conflict": conflict.run,
    "ppo": ppo.run,
    "length_proof": length_proof.run,
}


def run_stages(configs: Sequence[Config]) -> None:
    """Run each config's stage. Exits with 1 where training had to stop, and with 128 + the signal that stopped it.

    Every rank calls it; the first writes the run directory, and ranks wait for each other between stages.
    """
    first = from_environment().is_first
    for config in configs:
        device = prepare_device(config.engine)
        config.engine.dtype = settled_dtype(config.engine.dtype, device.type)
        if config.engine.name != "single":
            process_group.join(device, config.engine.collective_seconds)
        directory = RunDirectory(Path(config.root) / config.name / config.stage.name, writes=first)
        with locked(directory), logging_to(directory.log, enabled=first) as console:
            if process_group.sum_over_ranks([float(first and is_complete(directory, config))])[0]:
                log.info("%s is complete: %s", config.stage.name, directory.path)
                continue
            log.info("%s, in %s", config.stage.name, directory.path)
            try:
                code = STAGES[config.stage.kind](config, directory, console)
                if first:
                    write_stage_report(directory.path)
                process_group.barrier()
            except (CheckpointError, TrainingStopped, OSError) as error:
                log.error("%s", error)
                with contextlib.suppress(OSError):  # the disk may be full
                    record_end(directory, step=None, status="failed")
                    if first:
                        write_stage_report(directory.path)
                code = 1
        if code:
            sys.exit(code)
    if first:
        summarise(Path(configs[-1].root) / configs[-1].name, configs)


@contextlib.contextmanager
def locked(directory: RunDirectory) -> Iterator[None]:
    """The first rank holds the run directory; where it cannot, every rank raises."""
    with contextlib.ExitStack() as stack:
        failed: RunLocked | None = None
        try:
            stack.enter_context(directory.lock())
        except RunLocked as error:
            failed = error
        if process_group.sum_over_ranks([float(failed is not None)])[0]:
            raise failed or RunLocked(f"{directory.path}: see the message of rank 0.")
        yield


def summarise(root: Path, configs: Sequence[Config]) -> None:
    """What was done, in one line a stage, and what to do with it."""
    print()
    for config in configs:
        stage = read_stage(root / config.stage.name)
        if (root / config.stage.name / "round_1").exists():
            print("\n".join(ppo.describe_rounds(root / config.stage.name)))
            continue
        if not stage.steps:
            print(f"{stage.name:14}{'; '.join(gains(stage))}")
            continue
        what, key = ("score", "score") if config.stage.kind == "ppo" else ("training loss", "loss")
        first = next((value for value in stage.column(key) if value is not None), math.nan)
        print(
            f"{stage.name:14}{stage.steps:>8,} steps {quantity(stage.tokens):>7} tokens   "
            f"{what} {first:.3f} -> {stage.last(key) or math.nan:.3f}   {duration(stage.seconds)}"
        )
    last = configs[-1]
    print(f"report    {write_report(root)}")
    if (root / last.stage.name / "export").exists():
        print(f"model     {root / last.stage.name / 'export'} (official InternLM2 layout)")
    if last.stage.kind in ("sft", "ppo"):
        print(f"talk to it with: python -m internlm2.chat {root / last.stage.name}")
