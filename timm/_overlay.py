"""Lays this directory over the installed timm.

A module that exists here is this project's; every other `timm.*` module is the installed release's. A module of ours
first runs its installed counterpart in its own namespace (`run_installed`), so that classes, registered models and
pickles carry the names they always had, and then replaces what it wants to differ.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import re
import sys
from pathlib import Path

MINIMUM_VERSION = (1, 0, 20)
_OVERLAY = Path(__file__).resolve().parent


def run_installed(namespace: dict) -> None:
    """Execute the installed counterpart of the calling module in `namespace`, the caller's `globals()`.

    A package also gets the installed directory behind its own on its `__path__`. Raises ImportError, in one line, if
    timm is not installed or too old.
    """
    source = _installed_directory() / Path(namespace["__file__"]).resolve().relative_to(_OVERLAY)
    if "__path__" in namespace:
        namespace["__path__"].append(str(source.parent))
    docstring = namespace["__doc__"]
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec", dont_inherit=True), namespace)
    namespace["__doc__"] = docstring


def _installed_directory() -> Path:
    others = [entry for entry in sys.path if Path(entry).resolve() != _OVERLAY.parent]
    spec = importlib.machinery.PathFinder.find_spec("timm", others)
    required = ".".join(map(str, MINIMUM_VERSION))
    if spec is None or spec.origin is None:
        raise ImportError(f"timm >= {required} must be installed beside this project; pip install -r requirements.txt")
    version = importlib.metadata.version("timm")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < MINIMUM_VERSION:
        raise ImportError(f"timm >= {required} is required, got {version}; pip install -U timm")
    return Path(spec.origin).parent
