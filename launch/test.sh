#!/usr/bin/env bash
# Installs the package with its test extra into a virtual environment and runs the tests; without arguments also lint,
# format and type checks.
#   launch/test.sh [pytest arguments]
# VENV=DIR: the environment (default: .venv). PYTHON=python3.12: creates it with another Python (default: python3).
# EXTRA=quick: without PyTorch, lm_eval and the TPU compiler, and without the tests that need them.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == --help ]]; then sed -n '2,6s/^# //p' "$0"; exit 0; fi
venv=${VENV:-.venv}
extra=${EXTRA:-test}
[[ -x "$venv/bin/python" ]] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
if [[ "$extra" == test ]]; then
  "$venv/bin/python" -m pip install --quiet torch==2.13.0 # first, so that the CPU build satisfies the extra
fi
"$venv/bin/python" -m pip install --quiet --editable ".[$extra]"
if (($# == 0)); then # takes seconds
  "$venv/bin/ruff" check
  "$venv/bin/ruff" format --check
  "$venv/bin/mypy"
fi
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 -q "$@"
