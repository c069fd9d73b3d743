"""Meshes and shardings: the same logits on any mesh, each parameter sharded as in a table, initialisation in place."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from variants import EVERY, FALCON, GPT2, NEW_FALCON, VARIANTS, assert_near, chosen, doubled

from unidetox_jax import models, sharding
from unidetox_jax.errors import UserError

NEWER = (
    "gemma-1", "gemma-2", "gemma-3-scaled", "qwen-2-window", "qwen-3", "mistral-1", "olmo-2", "olmo-3", "phi-3",
    "pythia",
)  # fmt: skip
CONFIGS = {
    "gpt2-xl's 25 heads and odd vocabulary": {**GPT2, "n_embd": 200, "n_head": 25, "vocab_size": 257},
    "falcon-7b's 71 heads, one of keys": {**FALCON, "hidden_size": 568, "num_attention_heads": 71, "vocab_size": 128},
    "falcon-40b's 16 heads": {**NEW_FALCON, "hidden_size": 64, "num_attention_heads": 16, "num_kv_heads": 2},
    **{name: doubled(VARIANTS[name]) for name in chosen("gpt2", "opt-125m", "llama-3", *NEWER)},
}
# "data:2,fsdp:2,model:2" and a LLaMA whose dimensions all divide
LLAMA_TABLE = {
    "embed/tokens/embedding": P("model", "fsdp"),
    "blocks/attention_norm/scale": P(),
    "blocks/attention/query/kernel": P(None, "fsdp", "model"),
    "blocks/attention/key/kernel": P(None, "fsdp", "model"),
    "blocks/attention/value/kernel": P(None, "fsdp", "model"),
    "blocks/attention/output/kernel": P(None, "model", None, "fsdp"),
    "blocks/mlp_norm/scale": P(),
    "blocks/mlp/gate/kernel": P(None, "fsdp", "model"),
    "blocks/mlp/up/kernel": P(None, "fsdp", "model"),
    "blocks/mlp/down/kernel": P(None, "model", "fsdp"),
    "final/norm/scale": P(),
    "final/head/embedding": P("model", "fsdp"),
}
# "model:8" and GPT-2 XL's shape: only the feed-forward layer can be split
GPT2_TABLE = {
    "embed/tokens/embedding": P(),
    "embed/positions/embedding": P(),
    "blocks/attention/query/kernel": P(),
    "blocks/attention/query/bias": P(),
    "blocks/attention/output/kernel": P(),
    "blocks/attention/output/bias": P(),
    "blocks/mlp/up/kernel": P(None, None, "model"),
    "blocks/mlp/up/bias": P(None, "model"),
    "blocks/mlp/down/kernel": P(None, "model"),
    "blocks/mlp/down/bias": P(),
}


def specs(tree, mesh):
    leaves = jax.tree_util.tree_leaves_with_path(sharding.param_shardings(tree, mesh))
    return {sharding.path_string(path): leaf.spec for path, leaf in leaves}


# Every model on all axes at once, and on single axes those to which the axis matters
SINGLE_AXIS = [
    ("gpt2", "data:8"),
    ("llama-3", "fsdp:8"),
    *((name, "model:8") for name in CONFIGS if "heads" in name or name == "llama-3"),
]
PLACED = [
    *((name, "data:2,fsdp:2,model:2") for name in CONFIGS),
    *(itertools.product(CONFIGS, ("data:8", "fsdp:8", "model:8")) if EVERY else SINGLE_AXIS),
]


@pytest.fixture(scope="module")
def single(request):
    """(config, parameters, tokens, logits) on one device."""
    cfg = models.config_from_hf(CONFIGS[request.param])
    params = models.init(cfg, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, cfg.vocab_size, (8, 12)).astype(np.int32)
    return cfg, params, tokens, np.asarray(models.forward(params, tokens, cfg))


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize(("single", "layout"), PLACED, indirect=["single"])
def test_logits_and_steps_equal_one_device(single, layout, record_property):
    cfg, params, tokens, expected = single
    near = functools.partial(assert_near, record=record_property, what=layout, cfg=cfg, tolerance=1e-4)
    mesh = sharding.make_mesh(layout)
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        near(models.forward(placed, rows, cfg), expected)
        if cfg.window:
            cfg = dataclasses.replace(cfg, layer_loop="unroll")  # in which local layers' caches are ring buffers
        logits, cache = models.prefill(placed, rows[:, :8], cfg, models.init_cache(cfg, 8, 16))
        near(logits, expected[:, 7])
        logits, _ = models.decode_step(placed, rows[:, 8], cfg, cache)
        near(logits, expected[:, 8])


def test_parameters_are_sharded_as_in_the_tables():
    llama = models.abstract_params(models.config_from_hf(CONFIGS["llama-3"]))
    assert specs(llama, sharding.make_mesh("data:2,fsdp:2,model:2")) == LLAMA_TABLE
    gpt2 = specs(
        models.abstract_params(models.config_from_hf(CONFIGS["gpt2-xl's 25 heads and odd vocabulary"])),
        sharding.make_mesh("model:8"),
    )
    assert {path: gpt2[path] for path in GPT2_TABLE} == GPT2_TABLE


def test_parameters_are_initialised_in_place():
    cfg = models.config_from_hf(CONFIGS["llama-3"])
    mesh = sharding.make_mesh("fsdp:4,model:2")
    params = models.init(cfg, jax.random.key(0), mesh)
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 16, 44)}
    assert sharding.mesh_of(params) == mesh
    same = models.init(cfg, jax.random.key(0))
    np.testing.assert_allclose(kernel, same["blocks"]["mlp"]["up"]["kernel"], atol=1e-7)


def test_dimensions_that_do_not_divide_are_logged_once(caplog):
    abstract = models.abstract_params(models.config_from_hf(CONFIGS["falcon-7b's 71 heads, one of keys"]))
    mesh = sharding.make_mesh("model:8")
    sharding._log_whole.cache_clear()
    with caplog.at_level("INFO", "absl"):
        sharding.param_shardings(abstract, mesh)
        lines = [record.getMessage() for record in caplog.records if "keeps its 71 whole" in record.getMessage()]
        assert lines and len(lines) == len(set(lines))
        sharding.param_shardings(abstract, mesh)
    assert len([r for r in caplog.records if "keeps its 71 whole" in r.getMessage()]) == len(lines)


def test_an_axis_that_splits_nothing_is_refused():
    odd = {**GPT2, "n_embd": 35, "n_head": 5, "n_inner": 33, "vocab_size": 131}
    abstract = models.abstract_params(models.config_from_hf(odd))
    with pytest.raises(UserError, match="nothing of this model can be split 8 ways over 'model'"):
        sharding.param_shardings(abstract, sharding.make_mesh("model:8"))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("data:3", "needs a multiple of 3 devices, found 8"),
        ("data:-1,fsdp:-1", "only one axis may be -1"),
        ("tensor:8", "no axis 'tensor'"),
        ("model:eight", "model has size 'eight'"),
        ("model:16", "needs a multiple of 16"),
    ],
)
def test_bad_meshes_are_named(layout, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(layout)


def test_an_open_axis_takes_the_remaining_devices():
    assert dict(sharding.make_mesh("model:2,fsdp:-1").shape) == {"data": 1, "fsdp": 4, "model": 2}
    assert sharding.make_mesh("", jax.devices()[:1]).size == 1
