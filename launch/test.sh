#!/usr/bin/env bash
# Installs the package with its test extra into a virtual environment and runs the tests.
#   launch/test.sh [pytest arguments]      VENV=DIR uses another environment (default: .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == --help ]]; then sed -n '2,3s/^# //p' "$0"; exit 0; fi
venv=${VENV:-.venv}
[[ -x "$venv/bin/python" ]] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet torch==2.13.0   # first: its CPU build must satisfy what follows
"$venv/bin/python" -m pip install --quiet --editable '.[test]'
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile -q "$@"
