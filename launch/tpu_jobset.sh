#!/usr/bin/env bash
# Starts a run on a TPU slice of GKE: fills in tpu_jobset.yaml and passes it to kubectl.
#   launch/tpu_jobset.sh --name=NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 [--chips_per_host=4]
#     [--cache=gs://…] [--dry_run] -- COMMAND --config=… --workdir=gs://…
#   IMAGE: this repository as working directory, with the package and its tpu extra installed. Needs the JobSet controller.
#   kubectl get jobset NAME; kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
name='' image='' accelerator='' topology='' chips=4 cache='' dry_run=''
while (($#)); do
  case "$1" in
    --help) sed -n '2,6s/^# //p' "$here/tpu_jobset.sh"; exit 0 ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips_per_host=*) chips=${1#*=} ;;
    --cache=*) cache=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) echo "tpu_jobset.sh: unknown argument $1 (try --help)" >&2; exit 2 ;;
  esac
  shift
done
for argument in name image accelerator topology; do
  [[ -n ${!argument} ]] || { echo "tpu_jobset.sh: --$argument is needed (try --help)" >&2; exit 2; }
done
(($#)) || { echo "tpu_jobset.sh: no command after -- (try --help)" >&2; exit 2; }
[[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || { echo "tpu_jobset.sh: --topology=$topology: expected a form like 4x4" >&2; exit 2; }
hosts=$((${topology//x/*} / chips))
((hosts > 0 && hosts * chips == ${topology//x/*})) || {
  echo "tpu_jobset.sh: --topology=$topology has no multiple of $chips chips (--chips_per_host)" >&2
  exit 2
}
arguments=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@") # JSON is valid YAML
manifest=$(<"$here/tpu_jobset.yaml")
for word in NAME:"$name" HOSTS:"$hosts" ACCELERATOR:"$accelerator" TOPOLOGY:"$topology" IMAGE:"$image" CHIPS:"$chips" \
  CACHE:"$cache" ARGUMENTS:"$arguments"; do
  manifest=${manifest//": ${word%%:*}"/": ${word#*:}"}
  manifest=${manifest//"'${word%%:*}'"/"'${word#*:}'"}
done
if [[ -n $dry_run ]]; then
  printf '%s\n' "$manifest"
  echo "kubectl apply -f -"
  exit 0
fi
kubectl apply -f - <<<"$manifest"
