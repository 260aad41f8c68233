"""Run a stage of the InternLM2 recipe, or the whole of it: `python train.py --help`."""

import os
import sys
from pathlib import Path
from typing import NoReturn

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's exceptions reach `fail` below, which turns them into one sentence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from internlm2.config import ConfigError
from internlm2.config.compose import check_arguments, compose_stages, describe, register_schema
from internlm2.config.zero import check_ranks
from internlm2.launch import launch, under_slurm
from internlm2.plan.report import print_plans
from internlm2.run.ranks import ending_at_once, from_environment

register_schema()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> None:
    try:
        configs = compose_stages(composed, HydraConfig.get())
        if configs[0].plan:
            print_plans(configs)
            return
        if configs[0].dry_run:
            from internlm2.dry_run.run import dry_run

            dry_run(configs)
            return
        from internlm2.sources.source import check_sources

        for config in configs:
            check_ranks(config, from_environment().world_size)
            check_sources(config.data)
        with under_slurm():
            launch(configs, HydraConfig.get(), Path(__file__))  # returns where this process is to run the stages
            from internlm2.stages.recipe import run_stages  # torch is imported from here on

            run_stages(configs)
    except ConfigError as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Exit code 2: bad input. (0 finished; 128 + its number stopped by a signal after saving.)"""
    print(f"error: {describe(error)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    with ending_at_once():
        try:
            check_arguments(sys.argv[1:])
            main()
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            fail(error)
