#!/usr/bin/env bash
# Installs the package with its test extra into a virtual environment and runs the tests, after lint, format and types
# where no arguments are given.
#   launch/test.sh [pytest arguments]
# VENV=DIR uses another environment (default: .venv), PYTHON=python3.12 makes it with another Python (default: python3),
# EXTRA=quick leaves out PyTorch, lm_eval and the TPU's compiler, and with them the tests that import them.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == --help ]]; then sed -n '2,6s/^# //p' "$0"; exit 0; fi
venv=${VENV:-.venv}
extra=${EXTRA:-test}
[[ -x "$venv/bin/python" ]] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
if [[ "$extra" == test ]]; then
  "$venv/bin/python" -m pip install --quiet torch==2.13.0 # first: its CPU build must satisfy what follows
fi
"$venv/bin/python" -m pip install --quiet --editable ".[$extra]"
if (($# == 0)); then # seconds, against minutes of tests
  "$venv/bin/ruff" check
  "$venv/bin/ruff" format --check
  "$venv/bin/mypy"
fi
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 -q "$@"
