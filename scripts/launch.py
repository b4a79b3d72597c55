"""torchrun whose exit code is that of the process that failed first, where torchrun's own is always 1.

Ended by a signal itself, it ends its processes by SIGTERM, after half a minute by SIGKILL, and has the shell's code for
that signal: 143 for SIGTERM.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)  # negative: killed by that signal
    except SignalException as error:
        print(f"launch.py: {error.sigval.name} has ended it and its processes", file=sys.stderr)
        sys.exit(128 + error.sigval)
