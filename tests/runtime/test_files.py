"""The lock on an output directory: whose it is, and how long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from runtime.errors import UserError
from runtime.files import _locked, exclusive


def test_a_lock_on_a_file_that_another_process_has_replaced_is_none(tmp_path):
    """Who held it before has removed the file between our opening and our locking it; a third process made it anew."""
    path = tmp_path / ".lock"
    with open(path, "a") as opened_before:
        path.unlink()
        assert not _locked(opened_before, path)
        path.touch()
        assert not _locked(opened_before, path)
    with open(path, "a") as opened_now:
        assert _locked(opened_now, path)


FORKS = """
import os, sys, time
from pathlib import Path
from runtime.files import exclusive
with exclusive(Path(sys.argv[1]), "--output-dir"):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
"""


def test_the_lock_ends_with_its_process_also_where_a_child_lives_on(tmp_path, environment):
    """A run that is killed leaves its loaders' processes for a while; another run may start in the directory."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", FORKS, tmp_path], env=environment, **pipes) as process:
        child = int(process.stdout.readline())
        try:
            with pytest.raises(UserError, match="another process works there"), exclusive(tmp_path, "--output-dir"):
                pass
            process.kill()
            process.wait()
            os.kill(child, 0)  # it lives
            with exclusive(tmp_path, "--output-dir"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
