"""The emulated CUDA kernels, built once a session, under several schedules."""

import emulation_build
import pytest
from emulation_build import Emulation

# (when asynchronous copies land, seed of the thread order). A missing barrier shows under some and not under others.
SCHEDULES = [("lazy", 0), ("lazy", 1), ("eager", 2), ("mixed", 3)]


@pytest.fixture(scope="session")
def emulation_session() -> Emulation:
    return emulation_build.load()


@pytest.fixture
def emulation(emulation_session: Emulation) -> Emulation:
    emulation_session.configure()
    emulation_session.reset_counters()
    return emulation_session


@pytest.fixture(params=SCHEDULES, ids=lambda schedule: f"{schedule[0]}-{schedule[1]}")
def scheduled(request: pytest.FixtureRequest, emulation: Emulation) -> Emulation:
    """The emulation under each schedule in turn."""
    copies, seed = request.param
    emulation.configure(seed=seed, copies=copies)
    return emulation
