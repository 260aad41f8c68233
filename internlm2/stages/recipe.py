"""Run stages in order, each handing over to the next: what is complete is skipped, what was interrupted goes on.

python train.py stage=recipe model=tiny preset=demo
"""

import contextlib
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from internlm2.config import Config
from internlm2.engine.checkpoint_format import CheckpointError
from internlm2.engine.guard import TrainingStopped
from internlm2.run.console import duration, logging_to, quantity
from internlm2.run.directory import RunDirectory
from internlm2.run.provenance import record_end
from internlm2.run.report import write_report, write_stage_report
from internlm2.run.stage_summary import read_stage
from internlm2.stages import pretrain, reward, sft
from internlm2.stages.preparation import is_complete

log = logging.getLogger(__name__)

STAGES = {"pretrain": pretrain.run, "sft": sft.run, "reward": reward.run}


def run_stages(configs: Sequence[Config]) -> None:
    """Run each config's stage. Exits with 1 where training had to stop, and with 128 + the signal that stopped it."""
    for config in configs:
        directory = RunDirectory(Path(config.root) / config.name / config.stage.name)
        with directory.lock(), logging_to(directory.log) as console:
            if is_complete(directory, config):
                log.info("%s is complete: %s", config.stage.name, directory.path)
                continue
            log.info("%s, in %s", config.stage.name, directory.path)
            try:
                code = STAGES[config.stage.kind](config, directory, console)
                write_stage_report(directory.path)
            except (CheckpointError, TrainingStopped, OSError) as error:
                log.error("%s", error)
                with contextlib.suppress(OSError):  # the disk may be full
                    record_end(directory, step=None, status="failed")
                    write_stage_report(directory.path)
                code = 1
        if code:
            sys.exit(code)
    summarise(Path(configs[-1].root) / configs[-1].name, configs)


def summarise(root: Path, configs: Sequence[Config]) -> None:
    """What was done, in one line a stage, and what to do with it."""
    print()
    for config in configs:
        stage = read_stage(root / config.stage.name)
        first = next((loss for loss in stage.column("loss") if loss is not None), math.nan)
        print(
            f"{stage.name:14}{stage.steps:>8,} steps {quantity(stage.tokens):>7} tokens   "
            f"training loss {first:.3f} -> {stage.last('loss') or math.nan:.3f}   {duration(stage.seconds)}"
        )
    last = configs[-1]
    print(f"report    {write_report(root)}")
    if (root / last.stage.name / "export").exists():
        print(f"model     {root / last.stage.name / 'export'} (official InternLM2 layout)")
    if last.stage.kind == "sft":
        print(f"talk to it with: python -m internlm2.chat {root / last.stage.name}")
