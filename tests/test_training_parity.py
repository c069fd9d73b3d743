"""The training step against PyTorch: transformers.Trainer's steps in a plain torch loop, for every family."""

import jax
import numpy as np
import optax
import pytest
import torch
from transformers import get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import get_parameter_names
from variants import FALCON, GEMMA3, GPT2, LLAMA, OPT, params_from_torch, torch_model

from unidetox_jax import models, sharding, training
from unidetox_jax.training.optimizer import decay_mask

CONFIGS = {
    "gpt2": {**GPT2, "n_layer": 2, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {**OPT, "num_hidden_layers": 2, "dropout": 0.0},
    "falcon": {**FALCON, "num_hidden_layers": 2},
    "llama": {**LLAMA, "num_hidden_layers": 2},
    "gemma3": {**GEMMA3, "num_hidden_layers": 2, "sliding_window_pattern": 2},
}
STEPS, ROWS, LENGTH = 50, 4, 12
# transformers.Trainer.get_decay_parameter_names
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def make_batch(step: int) -> dict[str, np.ndarray]:
    """Rows of several lengths, padded on the right."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(3, 131, (ROWS, LENGTH)).astype(np.int32)
    real = np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (ROWS, 1))
    return {"tokens": np.where(real, tokens, 2).astype(np.int32), "loss_mask": real}


def train_torch(model, settings: training.Optimizer, steps: int, scale: float = 1.0) -> list[float]:
    """The Trainer's steps; returns the losses."""
    decay = set(get_parameter_names(model, [torch.nn.LayerNorm], NO_DECAY))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decay], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in model.named_parameters() if n not in decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(settings.b1, settings.b2), eps=settings.epsilon
    )
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    model.train()
    losses = []
    for step in range(steps):
        batch = {name: torch.from_numpy(array) for name, array in make_batch(step).items()}
        labels = torch.where(batch["loss_mask"], batch["tokens"].long(), -100)
        out = model(batch["tokens"].long(), attention_mask=batch["loss_mask"].long(), labels=labels)
        (out.loss * scale).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    return losses


def train(model, settings: training.Optimizer, steps: int):
    """Our steps from the same weights: losses, parameters, metrics of the last step."""
    cfg = models.config_from_hf(model.config.to_dict())
    state = training.init_state(params_from_torch(model, cfg), settings)
    step = training.make_train_step(cfg, settings)
    losses = []
    for number in range(steps):
        state, metrics = step(state, make_batch(number))
        losses.append(float(metrics["loss"]))
    return losses, state.params, metrics


def assert_same_parameters(ours, model) -> None:
    """Within 1e-5, except for biases of keys.

    These shift all scores of a query equally, so that no output depends on them and their exact gradient is zero: AdamW
    divides rounding errors by rounding errors, in PyTorch as well.
    """

    def compare(path, ours, theirs):
        name = sharding.path_string(path)
        if not name.endswith("key/bias"):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)

    theirs = params_from_torch(model, models.config_from_hf(model.config.to_dict()))
    jax.tree_util.tree_map_with_path(compare, ours, theirs)


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize("family", CONFIGS)
def test_fifty_steps_are_the_trainers(family):
    settings = training.Optimizer(learning_rate=5e-5, steps=STEPS)
    model = torch_model(CONFIGS[family])
    losses, params, metrics = train(model, settings, STEPS)
    expected = train_torch(model, settings, STEPS)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert float(metrics["grad_norm"]) > settings.clip_norm  # so that clipping is tested
    assert_same_parameters(params, model)


def test_warm_up_and_weight_decay_are_the_trainers():
    settings = training.Optimizer(learning_rate=1e-3, steps=20, warmup_steps=5, weight_decay=0.1, clip_norm=0.5)
    model = torch_model(CONFIGS["gpt2"])
    losses, params, metrics = train(model, settings, 8)
    np.testing.assert_allclose(losses, train_torch(model, settings, 8), rtol=1e-5)
    assert_same_parameters(params, model)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-3 * 13 / 15)


def test_the_learning_rate_is_the_schedulers_at_every_step():
    settings = training.Optimizer(learning_rate=3e-4, steps=11, warmup_steps=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, 11)
    for step in range(13):
        assert float(settings.learning_rate_at(step)) == pytest.approx(schedule.get_last_lr()[0], abs=1e-10)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("family", CONFIGS)
def test_biases_and_norms_do_not_decay(family):
    model = torch_model(CONFIGS[family])
    cfg = models.config_from_hf(model.config.to_dict())
    decay = set(get_parameter_names(model, [torch.nn.LayerNorm], NO_DECAY))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.fill_(float(name in decay))
    expected = jax.tree.map(lambda leaf: bool(leaf.all()), params_from_torch(model, cfg))
    assert decay_mask(models.abstract_params(cfg)) == expected


def test_release_precision_is_torchs_bfloat16():
    """With given gradients, so that only the optimizer's arithmetic is compared, bit for bit."""
    settings = training.Optimizer(learning_rate=1e-5, steps=40, weight_decay=0.1, clip_norm=0.0, precision="release")
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(64, 32)).astype(np.float32) * 0.02
    theirs = torch.nn.Parameter(torch.from_numpy(weights).bfloat16())
    optimizer = torch.optim.AdamW([theirs], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, settings.steps)
    ours = {"kernel": jax.numpy.asarray(weights, "bfloat16")}
    transformation = training.make_optimizer(settings)
    state = transformation.init(ours)
    update = jax.jit(transformation.update)
    for _ in range(settings.steps):
        gradient = rng.normal(size=weights.shape).astype(np.float32)
        theirs.grad = torch.from_numpy(gradient).bfloat16()
        optimizer.step()
        schedule.step()
        changes, state = update({"kernel": jax.numpy.asarray(gradient, "bfloat16")}, state, ours)
        ours = optax.apply_updates(ours, changes)
    actual, expected = np.asarray(ours["kernel"], np.float32), theirs.detach().float().numpy()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {"bfloat16"}
    assert (expected != np.asarray(jax.numpy.asarray(weights, "bfloat16"), np.float32)).any()
    assert (actual != expected).mean() < 1e-3


def test_release_precision_trains_as_torchs_bfloat16_model():
    settings = training.Optimizer(learning_rate=1e-3, steps=20, precision="release")
    model = torch_model(CONFIGS["gpt2"])
    losses, params, _ = train(model.bfloat16(), settings, 20)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    np.testing.assert_allclose(losses, train_torch(model, settings, 20), rtol=0.02)
