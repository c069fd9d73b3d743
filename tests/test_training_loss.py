"""The loss: chunks equal the plain form, with gradients; no logits of a whole batch; several texts per row."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import GEMMA, GPT2, LLAMA, OPT

from unidetox_jax import data, models, sharding, training

losses = importlib.import_module("unidetox_jax.training.loss")  # the package's `loss` is the function

jit = functools.partial(jax.jit, static_argnums=2)  # of (params, batch, cfg)
CONFIGS = {
    "gpt2": {**GPT2, "n_layer": 1},
    "opt-350m": {**OPT, "num_hidden_layers": 1, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "llama, untied": {**LLAMA, "num_hidden_layers": 1},
    "gemma-2, logits capped": {**GEMMA, "model_type": "gemma2", "num_hidden_layers": 1, "final_logit_softcapping": 0.3},
}


def random_batch(cfg, rows=3, length=10, seed=0) -> dict:
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, length)) < 0.7
    mask[:, 0] = True  # a row's first token is never a target
    return {"tokens": rng.integers(3, cfg.vocab_size, (rows, length)).astype(np.int32), "loss_mask": mask}


@jit
@jax.value_and_grad
def plain_loss(params, batch, cfg):
    """The definition: log_softmax over all logits."""
    logprobs = jax.nn.log_softmax(models.forward(params, batch["tokens"], cfg)[:, :-1])
    picked = jnp.take_along_axis(logprobs, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return -jnp.where(batch["loss_mask"][:, 1:], picked, 0.0).sum() / batch["loss_mask"][:, 1:].sum()


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize("positions", [1, 4, 10])  # per chunk: 10 chunks, 3 with a short last one, and all at once
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_equal_the_plain_loss(name, positions, monkeypatch):
    cfg = models.config_from_hf(CONFIGS[name])
    params, batch = models.init(cfg, jax.random.key(1)), random_batch(cfg)
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * 3 * cfg.vocab_size * positions)
    expected, expected_gradients = plain_loss(params, batch, cfg)
    (loss, aux), gradients = jit(jax.value_and_grad(training.loss, has_aux=True))(params, batch, cfg)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    without_derivatives = jit(lambda *inputs: training.loss(*inputs))(params, batch, cfg)[0]
    np.testing.assert_allclose(without_derivatives, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected_gradients)
    assert float(aux["targets"]) == batch["loss_mask"][:, 1:].sum()
    np.testing.assert_allclose(aux["total"], expected * aux["targets"], rtol=1e-6)


def test_without_targets_the_loss_is_zero():
    cfg = models.config_from_hf(CONFIGS["gpt2"])
    batch = random_batch(cfg)
    batch["loss_mask"] = np.zeros_like(batch["loss_mask"])
    batch["loss_mask"][:, 0] = True
    params = models.init(cfg, jax.random.key(1))
    (loss, aux), gradients = jit(jax.value_and_grad(training.loss, has_aux=True))(params, batch, cfg)
    assert float(loss) == float(aux["targets"]) == 0.0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("layout", ["", "data:2,fsdp:2,model:2"])
def test_no_logits_of_a_whole_batch_are_stored(layout):
    """With a large vocabulary, no buffer of the compiled step is as large as a device's share of the logits."""
    cfg = models.config_from_hf({**GPT2, "n_layer": 1, "vocab_size": 50_264})
    mesh = sharding.make_mesh(layout, None if layout else jax.devices()[:1])
    rows, length = 16, 512 if layout else 80
    optimizer = training.Optimizer(1e-5, 10)
    place = functools.partial(jax.ShapeDtypeStruct, (rows, length), sharding=sharding.batch_sharding(mesh))
    batch = {"tokens": place(jnp.int32), "loss_mask": place(bool)}
    step = training.make_train_step(cfg, optimizer, mesh)
    compiled = step.lower(training.abstract_state(cfg, optimizer, mesh), batch).compile()
    shapes = re.findall(r"\b(?:f32|bf16|pred|s32|u32)\[([\d,]+)\]", compiled.as_text())
    largest = max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)
    share = rows * length * cfg.vocab_size // mesh.size
    assert losses.LOGITS_BYTES / 2 < 4 * largest <= losses.LOGITS_BYTES < 4 * share


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("layout", ["pack", "pad"])
@pytest.mark.parametrize("name", ["gpt2", "llama, untied"])
def test_a_tokens_loss_does_not_depend_on_other_texts(name, layout):
    cfg = models.config_from_hf(CONFIGS[name])
    params = models.init(cfg, jax.random.key(2))
    params = jax.tree.map(
        lambda leaf: leaf * 4, params
    )  # far from uniform, so that a wrong neighbour would change the loss
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 14, 6)
    tokens = data.Tokens(
        ids=rng.integers(3, cfg.vocab_size, lengths.sum()).astype(np.int32),
        offsets=np.cumsum([0, *lengths]),
        rows=np.arange(6, dtype=np.int32),
        pad_id=2,
        max_length=16,
    )
    batches = data.Batches(tokens, 6, seed=0, layout=layout, length_multiple=8)
    shape, rows = batches.plan(0)
    batch = batches[0]
    assert ("segment_ids" in batch) == (layout == "pack") and (layout == "pad" or shape[0] < 6)

    @jax.jit
    def token_losses(batch):  # one target at a time, [R·T]
        size = batch["tokens"].size
        masks = jnp.eye(size, dtype=bool).reshape(size, *batch["tokens"].shape)
        return jax.vmap(lambda mask: training.loss(params, {**batch, "loss_mask": mask}, cfg)[0])(masks)

    together = np.asarray(token_losses(batch)).reshape(shape)
    checked = np.zeros(shape, bool)
    for row, texts in enumerate(rows):
        start = 0
        for text in texts:
            row_alone = np.full((1, 16), 2, np.int32)
            row_alone[0, : lengths[text]] = tokens[text]
            alone = np.asarray(token_losses({"tokens": row_alone, "loss_mask": np.ones((1, 16), bool)}))
            end = start + lengths[text]
            np.testing.assert_allclose(together[row, start + 1 : end], alone[1 : lengths[text]], rtol=1e-5, atol=1e-6)
            checked[row, start + 1 : end] = True
            start = end
    assert (checked == batch["loss_mask"]).all()
    total = jit(training.loss)(params, batch, cfg)[1]["total"]
    np.testing.assert_allclose(total, together[checked].sum(), rtol=1e-5)
