#!/usr/bin/env bash
# Set up, then run the tests on up to eight cores; options go to pytest.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup.sh"
cd "$root"
exec python -m pytest tests/ -n auto --maxprocesses 8 --dist worksteal "$@"
