#!/usr/bin/env bash
# Reproduce tables and figures of the paper:
#   bash scripts/reproduce.sh TARGET [--protocol smoke|small|long|imagenet] [...]
#   TARGET     table1 .. table10, fig2 .. fig6, or all; --help lists the options
# DATA_PATH is where small and long (Fashion-MNIST) and imagenet find their images; smoke, the default, needs none.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -d "${DATA_PATH:-}" ]; then export DATA_PATH="$(cd "$DATA_PATH" && pwd)"; fi
source "$root/scripts/setup.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec python -m reproduction "$@"
