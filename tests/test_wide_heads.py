"""Heads that lie together in a cache, as on a TPU, give what they give apart."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from variants import EVERY, VARIANTS

from unidetox_jax import models
from unidetox_jax.decoding import generate, objectives, preparation
from unidetox_jax.models import wide_heads

HEADS = {"gpt2": (5, 5), "llama-3": (6, 3), "falcon-rw-1b": (4, 4), "gemma-3": (4, 1)}


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize(
    ("name", "samples"),
    itertools.product(HEADS, (1, 3)) if EVERY else [("gpt2", 1), ("llama-3", 3), ("falcon-rw-1b", 1), ("gemma-3", 3)],
)
def test_texts_are_the_same(name, samples, monkeypatch):
    cfg = models.config_from_hf(VARIANTS[name])
    queries, keys = HEADS[name]
    cfg = dataclasses.replace(cfg, num_heads=queries, num_kv_heads=keys)
    model = models.Model(models.init(cfg, jax.random.key(0)), cfg)
    prompts = np.array([[5, 6, 7, 8], [0, 0, 3, 2]])
    settings = {
        "objective": objectives.get("base"), "max_new_tokens": 12, "eos_id": (), "log_probabilities": True,
        "samples": samples, "layer_loop": "scan", "attention_mask": np.array([[1, 1, 1, 1], [0, 0, 1, 1]]),
    }  # fmt: skip
    expected = generate([model], prompts, **settings)
    form = preparation.choose_layout

    def as_on_a_tpu(*arguments):
        usual = form(*arguments)
        return dataclasses.replace(usual, configs=tuple(dataclasses.replace(c, wide_heads=2) for c in usual.configs))

    monkeypatch.setattr(preparation, "choose_layout", as_on_a_tpu)
    (ready,) = preparation.prepare([model], layer_loop="scan")
    heads, size = wide_heads.shape(ready.params.configs[0])
    assert (heads, size) == (-(-keys // 2), 2 * cfg.head_size)
    found = generate([ready], prompts, **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "ways", "expected"),
    [
        ("openai-community/gpt2-xl", 1, 2),  # 25 heads of 64: one is filled up
        ("openai-community/gpt2-xl", 4, 1),  # which no four devices can share
        ("openai-community/gpt2", 2, 2),
        ("tiiuae/falcon-7b", 1, 1),  # one key-value head
        ("meta-llama/Llama-2-7b-hf", 1, 1),  # heads of 128
        ("facebook/opt-125m", 2, 2),
    ],
)
def test_as_many_lie_together_as_fill_the_lanes(name, ways, expected):
    assert wide_heads.width(models.published_config(name), ways) == expected
