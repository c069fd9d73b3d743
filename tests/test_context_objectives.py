"""Objectives that see more than the current logits: the published ones against PyTorch rereading each text, and the
content of `context` in every layout of the models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from test_generate import EOS, GREEDY, assert_row, model_of, prompts_of, real

from unidetox_jax import cli, models
from unidetox_jax.decoding import generate, loop, objectives, preparation, warpers
from unidetox_jax.decoding.context import Context, with_state
from unidetox_jax.decoding.context_objectives import fit_subspace
from unidetox_jax.decoding.generate import make_request
from unidetox_jax.decoding.stream import stream
from unidetox_jax.errors import UserError

torch.set_num_threads(1)
NEW = 12


def rows_of(name, objective, tokens=None, mask=None, **settings):
    """(greedy generation, each row's prompt, PyTorch model) for one model under an objective."""
    reference, model = model_of(name)
    if tokens is None:
        tokens, mask = prompts_of(model.cfg)
    settings = {"max_new_tokens": NEW, "layer_loop": "scan", **settings}
    ours = generate([model], tokens, attention_mask=mask, objective=objective, warpers=GREEDY, **settings)
    return ours, [real(tokens, mask, row) for row in range(len(tokens))], reference


def greedy_tokens(score, prompt, steps=NEW, end=EOS):
    """The tokens with maximal score(ids) [V], rereading the text at each step."""
    generated = []
    while len(generated) < steps and end not in generated:
        generated.append(int(np.argmax(score([*prompt, *generated]))))
    return generated


def read(reference, ids):
    """float64: logits [V], the last token's states after the embedding and each layer [L+1,D] (the last one
    normalised), and all tokens' last states [T,D]."""
    with torch.no_grad():
        out = reference(torch.tensor(ids)[None], output_hidden_states=True)
    states = np.stack([x[0, -1].double().numpy() for x in out.hidden_states])
    return out.logits[0, -1].double().numpy(), states, out.hidden_states[-1][0].double().numpy()


def softmax(z):
    return np.exp(z - z.max(-1, keepdims=True)) / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)


# --- published objectives -----------------------------------------------------------------------------------------


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("name", ["gpt2", "llama-3"])
def test_repetition_penalty_equals_transformers(name):
    ours, prompts, reference = rows_of(name, objectives.get("repetition_penalty", penalty=1.8))
    plain = rows_of(name, objectives.get("base"))[0]
    assert (plain.tokens != ours.tokens).any()
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        generated = reference.generate(ids, do_sample=False, max_new_tokens=NEW, repetition_penalty=1.8)
        assert_row(ours, row, generated[0, len(prompt) :].tolist())


def dola_score(logits, states, head, alpha):
    """float64: scores [V] for logits [V], and the index of the chosen one of the states [C,D]."""
    final, premature = softmax(logits), softmax(states @ head.T)
    mean = (final + premature) / 2
    farthest = int(((final * np.log(final / mean) + premature * np.log(premature / mean)).sum(-1) / 2).argmax())
    return np.where(final >= alpha * final.max(), np.log(final) - np.log(premature[farthest]), -np.inf), farthest


@pytest.mark.parametrize("name, norm", [("gpt2", False), ("llama-3", False), ("llama-3", True)])
def test_dynamic_dola_contrasts_states_of_layers(name, norm, alpha=0.05):
    layers = (0, 1, 2)
    objective = objectives.get("dola_dynamic", layers=layers, norm=norm, alpha=alpha)
    ours, prompts, reference = rows_of(name, objective, layer_loop="unroll" if norm else "scan", eos_id=())
    head = reference.get_output_embeddings().weight.detach().double().numpy()

    def score(ids):
        logits, states, _ = read(reference, ids)
        if norm:
            with torch.no_grad():
                states = reference.model.norm(torch.tensor(states, dtype=torch.float32)).double().numpy()
        return dola_score(logits, states[list(layers)], head, alpha)[0]

    for row, prompt in enumerate(prompts):
        assert ours.tokens[row].tolist() == greedy_tokens(score, prompt, end=None)


def test_dynamic_dola_chooses_the_farthest_layer_of_each_row():
    rng = np.random.default_rng(1)
    states, head, final = rng.normal(size=(9, 4, 8)), rng.normal(size=(30, 8)), rng.normal(size=(9, 30))
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(Context))
    context = Context(**{**nothing, "layers": (jnp.asarray(states),), "head": lambda x, norm: x @ head.T})
    found = objectives.get("dola_dynamic", layers=(0, 1, 2))(final, context=context)[0]
    expected, chosen = zip(*(dola_score(z, x[:3], head, 0.1) for z, x in zip(final, states, strict=True)), strict=True)
    assert len(set(chosen)) == 3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "count, high, expected",
    [(2, False, [1]), (3, False, [1]), (12, False, [2, 4]), (12, True, [6, 8, 10]), (32, True, range(16, 32, 2)),
     (48, False, range(2, 20, 2)), (48, True, range(28, 48, 2))],
)  # fmt: skip
def test_dola_layers_equal_transformers(count, high, expected):
    """For tied heads; transformers has no rule for three layers."""
    from unidetox_jax.decoding.context_objectives import _candidate_layers

    assert _candidate_layers((), high, count).tolist() == list(expected)


def contrastive_score(reference, ids, k, alpha):
    logits, _, past = read(reference, ids)
    probabilities, scores = softmax(logits), np.full(len(logits), -np.inf)
    past = past / np.linalg.norm(past, axis=-1, keepdims=True)
    for token in np.argsort(-logits)[:k]:
        state = read(reference, [*ids, int(token)])[2][-1]
        scores[token] = (1 - alpha) * probabilities[token] - alpha * (past @ state / np.linalg.norm(state)).max()
    return scores


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize(
    "name, layer_loop, steps",
    [("gpt2", "scan", 70), ("llama-3", "unroll", 12), ("mistral-1", "unroll", 12), ("falcon-rw-1b", "scan", 12)],
)  # 70: several segments; mistral's window is 5
def test_contrastive_search_looks_one_token_ahead(name, layer_loop, steps):
    objective = objectives.get("contrastive_search", k=4, alpha=0.6)
    ours, prompts, reference = rows_of(name, objective, max_new_tokens=steps, layer_loop=layer_loop, eos_id=())
    for row, prompt in enumerate(prompts):
        score = functools.partial(contrastive_score, reference, k=4, alpha=0.6)
        assert ours.tokens[row].tolist() == greedy_tokens(score, prompt, steps, end=None)


def test_sasa_adds_the_margin_after_each_candidate(tmp_path, top_p=0.95, k=6, beta=3.0):
    width = model_of("llama-3")[1].cfg.hidden_size
    w, b = np.random.default_rng(3).normal(size=width), 0.7
    np.savez(tmp_path / "subspace.npz", w=w, b=b)
    objective = objectives.get("sasa", subspace=str(tmp_path / "subspace.npz"), beta=beta, top_p=top_p, k=k)
    ours, prompts, reference = rows_of("llama-3", objective)

    def score(ids, beta=beta):
        logits, scores, mass = read(reference, ids)[0], np.full(131, -np.inf), 0.0
        for token in np.argsort(-logits)[:k]:
            if mass <= top_p:
                margin = (read(reference, [*ids, int(token)])[2][-1] @ w + b) / np.linalg.norm(w)
                scores[token] = logits[token] + beta * margin
            mass += softmax(logits)[token]
        return scores

    for row, prompt in enumerate(prompts):
        assert_row(ours, row, greedy_tokens(score, prompt))
    assert any(
        greedy_tokens(score, prompt) != greedy_tokens(functools.partial(score, beta=0), prompt) for prompt in prompts
    )
    np.savez(tmp_path / "subspace.npz", w=w[1:], b=b)
    with pytest.raises(UserError, match=r"found w \(31,\), b \(\), expected \(32,\) and \(\)"):
        rows_of("llama-3", objectives.get("sasa", subspace=str(tmp_path / "subspace.npz"), beta=beta))


def test_the_subspace_is_the_linear_discriminant():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6))
    harmless, toxic = rng.normal(size=(80, 6)) @ mix + 0.5, rng.normal(size=(80, 6)) @ mix
    w, b = fit_subspace(harmless, toxic)
    states, labels = np.concatenate([harmless, toxic]), np.repeat([1, 0], 80)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(states, labels)
    np.testing.assert_allclose(w / np.linalg.norm(w), theirs.coef_[0] / np.linalg.norm(theirs.coef_), rtol=1e-6)
    np.testing.assert_array_equal(states @ w + b > 0, theirs.predict(states) == 1)


# --- content of the context ---------------------------------------------------------------------------------------


@with_state(lambda prompt: {"count": jnp.zeros(len(prompt.tokens), jnp.int32), "room": jnp.asarray(prompt.room)})
def chain(base, *others, context):
    """Chooses a token from a hash of the text so far, the step and a counter: any error changes all later tokens."""
    text = jnp.where(context.tokens_mask, context.tokens, 0).sum(1)
    prompt = jnp.where(context.prompt_mask, context.prompt, 0).sum(1)
    last = jnp.where(
        context.step > 0,
        jnp.take_along_axis(context.tokens, jnp.maximum(context.step - 1, 0)[None, None].repeat(len(base), 0), 1)[:, 0],
        context.prompt[:, -1],
    )
    count = context.state["count"]
    best = (
        5 * text + 3 * prompt + 7 * last + 11 * count + 13 * context.step + context.tokens_mask.sum(1)
    ) % base.shape[1]
    scores = jnp.where(jnp.arange(base.shape[1]) == best[:, None], 0.0, -jnp.inf)
    return scores, {**context.state, "count": count + 2}


def chained(prompt, steps, size, eos):
    generated = []
    while len(generated) < steps and not set(generated) & set(eos):
        step = len(generated)
        generated.append(
            (5 * sum(generated) + 3 * sum(prompt) + 7 * [*prompt, *generated][-1] + 22 * step + 13 * step + step) % size
        )
    return generated


def build(function, name="mine:f"):
    """An objective from a function of this module."""
    return objectives.get(f"{function.__module__}:{function.__name__}")


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("samples, vocab_size, cache", [(1, None, "own"), (3, 97, "own"), (1, None, "official")])
def test_a_function_sees_the_text_so_far_and_its_state(samples, vocab_size, cache):
    pair = [model_of("gpt2")[1], model_of("gpt2", seed=1)[1]]
    tokens, mask = prompts_of(pair[0].cfg, batch=4)
    tokens %= 90
    eos = tuple(range(20, 24))
    settings = {"objective": build(chain), "max_new_tokens": 75, "attention_mask": mask, "samples": samples,
                "eos_id": eos, "cache": cache, "vocab_size": vocab_size, "warpers": [warpers.top_k(5)]}  # fmt: skip
    ours = generate(pair, tokens, layer_loop="scan", **settings)
    assert len(set(ours.lengths.tolist())) > 2 and max(ours.lengths) > 20  # rows end at different steps
    for row in range(4 * samples):
        generated = chained(real(tokens, mask, row // samples), 75, vocab_size or 131, eos)
        assert ours.tokens[row, : ours.lengths[row]].tolist() == generated
    streamed = list(stream(pair, tokens, **settings))
    np.testing.assert_array_equal(np.stack([token.ids for token in streamed]).T, ours.tokens[:, : len(streamed)])


def closeness(found, expected):
    return jnp.abs(found - expected).max((-2, -1), initial=0.0) < 1e-3


@with_state(lambda prompt: tuple(jnp.zeros((len(prompt.tokens), 1, h.shape[-1]), h.dtype) for h in prompt.hidden))
def sees_true(base, *others, context):
    """NaN if a model's states do not yield its logits, or differ from those that `look_ahead` predicted."""
    right = jnp.ones(len(base), bool)
    ahead = []
    scores = base if not others else base - others[0]
    token = scores.argmax(-1)[:, None]
    for model, logits in enumerate((base, *others)):
        hidden = context.hidden[model][:, None]
        right &= closeness(context.head(hidden, model)[:, 0][..., None], logits[..., None])
        right &= closeness(context.head(context.layers[model][:, -1:], model, norm=True), logits[:, None])
        right &= (context.step == 0) | closeness(context.state[model], hidden)
        ahead.append(context.look_ahead(jnp.concatenate([token + 0, (token + 1) % 90], 1), model)[:, :1])
    return jnp.where(right[:, None], scores, jnp.nan), tuple(ahead)


def as_on_a_gpu(form, configs, mesh, layer_loop=None, side_by_side=True):
    usual = form(configs, mesh, layer_loop, side_by_side)
    return dataclasses.replace(usual, side_by_side=side_by_side, transpose=False, fuse=True)


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize(
    "way", ["apart", "apart, samples", "side by side", "side by side, samples", "official", "windows", "cut vocabulary"]
)
def test_states_belong_to_their_models_in_every_layout(way, monkeypatch):
    name = "gemma-3" if way == "windows" else "gpt2"
    pair = [model_of(name)[1], model_of(name, seed=1)[1]]
    tokens, mask = prompts_of(pair[0].cfg)
    if way.startswith("side"):
        monkeypatch.setattr(preparation, "choose_layout", functools.partial(as_on_a_gpu, preparation.choose_layout))
        pair = preparation.prepare(pair, layer_loop="scan")
        assert pair[0].params.side_by_side
    settings = {"max_new_tokens": 75 if way == "apart" else 14, "attention_mask": mask, "eos_id": (),
                "samples": 2 if "samples" in way else 1, "cache": "official" if way == "official" else "own",
                "vocab_size": 100 if way == "cut vocabulary" else None, "warpers": GREEDY,
                "layer_loop": "unroll" if way == "windows" else "scan"}  # fmt: skip
    tokens %= 100
    ours = generate(pair, tokens, objective=build(sees_true), **settings)  # NaN is an error
    plain = generate(pair, tokens, objective=build(difference), **settings)
    np.testing.assert_array_equal(ours.tokens, plain.tokens)


def difference(base, toxic):
    return base - toxic


@with_state(lambda prompt: (prompt.hidden[0], prompt.mask[:, :-1]))
def prompt_is_true(base, *, context):
    """NaN if the prompt's states differ from those of a forward pass over the whole prompt."""
    _, model = model_of("gpt2")
    whole = models.hidden_states(model.params, context.prompt, model.cfg, context.prompt_mask)[:, :-1]
    hidden, mask = context.state
    right = closeness(jnp.where(mask[..., None], hidden - whole, 0), 0.0) & (mask == context.prompt_mask[:, :-1]).all(1)
    return jnp.where(right[:, None], base, jnp.nan), context.state


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("samples", [1, 2])
def test_the_initial_state_sees_the_prompts_hidden_states(samples):
    _, model = model_of("gpt2")
    tokens, mask = prompts_of(model.cfg)
    settings = {"objective": build(prompt_is_true), "warpers": GREEDY, "max_new_tokens": 3, "layer_loop": "scan"}
    generate([model], tokens, attention_mask=mask, samples=samples, **settings)
    generate([model], tokens[:, -1:], samples=samples, **settings)  # only the last token


def test_functions_without_context_cost_nothing(monkeypatch):
    """Neither states nor a context are traced, and the loop's carry has no objective state."""
    _, model = model_of("gpt2")

    def asked(*args, **kwargs):
        raise AssertionError("asked for states")

    for module, name in ((models, "decode_states"), (models, "prefill_states"), (loop, "_context")):
        monkeypatch.setattr(module, name, asked)
    settings = {"warpers": GREEDY, "max_new_tokens": 7, "layer_loop": "scan"}
    with pytest.raises(AssertionError, match="asked for states"):
        generate([model], [[5, 6, 9]], objective=objectives.get("repetition_penalty"), **settings)
    generate([model], [[5, 6, 9]], objective=build(plainly), **settings)
    request = make_request([model], [[5, 6, 9]], objective=build(plainly), max_new_tokens=7)
    _, state = jax.eval_shape(functools.partial(loop.begin, plan=request.plan), *request[:2], build(plainly))
    assert state.objective_state is None


def plainly(base):
    return base * 1.0


# --- errors -------------------------------------------------------------------------------------------------------


def tuple_without_state(base, *, context):
    return base, context.step


@with_state(lambda prompt: jnp.zeros(len(prompt.tokens)))
def another_state(base, *, context):
    return base, jnp.zeros(3, jnp.int32)


@with_state(lambda prompt: jnp.zeros(len(prompt.tokens)))
def scores_alone(base, *, context):
    return base


@with_state(lambda prompt: 0)
def state_without_context(base):
    return base


@pytest.mark.parametrize(
    "text, expected",
    [
        ("test_context_objectives:state_without_context", "declares a state, but no argument `context`"),
        ("sasa", "setting subspace has no default|setting beta has no default"),
        (
            "sasa(subspace='nowhere.npz', beta=1)",
            "sasa: subspace: no file 'nowhere.npz', expected an .npz file that holds w",
        ),
        ("sasa(subspace='w.npz', beta=1)", "w.npz.*b is not a file in the archive.*holds w and b"),
        ("sasa(subspace='text.npz', beta=1)", "text.npz.*expected an .npz file"),
        ("dola_dynamic(layers=3)", "layers: found 3, expected a tuple"),
        ("repetition_penalty(penalty=0)", r"penalty: found 0, expected a number in \(0, inf\)"),
        ("repetition_penalty(context=1)", "no setting 'context'"),
        ("contrastive_search(k=0)", "k: found 0, expected a whole number in"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(text, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("w.npz", w=np.ones(3))
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(UserError, match=expected) as caught:
        objectives.get(text)
    assert "\n" not in str(caught.value)
    if "=" in text:
        assert cli.main(["generate", "--models=nowhere", f"--objective={text}", "--prompt=a"]) == 2
        assert str(caught.value) in capsys.readouterr().err


@pytest.mark.parametrize(
    "function, expected",
    [
        (tuple_without_state, "returns a tuple; declare its state with @with_state"),
        (another_state, r"returns the state int32\[3\], expected one like the initial, float32\[1\]"),
        (scores_alone, r"declares a state, so it must return \(scores, state\)"),
    ],
)
def test_invalid_states_are_rejected(function, expected):
    with pytest.raises(UserError, match=expected):
        generate([model_of("gpt2")[1]], [[5, 6]], objective=build(function), max_new_tokens=2, layer_loop="scan")


def test_context_errors():
    objective = objectives.get("repetition_penalty")
    assert objective.needs_context and not objectives.get("base").needs_context
    assert objective.arguments == ("base",) and objective.settings == {"penalty": 1.2}
    with pytest.raises(UserError, match="repetition_penalty: needs the text so far .*, which only generation provides"):
        objective(jnp.zeros((1, 5)))
    with pytest.raises(UserError, match="found \\(0, 7\\), expected whole numbers from 0 to 2"):
        rows_of("gpt2", objectives.get("dola_dynamic(layers=(0, 7))"))
    with pytest.raises(UserError, match="found states of width 32, expected 16; use norm=True"):
        rows_of("opt-350m", objectives.get("dola_dynamic(layers=(1,))"))
