"""Reproduce the paper's tables and figures: train what they need, then write them with the paper's numbers and ours."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from pathlib import Path

from reproduction.protocols import PROTOCOLS, Protocol
from reproduction.targets import TARGETS
from runtime.errors import UserError
from runtime.files import exclusive


class Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number at least 1, got {text!r}")
    return int(text)


def build_parser() -> Parser:
    protocols = "\n".join(f"{name}: {protocol.description}" for name, protocol in PROTOCOLS.items())
    parser = Parser(prog="reproduce", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{' '.join(TARGETS)}, or all")
    parser.add_argument("--protocol", default="smoke", metavar="NAME", help=f"default: smoke\n{protocols}")
    parser.add_argument("--seeds", type=at_least_one, metavar="N", help="seeds 0 .. N-1 (default: the protocol's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/reproduce/PROTOCOL")
    parser.add_argument("--data-path", type=Path, metavar="DIR", help="default: the environment's DATA_PATH")
    parser.add_argument(
        "--jobs", type=at_least_one, metavar="N", help="runs at once (default: one a GPU, else up to 4)"
    )
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--report-only", action="store_true", help="write the reports of the runs that are there")
    return parser


def choose(kind: str, name: str, choices: list[str]) -> None:
    """Raises UserError, with the nearest names, for a name that is no choice."""
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
        meant = f", did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{kind} must be one of {', '.join(choices)}; got {name!r}{meant}")


def find_data(protocol: Protocol, name: str, given: Path | None) -> Path | None:
    """The directory of the protocol's data: `given`, or the environment's DATA_PATH.

    Raises UserError if the protocol needs none and one is given.
    """
    from datasets import DATA_SETS  # takes seconds, like the imports in `reproduce`

    if not DATA_SETS[protocol.data_set].needs_path:
        if given is not None:
            raise UserError(f"--protocol {name} needs no files, got --data-path {given}; leave it out")
        return None
    path = given or os.environ.get("DATA_PATH")
    return Path(path).resolve() if path else None


def check_data(protocol: Protocol, name: str, path: Path | None) -> None:
    """Raises UserError if main.py could not open the protocol's data."""
    from datasets import DATA_SETS, DataConfig, build_loaders

    if DATA_SETS[protocol.data_set].needs_path and path is None:
        raise UserError(
            f"--protocol {name} needs {protocol.data_set}'s files; set DATA_PATH or give --data-path, see docs/data.md"
        )
    options = {"download": False, "input_size": 32, "batch_size": 1, "num_workers": 0, "repeats": 1, "seed": 0}
    options |= {"aa": "none", "color_jitter": 0.0, "reprob": 0.0}
    build_loaders(DataConfig(name=protocol.data_set, path=path and str(path), **options))


def reproduce(args: argparse.Namespace) -> int:
    """Returns how many runs failed. Everything is checked before anything is written."""
    choose("--protocol", args.protocol, list(PROTOCOLS))
    for name in args.targets:
        choose("TARGET", name, [*TARGETS, "all"])
    if not args.targets and not args.report_only:
        raise UserError(f"TARGET must be one or more of {', '.join(TARGETS)}, or all; got none")
    protocol = PROTOCOLS[args.protocol]
    names = [name for name in TARGETS if name in args.targets or "all" in args.targets or not args.targets]
    out = (args.out or Path("runs/reproduce") / args.protocol).resolve()
    path = find_data(protocol, args.protocol, args.data_path)

    # Their imports take seconds, which a mistake in the command should not.
    from reproduction import report, runner, runs

    if args.report_only:
        if not any(out.glob(f"*/{runs.RECORD}")):
            raise UserError(f"--report-only needs runs in --out, {out} has none; leave it out to train them")
        print(*report.write_reports(names, args.protocol, protocol, out), sep="\n")
        return 0
    planned = runs.plan([TARGETS[name] for name in names], protocol, args.seeds or protocol.seeds)
    if not args.list:
        check_data(protocol, args.protocol, path)
    machine = runner.this_machine(args.jobs, protocol.torchrun)
    if protocol.needs_gpu and not machine.gpus and not args.list:
        raise UserError(f"--protocol {args.protocol} needs a GPU, PyTorch finds none; smoke runs on a CPU")
    processes = max(1, len(machine.slot_gpus(0, protocol.torchrun)))
    commands = {run: run.command(processes, str(path or runs.DATA_PATH)) for run in planned}
    waiting = runs.remaining(planned, out)
    if args.list:
        for run, command in commands.items():
            finished = "" if run in waiting else "  # finished"
            print(runs.shell([*command, "--output-dir", str(out / run.name)]) + finished)
        return 0
    with exclusive(out, "--out"):
        failed = runner.execute(waiting, len(planned) - len(waiting), out, machine, path)
        print(*report.write_reports(names, args.protocol, protocol, out), sep="\n")
    if failed:
        print(f"reproduce: {failed} of {len(waiting)} runs failed, see above; the same command tries them again")
    return failed


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a run failed, 2 the user must change something, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that whoever ends this ends the runs too
    try:
        return 1 if reproduce(build_parser().parse_args(argv)) else 0
    except (UserError, OSError) as error:
        message, code = f"reproduce: error: {error}", 2
    except KeyboardInterrupt:
        message, code = "reproduce: interrupted; the same command goes on from the last finished epochs", 130
    print(" ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
