#!/usr/bin/env bash
# Reproduce tables and figures of the paper:
#   bash scripts/reproduce.sh TARGET [--protocol smoke|small|long|imagenet] [...]
#   TARGET     table1 .. table10, fig2 .. fig6, or all; --help lists the options
# DATA_PATH is where small and long (Fashion-MNIST) and imagenet find their images; smoke, the default, needs none.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -d "${DATA_PATH:-}" ]; then export DATA_PATH="$(cd "$DATA_PATH" && pwd)"; fi
source "$root/scripts/setup.sh"
# python -m reproduction, but never one that lies in the caller's directory.
exec python -c 'import runpy, sys; sys.path[0] = sys.argv.pop(1)
runpy.run_module("reproduction", run_name="__main__", alter_sys=True)' "$root" "$@"
