"""Decoding objectives: each against its equation in float64, properties that all must have, and `objectives.get`."""

import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unidetox_jax.decoding import objectives
from unidetox_jax.decoding.context_objectives import CONTEXT_OBJECTIVES
from unidetox_jax.errors import UserError

PLAIN = sorted(objectives.OBJECTIVES.keys() - CONTEXT_OBJECTIVES.keys())
NUMBERS = {  # how many models' logits the tests pass to each
    name: max(objectives.get(name).num_models, 3 if name == "self_debiasing" else 0) for name in PLAIN
}
UNIFORM_WHERE_EQUAL = {"contrastive", "dola"}  # z_t = z_b gives the uniform distribution on the plausible set
STRENGTH = {  # the setting for which zero gives the base distribution, truncated or not
    "contrastive_beta": "beta",
    "contrastive_amateur": "weight",
    "dexperts": "alpha",
    "anti_expert": "alpha",
    "proxy_tuning": "alpha",
    "context_aware": "alpha",
    "detoxigen": "alpha",
    "self_debiasing": "decay",
}

# --- the equations in float64 -------------------------------------------------------------------------------------


def log_softmax(z):
    z = np.asarray(z, np.float64)
    return z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))


def softmax(z):
    return np.exp(log_softmax(z))


def apc(z, alpha):
    return z >= np.log(alpha) + z.max(-1, keepdims=True)


def top_p_set(z, mass):
    result = np.zeros(z.shape, bool)
    for row, probabilities in zip(result, softmax(z), strict=True):
        total = 0.0
        for token in np.argsort(-probabilities):
            row[token] = True
            total += probabilities[token]
            if total > mass:
                break
    return result


def restrict(mask, scores):
    return np.where(mask, scores, -np.inf)


def reference_detoxigen(b, t, alpha=1.0, top_p=0.9):
    mass = np.maximum(0, softmax(b) + alpha * (softmax(b) - softmax(t)))
    with np.errstate(divide="ignore"):
        return restrict(top_p_set(b, top_p), np.log(mass / mass.sum(-1, keepdims=True)))


def reference_self_debiasing(b, *biased, decay=50.0, epsilon=0.01):
    difference = softmax(b) - np.max([softmax(z) for z in biased], 0)
    weight = np.where(difference >= 0, 1.0, np.maximum(epsilon, np.exp(decay * difference)))
    return np.log(weight * softmax(b) / (weight * softmax(b)).sum(-1, keepdims=True))


def reference_soft_contrastive(b, t, min_k=10, shift_invariant=True):
    scores, (log_b, log_t) = b.copy(), (log_softmax(b), log_softmax(t))
    for row in range(len(b)):
        distance = np.sqrt(((np.exp(log_b[row]) - np.exp(log_t[row])) ** 2).sum())
        a = np.log(1 + distance) / (1 + np.log(1 + distance))
        k = int(np.clip(np.floor(a * b.shape[-1]), min_k, b.shape[-1]))
        favoured = log_t[row] - log_b[row]
        for token in np.argsort(-favoured)[:k]:
            if favoured[token] > 0:
                scores[row, token] -= a * (log_t if shift_invariant else t)[row, token]
    return scores


REFERENCES = {
    "base": lambda b: b,
    "contrastive": lambda b, t, alpha=0.1: restrict(apc(b, alpha), b - t),
    "contrastive_beta": lambda b, t, alpha=0.1, beta=0.5: restrict(apc(b, alpha), (1 + beta) * b - beta * t),
    "contrastive_amateur": lambda b, s, alpha=0.1, weight=1.0, temperature=0.5: restrict(
        apc(b, alpha), log_softmax(b) - weight * s / temperature
    ),
    "dexperts": lambda b, e, t, alpha=2.0, top_p=0.9: restrict(top_p_set(b, top_p), b + alpha * (e - t)),
    "anti_expert": lambda b, t, alpha=2.0, top_p=0.9: restrict(top_p_set(b, top_p), (1 + alpha) * b - alpha * t),
    "proxy_tuning": lambda b, e, t, alpha=1.0: b + alpha * (e - t),
    "classifier_free_guidance": lambda c, u, scale=1.5: log_softmax(u) + scale * (log_softmax(c) - log_softmax(u)),
    "context_aware": lambda c, n, alpha=0.5: (1 + alpha) * c - alpha * n,
    "dola": lambda n, m, alpha=0.1: restrict(apc(n, alpha), log_softmax(n) - log_softmax(m)),
    "detoxigen": reference_detoxigen,
    "self_debiasing": reference_self_debiasing,
    "soft_contrastive": reference_soft_contrastive,
}
OTHER_SETTINGS = {
    "contrastive": {"alpha": 0.013},
    "contrastive_beta": {"alpha": 0.3, "beta": 2.5},
    "contrastive_amateur": {"alpha": 0.5, "weight": 0.7, "temperature": 1.3},
    "dexperts": {"alpha": 3.2, "top_p": 0.6},
    "anti_expert": {"alpha": 0.7, "top_p": 0.99},
    "proxy_tuning": {"alpha": 1.6},
    "classifier_free_guidance": {"scale": 3.0},
    "context_aware": {"alpha": 1.0},
    "dola": {"alpha": 0.9},
    "detoxigen": {"alpha": 4.0, "top_p": 0.7},
    "self_debiasing": {"decay": 10.0, "epsilon": 0.1},
    "soft_contrastive": {"min_k": 25, "shift_invariant": False},
}
evaluate = jax.jit(lambda objective, *logits: objective(*logits))


def random_logits(count, seed=0, shape=(12, 83), scale=2.0):
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=shape)
    return [(scale * (shared + 0.7 * rng.normal(size=shape))).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("which", ("published", "other"))
def test_equals_the_equation_in_float64(name, which):
    settings = OTHER_SETTINGS.get(name, {}) if which == "other" else {}
    logits = random_logits(NUMBERS[name])
    scores = np.asarray(evaluate(objectives.get(name, **settings), *logits))
    expected = REFERENCES[name](*(z.astype(np.float64) for z in logits), **settings)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(np.isfinite(scores), np.isfinite(expected))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    direct = objectives.OBJECTIVES[name](*logits, **settings)
    np.testing.assert_allclose(direct, expected, rtol=1e-5, atol=1e-5)


def test_every_objective_has_a_reference():
    assert sorted(REFERENCES) == PLAIN


# --- properties ---------------------------------------------------------------------------------------------------

SHAPE = (3, 24)  # one shape: one compilation for each objective
few = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
names = st.sampled_from(PLAIN)
seeds = st.integers(0, 2**16)
# Multiples of one half stay exact in float32 when shifted by such numbers, so rounding moves no token across the edge
# of a set. Extreme scales are included.
scales = st.sampled_from((0.0, 0.5, 4.0, 64.0, 1024.0))


def halves(count, seed, scale):
    return [np.round(2 * z) / 2 for z in random_logits(count, seed, SHAPE, scale)]


def distribution(scores):
    return softmax(np.asarray(scores, np.float64))


def assert_sound(scores):
    scores = np.asarray(scores)
    assert not np.isnan(scores).any() and not np.isposinf(scores).any()
    assert np.isfinite(scores).any(-1).all()


@few
@hypothesis.given(names, seeds, scales)
def test_at_least_one_token_is_left_and_nothing_is_nan(name, seed, scale):
    logits = halves(NUMBERS[name], seed, scale)
    assert_sound(evaluate(objectives.get(name), *logits))
    narrow = evaluate(objectives.get(name), *(jnp.asarray(z, jnp.bfloat16) for z in logits))
    assert_sound(narrow)
    assert narrow.dtype == jnp.float32


@few
@hypothesis.given(names, seeds, st.sampled_from((0.5, 4.0)), st.integers(-200, 200), st.integers(0, 2))
def test_adding_a_constant_to_a_row_changes_nothing(name, seed, scale, shift, which):
    logits = halves(NUMBERS[name], seed, scale)
    moved = list(logits)
    moved[which % len(logits)] = logits[which % len(logits)] + np.float32(shift / 2)
    objective = objectives.get(name)
    np.testing.assert_allclose(
        distribution(evaluate(objective, *moved)), distribution(evaluate(objective, *logits)), atol=2e-4
    )


def test_soft_contrastive_as_published_is_not_shift_invariant():
    base, toxic = random_logits(2)
    published = objectives.get("soft_contrastive", shift_invariant=False)
    moved = distribution(evaluate(published, base, toxic + 3))
    assert np.abs(moved - distribution(evaluate(published, base, toxic))).max() > 0.01


@few
@hypothesis.given(names, seeds, scales)
def test_equal_models_give_the_uniform_or_the_base_distribution(name, seed, scale):
    (z,) = halves(1, seed, scale)
    settings = {"temperature": 1.0} if name == "contrastive_amateur" else {}
    scores = np.asarray(evaluate(objectives.get(name, **settings), *[z] * NUMBERS[name]))
    allowed = np.isfinite(scores)
    uniform = name in UNIFORM_WHERE_EQUAL | {"contrastive_amateur"}
    expected = distribution(restrict(allowed, np.zeros(SHAPE) if uniform else z))
    np.testing.assert_allclose(distribution(scores), expected, atol=1e-4)
    if "alpha" in settings or uniform:
        np.testing.assert_array_equal(allowed, apc(z.astype(np.float64), 0.1))


@few
@hypothesis.given(st.sampled_from(sorted(STRENGTH)), seeds, scales)
def test_zero_strength_gives_the_truncated_base_distribution(name, seed, scale):
    logits = halves(NUMBERS[name], seed, scale)
    scores = np.asarray(evaluate(objectives.get(name, **{STRENGTH[name]: 0}), *logits))
    assert_sound(scores)
    np.testing.assert_allclose(distribution(scores), distribution(restrict(np.isfinite(scores), logits[0])), atol=1e-4)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_token_that_the_base_model_excludes_stays_excluded(name):
    logits = random_logits(NUMBERS[name], shape=SHAPE)
    for z in logits:
        z[:, 5:8] = -np.inf  # padding of the vocabulary in every model
    scores = np.asarray(evaluate(objectives.get(name), *logits))
    assert_sound(scores)
    assert np.isneginf(scores[:, 5:8]).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_enormous_logits_are_not_nan(name):
    for scale in (1e4, 1e30):
        assert_sound(evaluate(objectives.get(name), *random_logits(NUMBERS[name], shape=SHAPE, scale=scale)))


def test_detoxigen_falls_back_to_the_base_distribution_where_it_excludes_every_token():
    base, toxic = np.log([[0.9, 0.05, 0.05]]), np.log([[0.98, 0.01, 0.01]])
    scores = evaluate(objectives.get("detoxigen", alpha=50.0, top_p=0.5), base, toxic)
    np.testing.assert_allclose(scores, [[np.log(0.9), -np.inf, -np.inf]], rtol=1e-5)


def test_alpha_one_keeps_only_the_best_token():
    scores = np.asarray(evaluate(objectives.get("contrastive", alpha=1), *random_logits(2)))
    np.testing.assert_array_equal(np.isfinite(scores).sum(-1), 1)
    np.testing.assert_array_equal(np.isfinite(scores).argmax(-1), random_logits(2)[0].argmax(-1))


# --- objectives.get -----------------------------------------------------------------------------------------------


def test_a_sweep_over_numbers_compiles_once():
    traces = []

    @jax.jit
    def run(objective, *logits):
        traces.append(objective)
        return objective(*logits)

    logits = random_logits(2)
    for alpha in (0.1, 0.5, 1, np.float32(0.3), jnp.float32(0.2)):
        scores = run(objectives.get("contrastive", alpha=alpha), *logits)
        np.testing.assert_array_equal(np.isfinite(scores), apc(logits[0], float(alpha)))
    assert len(traces) == 1
    for min_k in (1, 5, 83):
        run(objectives.get("soft_contrastive", min_k=min_k), *logits)
    assert len(traces) == 2
    run(objectives.get("soft_contrastive", shift_invariant=False), *logits)
    assert len(traces) == 3


@pytest.mark.parametrize("name", REFERENCES)
def test_objectives_are_equal_if_name_and_settings_are(name):
    value = objectives.get(name)
    assert value == objectives.get(name, **value.settings) == objectives.get(str(value))
    assert hash(value) == hash(objectives.get(str(value)))
    assert value != objectives.get("base" if name != "base" else "contrastive")
    if name in OTHER_SETTINGS:
        assert value != objectives.get(name, **OTHER_SETTINGS[name])
    leaves, structure = jax.tree.flatten(value)
    assert jax.tree.unflatten(structure, leaves) == value


def test_number_of_models():
    objective = objectives.get("dexperts")
    assert (objective.num_models, objective.takes_more) == (3, False)
    assert objective.arguments == ("base", "expert", "anti_expert")
    objective = objectives.get("self_debiasing")
    assert (objective.num_models, objective.takes_more) == (2, True)
    assert objective.arguments == ("base", "*biased")
    with pytest.raises(UserError, match=r"found 2 models, expected 3 \(base, expert, anti_expert\)"):
        objectives.get("dexperts")(*random_logits(2))
    with pytest.raises(UserError, match=r"found 1 models, expected 2 or more \(base, \*biased\)"):
        objective(*random_logits(1))
    assert evaluate(objective, *random_logits(4)).shape == (12, 83)


@pytest.mark.parametrize(
    "text, settings, expected",
    [
        ("contrastve", {}, "unknown name 'contrastve'; did you mean 'contrastive'.*known: anti_expert, base"),
        ("contrastive", {"alfa": 0.1}, "no setting 'alfa'; did you mean 'alpha'"),
        ("base", {"alpha": 0.1}, "no setting 'alpha'"),
        ("contrastive", {"alpha": 0}, r"contrastive: alpha: found 0, expected a number in \(0, 1\]"),
        ("contrastive", {"alpha": 1.01}, r"alpha: found 1.01, expected a number in \(0, 1\]"),
        ("dola", {"alpha": -0.5}, r"dola: alpha: found -0.5, expected a number in \(0, 1\]"),
        ("contrastive", {"alpha": float("nan")}, "alpha: found nan"),
        ("contrastive", {"alpha": "0.1"}, "alpha: found '0.1', expected a number"),
        ("contrastive", {"alpha": True}, "alpha: found True"),
        ("contrastive_beta", {"beta": float("inf")}, r"beta: found inf, expected a number in \[0, inf\)"),
        ("contrastive_amateur", {"temperature": 0}, r"temperature: found 0, expected a number in \(0, inf\)"),
        ("dexperts", {"top_p": 0}, "top_p: found 0"),
        ("self_debiasing", {"epsilon": 2}, r"epsilon: found 2, expected a number in \[0, 1\]"),
        ("soft_contrastive", {"min_k": 0}, "min_k: found 0"),
        ("soft_contrastive", {"shift_invariant": 1}, "shift_invariant: found 1, expected True or False"),
        ("contrastive(alpha=0.1)", {"alpha": 0.2}, "alpha is given twice"),
        ("contrastive(0.1)", {}, "expected name"),
        ("contrastive(alpha=__import__('os').getpid())", {}, "is not a literal"),
        ("contrastive(**{'alpha': 0.1})", {}, "is not a literal"),
        ("contrastive(alpha=0.1", {}, "expected name"),
        ("contrastive(alpha=0.1) or 1", {}, "expected name"),
        ("nowhere_at_all.here:f", {}, "no module 'nowhere_at_all'"),
        ("json:dmps", {}, "json has no function 'dmps'; did you mean 'dumps'"),
        ("json/tool:main", {}, "expected package.module:function"),
    ],
)
def test_mistakes_are_one_line(text, settings, expected):
    with pytest.raises(UserError, match=expected) as caught:
        objectives.get(text, **settings)
    assert "\n" not in str(caught.value)


USERS_FILE = """
import jax.numpy as jnp

def my_objective(base, toxic, tau=1, mode="plain", k: int = 2):
    assert isinstance(k, int) and isinstance(mode, str)
    return base - tau * toxic if mode == "plain" else base

def without_default(base, *, tau: float):
    return base / tau

def shrinks(base):
    return base[:, :k] if (k := 3) else base

def greedy_settings(base, **settings):
    return base

def nothing(tau=1.0):
    return tau
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    """A user's package in the working directory."""
    (tmp_path / "users_package").mkdir()
    (tmp_path / "users_package" / "ideas.py").write_text(USERS_FILE)
    (tmp_path / "users_package" / "broken.py").write_text("import jax\n\nraise ValueError('not finished')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "users_package.ideas"
    for name in [name for name in sys.modules if name.startswith("users_package")]:
        del sys.modules[name]


def test_a_users_function_is_found_in_the_working_directory(users_module):
    base, toxic = random_logits(2)
    objective = objectives.get(f"{users_module}:my_objective(tau=0.5)")
    np.testing.assert_allclose(evaluate(objective, base, toxic), base - 0.5 * toxic, rtol=1e-6)
    assert objective == objectives.get(f"{users_module}:my_objective", tau=0.5)
    assert objective.arguments == ("base", "toxic")
    assert jax.tree.leaves(objective) == [0.5]
    other = objectives.get(f"{users_module}:my_objective(mode='base', k=5)")
    np.testing.assert_array_equal(evaluate(other, base, toxic), base)
    np.testing.assert_allclose(evaluate(objectives.get(f"{users_module}:without_default(tau=2)"), base), base / 2)
    half = jnp.asarray(base, jnp.bfloat16)
    assert objectives.get(f"{users_module}:my_objective")(half, half).dtype == jnp.float32


@pytest.mark.parametrize(
    "call, expected",
    [
        ("ideas:my_objective(k=2.5)", "k: found 2.5, expected a whole number"),
        ("ideas:my_objective(mode=3)", "mode: found 3, expected a text"),
        ("ideas:my_objective(nu=3)", r"no setting 'nu'.*known: k, mode, tau"),
        ("ideas:without_default", "setting tau has no default"),
        ("ideas:greedy_settings", r"\*\*settings is not allowed"),
        ("ideas:nothing", "takes no logits"),
        ("broken:idea", r"importing it failed at .*broken.py:3: ValueError: not finished"),
        ("absent:idea", "no module 'users_package.absent'"),
    ],
)
def test_mistakes_in_a_users_function_are_one_line(users_module, call, expected):
    with pytest.raises(UserError, match=expected):
        objectives.get(f"users_package.{call}")


def test_a_users_function_must_return_the_logits_shape(users_module):
    with pytest.raises(UserError, match=r"returns shape \(12, 3\), expected the logits' \(12, 83\)"):
        objectives.get(f"{users_module}:shrinks")(*random_logits(1))
