"""Folders that are built once and then only read: written beside their place, renamed when complete, safe with
several processes.
"""

import contextlib
import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from internlm2.config import ConfigError

logger = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT}


def build_once(final: Path, is_complete: Callable[[Path], bool], build: Callable[[Path], None]) -> Path:
    """`final`, made by `build(temporary folder)` unless it is there and complete.

    The temporary folder is renamed only after every file in it is on disk, so that a killed process leaves nothing
    visible; what it left is removed by the next one. A second process waits for the first. A full disk raises
    ConfigError and changes nothing.
    """
    if is_complete(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache_dir: cannot create {final.parent}: {error.strerror}") from error
    with _locked(final.with_name(final.name + ".lock")):
        if is_complete(final):
            return final
        for stale in final.parent.glob(f"{final.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            temporary.mkdir()
            build(temporary)
            _sync_tree(temporary)
            _publish(temporary, final, is_complete)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise ConfigError(
                f"the disk is full while writing {final} ({_free(final.parent)} free). Nothing was damaged; "
                "free space or set data.cache_dir to another disk."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _publish(temporary: Path, final: Path, is_complete: Callable[[Path], bool]) -> None:
    if final.exists():
        if is_complete(final):  # made meanwhile where locks do not reach (some network file systems)
            return
        final.rename(temporary / "damaged")
        shutil.rmtree(temporary / "damaged")
    try:
        temporary.rename(final)
    except OSError:
        if not is_complete(final):
            raise
    _sync(final.parent)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock, released by the kernel if the process dies. Without lock support the atomic rename
    alone protects.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    with open(path, "a", encoding="utf-8") as stream:
        # Some network file systems refuse locks.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that makes %s", path.name.removesuffix(".lock"))
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # folders cannot be synced everywhere
            raise
    finally:
        os.close(handle)


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB"
