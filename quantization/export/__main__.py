"""The command line of the export; see the package's docstring."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from .packing import PackedModel
from .trained import trained_model
from .writing import FORMATS, check_target, export_model

USER_MISTAKE = 2
EPILOG = "Exit codes: 0 done, 2 something in the command must change. Nothing is written then."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{' '.join(message.split())}; see --help")


def _parser() -> _Parser:
    description = "Export the model in a checkpoint of main.py with its weights in 4 bits."
    parser = _Parser(prog="quantization.export", description=description, epilog=EPILOG)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file that main.py has written")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument("--to-format", required=True, choices=list(FORMATS))
    parser.add_argument(
        "--weights", default="model", choices=["model", "ema"], help="ema: the moving average (default: model)"
    )
    return parser


def report(packed: PackedModel, directory: Path, to_format: str) -> str:
    """What was written, its size before and after, and what stays in high precision."""
    numbers = sum(weight.shape.numel() for weight in packed.weights.values())
    kept = sum(value.numel() for value in packed.others.values())
    patterns = dict.fromkeys(re.sub(r"(?<![^.])\d+(?=\.)", "*", name) for name in packed.others)
    files = sorted(file for file in directory.iterdir() if file.name != "config.json")
    after = ", ".join(f"{file.stat().st_size / 1e6:.2f} MB in {file.name}" for file in files)
    return "\n".join(
        (
            f"model   {packed.description.architecture}: {len(packed.weights)} linears, {numbers:,} weights in MXFP4",
            f"size    {packed.bytes_before / 1e6:.2f} MB in fp32; {after}",
            f"stays   {kept:,} numbers in high precision: {', '.join(patterns)}",
            f"wrote   {directory} in the format {to_format}",
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 the user must change something."""
    try:
        options = _parser().parse_args(argv)
        check_target(options.to)  # before a large checkpoint is read
        trained = trained_model(options.checkpoint, options.weights)
        arguments = trained.model_args
        packed = export_model(
            trained.model, options.to, options.to_format, trained.architecture, source=trained.source, **arguments
        )
        print(report(packed, options.to, options.to_format))
    except (ValueError, OSError) as error:
        print(f"quantization.export: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
