"""Compare a run with its plan, and say what factor brings plans for this cluster to what was measured.

python -m internlm2.plan.calibrate runs/7b/pretrain_4k
python -m internlm2.plan.calibrate runs/7b/pretrain_4k --cluster h100 --gpus 16

The factor goes into conf/cluster/<name>.yaml as time_factor, or on the command line as cluster.time_factor=...
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from internlm2.config import Config, ConfigError
from internlm2.config.cluster import ClusterConfig
from internlm2.config.compose import load_group
from internlm2.plan.coefficients import fitted
from internlm2.plan.plan import plan_stage

WARM_UP = 3  # steps in which allocators, caches and compilers still settle
FEWEST = 5  # steps that a median needs


@dataclass(frozen=True)
class Calibration:
    """Seconds of a step, measured (median) and planned without any factor, and their ratio."""

    measured: float
    planned: float
    steps: int
    gpus: int

    @property
    def factor(self) -> float:
        return self.measured / self.planned


def calibrate(run: Path, cluster: ClusterConfig | None = None, gpus: int | None = None) -> Calibration:
    """Compare `run` (runs/<name>/<stage>) with its plan. Raises ConfigError where it cannot be."""
    config = read_config(run / "config.yaml")
    config.cluster = replace(cluster or config.cluster, time_factor=1.0)
    config.cluster.gpus = gpus or ranks_of(run) or config.cluster.gpus
    if config.stage.kind == "ppo":
        raise ConfigError(f"{run}: calibrate with a supervised stage; PPO's phases follow from the same speeds.")
    seconds = step_seconds(run / "timing.jsonl")
    if len(seconds) < FEWEST:
        raise ConfigError(f"{run}/timing.jsonl has {len(seconds)} steps after the first {WARM_UP}: needs {FEWEST}.")
    plan = plan_stage(config)
    if plan.configured is None:
        raise ConfigError(f"{run}: {plan.reason}. Give --gpus, the number of ranks that it ran on.")
    return Calibration(median(seconds), plan.configured.time.total, len(seconds), config.cluster.gpus)


def read_config(path: Path) -> Config:
    """The composed config that a run wrote."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a run directory such as runs/7b/pretrain_4k.")
    try:
        values = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    assert isinstance(config, Config)
    return config


def step_seconds(path: Path) -> list[float]:
    """Seconds of each step after the first few."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the run has not made a step.")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [float(record["seconds"]) for record in records[WARM_UP:]]


def ranks_of(run: Path) -> int | None:
    """Ranks that wrote the newest checkpoint; None where there is none."""
    indexes = sorted((run / "checkpoints").glob("step_*/index.json"))
    return int(json.loads(indexes[-1].read_text(encoding="utf-8"))["world_size"]) if indexes else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cluster", help="a file of conf/cluster; default: that of the run's config")
    parser.add_argument("--gpus", type=int, help="default: the ranks that wrote the newest checkpoint")
    options = parser.parse_args()
    try:
        cluster = load_group(ClusterConfig, f"cluster/{options.cluster}") if options.cluster else None
        found = calibrate(options.run, cluster, options.gpus)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    others = fitted().errors["calibrated"]
    spread = ", ".join(f"{one['median']:.0%} ({name})" for name, one in others.items())
    print(
        f"a step took {found.measured:.3f} s (median of {found.steps}) and was planned at {found.planned:.3f} s on "
        f"{found.gpus} GPUs\ncluster.time_factor={found.factor:.3f}\n"
        f"Published sources, each calibrated by one of its own runs, were then off by {spread} in the median."
    )


if __name__ == "__main__":
    main()
