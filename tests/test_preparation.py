"""Weights as decoding wants them; the GPU's kernel for one new token, interpreted (`test_gpu` runs it on one)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import EVERY, VARIANTS, chosen, init_on

from unidetox_jax import models, sharding
from unidetox_jax.decoding import generate, loop, objectives, preparation, sampling, warpers
from unidetox_jax.decoding.generate import make_request
from unidetox_jax.models.attention import attention
from unidetox_jax.models.decode_attention import applies, decode_attention
from unidetox_jax.recipe import Lora


@pytest.mark.parametrize(("kv_heads", "groups"), [(2, 1), (2, 4), (1, 16)])
def test_it_is_attention_over_the_live_slots(kv_heads, groups):
    batch, slots, live, size = 3, 96, 41, 16
    random = np.random.default_rng(0)
    query = random.normal(size=(batch, 1, kv_heads * groups, size)).astype(np.float32)
    key, value = random.normal(size=(2, batch, kv_heads, slots, size)).astype(np.float32)
    mask = np.tile(np.arange(slots) < live, (batch, 1))
    mask[0, :33] = mask[1, 3:9] = False
    key[:, :, 64:] = value[:, :, 64:] = np.nan  # beyond the last live block nothing is read
    found = decode_attention(*map(jnp.asarray, (query, key, value, mask)), jnp.int32(live), interpret=True)
    expected = attention(query, np.nan_to_num(key), np.nan_to_num(value), mask[:, None])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    both = jax.vmap(lambda key, value: decode_attention(query, key, value, mask, jnp.int32(live), interpret=True))
    np.testing.assert_allclose(both(jnp.stack([key, key]), jnp.stack([value, value]))[1], expected, atol=1e-5)


def test_it_is_for_gpus():
    assert not applies(models.published_config("openai-community/gpt2"), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "samples"),
    [("openai-community/gpt2", 1), ("meta-llama/Llama-3.2-1B", 3)]
    + EVERY * [("openai-community/gpt2", 3), ("meta-llama/Llama-3.2-1B", 1)],
)
def test_models_side_by_side_write_what_they_write_apart(name, samples, monkeypatch):
    """As on a GPU: fused weights of both models in one tree, each with a cache of its own."""
    kv_heads = 4 if name.endswith("gpt2") else 2
    cfg = dataclasses.replace(
        models.published_config(name), num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4,
        num_kv_heads=kv_heads, head_size=8, vocab_size=99,
    )  # fmt: skip
    pair = [models.Model(models.init(cfg, jax.random.key(seed)), cfg) for seed in range(2)]
    settings = {
        "objective": objectives.get("contrastive"), "warpers": [warpers.top_k(20)], "max_new_tokens": 12, "eos_id": (),
        "attention_mask": np.array([[1, 1, 1], [0, 1, 1]]), "log_probabilities": True, "samples": samples,
        "layer_loop": "scan",
    }  # fmt: skip
    prompts = np.array([[5, 6, 7], [0, 3, 2]])
    expected = generate(pair, prompts, **settings)
    form = preparation.choose_layout

    def as_on_a_gpu(configs, mesh, layer_loop=None, side_by_side=True):
        usual = form(configs, mesh, layer_loop, side_by_side)
        return dataclasses.replace(usual, side_by_side=side_by_side, transpose=False, fuse=True)

    monkeypatch.setattr(preparation, "choose_layout", as_on_a_gpu)
    together = preparation.prepare(pair, layer_loop="scan")
    assert together[0].params.side_by_side
    found = generate(together, prompts, **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, rtol=1e-4)
    other = [prompts, prompts + 1]
    assert generate(pair, other, **settings).tokens.shape == expected.tokens.shape  # read apart
    with pytest.raises(ValueError, match="side by side"):
        generate(together, other, **settings)


@pytest.mark.parametrize("k", [1, 50])
@pytest.mark.parametrize("size", [40, 300, 50257])
def test_the_best_blocks_hold_the_candidates(size, k):
    k = min(k, size)
    random = np.random.default_rng(0)
    many_ties = np.round(random.normal(size=(4, size)) * 2).astype(np.float32)
    few_tokens = np.where(random.random((4, size)) < 0.99, -np.inf, many_ties).astype(np.float32)
    for scores in (many_ties, few_tokens, random.normal(size=(4, size)).astype(np.float32)):
        for found, expected in zip(sampling.block_top_k(scores, k), jax.lax.top_k(scores, k), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_what_models_have_in_common_is_prepared_once(layer_loop):
    cfg = dataclasses.replace(
        models.published_config("meta-llama/Llama-3.2-1B"), num_layers=2, hidden_size=32, intermediate_size=48,
        num_heads=4, num_kv_heads=2, head_size=8, vocab_size=99, dtype="bfloat16",
    )  # fmt: skip
    base = models.Model(models.init(cfg, jax.random.key(0)), cfg)
    adapted = dataclasses.replace(cfg, lora=Lora(rank=2))
    adapter = models.lora.init(adapted, jax.random.key(1))
    twin = models.Model(models.lora.attach(base.params, adapter, adapted), adapted)
    first, second = preparation.prepare([base, twin], layer_loop=layer_loop)[0].params.trees
    leaves = {id(leaf) for leaf in jax.tree.leaves(first)}
    own = [leaf for leaf in jax.tree.leaves(second) if id(leaf) not in leaves]
    assert leaves < {id(leaf) for leaf in jax.tree.leaves(second)}
    assert sum(leaf.size for leaf in own) == sum(leaf.size for leaf in jax.tree.leaves(adapter))
    (alone,) = preparation.prepare([twin], layer_loop=layer_loop)[0].params.trees
    assert jax.tree.structure(alone) == jax.tree.structure(second)
    for found, expected in zip(jax.tree.leaves(second), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@pytest.mark.quick_variants(3)
@pytest.mark.parametrize("name", chosen("gpt2", "opt-350m", "falcon-40b", "olmo-2", "llama-biases"))
@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_transposed_and_fused_kernels_are_the_same_model(name, layer_loop):
    cfg = dataclasses.replace(models.config_from_hf(VARIANTS[name]), layer_loop=layer_loop)
    params = models.init(cfg, jax.random.key(0))
    prepared = models.prepare(params, cfg, transpose=True, fuse=True)
    (layer,) = {str(jax.tree.structure(layer)) for layer in jax.tree.leaves(prepared["blocks"], is_leaf=is_layer)}
    assert "'transposed_kernel'" in layer and "'query_key_value'" in layer and "'kernel'" not in layer
    tokens = np.arange(2, 32).reshape(3, 10)
    np.testing.assert_allclose(models.forward(prepared, tokens, cfg), models.forward(params, tokens, cfg), atol=1e-5)


def is_layer(tree) -> bool:
    return isinstance(tree, dict) and "attention" in tree


def test_projections_that_are_fused_are_not_shared_in_part():
    """A merged adapter of the queries leaves keys and values as the base has them."""
    cfg = dataclasses.replace(models.config_from_hf(VARIANTS["llama-3"]), layer_loop="unroll")
    adapted = dataclasses.replace(cfg, lora=Lora(rank=2, targets=("q_proj",)))
    base = models.Model(models.init(cfg, jax.random.key(0)), cfg)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, models.lora.init(adapted, jax.random.key(1)))
    twin = models.lora.merge(models.Model(models.lora.attach(base.params, adapter, adapted), adapted))
    assert twin.params["blocks"]["attention"]["key"]["kernel"] is base.params["blocks"]["attention"]["key"]["kernel"]
    together = preparation.prepare([base, twin])[0].params.trees[1]
    (alone,) = preparation.prepare([twin])[0].params.trees
    jax.tree.map(np.testing.assert_array_equal, together, alone)


@pytest.mark.slow
def test_models_in_common_are_prepared_on_a_mesh():
    """What they do not share may have nothing that an axis splits."""
    mesh = sharding.make_mesh("data:4,model:2")
    cfg = models.config_from_hf({**VARIANTS["gpt2"], "n_layer": 2})
    base = models.Model(init_on(cfg, mesh), cfg)
    settings = {
        "objective": objectives.get("contrastive"), "warpers": [warpers.top_k(20)], "max_new_tokens": 5, "eos_id": (),
    }  # fmt: skip
    prompts = np.arange(2, 26).reshape(8, 3)
    copy = models.Model(jax.tree.map(lambda leaf: leaf + 0, base.params), cfg)
    expected = generate([base, copy], prompts, **settings)
    np.testing.assert_array_equal(generate([base, base], prompts, **settings).tokens, expected.tokens)


def test_prepared_parameters_can_be_prepared_again():
    cfg = dataclasses.replace(models.config_from_hf(VARIANTS["llama-3"]), layer_loop="unroll")
    params = models.init(cfg, jax.random.key(0))
    (again,) = preparation.prepare([models.Model(models.prepare(params, cfg), cfg)])[0].params.trees
    (once,) = preparation.prepare([models.Model(params, cfg)])[0].params.trees
    jax.tree.map(np.testing.assert_array_equal, again, once)


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize(
    ("name", "samples", "mesh"),
    [("gpt2", 1, None), ("gemma-3", 2, "data:4,model:2")]
    + EVERY * [("gpt2", 1, "data:4,model:2"), ("gemma-3", 2, None)],
)
def test_one_model_under_several_prompts_reads_its_weights_once(name, samples, mesh):
    mesh = mesh and sharding.make_mesh(mesh)
    cfg = models.config_from_hf(VARIANTS[name])
    model = models.Model(init_on(cfg, mesh), cfg)
    copy = models.Model(jax.tree.map(lambda leaf: leaf + 0, model.params), cfg)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 90, size=(5, longest)) for longest in (4, 21)]
    masks = [np.arange(x.shape[1], 0, -1) <= random.integers(1, x.shape[1] + 1, size=(5, 1)) for x in prompts]
    settings = {
        "objective": objectives.get("classifier_free_guidance"), "max_new_tokens": 24, "eos_id": (),
        "attention_mask": masks, "samples": samples, "log_probabilities": True, "layer_loop": "scan",
    }  # fmt: skip
    found, expected = generate([model, model], prompts, **settings), generate([model, copy], prompts, **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, rtol=1e-4)
    products = [count_products(pair, prompts, settings) for pair in ([model, model], [model, copy])]
    assert 2 * products[0] == products[1]


def count_products(pair, prompts, settings: dict) -> int:
    """How many matrix products the program of a generation has."""
    request = make_request(pair, prompts, **settings)
    with preparation.mesh_context(request.mesh):
        lowered = loop.program.lower(request.params, request.inputs, settings["objective"], (), plan=request.plan)
    return lowered.as_text().count("dot_general")
