#!/usr/bin/env bash
# Tests and benchmarks for an NVIDIA GPU.
#   launch/gpu_check.sh [tests] [decode] [train] [packed] [evaluate]     default: all; OUT=DIR (runs/gpu_check), VENV=DIR
#
# tests: attention, packing and decoding with the GPU's programs. decode: two models of GPT-2 XL's shape, 128 texts of 256
# tokens, beside PyTorch. train: LLaMA-2-7B's shape, 8 texts of 256 tokens. packed: texts of 16 to 256 tokens, packed and
# padded. evaluate: 940 prompts, 25 continuations of 20 tokens, if DATA (../shared/data) exists.
# Each part has a time limit. OUT/gpu_check.json gets every measurement; a table is printed at the end.
# SIZE=tiny: small shapes, for a rehearsal on a CPU. PYTHON=python3 replaces VENV's.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
if [[ "${1:-}" == --help ]]; then sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0; fi
python=${PYTHON:-${VENV:-.venv}/bin/python}
out=${OUT:-runs/gpu_check}
data=${DATA:-../shared/data}
tiny=${SIZE:-}
patience=$((${#tiny} ? 8 : 1)) # compiling takes longer on a CPU
mkdir -p "$out"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export XLA_PYTHON_CLIENT_PREALLOCATE=false # leaves memory for PyTorch

bench() { # PART SECONDS FLAGS: writes the measurements to OUT/PART.jsonl
  local part=$1 seconds=$2
  shift 2
  timeout "$((seconds * patience))" "$python" -m unidetox_jax.cli bench "$@" 2> "$out/$part.log" | tee "$out/$part.txt"
  local status=${PIPESTATUS[0]}
  grep '^{' "$out/$part.txt" > "$out/$part.jsonl"
  return "$status"
}

tests() {
  local platform=cuda
  [[ -z $tiny ]] || platform=cpu
  JAX_PLATFORMS=$platform JAX_DISABLE_MOST_OPTIMIZATIONS=false timeout 180 "$python" -m pytest -q -n 0 tests/test_gpu.py
}

decode() {
  local shape=(--config=configs/bench.py:xl "--config.bench.batch_sizes=(128,)")
  [[ -z $tiny ]] || shape=(--config=configs/bench.py "--config.bench.batch_sizes=(2,)" --config.bench.new_tokens=4)
  bench decode 150 "${shape[@]}" --config.bench.repeats=1 --config.bench.against_torch=True
}

train() {
  local shape=(--config.bench.model=meta-llama/Llama-2-7b-hf "--config.bench.train_batch_sizes=(8,)")
  [[ -z $tiny ]] || shape=("--config.bench.train_batch_sizes=(2,)" --config.bench.train_length=16 --config.bench.steps=2)
  bench train 100 --config=configs/bench.py "--config.bench.what=('train',)" --config.dtype=bfloat16 \
    --config.bench.precision=bfloat16 --config.bench.remat=dots "${shape[@]}"
}

packed() {
  local shape=(--config.bench.model=openai-community/gpt2-xl "--config.bench.train_batch_sizes=(32,)")
  [[ -z $tiny ]] || shape=("--config.bench.train_batch_sizes=(4,)" --config.bench.train_length=32 --config.bench.steps=2)
  bench packed 100 --config=configs/bench.py "--config.bench.what=('train',)" --config.dtype=bfloat16 \
    --config.bench.remat=dots --config.bench.train_shortest=16 "--config.bench.layouts=('pack','pad')" "${shape[@]}"
}

evaluate() {
  if [[ ! -d $data ]]; then echo "evaluate: skipped, no data in $data (DATA=DIR)" && return; fi
  local shape=(--config.evaluate.samples=25)
  [[ -z $tiny ]] || shape=(--config.evaluate.samples=2 --config.evaluate.max_prompts=4)
  bench evaluate 150 --config=configs/real_small.py:tiny "--config.bench.what=('evaluate',)" --config.data_dir="$data" \
    "${shape[@]}" --config.bench.against_torch=True
}

failed=()
(($#)) || set -- tests decode train packed evaluate
for name in "$@"; do
  case $name in
    tests | decode | train | packed | evaluate)
      started=$SECONDS
      echo "== $name"
      "$name" || { failed+=("$name") && tail -n 3 "$out/$name.log" 2> /dev/null; }
      echo "   $((SECONDS - started)) s"
      ;;
    *) echo "gpu_check.sh: no part '$name' (tests, decode, train, packed, evaluate)" >&2 && exit 2 ;;
  esac
done
"$python" - "$out" << 'PYTHON'
import json, pathlib, sys
from unidetox_jax.benchmarks.bench import table
out = pathlib.Path(sys.argv[1])
rows = [json.loads(line) | {"part": file.stem} for file in sorted(out.glob("*.jsonl")) for line in file.read_text().splitlines()]
(out / "gpu_check.json").write_text(json.dumps(rows, indent=1))
columns = "part implementation layout ms_per_step tokens_per_second seconds bandwidth_share mfu times_torch compile_seconds program_gigabytes"
print(rows[0]["device"] if rows else "", table(rows, columns.split()), sep="\n")
PYTHON
if ((${#failed[@]})); then echo "gpu_check.sh: failed or out of time: ${failed[*]}" >&2 && exit 1; fi
