#!/usr/bin/env bash
# Called by tpu_pod.sh on each worker of a Cloud TPU: runs the program with output to ~/unidetox.log, worker 0's also shown.
#   launch/tpu_worker.sh --install
#   launch/tpu_worker.sh [--deterministic] [--dry_run] -- COMMAND --config=… --workdir=gs://…
set -euo pipefail
cd "$(dirname "$0")/.."
dry_run='' environment=(tpu)
while (($#)); do
  case "$1" in
    --help) sed -n '2,4s/^# //p' launch/tpu_worker.sh; exit 0 ;;
    --install) # in a virtual environment, not the machine's Python
      python3 -m venv .venv
      .venv/bin/python -m pip install --quiet --upgrade pip
      exec .venv/bin/python -m pip install --quiet --editable '.[tpu]'
      ;;
    --deterministic) environment+=("$1") ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) echo "tpu_worker.sh: unknown argument $1 (try --help)" >&2; exit 2 ;;
  esac
  shift
done
(($#)) || { echo "tpu_worker.sh: no command after -- (try --help)" >&2; exit 2; }
[[ -z $dry_run ]] || environment+=(--dry_run)
# shellcheck source=launch/env.sh
source launch/env.sh "${environment[@]}"
command=("${UNIDETOX:-.venv/bin/unidetox}" "$@")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
# A process that outlived its connection would still hold the TPU
if [[ -f ~/unidetox.pid ]] && kill "$(cat ~/unidetox.pid)" 2>/dev/null; then sleep "${UNIDETOX_WAIT:-30}"; fi
code=0
if [[ $(hostname) =~ -w-0$ ]]; then
  "${command[@]}" > >(tee -a ~/unidetox.log) 2>&1 &
else
  "${command[@]}" >>~/unidetox.log 2>&1 &
fi
echo "$!" >~/unidetox.pid
wait "$!" || code=$?
rm -f ~/unidetox.pid
[[ ! $(hostname) =~ -w-0$ ]] || echo "tpu_worker.sh: exit code $code"
exit "$code"
