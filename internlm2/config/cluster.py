"""The machines that a plan is made for, and how processes are started on the ones at hand."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def _key(*, minimum: float | None = None, maximum: float | None = None, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=MISSING, metadata={"minimum": minimum, "maximum": maximum, "choices": choices})


@dataclass
class ClusterConfig:
    """GPUs and links for `plan=true`; nothing here changes a run. Bandwidths count one direction."""

    name: str = MISSING
    gpus: int = _key(minimum=1)
    gpus_per_node: int = _key(minimum=1)
    family: str = _key(choices=("a100", "h100"))
    peak_tflops: float = _key(minimum=0.1)
    memory_GiB: float = _key(minimum=0.1)
    memory_TBps: float = _key(minimum=0.001)
    link_GBps: float = _key(minimum=0.1)
    node_GBps: float = _key(minimum=0.1)
    time_factor: float = _key(minimum=0.05, maximum=20.0)
