"""A process that has imported what a run needs, and forks a process for every Python script that it is given.

Each is a real process, with its own exit code, signals and end of the interpreter; only the seconds that it takes to
start Python and to import PyTorch are spent once. `conftest.py` starts the server and writes requests to it, a line of
JSON each; the server answers each of them by a line. Its first line is the number of its threads: a forked process has
one of them, and would wait for the others.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import sklearn.datasets  # what DIGITS needs
import sklearn.model_selection  # noqa: F401

import main  # noqa: F401  all of the program


def next_script() -> dict:
    """Tell the number of threads, then answer requests; returns in a forked process, with what it is to do."""
    print(len(os.listdir("/proc/self/task")), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(answer, flush=True)
    sys.exit()


def become(request: dict) -> str:
    """Take over the arguments, the directory, the environment and the output; returns the script."""
    signal.alarm(request["timeout"])  # ends the process, should it hang
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, path in enumerate(("/dev/null", request["stdout"], request["stderr"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["-c", *request["arguments"]]
    sys.path.insert(0, str(Path(request["directory"]).resolve()))
    return request["script"]


if __name__ == "__main__":
    script = become(next_script())
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
