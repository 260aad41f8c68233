"""Which processes run a command: this one, a rank of torchrun or srun, or ranks that it starts on this machine.

python train.py ...                     every visible GPU; one process where there is none or one
python train.py launch.ranks=2 ...      two ranks, on CPU as well
torchrun --nproc-per-node=8 train.py    what torchrun says
srun python train.py ...                a rank for each task of the step
"""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hydra.conf import HydraConf
from hydra.types import RunMode

from internlm2.config import Config, ConfigError
from internlm2.run import slurm
from internlm2.run.ranks import from_environment
from internlm2.run.supervisor import SUPERVISED, Outcome, run_ranks, tail


def launch(configs: Sequence[Config], hydra: HydraConf, program: Path) -> None:
    """Start ranks and exit with their code, or return where this process shall run the stages itself."""
    first = configs[0]
    directory = Path(first.root) / first.name
    if slurm.in_step():
        settle_slurm()
        slurm.write_to_own_file(directory / "logs")
    if "RANK" in os.environ or from_environment().world_size > 1:
        return
    ranks = first.launch.ranks or visible_gpus(first.engine.device)
    if ranks == 1 and first.launch.ranks is None:
        return
    overrides = job_overrides(configs, hydra)
    if ranks > 1 and first.engine.name == "single":
        if any(text.startswith("engine=") for text in overrides):
            if first.launch.ranks is not None:
                raise ConfigError(
                    f"engine=single is one process, but launch.ranks={ranks}: use engine=zero1, zero2 or zero3."
                )
            print(f"engine=single uses one of the {ranks} visible GPUs; engine=zero1 would use all.")
            return
        print(f"{ranks} ranks: engine=zero1 (the default, engine=single, is one process)")
        overrides.append("engine=zero1")
    command = [sys.executable, str(program), *overrides]
    code = supervise(command, ranks, directory, first)
    slurm.requeue_if_asked(code)
    sys.exit(code)


@contextlib.contextmanager
def under_slurm() -> Iterator[None]:
    """Around the stages in this process; outside SLURM it does nothing.

    Where a preemption signal ended them, the job goes back into the queue (ranks that our own launcher started leave
    that to it). A task of a step that fails ends its process at once: Hydra would keep the exception for later, and
    the other tasks would wait for this one.
    """
    code = 1
    try:
        yield
        return
    except ConfigError:
        raise
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        if SUPERVISED not in os.environ:
            slurm.requeue_if_asked(code)
        if not slurm.in_step() or code == 0:
            raise
    except BaseException:
        if not slurm.in_step():
            raise
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def visible_gpus(device: str) -> int:
    """Ranks that a plain command starts: one for each GPU, and one where there is none."""
    if device == "cpu":
        return 1
    import torch  # counted by the driver; nothing is allocated

    return max(1, torch.cuda.device_count())


def job_overrides(configs: Sequence[Config], hydra: HydraConf) -> list[str]:
    """The command line that composes the same configs in a rank; in a sweep, this job's values and run name."""
    overrides = list(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        overrides = [text for text in overrides if not text.startswith("name=")] + [f"name='{configs[0].name}'"]
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    return [*(text for folder in folders for text in ("--config-dir", folder)), *overrides]  # flags come first


def supervise(command: Sequence[str], ranks: int, directory: Path, config: Config) -> int:
    """Run the ranks, start them again where one died, and return the exit code.

    A restart goes on from the newest checkpoint. Failures count as one series as long as no new checkpoint has
    appeared since the last: after `launch.max_restarts` restarts without progress it gives up.
    """
    attempt, fruitless, known = 0, 0, checkpoints(directory)
    while True:
        logs = directory / "logs" / f"attempt_{attempt}"
        outcome = run_ranks(command, ranks, logs, grace_seconds=config.launch.grace_seconds)
        if not outcome.failed:
            return outcome.code
        report(outcome)
        found = checkpoints(directory)
        fruitless = 0 if found - known else fruitless + 1
        known |= found
        if fruitless > config.launch.max_restarts:
            print(
                f"error: given up after {fruitless} failure{'s' if fruitless > 1 else ''} without a new checkpoint "
                f"(launch.max_restarts={config.launch.max_restarts}).",
                file=sys.stderr,
            )
            return outcome.code
        attempt += 1
        print(f"restart {attempt} from the newest checkpoint in {directory}", file=sys.stderr)
        time.sleep(min(2.0**fruitless, 30.0))  # let ports, locks and a shared file system settle


def report(outcome: Outcome) -> None:
    """Name the rank that ended the job, with the last lines of its log."""
    print(f"error: {outcome.message()}", file=sys.stderr)
    if outcome.log is not None and outcome.log.exists():
        print(tail(outcome.log), file=sys.stderr)


def checkpoints(directory: Path) -> set[str]:
    """Complete checkpoints and finished stages below a run directory: what a restart would not lose."""
    found = [*directory.rglob("checkpoints/step_*"), *directory.rglob("finished.json")]
    return {str(path.relative_to(directory)) for path in found}


def settle_slurm(environment: Mapping[str, str] | None = None) -> None:
    """In a task of a SLURM step, say where rank 0 is: the step's first node, and a port from the job's number.

    Every task computes the same; a requeued job gets another port, in case the old one is not free yet.
    """
    values = os.environ if environment is None else environment
    if not slurm.in_step(values) or "MASTER_ADDR" in values:
        return
    nodes = values.get("SLURM_STEP_NODELIST") or values.get("SLURM_JOB_NODELIST", "")
    step = int(values["SLURM_STEP_ID"]) if values["SLURM_STEP_ID"].isdigit() else 0
    number = int(values.get("SLURM_JOB_ID", "0")) * 8 + step + slurm.attempt(values)
    os.environ.update(MASTER_ADDR=first_node(nodes), MASTER_PORT=str(20_000 + number % 30_000))


def first_node(nodes: str) -> str:
    """The first name of SLURM's compressed list: n[03-05,9],login -> n03."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise ConfigError(f"SLURM_JOB_NODELIST={nodes!r} names no node: set MASTER_ADDR to the host of rank 0.")
    return "".join(part for part in match.groups() if part)
