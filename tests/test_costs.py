"""Parameters, FLOPs and bytes of models against sums on paper; data sheets by the names that jax gives its devices."""

import dataclasses

import pytest

from unidetox_jax import devices, models
from unidetox_jax.models import costs

PRODUCTS = {
    "openai-community/gpt2": 12 * 12 * 768**2 + 50257 * 768,
    "meta-llama/Llama-2-7b-hf": 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096,
}
TABLES = {
    "openai-community/gpt2": 1024 * 768,
    "meta-llama/Llama-2-7b-hf": 32000 * 4096,
}  # positions; an untied embedding


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_forward_pass(name):
    cfg = dataclasses.replace(models.published_config(name), dtype="bfloat16")
    width = cfg.num_heads * cfg.head_size
    assert costs.read_bytes(cfg) == 2 * (models.num_params(cfg) - TABLES[name])
    assert costs.param_bytes(cfg) == 2 * models.num_params(cfg)
    assert costs.cache_bytes(cfg, 64.5) == 2 * 2 * cfg.num_layers * width * 64.5
    assert costs.forward_flops(cfg, 64.5) == 2 * PRODUCTS[name] + 4 * cfg.num_layers * width * 64.5
    without_head = costs.forward_flops(cfg, 0, logits=0)
    assert without_head == 2 * (PRODUCTS[name] - cfg.vocab_size * cfg.hidden_size)
    assert costs.forward_flops(cfg, 0, logits=0.25) == without_head + 0.25 * 2 * cfg.vocab_size * cfg.hidden_size


def test_training():
    """GPT-2 small: 6 FLOPs for each of 123.5 million weights in matrix products, and its attention."""
    cfg = models.published_config("openai-community/gpt2")
    products = PRODUCTS["openai-community/gpt2"]
    assert costs.training_flops(cfg, 0) == costs.training_flops(cfg, 0, "dots") == 6 * products
    assert costs.training_flops(cfg, 256) - 6 * products == 6 * 12 * 768 * 256
    assert costs.training_flops(cfg, 0, "full") == 8 * products
    assert costs.training_flops(dataclasses.replace(cfg, tie_word_embeddings=False), 0) == 6 * products
    assert costs.optimizer_bytes(models.num_params(cfg)) == 8 * 4 * models.num_params(cfg)


def test_grouped_heads_cache_less():
    cfg = models.published_config("meta-llama/Llama-3.1-8B")
    assert costs.cache_bytes(cfg, 1) == 4 * 2 * 32 * 8 * 128


def test_layers_that_see_a_window_keep_no_more():
    """Gemma 3 1B: 22 of its 26 layers see 512 tokens."""
    cfg = models.published_config("google/gemma-3-1b-pt")
    assert costs.cache_bytes(cfg, 500) == 4 * 2 * 256 * 26 * 500
    assert costs.cache_bytes(cfg, 8000) == 4 * 2 * 256 * (4 * 8000 + 22 * 512)
    assert costs.forward_flops(cfg, 8000) - costs.forward_flops(cfg, 0) == 4 * 4 * 256 * (4 * 8000 + 22 * 512)


def test_data_sheets_by_device_kind():
    for kind, name in (
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5p", "TPU v5"),
        ("TPU v5", "TPU v5"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H200 NVL", "NVIDIA H200"),
    ):
        assert devices.specs(kind) is devices.SPECS[name]
    assert devices.specs("cpu") is None


def test_what_the_axis_model_splits():
    """GPT-2 XL's 25 heads and 50,257 tokens are whole on each of two devices, but not its feed-forward."""
    xl, llama = (models.published_config(name) for name in ("openai-community/gpt2-xl", "meta-llama/Llama-2-7b-hf"))
    halved = 48 * (2 * 1600 * 6400 + 6400) // 2
    assert costs.read_params(xl) - costs.read_params(xl, shards=2) == halved
    assert costs.cache_bytes(xl, 1, 2) == costs.cache_bytes(xl, 1)
    assert costs.forward_flops(xl, 10) - costs.forward_flops(xl, 10, shards=2) == 2 * 48 * 1600 * 6400
    assert costs.forward_flops(llama, 10, shards=2) == costs.forward_flops(llama, 10) / 2
    assert costs.cache_bytes(llama, 1, 2) == costs.cache_bytes(llama, 1) / 2
    norms = 65 * 4096
    assert (
        costs.params_of_device(llama, {"data": 2, "fsdp": 4, "model": 2})
        == (models.num_params(llama) - norms) / 8 + norms
    )
