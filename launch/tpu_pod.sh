#!/usr/bin/env bash
# Runs one command on all workers of a Cloud TPU: copies this tree, installs it, starts it everywhere, follows worker 0.
#   launch/tpu_pod.sh --tpu=NAME --zone=ZONE [--project=P] [--create=TYPE] [--resume] [--deterministic] [--dry_run] \
#     -- COMMAND --config=… --workdir=gs://…
#   launch/tpu_pod.sh --tpu=xl --zone=us-west4-a -- run --config=configs/unidetox_gpt2_xl.py --workdir=gs://bucket/xl
#   --create=TYPE    make the TPU first: v5litepod-16, v5p-8, v6e-8, …; --version=RUNTIME where its usual one will not do
#   --resume         neither copy nor install: go on, on machines that are there
# The working directory must be one that all workers see. Exit code 75 (stopped, and saved) and a lost connection start
# the command again, UNIDETOX_RETRIES times (default 20); what is complete is not done again. A TPU that was taken away
# has to be made again first (--create).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
tpu='' zone='' project='' resume='' dry_run='' create='' version='' worker=()
while (($#)); do
  case "$1" in
    --help) sed -n '2,10s/^# //p' "$here/launch/tpu_pod.sh"; exit 0 ;;
    --tpu=*) tpu=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --create=*) create=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --resume) resume=yes ;;
    --deterministic) worker+=("$1") ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) echo "tpu_pod.sh: unknown argument $1 (try --help)" >&2; exit 2 ;;
  esac
  shift
done
[[ -n $tpu && -n $zone ]] || { echo "tpu_pod.sh: --tpu and --zone are needed (try --help)" >&2; exit 2; }
(($#)) || { echo "tpu_pod.sh: no command after -- (try --help)" >&2; exit 2; }
place=("--zone=$zone")
[[ -z $project ]] || place+=("--project=$project")

run() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
on_all() { run gcloud compute tpus tpu-vm ssh "$tpu" "${place[@]}" --worker=all "--command=$1"; }

if [[ -n $create ]]; then
  case "${version:-$create}" in
    v5litepod-*) version='v2-alpha-tpuv5-lite' ;;
    v5p-*) version='v2-alpha-tpuv5' ;;
    v6e-*) version='v2-alpha-tpuv6e' ;;
    v4-*) version='tpu-ubuntu2204-base' ;;
  esac
  run gcloud compute tpus tpu-vm create "$tpu" "${place[@]}" "--accelerator-type=$create" "--version=${version:?}"
fi
log=$(mktemp)
trap 'rm -f "$log" "$log.tar.gz"' EXIT
if [[ -z $resume ]]; then
  run tar -C "$here" --exclude=./.git --exclude=./.venv --exclude=./.cache --exclude=./runs -czf "$log.tar.gz" .
  run gcloud compute tpus tpu-vm scp "$log.tar.gz" "$tpu:unidetox_jax.tar.gz" "${place[@]}" --worker=all
  on_all 'mkdir -p unidetox_jax && tar -C unidetox_jax -xzf unidetox_jax.tar.gz && unidetox_jax/launch/tpu_worker.sh --install'
fi
printf -v remote '%q ' unidetox_jax/launch/tpu_worker.sh "${worker[@]}" -- "$@"
if [[ -n $dry_run ]]; then
  on_all "$remote"
  exit 0
fi
for ((attempt = 0; attempt <= ${UNIDETOX_RETRIES:-20}; attempt++)); do
  on_all "$remote" | tee "$log" || true # gcloud has exit codes of its own; the worker says its program's in a line
  code=$(sed -n 's/^tpu_worker.sh: exit code \([0-9]*\)$/\1/p' "$log" | tail -n 1)
  [[ -z $code || $code == 75 ]] || exit "$code"
  reason="stopped and saved"
  [[ -n $code ]] || reason="connection lost"
  echo "tpu_pod.sh: $reason; going on in ${UNIDETOX_WAIT:-30} s" >&2
  sleep "${UNIDETOX_WAIT:-30}"
done
exit 75
