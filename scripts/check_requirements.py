"""Exit 0 if this Python has what a file of requirements asks for; else name what is missing and exit 1.

python scripts/check_requirements.py FILE [--quiet]
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def problems(requirements: Path) -> list[str]:
    try:
        from packaging.requirements import Requirement  # comes with pytest
    except ModuleNotFoundError:
        return ["packaging is not installed"]
    found = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} {installed} does not satisfy {requirement.specifier}")
    return found


if __name__ == "__main__":
    missing = problems(Path(sys.argv[1]))
    if missing and "--quiet" not in sys.argv:
        print("\n".join(missing), file=sys.stderr)
    sys.exit(bool(missing))
