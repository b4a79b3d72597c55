#!/usr/bin/env bash
# Prepare a Python environment for this project. Running it again does nothing.
#   bash scripts/setup.sh          makes .venv, or leaves an active environment alone that has the requirements;
#                                  one that lacks something stays as it is, and .venv is made beside it
#   source scripts/setup.sh        the same, and leaves it active in your shell
# PYTHON=python3.12 chooses the interpreter of a new .venv. REQUIREMENTS=requirements-ci.txt installs the versions that
# CI tests with, in place of requirements.txt.

_tetrajet_setup() {
    local root python wanted="${REQUIREMENTS:-requirements.txt}"
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return
    if [ ! -f "$root/$wanted" ]; then
        echo "setup.sh: error: REQUIREMENTS must be a file of the repository, got $wanted; unset it" >&2
        return 2
    fi
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python "$root/scripts/check_requirements.py" "$root/$wanted" --quiet; then
        return 0
    fi
    if [ ! -x "$root/.venv/bin/python" ] || ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="${PYTHON:-python3}"
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "setup.sh: error: Python 3.10 or newer is needed, $python is not; set PYTHON=/path/to/python3.12" >&2
            return 2
        fi
        echo "setup.sh: making .venv with $("$python" --version)"
        rm -rf "$root/.venv"
        if ! "$python" -m venv "$root/.venv"; then
            echo "setup.sh: error: $python cannot make a virtual environment; on Debian: apt install python3-venv" >&2
            return 2
        fi
    fi
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate" || return
    if ! python "$root/scripts/check_requirements.py" "$root/$wanted" --quiet; then
        echo "setup.sh: installing $wanted, several GB with PyTorch's CUDA libraries: some minutes"
        if ! python -m pip install --quiet --disable-pip-version-check -r "$root/$wanted"; then
            echo "setup.sh: error: pip could not install $wanted; see its message above" >&2
            return 1
        fi
        python "$root/scripts/check_requirements.py" "$root/$wanted" || return 1
    fi
}

_tetrajet_setup
_tetrajet_status=$?
unset -f _tetrajet_setup
if [ "${BASH_SOURCE[0]}" = "$0" ]; then exit "$_tetrajet_status"; fi
return "$_tetrajet_status"
