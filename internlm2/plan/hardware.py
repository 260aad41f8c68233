"""One kind of GPU and the links around it, as the plan sees them."""

from dataclasses import dataclass

from internlm2.config.cluster import ClusterConfig


@dataclass(frozen=True)
class Hardware:
    """Rates in FLOP/s and bytes/s of one direction. `family` chooses the fitted efficiencies: a100 or h100."""

    name: str
    family: str
    peak_flops: float
    memory_bandwidth: float
    memory_bytes: float
    link_bandwidth: float
    node_bandwidth: float
    gpus_per_node: int = 8
    time_factor: float = 1.0

    @classmethod
    def of(cls, cluster: ClusterConfig) -> "Hardware":
        return cls(
            name=cluster.name,
            family=cluster.family,
            peak_flops=cluster.peak_tflops * 1e12,
            memory_bandwidth=cluster.memory_TBps * 1e12,
            memory_bytes=cluster.memory_GiB * 2**30,
            link_bandwidth=cluster.link_GBps * 1e9,
            node_bandwidth=cluster.node_GBps * 1e9,
            gpus_per_node=cluster.gpus_per_node,
            time_factor=cluster.time_factor,
        )
