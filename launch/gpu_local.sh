#!/usr/bin/env bash
# Runs one command on this machine's GPUs in one process, and again after exit code 75 (stopped, state saved).
#   launch/gpu_local.sh [--gpus=0,1,…] [--deterministic] [--dry_run] -- COMMAND --config=… --workdir=…
#   launch/gpu_local.sh -- run --config=configs/unidetox_gpt2_xl.py --workdir=runs/xl
#   UNIDETOX    the program (default: unidetox);  UNIDETOX_RETRIES    restarts after 75 at most (default: 20)
set -euo pipefail
cd "$(dirname "$0")/.."
dry_run='' gpus='' environment=(gpu)
while (($#)); do
  case "$1" in
    --help) sed -n '2,5s/^# //p' launch/gpu_local.sh; exit 0 ;;
    --dry_run) dry_run=yes ;;
    --gpus=*) gpus=${1#*=} ;;
    --deterministic) environment+=("$1") ;;
    --) shift; break ;;
    *) echo "gpu_local.sh: unknown argument $1 (try --help)" >&2; exit 2 ;;
  esac
  shift
done
(($#)) || { echo "gpu_local.sh: no command after -- (try --help)" >&2; exit 2; }
[[ -z $dry_run ]] || environment+=(--dry_run)
# shellcheck source=launch/env.sh
source launch/env.sh "${environment[@]}"
command=("${UNIDETOX:-unidetox}" "$@")
[[ -z $gpus ]] || command=(env "CUDA_VISIBLE_DEVICES=$gpus" "${command[@]}")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
for ((attempt = 0; attempt <= ${UNIDETOX_RETRIES:-20}; attempt++)); do
  code=0
  "${command[@]}" || code=$?
  ((code == 75)) || exit "$code"
  echo "gpu_local.sh: stopped and saved; continuing" >&2
done
exit 75
