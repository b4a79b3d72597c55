"""One package under two names: `quantization` in this repository, `tetrajet` where it is installed.

A program may import both names, for example if it runs in the repository while the package is installed. The operators
can be registered only once, so the second name must lead to the modules of the first one, submodules included.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

NAMES = ("quantization", "tetrajet")


class _OtherName(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of the package `own` under its `other` name.

    Another project's package of that name is left to the finders that follow.
    """

    def __init__(self, own: str, other: str) -> None:
        self._own, self._other = own, other
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = fullname.partition(".")[0]
        if top != self._other:
            return None
        if fullname == top:
            shared = not self._is_of_another_project()
        else:
            shared = sys.modules[top] is sys.modules[self._own]
        if not shared or importlib.util.find_spec(self._own_name(fullname)) is None:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._own_name(spec.name))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Undo the import system's changes to the module, which has been executed under its own name."""
        module.__spec__ = self._specs.pop(module.__spec__.name)
        if module is not sys.modules[self._own]:
            return
        # Importing `other.name` later would set the attribute `name` of the package, where a function may be.
        for name in [name for name in sys.modules if name.startswith(f"{self._own}.")]:
            sys.modules[self._other + name.removeprefix(self._own)] = sys.modules[name]

    def _own_name(self, fullname: str) -> str:
        return self._own + fullname.removeprefix(self._other)

    def _is_of_another_project(self) -> bool:
        spec = importlib.machinery.PathFinder.find_spec(self._other)
        folders = () if spec is None else spec.submodule_search_locations or ()
        return spec is not None and not any((Path(folder) / Path(__file__).name).is_file() for folder in folders)


def share_modules(package: str) -> None:
    """Make the modules of `package`, which is one of `NAMES`, importable by the other name, too."""
    if package in NAMES:
        other = NAMES[1 - NAMES.index(package)]
        sys.meta_path.insert(0, _OtherName(package, other))
