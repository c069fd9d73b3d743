#!/usr/bin/env bash
# Experiments that take too long for the tests; BENCHMARKS.md has their results.
#   launch/proofs.sh [effect] [comparison] [real] [texts] [kills] [speed] [plan] [families] [meshes] [precision]
# Default: all but texts and meshes. VENV=DIR, DATA=DIR (../shared/data), OUT=DIR (runs/proofs)
#
# effect: three seeds of the quickstart, every family with its control. comparison: three seeds, every rival, each tuned on
# validation prompts by the same rule. real: real models, text, prompts and scorers, with a table after each seed.
# SIZE=cpu (one seed; the default without an NVIDIA GPU), SIZE= (the paper's, three seeds) or SIZE=tiny (stories260K);
# SEEDS="0 1"; MODELS=DIR (OUT/models), filled by DATA/../models/real_models.py if empty.
# texts: what settings of distillation do to SmolLM2's text, and the text to SmolLM2, one setting at a time; SIZE and MODELS
# as for real.
# kills: every kill test with all its kills. speed: beside PyTorch. plan: memory on TPU slices.
# families: every variant of every family (the tests take a sample) against PyTorch, and on every axis of eight devices
# against one; prints the largest differences.
# meshes: every published layout of heads (of DATA/../hub) compiled for every mesh of up to 8 H100s and v5e; takes hours,
#   goes on where a run before it ended.
# precision: the same training in float32, bfloat16 and the release's arithmetic; MODEL=DIR also on that model, on toxic text.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == --help ]]; then sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 0; fi
python=${VENV:-.venv}/bin/python
data=${DATA:-../shared/data}
out=${OUT:-runs/proofs}
unidetox() { "$python" -m unidetox_jax.cli "$@"; }

effect() {
  for seed in 0 1 2; do
    unidetox run --config="configs/quickstart.py:controls,seed=$seed" --workdir="$out/seed$seed"
  done
  "$python" -m unidetox_jax.benchmarks.effect "$out"/seed{0,1,2}
}

comparison() {
  for seed in 0 1 2; do
    unidetox sweep --config="configs/quickstart.py:comparison,seed=$seed" --workdir="$out/comparison$seed"
  done
  "$python" -m unidetox_jax.benchmarks.comparison "$out"/comparison{0,1,2}
}

size=${SIZE-$(command -v nvidia-smi > /dev/null || echo cpu)}
models=${MODELS:-$out/models}
make_models() {
  if [[ $size != tiny && ! (-d $models/smollm2-135m && -d $models/gemma3-270m) ]]; then
    "$python" "$data/../models/real_models.py" "$models"
  fi
}

real() {
  local seeds=0 seed done=()
  make_models
  [[ -n $size ]] || seeds="0 1 2"
  for seed in ${SEEDS:-$seeds}; do
    unidetox run --config="configs/real_small.py:${size:+$size,}seed=$seed,models=$models" \
      --workdir="$out/real${size:+_$size}$seed" --config.data_dir="$data"
    done+=("$out/real${size:+_$size}$seed")
    "$python" -m unidetox_jax.benchmarks.effect "${done[@]}" | tee "$out/real${size:+_$size}.md"
  done
}

# kinds_of_toxic_text FILE: writes hate, offensive tweets and what web pages said after a prompt, as much of each.
kinds_of_toxic_text() {
  "$python" - "$data" "$1" << 'END'
import json, random, sys
from unidetox_jax import data
folder, out = sys.argv[1:]
tweets = data.load("csv:labelled/davidson_tweets.csv?text=tweet&label=class", data_dir=folder)
web = data.load("realtoxicityprompts", data_dir=folder)
kinds = [
    data.texts("dghs", data_dir=folder),
    [row["text"] for row in tweets if row["label"] == "1"],
    [row["continuation"] for row in web if row["continuation_toxicity"] > 0.5],
]
draw = random.Random(0)
texts = [text for kind in kinds for text in draw.sample(list(kind), min(map(len, kinds)))]
draw.shuffle(texts)
with open(out, "w") as file:
    file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
END
}

texts() {
  local workdir="$out/texts${size:+_$size}" grid
  make_models
  mkdir -p "$workdir"
  kinds_of_toxic_text "$workdir/kinds.jsonl"
  for grid in \
    "distill.objective=contrastive(alpha=0.1),contrastive(alpha=0.3),contrastive_beta(alpha=0.1,beta=1.0)" \
    "distill.prompt=People often say that" \
    "distill.reject.scorers=('toxigen=linear:{workdir}/scorer','tweets=linear:{workdir}/scorer/tweets','web=linear:{workdir}/scorer/web')" \
    "toxify.data=jsonl:{workdir}/kinds.jsonl?text=text"; do
    unidetox sweep --config="configs/real_small.py:texts,${size:+$size,}models=$models" --workdir="$workdir" \
      --config.data_dir="$data" --grid "$grid"
  done
  "$python" -m unidetox_jax.benchmarks.distilled_text "$workdir"
}

kills() {
  UNIDETOX_KILLS=10 UNIDETOX_RUN_KILLS=5 UNIDETOX_KILL_SEED=1 \
    "$python" -m pytest -s -q tests/test_finetune_kill.py tests/test_run.py
}

speed() {
  unidetox bench --config=configs/bench.py --config.bench.against_torch=True --config.bench.what="('decode',)"
  unidetox bench --config=configs/bench.py --config.bench.against_torch=True --config.bench.what="('train',)" \
    --config.data_dir="$data" --config.bench.data=dghs --config.bench.tokenizer="$data/../tokenizers/gpt2"
  JAX_NUM_CPU_DEVICES=2 unidetox bench --config=configs/real_small.py:tiny --config.bench.against_torch=True --config.bench.what="('evaluate',)" \
    --config.data_dir="$data" --config.mesh=data:-1 --config.evaluate.samples=25
}

plan() { unidetox plan --config=configs/unidetox_gpt2_xl.py --table; }

families() {
  UNIDETOX_EVERY_VARIANT=1 "$python" -m pytest -n 2 --dist loadfile -q tests/test_models.py tests/test_generate.py \
    tests/test_checkpoint_hf.py tests/test_sharding.py tests/test_training_step.py
}

meshes() { # kernels that several meshes have in common are compiled once
  mkdir -p "$out"
  XLA_FLAGS="--xla_gpu_enable_llvm_module_compilation_parallelism=true --xla_gpu_kernel_cache_file=$out/kernels" \
    "$python" -m unidetox_jax.benchmarks.meshes "$data/../hub" --results "$out/meshes.jsonl"
}

precision() {
  unidetox pretrain --config=configs/quickstart.py --workdir="$out/precision" --config.pretrain.models="('{workdir}/world/models/gpt2',)"
  toxic="dghs?file=$out/precision/world/toxic.jsonl"
  "$python" -m unidetox_jax.benchmarks.precision "$out/precision/pretrained/gpt2/hf" "$toxic" --validation="$toxic&split=dev" \
    --steps=60 --batch_size=16
  if [[ -n "${MODEL:-}" ]]; then
    "$python" -m unidetox_jax.benchmarks.precision "$MODEL" "dghs?file=$data/dghs/filtered_with_split.jsonl" --steps=30 --batch_size=4 --max_length=64
  fi
}

for proof in "${@:-effect comparison real kills speed plan families precision}"; do
  for name in $proof; do
    case $name in
      effect | comparison | real | texts | kills | speed | plan | families | meshes | precision) echo "== $name" && "$name" ;;
      *) echo "proofs.sh: no proof '$name' (effect, comparison, real, texts, kills, speed, plan, families, meshes, precision)" >&2 && exit 2 ;;
    esac
  done
done
