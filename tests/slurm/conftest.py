"""A real SLURM cluster on this machine, and the small command line of the stages' tests."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stages.conftest import command, corpus

__all__ = ["cluster", "command", "corpus"]

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "slurm_cluster.sh"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and its friends talk to two nodes; skips where SLURM is not installed."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and SLURM ({', '.join(missing) or 'not root'}): apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "SLURM_BASE_PORT": str(20_000 + os.getpid() % 20_000)}
    done = subprocess.run([SCRIPT, "up", folder, "2"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    environment |= {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{folder / 'bin'}:{environment['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    yield environment
    subprocess.run(["scancel", "--user=root"], env=environment, timeout=60)
    subprocess.run([SCRIPT, "down", folder], env=environment, timeout=60)
