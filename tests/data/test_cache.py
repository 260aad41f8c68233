"""Folders appear complete or not at all: kill -9, a full disk, two processes, damage."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internlm2.config import ConfigError
from internlm2.data.cache import build_once


def complete(folder: Path) -> bool:
    return (folder / "done").is_file()


def write(folder: Path) -> None:
    (folder / "part").write_text("content")
    (folder / "done").write_text("")


def test_builds_once(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        write(folder)

    for _ in range(3):
        build_once(tmp_path / "a" / "b", complete, build)
    assert len(calls) == 1
    assert (tmp_path / "a" / "b" / "part").read_text() == "content"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b", "b.lock"]


def test_an_error_leaves_nothing_visible(tmp_path):
    def fail(folder):
        (folder / "part").write_text("half")
        raise ValueError("broken input")

    with pytest.raises(ValueError, match="broken input"):
        build_once(tmp_path / "x", complete, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["x.lock"]
    build_once(tmp_path / "x", complete, write)
    assert complete(tmp_path / "x")


def test_full_disk_names_the_key_and_damages_nothing(tmp_path):
    build_once(tmp_path / "before", complete, write)

    def fail(folder):
        (folder / "part").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match=r"disk is full.*data\.cache_dir"):
        build_once(tmp_path / "x", complete, fail)
    assert not (tmp_path / "x").exists()
    assert (tmp_path / "before" / "part").read_text() == "content"
    assert not list(tmp_path.glob("*.tmp-*"))


def test_other_system_errors_keep_their_own_text(tmp_path):
    def fail(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        build_once(tmp_path / "x", complete, fail)


def test_a_place_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: cannot create"):
        build_once(tmp_path / "file" / "x", complete, write)


def test_a_damaged_folder_is_replaced(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "part").write_text("old")
    build_once(tmp_path / "x", complete, write)
    assert (tmp_path / "x" / "part").read_text() == "content"


SLOW_BUILD = """
import sys, time
from pathlib import Path
from internlm2.data.cache import build_once

def build(folder):
    (folder / "part").write_text("half")
    print("writing", flush=True)
    time.sleep(60)

build_once(Path(sys.argv[1]), lambda folder: (folder / "done").is_file(), build)
"""


def test_kill_while_writing_leaves_nothing_visible_and_the_next_process_cleans_up(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "x").exists()
    assert len(list(tmp_path.glob("x.tmp-*"))) == 1
    build_once(tmp_path / "x", complete, write)
    assert complete(tmp_path / "x")
    assert not list(tmp_path.glob("x.tmp-*"))


def _build_and_log(folder: str, log: str) -> None:
    def build(target):
        with open(log, "a", encoding="utf-8") as stream:
            stream.write("built\n")
        time.sleep(0.2)
        write(target)

    build_once(Path(folder), complete, build)


def test_two_processes_at_once_build_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_build_and_log, args=(str(tmp_path / "x"), str(tmp_path / "log"))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"
    assert complete(tmp_path / "x")


def test_without_locks_the_rename_still_decides(tmp_path, monkeypatch):
    """A second writer that finished meanwhile wins; ours is dropped."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)

    def build(folder):
        write(folder)
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "part").write_text("theirs")
        (tmp_path / "x" / "done").write_text("")

    build_once(tmp_path / "x", complete, build)
    assert (tmp_path / "x" / "part").read_text() == "theirs"
    assert not list(tmp_path.glob("x.tmp-*"))
