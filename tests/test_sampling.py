"""The sampler: its law, whose noise it is, and the same tokens wherever it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from unidetox_jax.decoding import sampling, warpers

DRAWS = 20_000


def exact_law(scores, temperature=1.0, k=None, p=None, min_p=None):
    """The law in float64, from the definitions: temperature, top-k, top-p, min-p."""
    z = np.asarray(scores, np.float64) / temperature
    if k is not None:
        z = np.where(z < np.sort(z)[-k], -np.inf, z)
    law = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    if p is not None:
        order = np.argsort(law, kind="stable")
        dropped = np.cumsum(law[order]) <= 1 - p
        dropped[-1] = False
        law[order[dropped]] = 0
        law /= law.sum()
    if min_p is not None:
        law[law < min_p * law.max()] = 0
        law /= law.sum()
    return law


def draws_of(scores, chosen, seed=0, count=DRAWS):
    keys = sampling.step_keys(sampling.row_keys(seed, jnp.arange(count)), 5)
    rows = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (count, len(scores)))
    return np.asarray(jax.jit(sampling.draw)(rows, tuple(chosen), keys))


SCORES = np.random.default_rng(3).normal(size=23) * 1.5
TIED = np.round(SCORES)  # several tokens at the k-th value: all of them survive
LAWS = {
    "everything": (SCORES, {}),
    "temperature": (SCORES, {"temperature": 0.6}),
    "top_k": (SCORES, {"k": 7}),
    "top_p": (SCORES, {"p": 0.8}),
    "min_p": (SCORES, {"min_p": 0.1}),
    "top_k of ties": (TIED, {"k": 7}),
    "temperature, top_k, top_p": (SCORES, {"temperature": 1.7, "k": 9, "p": 0.75}),
    "top_k, min_p": (SCORES, {"k": 9, "min_p": 0.05}),
    "top_k beyond the vocabulary": (SCORES, {"k": 50}),
    "excluded tokens": (np.where(np.arange(23) % 3 == 0, -np.inf, SCORES), {"k": 20}),
}


@pytest.mark.parametrize("name", LAWS)
def test_draws_have_the_exact_law(name):
    scores, settings = LAWS[name]
    make = {
        "temperature": warpers.temperature,
        "k": warpers.top_k,
        "p": warpers.top_p,
        "min_p": warpers.min_p,
    }
    tokens = draws_of(scores, [make[setting](value) for setting, value in settings.items()])
    law = exact_law(scores, **{"k": None, **settings} if settings.get("k", 0) <= 23 else {})
    counts = np.bincount(tokens, minlength=len(scores))
    assert counts[law == 0].sum() == 0
    assert stats.chisquare(counts[law > 0], DRAWS * law[law > 0]).pvalue > 0.01
