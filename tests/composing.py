"""Configs as a command line composes them, without a process."""

from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir

from internlm2.config import Config
from internlm2.config.compose import CONF, register_schema, to_config


@pytest.fixture(autouse=True)
def hydra_context() -> Iterator[None]:
    """Hydra finds conf/ in every test of the module that imports this."""
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> Config:
    return to_config(compose("train", overrides=list(overrides)))
