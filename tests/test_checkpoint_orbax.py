"""Orbax trees and checkpoint series: any mesh, donated arrays, damaged and missing files, full disks."""

import asyncio
import gc
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from unidetox_jax.checkpoint import orbax_io
from unidetox_jax.errors import UserError


def mesh(*shape):
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


@pytest.fixture(scope="module")
def state():
    """A training state as optax makes it: named tuples, scalars, two dtypes, one sharded leaf."""
    kernel = np.random.default_rng(0).standard_normal((64, 96), dtype=np.float32)
    params = {
        "kernel": jax.device_put(kernel, NamedSharding(mesh(8), P("data"))),
        "norm": {"scale": jnp.arange(5, dtype=jnp.bfloat16)},
    }
    return {"params": params, "opt": optax.adamw(1e-3).init(params), "step": jnp.int32(7)}


def target(tree, mesh, *axes):
    def abstract(leaf):
        sharding = NamedSharding(mesh, P(*axes) if leaf.ndim == 2 else P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, tree)


def same(left, right):
    return all(
        a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


def test_tree_is_restored_on_another_mesh(tmp_path, state):
    orbax_io.save_tree(tmp_path / "tree", state)
    target_tree = target(state, mesh(2, 4), "model", "data")
    restored = orbax_io.restore_tree(tmp_path / "tree", target_tree)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert same(restored, state)
    assert restored["params"]["kernel"].sharding == target_tree["params"]["kernel"].sharding
    assert orbax_io.saved_dtypes(tmp_path / "tree")["params/norm/scale"] == "bfloat16"


@pytest.mark.parametrize("fault", ["shape", "missing", "surplus", "absent"])
def test_tree_of_another_model_is_an_error(tmp_path, state, fault):
    orbax_io.save_tree(tmp_path / "tree", state["params"])
    target_tree = target(state["params"], mesh(8))
    directory, message = tmp_path / "tree", ""
    if fault == "shape":
        target_tree["kernel"] = jax.ShapeDtypeStruct((64, 95), jnp.float32, sharding=target_tree["kernel"].sharding)
        message = r"kernel has shape \(64, 96\), expected \(64, 95\)"
    elif fault == "missing":
        target_tree["bias"] = target_tree["norm"]["scale"]
        message = "leaf bias is missing"
    elif fault == "surplus":
        del target_tree["norm"]
        message = "leaf norm/scale is not one of the model's"
    else:
        directory, message = tmp_path / "elsewhere", "elsewhere: cannot be read"
    with pytest.raises(UserError, match=message):
        orbax_io.restore_tree(directory, target_tree)


def test_series_keeps_the_newest_and_survives_donation(tmp_path, state):
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    tree = jax.tree.map(jnp.copy, state)
    with orbax_io.Checkpointer(tmp_path / "run", keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.restore_latest(target(state, mesh(8))) is None
        for number in range(4):
            checkpointer.save(number, tree)
            tree = step(tree)  # overwrites the arrays while they are being written
        checkpointer.save(3, tree)  # exists already, and stays
        assert checkpointer.latest_step() == 3
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["2", "3"]
    with orbax_io.Checkpointer(tmp_path / "run") as checkpointer:
        number, restored = checkpointer.restore_latest(target(state, mesh(4, 2), "data", "model"))
    assert number == 3
    expected = state
    for _ in range(3):
        expected = step(jax.tree.map(jnp.copy, expected))
    assert same(restored, expected)


def damage(step: pathlib.Path, kind: str) -> None:
    data = [path for path in step.rglob("d/*") if path.is_file()]
    if kind == "truncated":
        with max(data, key=lambda path: path.stat().st_size).open("rb+") as file:
            file.truncate(100)
    elif kind == "data":
        for path in data:
            path.unlink()
    elif kind == "metadata":
        (step / "default" / "_METADATA").unlink()
    else:
        (step / "default" / "_METADATA").write_text("{")


@pytest.mark.parametrize("kind", ["truncated", "data", "metadata", "not json"])
def test_damaged_newest_is_reported_and_replaced(tmp_path, state, kind, caplog):
    run = tmp_path / "run"
    with orbax_io.Checkpointer(run, keep=3) as checkpointer:
        checkpointer.save(10, state)
        checkpointer.save(20, state)
    damage(run / "20", kind)
    with orbax_io.Checkpointer(run, keep=1) as checkpointer:
        number, restored = checkpointer.restore_latest(target(state, mesh(8)))
        assert number == 10 and same(restored, state)
        warnings = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
        assert len(warnings) == 1 and "step 20" in warnings[0] and "\n" not in warnings[0]
        checkpointer.save(15, state)  # older than the damaged one, but the only one left
        assert checkpointer.latest_step() == 15
    assert [path.name for path in run.iterdir()] == ["15"]


def test_all_damaged_is_an_error(tmp_path, state):
    run = tmp_path / "run"
    with orbax_io.Checkpointer(run) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.save(2, state)
    for step in ("1", "2"):
        damage(run / step, "data")
    with orbax_io.Checkpointer(run) as checkpointer:
        with pytest.raises(UserError, match="no checkpoint can be read.*step 2.*step 1"):
            checkpointer.restore_latest(target(state, mesh(8)))


def test_checkpoints_of_another_model_are_not_called_damaged(tmp_path, state):
    with orbax_io.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, state)
        checkpointer.wait()
        other = target(state, mesh(8))
        other["step"] = jax.ShapeDtypeStruct((), jnp.float32, sharding=other["step"].sharding)
        with pytest.raises(UserError, match="leaf step has dtype int32, expected float32"):
            checkpointer.restore_latest(other)


def test_unfinished_checkpoint_is_ignored(tmp_path, state):
    run = tmp_path / "run"
    with orbax_io.Checkpointer(run) as checkpointer:
        checkpointer.save(1, state)
    shutil.copytree(run / "1", run / "2.orbax-checkpoint-tmp")
    with orbax_io.Checkpointer(run) as checkpointer:
        assert checkpointer.latest_step() == 1
        checkpointer.save(2, state, wait=True)
    assert sorted(path.name for path in run.iterdir()) == ["1", "2"]


def test_full_disk_is_a_user_error_and_keeps_the_last_checkpoint(tmp_path, state):
    run = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with orbax_io.Checkpointer(run) as checkpointer:
        checkpointer.save(1, state, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(UserError, match="cannot be written"):
                checkpointer.save(2, state, wait=True)
            with pytest.raises(UserError, match="cannot be written"):
                orbax_io.save_tree(tmp_path / "tree", state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpointer.restore_latest(target(state, mesh(8)))[0] == 1
        checkpointer.save(3, state, wait=True)
        assert checkpointer.latest_step() == 3
    assert not (tmp_path / "tree").exists()


def test_relative_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {"a": jnp.arange(8.0)}
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
    orbax_io.save_tree("tree", tree)
    np.testing.assert_array_equal(orbax_io.restore_tree("tree", target)["a"], tree["a"])
    with orbax_io.Checkpointer("series") as series:
        series.save(3, tree, wait=True)
        assert series.restore_latest(target)[0] == 3


def test_later_failed_writes_print_no_traceback(caplog):
    async def fails():
        raise OSError("No space left on device")

    async def another_was_faster():
        asyncio.create_task(fails())
        await asyncio.sleep(0.01)

    asyncio.run(another_was_faster())
    gc.collect()
    assert not caplog.records
