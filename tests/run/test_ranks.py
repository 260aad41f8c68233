"""Who am I: torchrun, srun, or nobody."""

import pytest

from internlm2.config import ConfigError
from internlm2.run.ranks import Ranks, from_environment


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks()),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Ranks(5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2, 1, 2)),
        (
            {
                "SLURM_PROCID": "9",
                "SLURM_NTASKS": "16",
                "SLURM_LOCALID": "1",
                "SLURM_NTASKS_PER_NODE": "8",
                "SLURM_STEP_ID": "0",
            },
            Ranks(9, 16, 1, 8),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}, Ranks()),  # a batch script, no step
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "7", "SLURM_NTASKS": "8"}, Ranks(0, 2, 0, 2)),
    ],
)
def test_launchers(environment, expected):
    assert from_environment(environment) == expected
    assert from_environment(expected.environment()) == expected
    assert expected.is_first == (expected.rank == 0)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
        {"RANK": "a", "WORLD_SIZE": "2"},
    ],
)
def test_what_does_not_fit_is_named(environment):
    with pytest.raises(ConfigError, match=r"RANK=(2|0|a)"):
        from_environment(environment)
