"""The training step on meshes and in microbatches; its state, metrics and compiled programs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import EVERY, GPT2, LLAMA, VARIANTS, chosen, doubled, init_on

from unidetox_jax import models, sharding, training

GPT2_CONFIG = {**GPT2, "n_layer": 2, "n_embd": 32, "n_head": 8, "vocab_size": 128}
LLAMA_CONFIG = {
    **LLAMA, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
CONFIGS = {
    **{name: doubled(VARIANTS[name]) for name in chosen("gemma-3-scaled")},
    "gpt2": GPT2_CONFIG,
    "llama": LLAMA_CONFIG,
}
AXES = ("data:8", "fsdp:8", "model:8")
STEPS = 20
OPTIMIZER = training.Optimizer(learning_rate=1e-3, steps=STEPS)
PUBLISHED = training.Optimizer(learning_rate=5e-5, steps=STEPS)


@pytest.fixture(scope="module")
def cfg():
    return models.config_from_hf(GPT2_CONFIG)


def make_batch(step: int, rows: int = 8, length: int = 16) -> dict[str, np.ndarray]:
    """Packed rows with unequal numbers of targets."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(2, length + 1, (rows, 1))
    cuts = rng.integers(1, length, (rows, 1))
    position = np.arange(length)
    real = position < lengths
    return {
        "tokens": rng.integers(3, 128, (rows, length)).astype(np.int32),
        "loss_mask": real & (position != 0) & (position != cuts),
        "segment_ids": np.where(real, 1 + (position >= cuts), 0).astype(np.int32),
    }


def train(cfg, steps, mesh=None, optimizer=OPTIMIZER, **options):
    """(metrics of every step, final state) from a fixed seed."""
    state = training.init_state(init_on(cfg, mesh), optimizer)
    step = training.make_train_step(cfg, optimizer, mesh, **options)
    history, compiled = [], step.program._cache_size()
    for number in range(steps):
        state, metrics = step(state, make_batch(number))
        history.append({name: float(value) for name, value in metrics.items()})
    assert step.program._cache_size() <= compiled + 1
    return history, state


loss = jax.jit(training.loss, static_argnums=2)


def column(history, name):
    return np.array([metrics[name] for metrics in history])


@pytest.fixture(scope="module")
def one_device(request):
    cfg = models.config_from_hf(CONFIGS[request.param])
    return cfg, train(cfg, STEPS)[0]


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize(
    ("one_device", "layout"),
    [
        *itertools.product(CONFIGS if EVERY else ["gpt2"], AXES),
        *((name, "data:2,fsdp:2,model:2") for name in CONFIGS),
    ],
    indirect=["one_device"],
)
def test_the_loss_curve_is_one_devices(one_device, layout):
    cfg, expected = one_device
    mesh = sharding.make_mesh(layout)
    history, state = train(cfg, STEPS, mesh)
    np.testing.assert_allclose(column(history, "loss"), column(expected, "loss"), rtol=1e-5)
    np.testing.assert_allclose(column(history, "grad_norm"), column(expected, "grad_norm"), rtol=1e-4)
    assert column(expected, "loss")[-1] != column(expected, "loss")[0]
    kernel = state.opt_state[1].mu["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding == state.params["blocks"]["mlp"]["up"]["kernel"].sharding
    shards = mesh.shape["fsdp"] * mesh.shape["model"]
    assert kernel.addressable_shards[0].data.size == kernel.size // shards


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize(("layout", "count"), [("", 4), ("data:2,fsdp:2,model:2", 2)])
def test_microbatches_equal_the_batch(cfg, layout, count):
    """Eight rows at once, and as four microbatches of two (or two of four, for a mesh of four batch shards)."""
    mesh = sharding.make_mesh(layout) if layout else None
    expected, expected_state = train(cfg, 4, mesh, PUBLISHED)
    history, state = train(cfg, 4, mesh, PUBLISHED, accumulation=count)
    for name in ("loss", "grad_norm", "targets"):
        np.testing.assert_allclose(column(history, name), column(expected, name), rtol=2e-6)
    assert_same_moments(state, expected_state)


def assert_same_moments(state, expected):
    """Compares mean gradients, whose norm is 1. Parameters may differ where a gradient is only rounding error, which
    AdamW divides by itself."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        state.opt_state[1].mu,
        expected.opt_state[1].mu,
    )


@pytest.fixture(scope="module")
def without_remat(cfg):
    return train(dataclasses.replace(cfg, residual_dropout=0.1), 3, None, PUBLISHED, dropout_seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_nothing(cfg, without_remat, remat):
    history, state = train(
        dataclasses.replace(cfg, residual_dropout=0.1), 3, None, PUBLISHED, remat=remat, dropout_seed=3
    )
    np.testing.assert_allclose(column(history, "loss"), column(without_remat[0], "loss"), rtol=1e-6)
    assert_same_moments(state, without_remat[1])


@pytest.mark.slow
def test_dropout_is_a_function_of_the_step(cfg):
    cfg = dataclasses.replace(cfg, embedding_dropout=0.1, attention_dropout=0.1, residual_dropout=0.1)
    optimizer = training.Optimizer(learning_rate=0.0, steps=10)  # weights stay, so that only the noise changes
    step = training.make_train_step(cfg, optimizer, dropout_seed=1, accumulation=2)
    batch = {
        name: np.tile(array[:1], (2, 1)) for name, array in make_batch(0).items()
    }  # both microbatches are the same row

    def start(number):
        state = training.init_state(models.init(cfg, jax.random.key(0)), optimizer)
        return state._replace(step=jnp.asarray(number, jnp.int32))

    state, first = step(start(0), batch)
    _, second = step(state, batch)
    assert float(first["loss"]) != float(second["loss"])
    assert float(step(start(1), batch)[1]["loss"]) == float(second["loss"])  # as after resuming
    quiet = loss(models.init(cfg, jax.random.key(0)), batch, cfg)[0]
    assert abs(float(first["loss"]) - float(quiet)) > 1e-4


def test_bfloat16_compute_keeps_float32_masters(cfg):
    history, state = train(dataclasses.replace(cfg, dtype="bfloat16"), 5)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {"float32"}
    np.testing.assert_allclose(column(history, "loss"), column(train(cfg, 5)[0], "loss"), rtol=2e-2)


def test_a_step_donates_its_state(cfg):
    state = training.init_state(models.init(cfg, jax.random.key(0)), OPTIMIZER)
    step = training.make_train_step(cfg, OPTIMIZER)
    after, metrics = step(state, make_batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(after.step) == 1
    assert {name: value.dtype.name for name, value in metrics.items()} == dict.fromkeys(
        ("loss", "grad_norm", "learning_rate", "targets"), "float32"
    )


@pytest.mark.parametrize("precision", training.PRECISIONS)
@pytest.mark.parametrize("layout", ["", "fsdp:4,model:2"])
def test_the_abstract_state_describes_the_real_one(cfg, layout, precision):
    mesh = sharding.make_mesh(layout) if layout else None
    optimizer = dataclasses.replace(OPTIMIZER, precision=precision)
    real = training.init_state(init_on(cfg, mesh), optimizer)
    abstract = training.abstract_state(cfg, optimizer, mesh)
    assert jax.tree.structure(real) == jax.tree.structure(abstract)

    def same(a, b):
        return (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)

    assert all(jax.tree.leaves(jax.tree.map(same, real, abstract)))


@pytest.mark.parametrize("layout", ["", "data:2,fsdp:2,model:2"])
def test_evaluation_totals_are_the_losses(cfg, layout):
    mesh = sharding.make_mesh(layout) if layout else None
    params, batch = init_on(cfg, mesh), make_batch(0)
    totals = training.make_eval_step(cfg, mesh)(params, batch)
    expected = loss(models.init(cfg, jax.random.key(0)), batch, cfg)[1]
    np.testing.assert_allclose(totals["total"], expected["total"], rtol=1e-6)
    assert float(totals["targets"]) == float(expected["targets"]) == batch["loss_mask"][:, 1:].sum()


def test_rows_that_do_not_divide_into_microbatches_are_refused(cfg):
    with pytest.raises(ValueError, match="8 rows cannot be computed in 3 parts"):
        train(cfg, 1, accumulation=3)


@pytest.mark.slow
def test_schedules_and_dropout_seeds_share_a_program(cfg):
    settings = [training.Optimizer(1e-3, 10, warmup_steps=2), training.Optimizer(5e-5, 7, seed=3)]
    steps = [training.make_train_step(cfg, optimizer, dropout_seed=seed) for seed, optimizer in enumerate(settings)]
    steps[0].program.clear_cache()
    for optimizer, step in zip(settings, steps, strict=True):
        state = training.init_state(models.init(cfg, jax.random.key(0)), optimizer)._replace(step=jnp.int32(1))
        _, metrics = step(state, make_batch(0))
        assert float(metrics["learning_rate"]) == pytest.approx(float(optimizer.learning_rate_at(1)))
    assert steps[0].program._cache_size() == 1
    unclipped = dataclasses.replace(settings[0], clip_norm=0.0)
    assert training.make_train_step(cfg, unclipped, dropout_seed=0).program is not steps[0].program
