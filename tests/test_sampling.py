"""The sampler: its distribution, its noise, and equal tokens in any batch and on any mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from unidetox_jax.decoding import sampling, warpers
from unidetox_jax.sharding import make_mesh

SAMPLES = 20_000


def exact_distribution(scores, temperature=1.0, k=None, p=None, min_p=None):
    """The distribution in float64, from the definitions: temperature, top-k, top-p, min-p."""
    z = np.asarray(scores, np.float64) / temperature
    if k is not None:
        z = np.where(z < np.sort(z)[-k], -np.inf, z)
    probabilities = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    if p is not None:
        order = np.argsort(probabilities, kind="stable")
        dropped = np.cumsum(probabilities[order]) <= 1 - p
        dropped[-1] = False
        probabilities[order[dropped]] = 0
        probabilities /= probabilities.sum()
    if min_p is not None:
        probabilities[probabilities < min_p * probabilities.max()] = 0
        probabilities /= probabilities.sum()
    return probabilities


def samples_of(scores, chosen, seed=0, count=SAMPLES):
    keys = sampling.step_keys(sampling.row_keys(seed, jnp.arange(count)), 5)
    rows = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (count, len(scores)))
    return np.asarray(jax.jit(sampling.sample)(rows, tuple(chosen), keys))


SCORES = np.random.default_rng(3).normal(size=23) * 1.5
TIED = np.round(SCORES)  # several tokens tie at the k-th value and survive
CASES = {
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


@pytest.mark.quick_variants(4)
@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_exact_distribution(name):
    scores, settings = CASES[name]
    make = {
        "temperature": warpers.temperature,
        "k": warpers.top_k,
        "p": warpers.top_p,
        "min_p": warpers.min_p,
    }
    tokens = samples_of(scores, [make[setting](value) for setting, value in settings.items()])
    probabilities = exact_distribution(scores, **{"k": None, **settings} if settings.get("k", 0) <= 23 else {})
    counts = np.bincount(tokens, minlength=len(scores))
    assert counts[probabilities == 0].sum() == 0
    assert stats.chisquare(counts[probabilities > 0], SAMPLES * probabilities[probabilities > 0]).pvalue > 0.01


@pytest.mark.slow
def test_top_k_beyond_one_block_and_without_top_k():
    """A vocabulary of several blocks of `inverse_cdf`, the last one short."""
    scores = np.random.default_rng(4).normal(size=700) * 2
    for chosen, settings in (((), {}), ((warpers.top_p(0.7),), {"p": 0.7})):
        probabilities = exact_distribution(scores, **settings)
        tokens = samples_of(scores, chosen)
        assert (probabilities[tokens] > 0).all()
        groups = np.add.reduceat(probabilities, np.arange(0, 700, 50)), np.bincount(tokens // 50, minlength=14)
        assert stats.chisquare(groups[1], SAMPLES * groups[0]).pvalue > 0.01


def test_noise_is_gumbel_and_depends_on_row_step_and_token():
    keys = sampling.step_keys(sampling.row_keys(0, jnp.arange(200)), 7)
    noise = np.asarray(sampling.token_noise(keys, jnp.broadcast_to(jnp.arange(100), (200, 100))))
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 0.01
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.02
    some = np.asarray(sampling.token_noise(keys[50:60], jnp.tile(jnp.asarray([93, 2, 17]), (10, 1))))
    np.testing.assert_array_equal(some, noise[50:60][:, [93, 2, 17]])
    other_step = sampling.token_noise(
        sampling.step_keys(sampling.row_keys(0, jnp.arange(10)), 8), jnp.zeros((10, 1), int)
    )
    assert not np.isin(other_step, noise).any()


def test_noise_never_changes():
    """If these numbers change, so do all users' texts."""
    keys = sampling.step_keys(sampling.row_keys(1234, jnp.asarray([0, 639])), 254)
    noise = sampling.token_noise(keys, jnp.asarray([[0, 50_256], [0, 50_256]]))
    np.testing.assert_allclose(noise, [[0.658083, -0.057924], [2.05408, 0.675566]], rtol=1e-4)


CHAINS = {
    "greedy": (warpers.greedy(),),
    "top_k": (warpers.top_k(50),),
    "all": (warpers.temperature(0.8), warpers.top_k(50), warpers.top_p(0.9), warpers.min_p(0.01)),
    "none": (),
    "top_p": (warpers.top_p(0.9),),
}
BATCH, VOCABULARY = 16, 1024


@jax.jit
def sample_rows(scores, chain, row_ids):
    return sampling.sample(scores, chain, sampling.step_keys(sampling.row_keys(9, row_ids), 3))


def scores_with_ties():
    scores = np.random.default_rng(5).normal(size=(BATCH, VOCABULARY)).astype(np.float32) * 2
    scores[3] = np.round(scores[3])  # ties at the k-th score
    scores[4, 30:] = -np.inf  # fewer tokens than k
    scores[5] = 0.0
    return scores


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("name", ("all", "top_p"))
def test_a_row_is_sampled_equally_alone_and_among_others(name):
    scores, rows = scores_with_ties(), np.arange(BATCH) + 40
    together = np.asarray(sample_rows(scores, CHAINS[name], rows))
    order = np.random.default_rng(0).permutation(BATCH)
    np.testing.assert_array_equal(sample_rows(scores[order], CHAINS[name], rows[order]), together[order])
    for row in (0, 3, 5):
        alone = sample_rows(scores[row : row + 1], CHAINS[name], rows[row : row + 1])
        np.testing.assert_array_equal(alone, together[row : row + 1])


@pytest.mark.quick_variants(2)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPUs take a few rows at a time")
@pytest.mark.parametrize("layout, rows", [("data:1", 2), ("data:2,fsdp:4", 1)])
@pytest.mark.parametrize("name", ("none", "top_p"))
def test_a_few_rows_at_a_time_give_the_same_tokens(name, layout, rows, monkeypatch):
    """Chunks of the 16 rows of one device, or of the two of each device."""
    scores, row_ids = scores_with_ties(), jnp.arange(BATCH)
    expected = np.asarray(sample_rows(scores, CHAINS[name], row_ids))
    monkeypatch.setattr(sampling, "_CACHE_BYTES", (4 * rows + 2) * VOCABULARY)
    chunked = jax.jit(sample_rows.__wrapped__)
    with jax.set_mesh(make_mesh(layout, jax.devices()[:1] if layout == "data:1" else None)):
        text = chunked.lower(scores, CHAINS[name], row_ids).as_text()
        np.testing.assert_array_equal(chunked(scores, CHAINS[name], row_ids), expected)
    assert f"tensor<{rows}x{VOCABULARY}xf32>" in text


@pytest.mark.quick_variants(3)
@pytest.mark.parametrize(
    "name, layout",
    [(name, "data:2,model:4") for name in CHAINS] + [("all", "model:8"), ("top_p", "data:2,fsdp:4")],
)
def test_a_mesh_changes_no_token_and_gathers_no_vocabulary(name, layout):
    scores, rows = scores_with_ties(), jnp.arange(BATCH)
    expected = np.asarray(sample_rows(scores, CHAINS[name], rows))
    mesh = make_mesh(layout)
    with jax.set_mesh(mesh):
        split = jax.device_put(scores, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "model")))
        compiled = sample_rows.lower(split, CHAINS[name], rows).compile()
        np.testing.assert_array_equal(compiled(split, CHAINS[name], rows), expected)
    gathered = re.findall(r" = ([^=]*?) all-gather(?:-start)?\(", compiled.as_text())
    shapes = [shape for shapes in gathered for shape in re.findall(r"\[([\d,]*)\]", shapes)]
    assert bool(shapes) or "model" not in layout  # local candidates or masses are gathered, or the pattern is stale
    assert all(np.prod([int(size) for size in shape.split(",")]) < BATCH * VOCABULARY / 2 for shape in shapes), shapes


def test_dimensions_that_the_mesh_does_not_divide():
    scores = np.random.default_rng(6).normal(size=(3, 997)).astype(np.float32)
    expected = np.asarray(sample_rows(scores, CHAINS["all"], jnp.arange(3)))
    with jax.set_mesh(make_mesh("data:2,model:4")):
        np.testing.assert_array_equal(sample_rows(scores, CHAINS["all"], jnp.arange(3)), expected)


def test_candidates_of_a_sharded_vocabulary_equal_top_k():
    scores = scores_with_ties()
    expected = jax.lax.top_k(scores, 200)  # more than the 128 tokens that a device holds
    with jax.set_mesh(make_mesh("model:8")):
        found = jax.jit(lambda scores: sampling.top_candidates(scores, 200))(scores)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA's CPU compiler treats top_k")
def test_the_vocabulary_is_never_sorted():
    """XLA turns top_k into a sort of the vocabulary, fifty times slower, if an output is sliced."""
    scores = jnp.zeros((4, 50_257))
    for name in ("all", "top_p"):
        text = sample_rows.lower(scores, CHAINS[name], jnp.arange(4)).compile().as_text()
        assert not re.search(r"50257[^=]* sort\(", text)
        assert ("TopK" in text) == (name == "all")


def test_inverse_cdf_takes_only_tokens_with_mass():
    scores = np.full((4, 600), -np.inf, np.float32)
    scores[:, [5, 300, 590]] = [[0.0, -1.0, -30.0]]
    uniform = jnp.asarray([0.0, 0.7, 0.9, 1 - 2**-24])
    np.testing.assert_array_equal(sampling.inverse_cdf(scores, uniform), [5, 5, 300, 300])
    certain = np.where(np.arange(600) == 599, 0.0, -np.inf)[None].astype(np.float32)
    np.testing.assert_array_equal(sampling.inverse_cdf(certain, jnp.asarray([0.0])), [599])


def test_settings_of_warpers_are_traced():
    scores, rows = scores_with_ties(), jnp.arange(BATCH)
    sample_rows(scores, (warpers.temperature(0.5), warpers.top_k(50), warpers.top_p(0.3)), rows)
    before = sample_rows._cache_size()
    sample_rows(scores, (warpers.temperature(1.5), warpers.top_k(50), warpers.top_p(0.8)), rows)
    assert sample_rows._cache_size() == before
