"""`generate` against PyTorch: greedy text of every family, several models, the released code's shared cache; errors."""

import copy
import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from variants import EVERY, VARIANTS, params_from_torch, torch_model

from unidetox_jax import models, sharding
from unidetox_jax.decoding import generate, loop, objectives, warpers
from unidetox_jax.errors import UserError

torch.set_num_threads(1)  # threads slow tiny models down
BASE = objectives.get("base")
GREEDY = [warpers.temperature(0.0)]
PAD, EOS = 0, 2


@functools.cache
def model_of(name, seed=0):
    """(PyTorch model, our model) of one variant, with end token 2 and padding token 0."""
    config = {**VARIANTS[name], "pad_token_id": PAD, "eos_token_id": EOS}
    reference = torch_model(config, seed)
    cfg = models.config_from_hf(config)
    return reference, models.Model(params_from_torch(reference, cfg), cfg)


def prompts_of(cfg, batch=3, length=6, seed=0):
    """Left-padded prompts of 6, 4, 1, 6, … tokens, and their mask."""
    tokens = np.random.default_rng(seed).integers(3, cfg.vocab_size, (batch, length)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[1::3, :2] = 0
    mask[2::3, :5] = 0
    return np.where(mask, tokens, PAD), mask


def real(tokens, mask, row):
    return tokens[row][mask[row] == 1].tolist()


def last_logits(reference, ids):
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0, -1].numpy()


@functools.cache
def jitted(objective):
    return jax.jit(objective.__call__)


def greedy_by_hand(objective, sources, prompts, steps):
    """Greedy tokens of an objective over several models, rereading the whole text at each step.

    sources: functions ids → logits [V]; prompts: the ids for each source. Returns the tokens, and their mean
    log-probability under each source alone.
    """
    generated, sums = [], np.zeros(len(sources))
    objective = jitted(objective)
    while len(generated) < steps and EOS not in generated:
        logits = [source([*prompt, *generated]) for source, prompt in zip(sources, prompts, strict=True)]
        generated.append(int(np.argmax(objective(*(jnp.asarray(z)[None] for z in logits)))))
        sums += [torch.log_softmax(torch.tensor(z), -1)[generated[-1]].item() for z in logits]
    return generated, sums / len(generated)


def assert_row(ours, row, generated, log_probabilities=None):
    assert ours.tokens[row, : ours.lengths[row]].tolist() == generated
    assert (ours.tokens[row, ours.lengths[row] :] == PAD).all()
    assert bool(ours.ended[row]) == (generated[-1] == EOS)
    if log_probabilities is not None:
        np.testing.assert_allclose(ours.log_probabilities[:, row], log_probabilities, atol=2e-4)


GREEDILY = [("gpt2", "unroll"), ("gpt2", "scan"), ("opt-125m", "unroll"), ("opt-350m", "scan"), ("falcon-7b", "scan"),
            ("falcon-rw-1b", "scan"), ("llama-3", "scan"), ("llama-3", "unroll"), ("gemma-3", "unroll"),
            ("mistral-1", "scan")]  # fmt: skip


@pytest.mark.quick_variants(3)
@pytest.mark.parametrize("name, layer_loop", itertools.product(VARIANTS, ("scan", "unroll")) if EVERY else GREEDILY)
def test_greedy_equals_pytorch_with_left_padding(name, layer_loop):
    reference, model = model_of(name)
    tokens, mask = prompts_of(model.cfg, seed=1)  # for which no variant has ties between its two best tokens
    ours = generate([model], tokens, objective=BASE, warpers=GREEDY, max_new_tokens=12,
                    attention_mask=mask, layer_loop=layer_loop)  # fmt: skip
    padded, attention_mask = (torch.tensor(x, dtype=torch.long) for x in (tokens, mask))
    together = reference.generate(padded, attention_mask=attention_mask, do_sample=False, max_new_tokens=12)
    for row in range(3):
        ids = torch.tensor([real(tokens, mask, row)])
        generated = reference.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
        assert_row(ours, row, generated)
        assert together[row, 6 : 6 + len(generated)].tolist() == generated


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("norm", [False, True])
def test_dola_with_early_exit(norm, layer=1):
    """Layer 1 of GPT-2 as the premature one, with and without final norm; log-probabilities under both."""
    reference, model = model_of("gpt2")
    tokens, mask = prompts_of(model.cfg)
    objective = objectives.get("dola", alpha=0.3)

    def premature(ids):
        with torch.no_grad():
            hidden = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][:, -1:]
            return reference.lm_head(reference.transformer.ln_f(hidden) if norm else hidden)[0, 0].numpy()

    ours = generate([model, models.early_exit(model, layer, norm)], tokens, objective=objective, warpers=GREEDY,
                    max_new_tokens=10, attention_mask=mask, log_probabilities=True)  # fmt: skip
    for row in range(3):
        ids = real(tokens, mask, row)
        sources = functools.partial(last_logits, reference), premature
        generated, means = greedy_by_hand(objective, sources, (ids, ids), steps=10)
        assert_row(ours, row, generated, means)


@pytest.mark.parametrize("name", ["context_aware", "self_debiasing"])
def test_every_model_has_its_own_prompt(name):
    """The same LLaMA two or three times, reading a row's text after contexts of different lengths."""
    reference, model = model_of("llama-3")
    text, text_mask = prompts_of(model.cfg, length=6)
    contexts = [prompts_of(model.cfg, length=6, seed=seed)[0] for seed in (1, 2)]
    if name == "context_aware":
        prompts = [np.concatenate([contexts[0], text], 1), text]
    else:
        prompts = [
            text,
            *(np.concatenate([context[:, :k], text], 1) for context, k in zip(contexts, (2, 5), strict=True)),
        ]
    masks = [np.pad(text_mask, ((0, 0), (x.shape[1] - 6, 0)), constant_values=1) for x in prompts]  # padding within
    objective = objectives.get(name)
    ours = generate([model] * len(prompts), prompts, objective=objective, warpers=GREEDY, max_new_tokens=10,
                    attention_mask=masks, log_probabilities=True, layer_loop="scan")  # fmt: skip
    plain = []
    for row in range(3):
        own = [real(tokens, mask, row) for tokens, mask in zip(prompts, masks, strict=True)]
        source = functools.partial(last_logits, reference)
        assert_row(ours, row, *greedy_by_hand(objective, [source] * len(own), own, steps=10))
        plain.append(greedy_by_hand(BASE, [source], own[:1], steps=10)[0])
    assert [ours.tokens[row, : ours.lengths[row]].tolist() for row in range(3)] != plain  # the contexts matter


def shared_cache_by_hand(base, toxic, ids, objective, steps):
    """The released code's loop (transformers 4.39): the toxic model gets the base model's inputs, including its keys
    and values, and only its logits are used.

    There, a cache is an immutable tuple. In transformers 5 it is an object that every model appends to, so here the
    toxic model gets a copy from before the base model's step.
    """
    generated, sums, cache, inputs = [], np.zeros(2), None, torch.tensor([ids])
    objective = jitted(objective)
    while len(generated) < steps and EOS not in generated:
        lent = copy.deepcopy(cache)
        with torch.no_grad():
            outputs = base(inputs, past_key_values=cache, use_cache=True)
            logits = [outputs.logits[0, -1], toxic(inputs, past_key_values=lent, use_cache=True).logits[0, -1]]
        cache = outputs.past_key_values
        generated.append(int(np.argmax(objective(*(jnp.asarray(z.numpy())[None] for z in logits)))))
        sums += [torch.log_softmax(z, -1)[generated[-1]].item() for z in logits]
        inputs = torch.tensor([generated[-1:]])
    return generated, sums / len(generated)


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("layer_loop, steps", [("scan", 60), ("unroll", 20)])  # 60: more than one segment
def test_official_cache_is_the_first_models(layer_loop, steps):
    (base, ours_base), (toxic, ours_toxic) = model_of("gpt2"), model_of("gpt2", seed=1)
    tokens, mask = prompts_of(ours_base.cfg)
    objective = objectives.get("contrastive", alpha=0.05)
    settings = {"objective": objective, "warpers": GREEDY, "max_new_tokens": steps, "attention_mask": mask,
                "log_probabilities": True, "eos_id": EOS, "layer_loop": layer_loop}  # fmt: skip
    ours = generate([ours_base, ours_toxic], tokens, cache="official", **settings)
    for row in range(3):
        assert_row(ours, row, *shared_cache_by_hand(base, toxic, real(tokens, mask, row), objective, steps))
    if layer_loop == "scan":
        own = generate([ours_base, ours_toxic], tokens, **settings)
        assert (own.tokens != ours.tokens).any() and (own.tokens[:, 0] == ours.tokens[:, 0]).all()


def test_non_finite_logits_name_row_and_step():
    """GPT-2 whose ninth position is NaN: the longest prompt, of six tokens, reaches it before its fourth new token."""
    params, cfg = model_of("gpt2")[1]
    positions = np.array(params["embed"]["positions"]["embedding"])
    positions[8] = np.nan
    damaged = {**params, "embed": {**params["embed"], "positions": {"embedding": positions}}}
    tokens, mask = prompts_of(cfg)
    order = [1, 0, 2]
    settings = {"attention_mask": mask[order], "eos_id": (), "warpers": GREEDY, "layer_loop": "scan"}
    with pytest.raises(UserError, match="model 0 gives logits that are not finite .* in row 1 at new token 3"):
        generate([models.Model(damaged, cfg)], tokens[order], objective=BASE, max_new_tokens=12, **settings)
    fine = generate([models.Model(damaged, cfg)], tokens[order], objective=BASE, max_new_tokens=3, **settings)
    assert fine.lengths.tolist() == [3, 3, 3]


def test_an_objective_that_leaves_no_token_is_named(tmp_path, monkeypatch):
    (tmp_path / "nothing_left.py").write_text("import jax.numpy as jnp\ndef none(base):\n    return base - jnp.inf\n")
    monkeypatch.syspath_prepend(tmp_path)
    objective = objectives.get("nothing_left:none")
    with pytest.raises(UserError, match="objective nothing_left:none leaves no token .* row 0 at new token 0"):
        generate([model_of("gpt2")[1]], [[5]], objective=objective, max_new_tokens=2, layer_loop="scan")


def test_inconsistent_arguments_are_rejected():
    """Before anything is compiled."""
    _, gpt2 = model_of("gpt2")
    _, opt = model_of("opt-125m")
    small = models.Model(gpt2.params, models.config_from_hf({**VARIANTS["gpt2"], "vocab_size": 99}))
    contrastive = objectives.get("contrastive")
    ones = np.ones((2, 3), np.int32)
    elsewhere = [jax.device_put(gpt2.params, sharding.replicated(sharding.make_mesh("", [device])))
                 for device in jax.devices()[:2]]  # fmt: skip
    for message, chosen, prompts, settings in (
        ("has a vocabulary of 99 tokens, but model 0 .* has 131", [gpt2, small], ones, {"objective": contrastive}),
        (r"found 1 models, expected 2 \(base, toxic\)", [gpt2], ones, {"objective": contrastive}),
        ("together 641, but the context of model 0 .* is 640", [gpt2], ones, {"max_new_tokens": 638}),
        ("model 1 has .* only models of equal shape", [gpt2, models.early_exit(gpt2, 2)], ones,
         {"objective": contrastive, "cache": "official"}),
        ("expected 'own' or 'official'", [gpt2], ones, {"cache": "shared"}),
        ("token 131 in row 1", [gpt2], [[1, 2], [3, 131]], {}),
        ("found float64", [gpt2], [[1.5]], {}),
        ("row 1 has no real token", [gpt2], ones, {"attention_mask": [[1, 1, 1], [0, 0, 0]]}),
        ("found shape", [gpt2], ones, {"attention_mask": [[1, 1], [1, 1]]}),
        ("2 rows for model 1, but 3", [gpt2, gpt2], [np.ones((3, 2), int), ones], {"objective": contrastive}),
        ("expected one for each of 2 models", [gpt2, gpt2], [ones], {"objective": contrastive}),
        (r"found int32 \(0, 3\)", [gpt2], ones[:0], {}),
        ("max_new_tokens: found 0", [gpt2], ones, {"max_new_tokens": 0}),
        ("row_ids: found", [gpt2], ones, {"row_ids": [1]}),
        ("seed: found -1", [gpt2], ones, {"seed": -1}),
        ("different meshes", [models.Model(tree, gpt2.cfg) for tree in elsewhere], ones, {"objective": contrastive}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            generate(chosen, prompts, **{"objective": BASE, "max_new_tokens": 2, **settings})
    assert opt.cfg.vocab_size == gpt2.cfg.vocab_size  # families may differ
    generate([gpt2, opt], ones, objective=contrastive, max_new_tokens=2, layer_loop="scan")


@pytest.mark.slow
def test_samples_share_the_prefill_without_changing_the_text():
    _, model = model_of("falcon-rw-1b")
    tokens, mask = prompts_of(model.cfg)
    chosen = {"objective": BASE, "warpers": [warpers.top_k(9)], "max_new_tokens": 7, "seed": 3}
    row_ids = np.arange(12) + 5
    ours = generate([model], tokens, attention_mask=mask, row_ids=row_ids, samples=4, **chosen)
    repeated, masks = np.repeat(tokens, 4, axis=0), np.repeat(mask, 4, axis=0)
    each = generate([model], repeated, attention_mask=masks, row_ids=row_ids, **chosen)
    assert ours.tokens.tolist() == each.tokens.tolist()
    assert ours.lengths.tolist() == each.lengths.tolist()
    assert len({tuple(row) for row in ours.tokens[:4]}) > 1
    with pytest.raises(UserError, match="samples: found 0"):
        generate([model], tokens, samples=0, **chosen)


@pytest.mark.parametrize(
    ("slots", "new", "expected"),
    [
        (0, 20, (24,)),
        (48, 20, (24,)),
        (60, 20, (20,)),
        (40, 80, (24, 80)),
        (40, 90, (24, 96)),
        (40, 200, (24, 88, 152, 200)),
    ],
)
def test_short_segments_join_their_neighbours(slots, new, expected):
    assert loop.plan_segments(slots, new) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "budget"), [("fsdp:4", 0), ("data:2,fsdp:2,model:2", 0), ("data:2,fsdp:2,model:2", 1 << 30)]
)
def test_fsdp_weights_give_the_same_text_gathered_before_or_in_the_loop(layout, budget, monkeypatch):
    monkeypatch.setattr(importlib.import_module("unidetox_jax.decoding.preparation"), "GATHER_BYTES", budget)
    _, (params, cfg) = model_of("gpt2")
    mesh = sharding.make_mesh(layout, jax.devices()[: 4 if layout == "fsdp:4" else 8])
    placed = models.Model(jax.device_put(params, sharding.param_shardings(params, mesh)), cfg)
    tokens, mask = prompts_of(cfg)
    options = {"objective": BASE, "warpers": [warpers.top_k(20)], "max_new_tokens": 12, "attention_mask": mask}
    alone = generate([models.Model(params, cfg)], tokens, **options)
    several = generate([placed], tokens, **options)
    np.testing.assert_array_equal(several.tokens, alone.tokens)
