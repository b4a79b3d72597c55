#!/usr/bin/env bash
# Set up, then run the tests on up to eight cores.
#   bash scripts/test.sh           all tests but the long ones
#   bash scripts/test.sh --long    what only a run of minutes can show
# Further options go to pytest.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup.sh"
cd "$root"
unset REQUIREMENTS # tests call setup.sh in copies of parts of the repository, which lack such a file
if [ "${1:-}" = --long ]; then
    set -- -m long "${@:2}"
fi
exec python -m pytest tests/ -n auto --maxprocesses 8 --dist worksteal "$@"
