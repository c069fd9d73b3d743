"""The library gives the same results under other JAX settings, up to precision."""

import json
import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT
from variants import VARIANTS, chosen

from unidetox_jax import models, sharding
from unidetox_jax.benchmarks import meshes

pytestmark = pytest.mark.slow

SCRIPT = """
import dataclasses, json, sys
import jax, numpy as np
from unidetox_jax import checkpoint, decoding, models, training
from unidetox_jax.decoding import objectives, warpers
from unidetox_jax.evaluation.likelihood import loglikelihood

SMALL = {
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "llama": {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 2, "max_position_embeddings": 64,
    },
}
directory, *families = sys.argv[1:]
tokens = np.arange(32).reshape(4, 8) % 7 + np.arange(4)[:, None]
mask = np.ones((4, 8), int)
mask[0, :3] = 0


def compute(family):
    cfg = models.config_from_hf({"model_type": family, "bos_token_id": 0, "eos_token_id": 1, **SMALL[family]})
    path = f"{directory}/{family}"
    checkpoint.save_hf(path, models.Model(models.init(cfg, jax.random.key(0)), cfg))
    model = checkpoint.load(path)
    cfg = dataclasses.replace(model.cfg, dtype="float32")
    model = models.Model(model.params, cfg)
    logits, cache = models.prefill(model.params, tokens, cfg, models.init_cache(cfg, 4, 16), mask)
    logits, _ = models.decode_step(model.params, logits.argmax(-1), cfg, cache)
    result = {"forward": models.forward(model.params, tokens, cfg, mask).mean((1, 2)), "step": logits.mean(1)}
    for form in ("own",) if jax.config.jax_disable_jit else ("own", "official"):
        result[form] = decoding.generate(
            [model, model], tokens, objective=objectives.get("contrastive", alpha=0.1), max_new_tokens=4, seed=3,
            warpers=[warpers.top_k(20), warpers.top_p(0.9), warpers.temperature(0.8)], attention_mask=mask, cache=form,
        ).tokens
    if jax.config.jax_disable_jit:  # a hundred times slower: skip the rest
        return result
    result["all"] = decoding.generate(
        [model], tokens, objective=objectives.get("base"), max_new_tokens=4, samples=2, log_probabilities=True
    ).log_probabilities
    contexts = [list(range(2, 24))] * 4 + [[3]]
    result["likelihood"] = loglikelihood(model, contexts, [[5, 6], [7], [8, 9, 10], [11, 5], [4, 5]]).sums
    batch = {"tokens": tokens.astype(np.int32), "loss_mask": mask != 0}
    optimizer = training.Optimizer(1e-3, 10, weight_decay=0.1)
    step = training.make_train_step(cfg, optimizer, accumulation=2)
    state, _ = step(training.init_state(model.params, optimizer), batch)
    state, metrics = step(state, batch)
    result["train"] = metrics["loss"]
    return result


found = {family: compute(family) for family in families}
print(json.dumps(jax.tree.map(lambda value: np.asarray(value).ravel().tolist(), found)))
"""


def run(directory, *families, **surroundings):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **surroundings}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, directory, *families], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"), "gpt2", "llama")


@pytest.mark.parametrize(
    ("surroundings", "families"),
    [
        ({"JAX_ENABLE_X64": "1"}, ("gpt2", "llama")),
        ({"JAX_DISABLE_JIT": "1"}, ("llama",)),
    ],
    ids=["64 bits", "no compilation"],
)
def test_results_do_not_depend_on_jax_settings(plain, tmp_path, surroundings, families):
    found = run(tmp_path, *families, **surroundings)
    for family in families:
        for quantity, values in found[family].items():
            assert values == pytest.approx(plain[family][quantity], rel=1e-4, abs=1e-5), (family, quantity)


@pytest.mark.parametrize(
    "name", chosen("gpt2-scale-by-layer", "opt-350m", "falcon-rw-1b", "llama-3", "gemma-2", "mistral-1", "pythia")
)
def test_nothing_is_promoted(name):
    """Every program can be traced where no dtype and no rank may be promoted."""
    cfg = models.config_from_hf(VARIANTS[name])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for program in meshes.programs_of(cfg):
            program.lower(sharding.single_device_mesh())


def test_an_absent_tpu_is_no_reason_to_complain(tmp_path):
    """With libtpu installed for `unidetox plan` and without JAX_PLATFORMS=cpu, as on most laptops."""
    pytest.importorskip("libtpu")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    command = ["unidetox_jax.cli", "plan", f"--config={ROOT}/configs/quickstart.py", "--topology=local"]
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.startswith("local: 1 x ")  # the devices were looked for
    assert result.stderr == "unidetox: ./pretrained/gpt2: no such directory\n"
