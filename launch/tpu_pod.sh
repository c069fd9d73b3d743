#!/usr/bin/env bash
# Runs one command on all workers of a Cloud TPU: copies and installs this repository, starts it, shows worker 0's output.
#   launch/tpu_pod.sh --tpu=NAME --zone=ZONE [--project=P] [--create=TYPE] [--resume] [--deterministic] [--dry_run] \
#     -- COMMAND --config=… --workdir=gs://…
#   launch/tpu_pod.sh --tpu=xl --zone=us-west4-a -- run --config=configs/unidetox_gpt2_xl.py --workdir=gs://bucket/xl
#   --create=TYPE    creates the TPU: v5litepod-16, v5p-8, v6e-8, …; --version=RUNTIME if not its usual one
#   --resume         neither copies nor installs, as a former call did
# All workers must see the working directory. After exit code 75 (stopped, state saved) or a lost connection the command is
# started again, UNIDETOX_RETRIES times at most (default 20); complete work is not repeated. A TPU that was taken away must
# be created again (--create).
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
  # Environments and caches begin with a dot
  run tar -C "$here" --exclude='./.*' --exclude=./runs --exclude=./build --exclude=./dist -czf "$log.tar.gz" .
  run gcloud compute tpus tpu-vm scp "$log.tar.gz" "$tpu:unidetox_jax.tar.gz" "${place[@]}" --worker=all
  on_all 'mkdir -p unidetox_jax && tar -C unidetox_jax -xzf unidetox_jax.tar.gz && unidetox_jax/launch/tpu_worker.sh --install'
fi
printf -v remote '%q ' unidetox_jax/launch/tpu_worker.sh "${worker[@]}" -- "$@"
if [[ -n $dry_run ]]; then
  on_all "$remote"
  exit 0
fi
for ((attempt = 0; attempt <= ${UNIDETOX_RETRIES:-20}; attempt++)); do
  on_all "$remote" | tee "$log" || true # gcloud has its own exit codes; the worker prints the program's
  code=$(sed -n 's/^tpu_worker.sh: exit code \([0-9]*\)$/\1/p' "$log" | tail -n 1)
  [[ -z $code || $code == 75 ]] || exit "$code"
  reason="stopped and saved"
  [[ -n $code ]] || reason="connection lost"
  echo "tpu_pod.sh: $reason; continuing in ${UNIDETOX_WAIT:-30} s" >&2
  sleep "${UNIDETOX_WAIT:-30}"
done
exit 75
