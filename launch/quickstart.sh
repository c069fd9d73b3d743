#!/usr/bin/env bash
# UniDetox from nothing to a report: installs the package and runs configs/quickstart.py.
#   launch/quickstart.sh [WORKDIR] [--config.…=…]      default WORKDIR: runs/quickstart; VENV=DIR (.venv)
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == --help ]]; then sed -n '2,3s/^# //p' "$0"; exit 0; fi
workdir=runs/quickstart
if [[ "${1:-}" != "" && "${1:-}" != --* ]]; then workdir=$1; shift; fi
extra=''
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then extra='[cuda]'; fi
if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then extra='[tpu]'; fi
venv=${VENV:-.venv}
[[ -x "$venv/bin/python" ]] || python3 -m venv "$venv"
if ! "$venv/bin/python" -c 'import unidetox_jax, jax' 2>/dev/null; then
  echo "installing unidetox-jax$extra into $venv"
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  "$venv/bin/python" -m pip install --quiet --editable ".$extra"
fi
exec "$venv/bin/python" -m unidetox_jax.cli run --config=configs/quickstart.py --workdir="$workdir" "$@"
