#!/usr/bin/env bash
# Environment of a run, for every launcher; sourced, not executed.
#   source launch/env.sh gpu|tpu [--deterministic] [--dry_run] [--help]
#   --deterministic    bitwise reproducible runs on GPUs, somewhat slower (TPUs always are)
#   --dry_run          print what would be set
#   UNIDETOX_CACHE     directory of compiled programs (default: ~/.cache/unidetox_jax/jax). On several hosts use one that
#                      all share, or gs://…: process 0 writes, all read.
#   UNIDETOX_MEMORY    share of a GPU's memory that JAX preallocates (default: 0.92)

unidetox_env() {
  local kind=${1:-} dry_run='' deterministic='' argument flags cache
  for argument in "${@:2}"; do
    case "$argument" in
      --deterministic) deterministic=yes ;;
      --dry_run) dry_run=yes ;;
      --help) kind=--help ;;
      *) kind=unknown ;;
    esac
  done
  if [[ $kind == --help ]]; then sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; return 0; fi
  if [[ $kind != gpu && $kind != tpu ]]; then echo "env.sh: expected gpu or tpu, and --help's arguments" >&2; return 2; fi
  # Compiling GPT-2 XL's programs takes minutes, which the cache saves in later runs
  cache=${UNIDETOX_CACHE:-${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/unidetox_jax/jax}}
  local names=(JAX_COMPILATION_CACHE_DIR TOKENIZERS_PARALLELISM)
  local values=("$cache" false) # silences a warning at every fork of the data pipeline
  if [[ $kind == gpu ]]; then
    # Overlaps gathering the next layer's weights with computing this layer
    flags="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
    if [[ -n $deterministic ]]; then
      # The order of atomic additions, and kernels autotuned by timings, differ from run to run
      flags="$flags --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    fi
    # JAX's default is 0.75; NCCL and cuDNN need a little memory outside of its pool
    names+=(XLA_PYTHON_CLIENT_MEM_FRACTION XLA_FLAGS)
    values+=("${UNIDETOX_MEMORY:-0.92}" "${flags# }")
  fi
  local index
  for index in "${!names[@]}"; do
    if [[ -n $dry_run ]]; then
      printf 'export %s=%q\n' "${names[index]}" "${values[index]}"
    else
      export "${names[index]}=${values[index]}"
    fi
  done
}

unidetox_env "$@"
