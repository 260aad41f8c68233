"""The machines that a plan is made for, and how this machine's ranks are started."""

from dataclasses import dataclass

from omegaconf import MISSING

from internlm2.config.keys import key


@dataclass
class ClusterConfig:
    """GPUs and links for `plan=true`; nothing here changes a run. Bandwidths count one direction."""

    name: str = MISSING
    gpus: int = key(minimum=1)
    gpus_per_node: int = key(minimum=1)
    family: str = key(choices=("a100", "h100"))
    peak_tflops: float = key(minimum=0.1)
    memory_GiB: float = key(minimum=0.1)
    memory_TBps: float = key(minimum=0.001)
    link_GBps: float = key(minimum=0.1)
    node_GBps: float = key(minimum=0.1)
    time_factor: float = key(minimum=0.05, maximum=20.0)


@dataclass
class LaunchConfig:
    """How many ranks a plain command starts on this machine, and what happens when one dies."""

    ranks: int | None = key(minimum=1)
    max_restarts: int = key(minimum=0)
    grace_seconds: float = key(minimum=0.0)
