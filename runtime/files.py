"""Files that several processes may touch: one writer per directory, and content that is replaced as a whole."""

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
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; if the block ends without an error, that file replaces `path`.

    A reader, also one after a crash, finds the old content or the new one. After an error the old one stays.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def exclusive(directory: Path, option: str) -> Iterator[None]:
    """Make `directory`, which the user gave with `option`, and keep other runs out of it.

    Raises UserError if it cannot be made or another process holds it. The lock is POSIX's, so it ends with the process,
    even if loader processes live a little longer.
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
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # otherwise the file system has no locks
    # The previous holder may have removed the file meanwhile, and a third process may have made a new one.
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False
