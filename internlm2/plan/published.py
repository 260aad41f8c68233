"""Published training runs that the plan is fitted on and judged by.

`published_runs.csv` holds facts from public pages, a run a row: tokens/s/GPU at a stated model, GPU and layout.

    InternEvo-tput, -flops  InternEvo, doc/en/train_performance.md at commit c628a8c: InternLM-7B on A100-80 SXM nodes
                            with 4 x 100 Gb/s RoCE (50 GB/s a node)
    llm-foundry             MosaicML LLM-Foundry, scripts/train/benchmarking/README.md at commit 8c8dd48: MPT models
                            under FSDP, full sharding. The network is stated for A100 (1,600 Gb/s a node) and assumed
                            for H100 (3,200 Gb/s)
    torchtitan              benchmarks/ at commit b5bcd76: Llama 3.1 under FSDP2. Read where a table has such rows; the
                            table here has none
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm2.plan.coefficients import Coefficients
from internlm2.plan.hardware import Hardware
from internlm2.plan.layout import Layout, Practice
from internlm2.plan.network import Network
from internlm2.plan.speed import SpeedModel

TABLE = Path(__file__).with_name("published_runs.csv")
RECOMPUTE = {"0": "none", "1": "full", "2": "selective"}


def _mpt(name: str, hidden: int, layers: int, heads: int) -> Network:
    return Network(name, hidden, layers, heads, heads, hidden // heads, 4 * hidden, 50_368, gated=False, tied=True)


NETWORKS = {
    network.name: network
    for network in (
        Network("internlm-7b", 4096, 32, 32, 32, 128, 11008, 103_168),
        Network("llama3-8b", 4096, 32, 32, 8, 128, 14336, 128_256),
        Network("llama3-70b", 8192, 80, 64, 8, 128, 28672, 128_256),
        _mpt("mpt-125m", 768, 12, 12),
        _mpt("mpt-350m", 1024, 24, 16),
        _mpt("mpt-760m", 1536, 24, 12),
        _mpt("mpt-1b", 2048, 24, 16),
        _mpt("mpt-3b", 2560, 32, 20),
        _mpt("mpt-7b", 4096, 32, 32),
        _mpt("mpt-13b", 5120, 40, 40),
        _mpt("mpt-30b", 7168, 48, 56),
        _mpt("mpt-70b", 8192, 80, 64),
    )
}
# family, peak TFLOP/s, memory TB/s, memory GiB, link GB/s of one direction (NVIDIA data sheets). torchtitan's H100
# were limited to 500 W of 700 and had HBM2e at 2.4 TB/s (its benchmark page): arithmetic
# is taken at the square root of that.
GPUS = {
    "a100-40": ("a100", 312.0, 1.555, 40.0, 300.0),
    "a100-80": ("a100", 312.0, 2.039, 80.0, 300.0),
    "h100": ("h100", 989.4, 3.35, 80.0, 450.0),
    "h100-500W": ("h100", 989.4 * math.sqrt(500 / 700), 2.4, 96.0, 450.0),
}


@dataclass(frozen=True)
class PublishedRun:
    """One row: what ran, how, and the tokens a second and GPU that its authors measured."""

    source: str
    network: Network
    hardware: Hardware
    layout: Layout
    practice: Practice
    tokens_per_second: float

    @property
    def family(self) -> str:
        """The project that published it."""
        return self.source.partition("-flops")[0].partition("-tput")[0]

    def predicted(self, coefficients: Coefficients) -> float:
        """Tokens a second and GPU by the model."""
        seconds = SpeedModel(coefficients, self.hardware, self.practice).step(self.network, self.layout).total
        return self.layout.tokens_per_step / seconds / self.layout.gpus

    def error(self, coefficients: Coefficients) -> float:
        """log(predicted / measured)."""
        return math.log(self.predicted(coefficients) / self.tokens_per_second)


def read_runs(path: Path = TABLE) -> list[PublishedRun]:
    """The rows of a table with the columns of published_runs.csv; a run that stands twice counts once."""
    with open(path, newline="", encoding="utf-8") as file:
        runs = [_run(row) for row in csv.DictReader(file)]
    seen: set[tuple[object, ...]] = set()
    kept = []
    for run in runs:
        key = (run.network.name, run.hardware.name, run.layout, run.tokens_per_second)
        if key not in seen:
            seen.add(key)
            kept.append(run)
    return kept


def _run(row: dict[str, str]) -> PublishedRun:
    hardware = hardware_of(row["gpu"], float(row["net_GBps_node"] or 400.0))
    layout = Layout(
        gpus=int(row["gpus"]),
        seq_len=int(row["seq"]),
        micro_batch=int(row["micro_bs"]),
        accumulation=int(row["gas"]),
        zero=int(row["zero"]),
        shard=int(row["shard_group"]),
        tensor_parallel=int(row["tp"]),
        recompute=RECOMPUTE[row["ckpt"]],
    )
    return PublishedRun(row["src"], NETWORKS[row["model"]], hardware, layout, practice(row["src"]), float(row["tgs"]))


def hardware_of(gpu: str, node_gbps: float) -> Hardware:
    """A GPU of the tables in a node whose network moves `node_gbps` GB/s."""
    family, peak, bandwidth, memory, link = GPUS[gpu]
    return Hardware(
        name=gpu,
        family=family,
        peak_flops=peak * 1e12,
        memory_bandwidth=bandwidth * 1e12,
        memory_bytes=memory * 2**30,
        link_bandwidth=link * 1e9,
        node_bandwidth=node_gbps * 1e9,
    )


def practice(source: str) -> Practice:
    """What a project's software did: kernels and collectives of its time."""
    if source.startswith("InternEvo"):
        return Practice(broadcast_update=True, loss_passes=0.5)  # flash-attn's fused cross entropy
    if source.startswith("torchtitan"):
        compiled = 0.5 if "compile" in source else 1.0
        return Practice(attention_speed=1.7, elementwise=compiled, loss_passes=compiled)
    return Practice()


@dataclass(frozen=True)
class Errors:
    """Relative errors of predicted tokens/s, as shares: their median, 90th percentile and largest, and the bias."""

    rows: int
    median: float
    p90: float
    largest: float
    bias: float


def errors(runs: Sequence[PublishedRun], coefficients: Coefficients) -> Errors:
    """How far off `coefficients` are on `runs`."""
    logs = sorted(run.error(coefficients) for run in runs)
    sizes = sorted(abs(math.expm1(value)) for value in logs)
    return Errors(len(runs), quantile(sizes, 0.5), quantile(sizes, 0.9), sizes[-1], math.expm1(quantile(logs, 0.5)))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of a sorted sequence lies; linear between neighbours, as numpy's default."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def families(runs: Iterable[PublishedRun]) -> list[str]:
    return sorted({run.family for run in runs})
