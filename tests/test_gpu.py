"""What a GPU's own programs give: cuDNN's attention, the kernel for one new token, models side by side. Skipped
elsewhere; `launch/gpu_check.sh tests` runs it where there is one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unidetox_jax import models, sharding, training
from unidetox_jax.decoding import generate, objectives, preparation, sampling, warpers
from unidetox_jax.models.attention import attention, causal_mask
from unidetox_jax.models.decode_attention import decode_attention

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
ROUNDING = 2e-2  # of attention's outputs around 1 in bfloat16


def shape(name, **changes):
    """A published model's kind with two layers and heads of 64."""
    small = {"num_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "head_size": 64}
    cfg = models.published_config(name)
    small["num_kv_heads"] = 4 if cfg.num_kv_heads == cfg.num_heads else 2
    return dataclasses.replace(cfg, **{**small, "vocab_size": 3000, "dtype": "bfloat16", **changes})


@pytest.fixture(scope="module", params=["openai-community/gpt2", "meta-llama/Llama-3.2-1B"])
def pair(request):
    cfg, mesh = shape(request.param), sharding.single_device_mesh()
    return [models.Model(models.init(cfg, jax.random.key(seed), mesh), cfg) for seed in range(2)]


def random(seed, *sizes):
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes), jnp.bfloat16)


@pytest.mark.parametrize(("kv_heads", "groups", "size"), [(4, 1, 64), (2, 4, 128), (1, 16, 256), (3, 3, 16)])
def test_the_kernel_for_one_new_token_is_attention(kv_heads, groups, size):
    batch, slots, live = 5, 192, 133
    query = random(0, batch, 1, kv_heads * groups, size) / size**0.5
    key, value = (random(seed, batch, kv_heads, slots, size) for seed in (1, 2))
    mask = np.tile(np.arange(slots) < live, (batch, 1))
    mask[0, :70] = mask[1, 3:9] = False
    found = jax.jit(decode_attention)(query, key, value, mask, live)
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    np.testing.assert_allclose(found.astype(jnp.float32), attention(*wide, mask[:, None]), atol=ROUNDING)


@pytest.mark.parametrize("length", [128, 77])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cudnns_attention_keeps_texts_of_a_row_apart(length, kv_heads):
    segments = np.where(np.arange(length) < 40, 1, 2)[None]
    mask = jnp.asarray(causal_mask(jnp.asarray(segments), length))
    query = random(0, 1, length, 4, 64) / 8
    key, value = (random(seed, 1, kv_heads, length, 64) for seed in (1, 2))
    run = jax.jit(attention)
    assert "cudnn" in run.lower(query, key, value, mask).compile().as_text()
    found = run(query, key, value, mask)
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    np.testing.assert_allclose(found.astype(jnp.float32), attention(*wide, mask), atol=ROUNDING)
    changed = run(query, key.at[:, :, :40].set(3), value.at[:, :, :40].set(7), mask)
    np.testing.assert_array_equal(changed[:, 40:], found[:, 40:])
    assert (np.asarray(changed)[:, 20:40] != np.asarray(found)[:, 20:40]).any()


def test_models_side_by_side_write_what_they_write_apart(pair):
    exact = [models.Model(params, dataclasses.replace(cfg, dtype="float32")) for params, cfg in pair]
    prompts, mask = np.array([[5, 6, 7], [0, 3, 2]]), np.array([[1, 1, 1], [0, 1, 1]])
    settings = {
        "objective": objectives.get("contrastive"), "warpers": [warpers.top_k(50)], "max_new_tokens": 80, "eos_id": (),
        "attention_mask": mask, "log_probabilities": True, "samples": 4,
    }  # fmt: skip
    together, apart = (preparation.prepare(exact, side_by_side=choice) for choice in (True, False))
    assert together[0].params.side_by_side and not apart[0].params.side_by_side
    found, expected = generate(together, prompts, **settings), generate(apart, prompts, **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, rtol=1e-4)


def test_log_probabilities_of_decoding_are_those_of_a_forward_pass(pair):
    prompts = np.array([[5, 6, 7]] * 3)
    assert preparation.prepare(pair)[0].params.configs[0].decode_kernel
    found = generate(
        pair, prompts, objective=objectives.get("contrastive"), warpers=[warpers.top_k(50)], max_new_tokens=100,
        eos_id=(), log_probabilities=True,
    )  # fmt: skip
    tokens = np.concatenate([prompts, found.tokens], axis=1)
    for (params, cfg), reported in zip(pair, found.log_probabilities, strict=True):
        logits = models.forward(params, tokens, dataclasses.replace(cfg, dtype="float32"))
        each = jnp.take_along_axis(jax.nn.log_softmax(logits[:, 2:-1]), tokens[:, 3:, None], -1)
        np.testing.assert_allclose(reported, each.mean((1, 2)), atol=2e-2)


def test_candidates_are_top_ks_without_a_sort_of_the_vocabulary():
    scores = jnp.round(jax.random.normal(jax.random.key(0), (6, 50257)) * 50) / 50  # with ties
    for found, expected in zip(jax.jit(sampling.top_candidates, static_argnums=1)(scores, 51),
                               jax.lax.top_k(scores, 51), strict=True):  # fmt: skip
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("precision", training.PRECISIONS)
def test_training_learns_a_batch(pair, precision):
    cfg, params = pair[0].cfg, jax.tree.map(jnp.copy, pair[0].params)  # the step takes its state's memory
    optimizer = training.Optimizer(1e-3, 40, precision=precision)
    state = training.init_state(params, optimizer)
    step = training.make_train_step(cfg, optimizer, sharding.single_device_mesh(), remat="dots", dropout_seed=0)
    tokens = np.random.default_rng(0).integers(0, 3000, (4, 64)).astype(np.int32)
    segments = np.tile(np.arange(64) // 32 + 1, (4, 1)).astype(np.int32)
    losses = []
    for _ in range(20):
        state, metrics = step(state, {"tokens": tokens, "loss_mask": np.ones((4, 64), bool), "segment_ids": segments})
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - np.log(3000)) < 0.3 and losses[-1] < losses[0] - 1
