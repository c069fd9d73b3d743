"""Rows and programs of `generate`: the exact distribution, the same text in any batch and on any mesh, one compilation,
and caches updated in place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from unidetox_jax import models, sharding
from unidetox_jax.decoding import generate, loop, objectives, preparation, sampling, warpers
from unidetox_jax.decoding.generate import make_plan

TEXTS, NEW = 2000, 12
SEED = 7
CONTRASTIVE = objectives.get("contrastive", alpha=0.05)
TOP_K = warpers.top_k(20)
BOS = np.full((TEXTS, 1), 1, np.int32)
NEAR = 1e-4  # perturbed scores this close may be reordered by rounding


def tiny(seed, vocab_size=128):
    """A GPT-2 of two layers and eight heads, with random weights large enough for non-uniform distributions."""
    cfg = models.config_from_hf(
        {"model_type": "gpt2", "vocab_size": vocab_size, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 160,
         "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.25}
    )  # fmt: skip
    return models.Model(models.init(cfg, jax.random.key(seed)), cfg)


@pytest.fixture(scope="module")
def pair():
    """Base and toxic model of one vocabulary."""
    return tiny(0), tiny(1)


def sample(pair, rows, **settings):
    """Texts of the rows with the given ids, int32 [B,NEW]."""
    settings = {"objective": CONTRASTIVE, "warpers": [TOP_K], "max_new_tokens": NEW, "seed": SEED,
                "layer_loop": "scan", **settings}  # fmt: skip
    return generate(pair, BOS[: len(rows)], row_ids=np.asarray(rows), **settings).tokens


@pytest.fixture(scope="module")
def together(pair):
    """All texts, from one batch on one device."""
    return sample(pair, np.arange(TEXTS))


def gap(pair, row, left, right):
    """The distance between the perturbed scores of the first tokens in which two texts differ; infinite if one of them
    is not a candidate."""
    step = int(np.argmax(left != right))
    prefix = np.concatenate([BOS[0], left[:step]])[None]
    logits = [models.forward(params, prefix, cfg)[:, -1] for params, cfg in pair]
    values, ids = sampling.top_candidates(CONTRASTIVE(*logits), TOP_K.k)
    keys = sampling.step_keys(sampling.row_keys(SEED, jnp.asarray([row])), step)
    perturbed = dict(zip(ids[0].tolist(), (values + sampling.token_noise(keys, ids))[0].tolist(), strict=True))
    return abs(perturbed.get(int(left[step]), np.inf) - perturbed.get(int(right[step]), -np.inf))


def assert_same_texts(pair, rows, found, expected):
    """At most 1 in 200 texts differs, and then only from a near-tie on."""
    different = np.flatnonzero((found != expected).any(1))
    assert len(different) <= len(rows) / 200
    for i in different:
        assert gap(pair, rows[i], found[i], expected[i]) <= NEAR, f"row {rows[i]}"


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize(("batch", "texts"), [(1, 200), (7, TEXTS), (64, TEXTS)])
def test_a_text_is_the_same_in_any_batch(pair, together, batch, texts):
    """Alone, or in a batch with other rows."""
    order = np.random.default_rng(batch).permutation(TEXTS)[:texts]
    order = np.concatenate([order, order[: -texts % batch]])
    found = np.concatenate([sample(pair, rows) for rows in order.reshape(-1, batch)])
    assert_same_texts(pair, order, found, together[order])


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("layout", ["data:8", "fsdp:8", "model:8", "data:2,fsdp:2,model:2"])
def test_a_text_is_the_same_on_any_mesh(pair, together, layout):
    mesh = sharding.make_mesh(layout)
    placed = [models.Model(jax.device_put(tree, sharding.param_shardings(tree, mesh)), cfg) for tree, cfg in pair]
    found = sample(placed, np.arange(TEXTS - 1))  # not divisible by the mesh, so rows are padded
    assert_same_texts(pair, np.arange(TEXTS - 1), found, together[:-1])


@pytest.mark.slow
def test_other_differences_between_texts_are_detected(pair, together):
    assert len(np.unique(together, axis=0)) > TEXTS * 0.9
    other = sample(pair, np.arange(TEXTS), seed=SEED + 1)
    assert min(gap(pair, row, together[row], other[row]) for row in range(20)) > NEAR
    with pytest.raises(AssertionError):
        assert_same_texts(pair, np.arange(TEXTS), other, together)


def test_random_numbers_are_equal_everywhere():
    ids = jnp.broadcast_to(jnp.arange(0, 50_257, 1000), (64, 51))

    @jax.jit
    def noise(rows, ids):
        return sampling.token_noise(sampling.step_keys(sampling.row_keys(SEED, rows), 3), ids)

    rows = np.arange(64)
    expected = np.asarray(noise(rows, ids))
    for batch in (1, 7):
        for first in (0, 21, 57):
            part = slice(first, first + batch)
            np.testing.assert_array_equal(noise(rows[part], ids[part]), expected[part])
    for layout in ("data:8", "data:2,model:4"):
        mesh = sharding.make_mesh(layout)
        with jax.set_mesh(mesh):
            split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in (rows, ids)]
            np.testing.assert_array_equal(noise(*split), expected)


def distribution_of(pair, prefix, objective, chain):
    """The next token's distribution after a prefix, float64 [V]."""
    logits = [models.forward(params, np.asarray([prefix]), cfg)[:, -1] for params, cfg in pair]
    scores = np.asarray(warpers.apply(chain, objective(*logits)), np.float64)[0]
    return np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["top_k", "temperature and top_p"])
def test_pairs_of_tokens_have_the_exact_distribution(chain, draws=20_000):
    """The joint distribution of the first two tokens, from both models' logits."""
    pair = tiny(2, vocab_size=23), tiny(3, vocab_size=23)
    chosen = [warpers.top_k(6)] if chain == "top_k" else [warpers.temperature(0.7), warpers.top_p(0.8)]
    objective = objectives.get("contrastive", alpha=0.1)
    settings = {"objective": objective, "warpers": chosen, "max_new_tokens": 2, "eos_id": ()}
    tokens = np.concatenate([sample(pair, rows, **settings) for rows in np.arange(draws).reshape(-1, TEXTS)])
    chain = warpers.in_order(chosen)
    first = distribution_of(pair, [1], objective, chain)
    joint = np.zeros((23, 23))
    for token in np.flatnonzero(first):
        joint[token] = first[token] * distribution_of(pair, [1, token], objective, chain)
    counts = np.zeros_like(joint)
    np.add.at(counts, (tokens[:, 0], tokens[:, 1]), 1)
    assert counts[joint == 0].sum() == 0 and (first > 0).sum() > 2
    frequent = draws * joint >= 5  # the chi-square test's minimum; all others form one bin
    observed, expected = (np.append(x[frequent], x[~frequent].sum()) for x in (counts, draws * joint))
    possible = expected > 0
    assert possible.sum() > 8
    assert stats.chisquare(observed[possible], expected[possible]).pvalue > 0.01


@pytest.fixture
def compilations():
    """Records the compilations of a test."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_one_compilation_per_bucket_and_per_sweep(pair, compilations):
    rng = np.random.default_rng(0)

    def run(length, new, alpha=0.1, temperature=1.0, masked=0, seed=0):
        prompts = rng.integers(3, 128, (5, length))
        mask = np.ones_like(prompts)
        mask[2, :masked] = 0
        return generate(pair, prompts, objective=objectives.get("contrastive", alpha=alpha), attention_mask=mask,
                        warpers=[warpers.temperature(temperature), TOP_K], max_new_tokens=new, seed=seed,
                        layer_loop="scan").tokens  # fmt: skip

    run(9, 12)
    assert compilations
    compilations.clear()
    run(9, 12)  # other prompts
    run(6, 12, masked=3)  # of other lengths
    run(9, 16, seed=5)  # as many new tokens as fit
    swept = [run(9, 12, alpha=alpha, temperature=0.5 + alpha) for alpha in (0.05, 0.3, 1.0)]
    assert not compilations
    assert all((swept[0] != other).any() for other in swept[1:])
    run(10, 12)  # the next bucket
    assert compilations


def instructions(text):
    """Computation → its instructions as (shape, operation, line), from an HLO module's text."""
    found, name = {}, None
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header[1]
            found[name] = []
        elif match := re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (\S+?)(?:\{[^}]*\})? ([\w-]+)\(", line):
            found[name].append((match[1], match[2], line))
    return found


@pytest.mark.quick_variants(1)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the HLO of XLA's CPU compiler")
@pytest.mark.parametrize("cache", ["own", "official"])
@pytest.mark.parametrize("layer_loop", ["unroll", "scan"])
def test_the_loop_writes_its_caches_in_place(pair, layer_loop, cache):
    """Within the loops, arrays of a cache's shape are passed on or updated by a slice, never copied."""
    batch, new = 3, 100
    prepared = preparation.prepare(pair, layer_loop=layer_loop)[0].params
    plan = make_plan(prepared.configs, [9, 9], new, cache=cache)
    assert len(plan.segments) == 2
    prompts = (np.zeros((batch, plan.prompt_slots[0] + 1), np.int32),) * 2
    rows = np.arange(batch, dtype=np.int32)
    inputs = loop.Inputs(prompts, tuple(x == 0 for x in prompts), rows, rows >= 0, np.uint32(0), np.int32(new),
                         np.array([2], np.int32), np.int32(0))  # fmt: skip
    compiled = loop.program_for("cpu").lower(prepared.trees, inputs, CONTRASTIVE, (TOP_K,), plan=plan).compile()
    computations = instructions(compiled.as_text())
    shapes = {f"f32[{'2,' if layer_loop == 'scan' else ''}{batch},8,{length},4]"
              for segment in range(2) for length in plan.cache_lengths(segment)}  # fmt: skip
    bodies = re.findall(r"while\(.*body=%?([\w.-]+)", compiled.as_text())
    reached, waiting = set(), list(bodies)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            called = " ".join(line for _, _, line in computations[name])
            waiting += [n for n in re.findall(r"(?:body|calls|to_apply|condition)=%?([\w.-]+)", called)]
    whole = [(operation, line) for name in reached for shape, operation, line in computations[name] if shape in shapes]
    updates = [line for operation, line in whole if operation == "dynamic-update-slice"]
    # Keys and values of each model, in each segment's loop (unrolled: of each layer).
    assert len(updates) >= 2 * len(plan.segments) * 2 * (2 if layer_loop == "unroll" else 1)
    passed_on = {"parameter", "get-tuple-element", "dynamic-update-slice", "bitcast"}
    others = [line for operation, line in whole if operation not in passed_on]
    for line in others:
        called = re.search(r" fusion\(.*calls=%?([\w.-]+)", line)
        root = called and next(line for _, _, line in computations[called[1]] if "ROOT" in line)
        assert root and " dynamic-update-slice(" in root, line
