"""The limits of the interpreter's subprocess, each run into."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from internlm2.generation.interpreter import Limits, code_of, network_cut, run_python


def test_output_and_errors_come_back():
    assert run_python("print(6 * 7)") == "42"
    assert run_python("print('书生')") == "书生"
    failed = run_python("print('before')\nraise KeyError('gone')")
    assert failed.startswith("before\nTraceback")
    assert failed.endswith("KeyError: 'gone'\n[ended with exit code 1]")
    assert run_python("") == ""


def test_code_is_taken_out_of_its_fence():
    assert code_of("```python\nx = 1\nprint(x)\n```") == "x = 1\nprint(x)"
    assert code_of("text\n```\nprint(1)\n```\nmore") == "print(1)"
    assert code_of("print(2)") == "print(2)"
    assert code_of("```python\nprint(3)") == "print(3)"


def test_time_is_limited_with_all_that_was_started():
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "print(child.pid, flush=True)\n"
        "while True: pass"
    )
    child, note = run_python(code, Limits(seconds=5.0)).split("\n")
    assert note == "[stopped after 5 seconds]"
    status = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 10.0  # a signal is sent at once and acted on when the process runs next
    while _runs(status) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(status)


def _runs(status: Path) -> bool:
    """False where the process is gone, or dead and unclaimed."""
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_memory_is_limited():
    assert "MemoryError" in run_python("x = bytearray(600 << 20)", Limits(megabytes=400))


def test_output_is_limited():
    text = run_python("print('a' * 5000)", Limits(characters=100))
    assert text == "a" * 100 + "\n[output cut after 100 characters]"


def test_works_in_a_folder_of_its_own_without_our_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    code = (
        "import os\nopen('file', 'w').write('x')\n"
        "print(sorted(os.listdir()), os.environ.get('SECRET_TOKEN'), os.getcwd())"
    )
    listing, folder = run_python(code).rsplit(" ", 1)
    assert listing == "['file', 'program.py'] None"
    assert not os.path.exists(folder)


def test_there_is_no_network():
    if network_cut() is None:
        pytest.skip("this system does not permit unshare")
    server = socket.create_server(("127.0.0.1", 0))
    accepted = []
    threading.Thread(target=lambda: accepted.append(server.accept()), daemon=True).start()
    port = server.getsockname()[1]
    code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 3)\nprint('connected')"
    said = run_python(code)
    assert "OSError" in said or "PermissionError" in said
    assert accepted == []
    server.close()
