"""Train or evaluate a Vision Transformer with its block linears in MXFP4: arguments and exit codes."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext

from runtime import processes
from runtime.determinism import deterministic
from runtime.errors import NonFiniteSteps, RanksDiffer, Stopped, UserError
from training import setup
from training.options import Options, parse_args

DONE, DIVERGED, USER_MISTAKE, STOPPED, INTERRUPTED = 0, 1, 2, os.EX_TEMPFAIL, 130
"""Exit codes. After the first two and STOPPED, every process ends by itself."""


def run(options: Options) -> None:
    device = processes.start(options.run.device)
    try:
        with deterministic(device) if options.run.deterministic else nullcontext():
            prepared = setup.prepare(options, device)
            if options.run.eval:
                setup.evaluate_only(prepared)
            else:
                setup.train(prepared)
    except BaseException as error:
        processes.end_loaders(error)
        raise


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 diverged, 2 the user must change something, 75 stopped by a signal, 130 interrupted.

    Each process that fails says why; several processes say the same message once.
    """
    code = DONE
    logging.getLogger("timm").setLevel(logging.ERROR)  # timm's schedule warns of runs of one epoch
    try:
        run(parse_args(argv))
    except UserError as error:
        # From a loader's process the text comes with its traceback in front.
        message, code = f"main.py: error: {str(error).rpartition('UserError: ')[2]}", USER_MISTAKE
    except OSError as error:  # no space, no permission, a name too long
        message, code = f"main.py: error: {error}", USER_MISTAKE
    except NonFiniteSteps as error:
        message, code = f"main.py: diverged: {error}", DIVERGED
    except RanksDiffer as error:
        message, code = f"main.py: ranks differ: {error}", DIVERGED
    except Stopped as error:
        message, code = f"main.py: stopped by {error}", STOPPED
    except KeyboardInterrupt as error:
        message, code = "; ".join(filter(None, ("main.py: interrupted", str(error)))), INTERRUPTED
    except Exception as error:
        # A collective breaks off where another process has ended; that one says why.
        broken_off = isinstance(error, RuntimeError) and processes.another_has_failed()
        if broken_off or not processes.first_to_report(repr(error)):
            return DIVERGED
        if not processes.lacks_shared_memory(error):
            raise
        message, code = f"main.py: error: {processes.SHARED_MEMORY}", USER_MISTAKE
    if code != DONE and processes.first_to_report(message):
        processes.write_line(" ".join(message.split()), sys.stderr)
    if code in (DONE, DIVERGED, STOPPED):  # where all processes end; after another failure it would wait for the rest
        processes.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
