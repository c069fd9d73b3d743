"""What weights and moments are kept in: stochastic rounding loses nothing on average, and is the same everywhere."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import HANGS, ROOT
from test_training_step import GPT2_CONFIG, make_batch

from unidetox_jax import method, models, sharding, training
from unidetox_jax.checkpoint import Checkpointer
from unidetox_jax.errors import UserError
from unidetox_jax.recipe import Lora, Recipe
from unidetox_jax.training import rounding

OPTIMIZER = training.Optimizer(1e-3, steps=20, weight_decay=0.1, precision="bfloat16", seed=7)


@pytest.fixture(scope="module")
def cfg():
    return models.config_from_hf(GPT2_CONFIG)


def assert_equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


# ------------------------------------------------------------------------------------------------------ the rounding


def test_a_number_becomes_a_neighbour_with_the_right_probability():
    """Every value of the 16 random bits once, so that the mean is the number itself."""
    odd = [0.0, 1.0, 1.999, -1e-30, 3.3e38, np.inf, -np.inf, np.nan]
    numbers = np.concatenate([np.random.default_rng(0).normal(size=14), odd]).astype(np.float32)
    bits = jnp.arange(1 << 16, dtype=jnp.uint32)[:, None]
    found = np.asarray(jax.jit(rounding.to_bfloat16)(jnp.asarray(numbers)[None], bits), np.float64)
    finite = np.isfinite(numbers)
    kept, exact = found[:, finite], numbers[finite].astype(np.float64)
    np.testing.assert_allclose(kept.mean(0), exact, rtol=1e-12)
    assert (np.abs(kept - exact) <= np.abs(exact) * 2.0**-7).all()
    np.testing.assert_array_equal(found[:, ~finite], np.broadcast_to(numbers[~finite], (1 << 16, 3)))


@pytest.mark.parametrize("weight", [1.0, -1.0, 3.0, 8.0, -8.0])
def test_a_sum_is_right_where_float32_would_round_the_change(weight):
    """A change of 8.2 of float32's spacings at 8, which its sum takes for 8: 2.3 % less, at every step."""
    change = np.float32(2.0**-7 / 1000)
    high, low = jnp.arange(1 << 16, dtype=jnp.uint32)[:, None], jnp.arange(0, 1 << 16, 1 << 10, dtype=jnp.uint32)
    found = jax.jit(rounding.add)(jnp.bfloat16(weight), change, (high << 16) | low)
    moved = (np.asarray(found, np.float64) - weight).mean()
    assert moved == pytest.approx(float(change), rel=2e-3)


def test_random_bits_belong_to_seed_step_path_and_element():
    def draw(seed=1, step=2, path="blocks/mlp/up/kernel", shape=(3, 4, 5)):
        return np.stack([np.asarray(part) for part in rounding.random_bits(seed, jnp.int32(step), path, shape)])

    first = draw()
    assert len(np.unique(first)) == first.size
    for other in (draw(seed=2), draw(step=3), draw(path="blocks/mlp/down/kernel")):
        assert not (other == first).any()
    np.testing.assert_array_equal(first, draw())
    assert draw(shape=()).shape == (2,)


# ----------------------------------------------------------------------------------------------------------- updates


def test_a_step_changes_weights_by_float32s_update_on_average():
    """At a learning rate of which rounding to nearest keeps nothing: the mean change of a million weights is float32's
    within three standard errors."""
    weights = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.0, (1024, 1024)), jnp.bfloat16)
    gradient = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.0, weights.shape), jnp.float32)
    found = {}
    for precision in training.PRECISIONS:
        settings = training.Optimizer(1e-5, steps=20, clip_norm=0.0, precision=precision)
        params = {"kernel": weights.astype(settings.param_dtype)}
        transformation = training.make_optimizer(settings)
        changes, _ = jax.jit(transformation.update)(
            {"kernel": gradient.astype(settings.gradient_dtype)}, transformation.init(params), params
        )
        after = optax.apply_updates(params, changes)["kernel"]
        found[precision] = np.asarray(after, np.float64) - np.asarray(weights, np.float64)
    assert not found["release"].any()
    error = found["bfloat16"].std() / np.sqrt(weights.size)
    assert abs(found["bfloat16"].mean() - found["float32"].mean()) < 3 * error
    assert error < 0.1 * abs(found["float32"].mean())


def run(step, state, first, last):
    for number in range(first, last):
        state, _ = step(state, make_batch(number))
    return state


@pytest.mark.slow
def test_a_resumed_training_is_the_one_that_went_on(cfg, tmp_path):
    """From a checkpoint on disk."""
    step = training.make_train_step(cfg, OPTIMIZER, dropout_seed=1)
    half = run(step, training.init_state(models.init(cfg, jax.random.key(0)), OPTIMIZER), 0, 3)
    with Checkpointer(tmp_path / "checkpoints", 1) as checkpoints:
        checkpoints.save(3, half, wait=True)
    whole = run(step, half, 3, 6)
    with Checkpointer(tmp_path / "checkpoints", 1) as checkpoints:
        number, restored = checkpoints.restore_latest(training.abstract_state(cfg, OPTIMIZER, None))
    assert number == 3
    assert_equal(run(step, restored, 3, 6), whole)


# ---------------------------------------------------------------------------------------------- what a step computes


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_late_casts_change_no_gradient(cfg, remat):
    """Against weights that are all cast before the layers, in bfloat16 compute."""
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    params, batch = models.init(cfg, jax.random.key(0)), make_batch(0)

    def early(prepared):
        return training.loss(prepared, batch, cfg, remat=remat)[0]

    def late(variables):
        return training.loss(models.casting.defer(params, variables), batch, cfg, remat=remat)[0]

    expected = jax.jit(jax.value_and_grad(early))(models.prepare(params, cfg))
    found = jax.jit(jax.value_and_grad(late))(models.casting.placeholders(params, cfg))
    assert_equal(jax.tree.map(lambda leaf: leaf.dtype.name == "bfloat16", found[1]),
                 jax.tree.map(lambda leaf: leaf.dtype.name == "bfloat16", expected[1]))  # fmt: skip
    assert_equal(found, expected)


def test_what_no_training_can_have_is_one_line(cfg):
    with pytest.raises(UserError, match=r"^precision: no 'bf16'; did you mean 'bfloat16'\? \(known: bfloat16, float32"):
        method.optimizer(Recipe(precision="bf16"), 1)
    assert method.optimizer(Recipe(reproduce_release=True), 1).precision == "release"
    with pytest.raises(UserError, match="^precision: found 'bfloat16', but an adapter"):
        models.lora.check(cfg, Recipe(precision="bfloat16", lora=Lora(rank=1)))
    assert method.optimizer(Recipe(), 1) == training.Optimizer(5e-5, steps=1, seed=123)


# ------------------------------------------------------------------------------------- in programs as users get them


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_million_small_updates_end_where_float64_ends(count=1_000_000):
    """A thousandth of bfloat16's spacing at 1, a million times, up and down, through four binades."""
    start = np.repeat([1.0, -1.0], 128)
    change = np.float32(start * 2.0**-7 / 1000)

    @jax.jit
    def run(weights):
        def update(step, weights):
            return rounding.add(weights, change, rounding.random_bits(3, step, "w", (256,))[0])

        return jax.lax.fori_loop(0, count, update, weights)

    found = np.asarray(run(jnp.asarray(start, jnp.bfloat16)), np.float64)
    for sign in (1, -1):
        part = found[start == sign]
        expected = sign * (1 + count * float(change[0]))
        error = part.std(ddof=1) / np.sqrt(part.size)
        assert abs(part.mean() - expected) < 3 * error
        assert error < 0.01 * abs(expected)  # so that an update that is lost or doubled is seen
    nearest = jnp.asarray(start, jnp.bfloat16) + jnp.asarray(change, jnp.bfloat16)
    np.testing.assert_array_equal(nearest, start)  # which would never move


def updated(layout):
    """Weights and moments after three updates by gradients that are the same numbers on any mesh.

    Without clipping, whose norm is a sum and so has the mesh's order; all else of an update is element by element.
    """
    optimizer = dataclasses.replace(OPTIMIZER, clip_norm=0.0)
    transformation, rng = training.make_optimizer(optimizer), np.random.default_rng(5)
    shapes = {"embed": {"tokens": {"embedding": (64, 32)}}, "final": {"norm": {"scale": (32,)}},
              "blocks": {"mlp": {"up": {"kernel": (2, 32, 64), "bias": (2, 64)}}}}  # fmt: skip
    weights = jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    mesh = sharding.make_mesh(layout) if layout else sharding.single_device_mesh()
    places = sharding.param_shardings(weights, mesh)
    state = training.init_state(jax.tree.map(jax.device_put, weights, places), optimizer)
    params, opt_state = state.params, state.opt_state

    @jax.jit
    def update(gradients, opt_state, params):
        with jax.numpy_dtype_promotion("standard"):
            changes, opt_state = transformation.update(gradients, opt_state, params)
            return optax.apply_updates(params, changes), opt_state

    for _ in range(3):
        gradients = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
        params, opt_state = update(jax.device_put(gradients, places), opt_state, params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, opt_state)) if leaf.ndim} == {"bfloat16"}
    assert len(params["blocks"]["mlp"]["up"]["kernel"].sharding.device_set) == (8 if layout else 1)
    return jax.device_get((params, opt_state))


@pytest.mark.quick_variants(1)
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("layout", ["fsdp:8", "data:2,fsdp:2,model:2"])
def test_one_device_and_eight_give_the_same_bits(layout):
    assert_equal(updated(layout), updated(""))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision", "most"), [
    ("openai-community/gpt2-xl", "float32", 26), ("openai-community/gpt2-xl", "bfloat16", 15),
    ("meta-llama/Llama-2-7b-hf", "bfloat16", 68), ("facebook/opt-6.7b", "bfloat16", 68),
    ("tiiuae/falcon-7b", "bfloat16", 68),
])  # fmt: skip
def test_a_step_fits_an_h100(shared, name, precision, most):
    """8 texts of 256 tokens with remat "dots", compiled for a GPU that is not here: peak memory in GiB."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("XLA's compiler for NVIDIA GPUs is not here: jax-cuda13-plugin is not installed")
    code = f"""
import dataclasses, pathlib, jax, jax.numpy as jnp
from jax.experimental import topologies
from unidetox_jax import models, sharding, training
target = pathlib.Path({str(shared / "gpu/h100.txtpb")!r}).read_text()
topology = topologies.get_topology_desc("h100", platform="cuda", topology="1x1x1", target_config=target)
mesh = sharding.make_mesh("fsdp:-1", list(topology.devices))
cfg = dataclasses.replace(models.published_config({name!r}), dtype="bfloat16")
optimizer = training.Optimizer(1e-5, steps=100, precision={precision!r})
kinds = dict(tokens=jnp.int32, loss_mask=jnp.bool_, segment_ids=jnp.int32)
rows = sharding.batch_sharding(mesh)
batch = {{kind: jax.ShapeDtypeStruct((8, 256), dtype, sharding=rows) for kind, dtype in kinds.items()}}
step = training.make_train_step(cfg, optimizer, mesh, remat="dots")
traced = step.trace(training.abstract_state(cfg, optimizer, mesh), batch)
memory = traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis()
print("peak", memory.peak_memory_in_bytes / 2**30)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split("peak ")[1]) <= most
