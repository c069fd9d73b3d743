"""Warpers keep the same tokens as transformers' classes, for random scores and ties; their equality and order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from unidetox_jax.decoding import order_statistics, warpers
from unidetox_jax.errors import UserError

PAIRS = {
    "temperature": (warpers.temperature, hf.TemperatureLogitsWarper, (0.3, 0.7, 1.0, 1.7)),
    "top_k": (warpers.top_k, hf.TopKLogitsWarper, (1, 5, 50)),
    "top_p": (warpers.top_p, hf.TopPLogitsWarper, (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.999, 1.0)),
    "min_p": (warpers.min_p, hf.MinPLogitsWarper, (0.0, 0.05, 0.1, 0.3, 1.0)),
}


def scores_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    scores = {
        "random": lambda: rng.normal(size=(16, 97)) * 3,
        "wide": lambda: rng.normal(size=(3, 50_257)) * 3,
        "tied": lambda: np.round(rng.normal(size=(16, 97)) * 2),
        "two levels": lambda: np.where(rng.random((16, 97)) < 0.3, 1.0, 0.0),
        "uniform": lambda: np.zeros((2, 10)),
        "one certain token": lambda: np.where(np.arange(97) == 17, 200.0, rng.normal(size=(16, 97))),
        "mostly excluded": lambda: np.where(rng.random((16, 97)) < 0.9, -np.inf, rng.normal(size=(16, 97))),
        "negative": lambda: -1e4 - rng.random((16, 97)),
    }[kind]()
    return scores.astype(np.float32)


ONE_ULP = {"rtol": 2.4e-7, "atol": 0}
KINDS = (
    "random",
    "wide",
    "tied",
    "two levels",
    "uniform",
    "one certain token",
    "mostly excluded",
    "negative",
)


ours = jax.jit(lambda chain, scores: warpers.apply(chain, scores))


def theirs(chain, scores: np.ndarray) -> np.ndarray:
    scores = torch.from_numpy(scores)
    for warper in chain:
        scores = warper(None, scores)
    return scores.numpy()


@pytest.fixture
def stable_sort(monkeypatch):
    """Makes TopPLogitsWarper's torch.sort, which leaves the order of ties open, sort ties by id."""
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_transformers(name, kind, stable_sort):
    make, reference, settings = PAIRS[name]
    scores = scores_of(kind)
    for setting in settings:
        found, expected = np.asarray(ours((make(setting),), scores)), theirs([reference(setting)], scores)
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected), err_msg=f"{name}({setting})")
        # XLA multiplies by 1 / t, so the last bit may differ for temperature, but for no other warper.
        np.testing.assert_allclose(found, expected, **(ONE_ULP if name == "temperature" else {"rtol": 0}))


@pytest.mark.parametrize("kind", ("tied", "two levels"))
def test_keeps_as_many_ties_as_transformers_unstable_sort(kind):
    scores = scores_of(kind)
    for p in PAIRS["top_p"][2]:
        found = np.sort(np.asarray(ours((warpers.top_p(p),), scores)), -1)
        np.testing.assert_array_equal(found, np.sort(theirs([hf.TopPLogitsWarper(p)], scores), -1))


@pytest.mark.parametrize("kind", ("random", "tied"))
def test_a_chain_equals_transformers_in_its_order(kind, stable_sort):
    scores = scores_of(kind)
    reference = (hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.9))
    given = (warpers.top_p(0.9), warpers.temperature(0.7), warpers.top_k(20))
    np.testing.assert_allclose(ours(given, scores), theirs(reference, scores), **ONE_ULP)


def test_order_is_fixed_and_duplicates_are_rejected():
    order = (warpers.temperature(0.5), warpers.top_k(5), warpers.top_p(0.9), warpers.min_p(0.1))
    assert warpers.in_order(order[::-1]) == order
    with pytest.raises(UserError, match="TopK is given 2 times"):
        warpers.in_order([warpers.top_k(5), warpers.top_k(6)])
    with pytest.raises(UserError, match="expected temperature, top_k, top_p or min_p"):
        warpers.in_order([lambda scores: scores])


def test_warpers_are_equal_if_their_settings_are():
    for name, (make, _, settings) in PAIRS.items():
        first, second, other = make(settings[0]), make(settings[0]), make(settings[1])
        assert first == second and hash(first) == hash(second) and first != other, name
    assert warpers.top_p(0.5) != warpers.min_p(0.5)
    assert warpers.temperature(0) == warpers.temperature(0.0) == warpers.greedy()


def test_numbers_are_traced_and_k_is_static():
    traces = []

    @jax.jit
    def run(chain, scores):
        traces.append(chain)
        return warpers.apply(chain, scores)

    scores = jnp.asarray(scores_of("random"))
    for t, p, m in ((0.5, 0.9, 0.1), (1, 0.5, 0.2), (2.0, 1, 0)):
        run((warpers.temperature(t), warpers.top_k(5), warpers.top_p(p), warpers.min_p(m)), scores)
    assert len(traces) == 1
    run((warpers.temperature(0.5), warpers.top_k(6), warpers.top_p(0.9), warpers.min_p(0.1)), scores)
    assert len(traces) == 2


def test_temperature_zero_keeps_only_the_best_token():
    kept = np.isfinite(np.asarray(warpers.temperature(0)(jnp.asarray([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]]))))
    np.testing.assert_array_equal(kept, [[False, True, False], [True, False, False]])


@pytest.mark.parametrize(
    "make, value, expected",
    [
        (warpers.temperature, -0.1, "temperature: found -0.1, expected a number ≥ 0"),
        (warpers.temperature, float("inf"), "temperature: found inf"),
        (warpers.temperature, float("nan"), "temperature: found nan"),
        (warpers.temperature, "warm", "temperature: found 'warm'"),
        (warpers.top_k, 0, "top_k: found 0, expected a whole number ≥ 1"),
        (warpers.top_k, 5.5, "top_k: found 5.5"),
        (warpers.top_k, True, "top_k: found True"),
        (warpers.top_p, 1.1, "top_p: found 1.1, expected a number from 0 to 1"),
        (warpers.top_p, -0.1, "top_p: found -0.1"),
        (warpers.min_p, 2, "min_p: found 2"),
    ],
)
def test_bad_settings_are_named(make, value, expected):
    with pytest.raises(UserError, match=expected):
        make(value)


@pytest.mark.parametrize("k", (1, 7, 96, 97))
def test_kth_largest_equals_sorting(k):
    for kind in ("random", "tied", "mostly excluded"):
        scores = scores_of(kind)
        np.testing.assert_array_equal(order_statistics.kth_largest(scores, k)[:, 0], np.sort(scores, -1)[:, -k])


def test_kth_largest_with_a_different_k_per_row():
    scores, k = scores_of("random"), np.arange(1, 17)[:, None]
    expected = np.take_along_axis(np.sort(scores, -1)[:, ::-1], k - 1, -1)
    np.testing.assert_array_equal(jax.jit(order_statistics.kth_largest)(scores, k), expected)
