"""Hostile programs against the kernel's guards, each of which must hold."""

import os
import socket
import threading
from pathlib import Path

import pytest

from internlm2.generation import sandbox
from internlm2.generation.interpreter import Limits, run_program

ALONE = Limits(seconds=20.0, megabytes=600, processes=False)


def needs(guard: str) -> None:
    if guard in sandbox.missing():
        pytest.skip(f"this system has no guard for {guard}")


def test_files_outside_of_its_folder_are_safe(tmp_path):
    needs("files")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    code = f"""
import os, shutil
for attempt in (
    lambda: open({str(victim)!r}, 'w'),
    lambda: open({str(victim)!r}).read(),
    lambda: os.remove({str(victim)!r}),
    lambda: os.rename({str(victim)!r}, 'mine'),
    lambda: os.truncate({str(victim)!r}, 0),
    lambda: os.listdir({str(tmp_path)!r}),
    lambda: os.symlink('x', {str(tmp_path / "link")!r}),
    lambda: os.link({str(victim)!r}, 'mine'),
    lambda: shutil.rmtree({str(tmp_path)!r}),
    lambda: open('/tmp/internlm2_was_here', 'w'),
):
    try: attempt(); print('done')
    except OSError: print('refused')
open('own', 'w').write('x'); print(open('own').read())
"""
    outcome = run_program(code, ALONE)
    assert outcome.output.split() == ["refused"] * 10 + ["x"], outcome
    assert victim.read_text() == "precious"
    assert not Path("/tmp/internlm2_was_here").exists()


def test_no_network():
    needs("network")
    server = socket.create_server(("127.0.0.1", 0))
    accepted: list[object] = []
    threading.Thread(target=lambda: accepted.append(server.accept()), daemon=True).start()
    code = f"""
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
    try: socket.socket(family); print('made')
    except PermissionError: print('refused')
try: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)
except OSError: print('refused')
"""
    assert run_program(code, ALONE).output.split() == ["refused"] * 4
    assert accepted == []
    server.close()


def test_fork_bombs_end_at_once():
    needs("processes")
    bomb = """
import os, subprocess, sys, _thread, time
spawn = lambda: os.posix_spawn('/bin/true', ['true'], {})
for attempt in (os.fork, os.forkpty, lambda: subprocess.Popen([sys.executable]), spawn):
    try: attempt(); print('born')
    except (OSError, RuntimeError): print('refused')
_thread.start_new_thread(lambda: print('thread'), ())
time.sleep(0.3)
"""
    assert run_program(bomb, ALONE).output.split() == ["refused"] * 4 + ["thread"]
    forever = run_program("import os\nwhile True: os.fork()", ALONE)
    assert "PermissionError" in forever.output
    assert not forever.late


def test_other_processes_are_out_of_reach():
    needs("processes")
    code = f"""
import os, signal
try: os.kill({os.getpid()}, signal.SIGTERM); print('sent')
except PermissionError: print('refused')
try: print(open('/proc/{os.getpid()}/environ').read())
except OSError: print('refused')
"""
    assert run_program(code, ALONE).output.split() == ["refused", "refused"]


def test_time_memory_and_output_end():
    late = run_program("while True: pass", Limits(seconds=1.0, processes=False))
    assert late.late
    stubborn = "import time, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(99)"
    sleeper = run_program(stubborn, Limits(1.0))
    assert sleeper.late
    assert "MemoryError" in run_program("x = 'a' * (1 << 40)", ALONE).output
    assert "MemoryError" in run_program("x = []\nwhile True: x.append(bytearray(1 << 20))", ALONE).output
    loud = run_program("while True: print('a' * 10000)", Limits(seconds=10.0, characters=50, processes=False))
    assert loud.output == "a" * 50
    assert loud.cut
    assert "RecursionError" in run_program("def f(): return f()\nf()", ALONE).output


def test_crashes_are_seen():
    assert run_program("import os; os._exit(7)", ALONE).exit_code == 7
    assert run_program("import ctypes; ctypes.string_at(0)", ALONE).exit_code != 0
    assert run_program("raise SystemExit", ALONE).exit_code == 0


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("processes", [False, True])
def test_the_filter_s_jumps_stay_inside(machine, processes):
    program = sandbox.filter_program(machine, processes)
    steps = [program[start : start + 8] for start in range(0, len(program), 8)]
    for place, step in enumerate(steps):
        if step[0] in (0x15, 0x45):
            assert place + 1 + max(step[2], step[3]) < len(steps)
    assert steps[-1] == bytes.fromhex("060000000000ff7f")
    with pytest.raises(OSError, match="no table of system calls for riscv"):
        sandbox.filter_program("riscv", processes)
