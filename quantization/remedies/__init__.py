"""Remedies for oscillation, one file each. Every file of this folder is imported, so that its remedy is registered."""

from __future__ import annotations

import importlib
import pkgutil

from . import q_ema, q_ramping  # noqa: F401  the paper's own come first in --help and in `REMEDIES`

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
