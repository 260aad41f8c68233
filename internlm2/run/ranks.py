"""Which of a job's processes this is, from the environment of torchrun, of srun or of our own launcher. No torch."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from internlm2.config.errors import ConfigError

# What each launcher sets: rank, number of ranks, rank on this node, ranks on this node.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")


@dataclass(frozen=True)
class Ranks:
    """Position of this process among `world_size` ranks; `local_rank` counts on this node and picks the GPU."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Rank 0 writes the run directory, the log and the console."""
        return self.rank == 0

    def environment(self) -> dict[str, str]:
        """torchrun's variables for this rank, which `from_environment` reads back."""
        values = (self.rank, self.world_size, self.local_rank, self.local_world_size)
        return {name: str(value) for name, value in zip(_TORCHRUN, values)}


def from_environment(environment: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that the launcher set; one rank where it set none. Raises ConfigError for numbers that do not fit.

    torchrun's variables come first. srun's count only inside a job step (SLURM_STEP_ID): a plain command in an
    allocation or a batch script is one process. LOCAL_WORLD_SIZE, where absent, is taken to be all ranks (one node).
    """
    values = os.environ if environment is None else environment
    if _TORCHRUN[0] in values and _TORCHRUN[1] in values:
        names = _TORCHRUN
    elif _SRUN[0] in values and "SLURM_STEP_ID" in values and int(values.get(_SRUN[1], "1")) > 1:
        names = _SRUN
    else:
        return Ranks()
    rank, world_size = (_number(values, name) for name in names[:2])
    local_rank = _number(values, names[2]) if names[2] in values else rank
    local_world_size = _number(values, names[3]) if names[3] in values else world_size
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        told = ", ".join(f"{name}={values[name]}" for name in names if name in values)
        raise ConfigError(f"The launcher's variables do not fit together: {told}.")
    return Ranks(rank, world_size, local_rank, local_world_size)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Around the program of one of several ranks: the process ends with it, by its exit code, without teardown.

    After a failure the interpreter would wait for threads, such as one that waits for a dead rank's part of a
    checkpoint; and after success gloo's threads sometimes abort the process with all work done. On one rank it does
    nothing.
    """
    if from_environment().world_size == 1:
        yield
        return
    code = 1
    try:
        yield
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        distributed = sys.modules.get("torch.distributed")
        if code != 1 and distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _number(values: Mapping[str, str], name: str) -> int:
    try:
        return int(values[name])
    except ValueError:
        raise ConfigError(f"{name}={values[name]} is not a number: start the run through one launcher.") from None
