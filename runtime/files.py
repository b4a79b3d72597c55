"""One process at a time writes into a directory."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from runtime.errors import UserError


@contextmanager
def exclusive(directory: Path, option: str) -> Iterator[None]:
    """Makes `directory`, which the user gave by `option`. Raises UserError if it cannot, or another process is there.

    The lock is POSIX's: it ends with the process, also where loaders' processes outlive that for a while.
    """
    path = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a")
    except OSError as error:
        raise UserError(f"{option} must be a directory that can be written, got {directory} ({error})") from error
    with lock:
        if not _locked(lock, path):
            raise UserError(f"{option} {directory} must be free, another process works there; wait or give another")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(lock: TextIO, path: Path) -> bool:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # else this file system has no locks
    # Who held it before may have removed it meanwhile, and a third process may have made it anew.
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False
