"""The machine, versions and commit behind a number."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def environment(on_gpu: bool | None = None) -> dict[str, str]:
    """Device, versions and commit, for a log or a row of a table. With several GPUs, the first one is named.

    `on_gpu` says whether the GPU is the device; by default it is if there is one.
    """
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "commit": _commit(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The checkout's commit, and whether its files have changed since; "unknown" without git or outside a checkout."""
    if not (ROOT / ".git").exists():  # a folder around this one may be a checkout of something else
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True).stdout
    except OSError:
        return "unknown"
    return (commit or "unknown") + (", with changes" if changed else "")


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return f"{os.cpu_count()} cores of {found[1]}"
    return f"{os.cpu_count()} cores of {platform.machine()}"
