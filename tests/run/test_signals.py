"""SIGTERM and Ctrl-C: the step ends, the state is saved, the exit code says so."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from internlm2.run.signals import StopSignals

REPOSITORY = Path(__file__).resolve().parents[2]

LOOP = """
import sys, time
from internlm2.run.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    for step in range(1, 1000):
        time.sleep(0.05)
        if stop.requested:
            break
    print(stop.message(step), flush=True)
sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_finishes_its_step_and_exits_with_the_code(number, code):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == code
    assert output.startswith(f"Stopped by {number.name} after step ")


def test_second_interrupt_does_not_wait():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_after_a_term_does_not_wait_and_a_second_term_does():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_code == 143


def test_handlers_are_restored_and_no_signal_means_finished():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert stop.exit_code == 0


def test_another_thread_sets_no_handlers():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_ranks_agree_on_a_signal_that_reached_one_of_them():
    """Until they talk, each has its own; afterwards a signal that came too late for the talk waits for the next."""
    with StopSignals() as stop:
        assert not stop.agree(list)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested is None
        assert stop.agree(list)
        assert (stop.requested, stop.exit_code) == (signal.SIGTERM, 143)
    with StopSignals() as stop:
        reached_another_rank = [float(number == signal.SIGUSR2) for number in stop.signals]
        assert stop.agree(lambda mine: [a + b for a, b in zip(mine, reached_another_rank, strict=True)])
        assert stop.exit_code == 128 + signal.SIGUSR2
        assert "asks for a new start" in stop.message(7)
