"""Generators: several models under an objective, each with a prefix, against PyTorch one text at a time."""

import functools

import numpy as np
import pytest
import torch

from tests.eval_helpers import make_pair, make_tokenizer
from unidetox_jax import decoding, models, padded_sizes
from unidetox_jax.decoding import objectives, warpers
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import continuations, generator, likelihood, mmlu

BOS = 0


@pytest.fixture(scope="module")
def trio():
    """Three pairs (PyTorch model, our model)."""
    return [make_pair(seed=seed) for seed in range(3)]


def make(trio, objective, prefixes=()):
    tokenizer = make_tokenizer()
    models = [model for _, model in trio]
    return generator.make(models, [tokenizer] * len(models), ["a", "b", "c"][: len(models)], objective, prefixes)


@torch.no_grad()
def logits(torch_model, tokens):
    """Logits of every next token, float64 [len(tokens), V]."""
    return torch_model(torch.tensor([list(tokens)])).logits[0].double()


def proxy_tuned(torch_models, inputs, alpha):
    base, expert, anti = (logits(m, tokens)[-1] for m, tokens in zip(torch_models, inputs, strict=True))
    return base + alpha * (expert - anti)


PREFIXES = ("", "the cat ran", "a bird sang on a green hill")


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("prefixes", [(), PREFIXES])
def test_likelihoods_under_an_objective_with_prefixes_after_bos(trio, prefixes):
    subject = make(trio, "proxy_tuning(alpha=0.7)", prefixes)
    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)
    before = [tokenizer.encode(text, add_special_tokens=False) for text in prefixes or ("", "", "")]
    assert [len(tokens) > 0 for tokens in before] == [False, bool(prefixes), bool(prefixes)]
    shared = [BOS, *rng.integers(2, 260, 22).tolist()]
    contexts = [shared] * 5 + [[BOS, *rng.integers(2, 260, n).tolist()] for n in (3, 9, 1, 20)]
    contexts += [rng.integers(2, 260, 6).tolist()] + [
        contexts[5]
    ] * 2  # without BOS; the last differ in one token alone
    size = len(tokenizer)
    continuations = [rng.integers(2, 260, n).tolist() for n in (4, 2, 7, 1, 3, 5, 2, 8, 1, 6)] + [[7, 9], [7, 11]]
    found = likelihood.loglikelihood(subject, contexts, continuations, batch_size=4)
    for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        total = 0.0
        for at in range(len(continuation)):
            text = [*context, *continuation[:at]]
            begin, rest = ([BOS], text[1:]) if text[0] == BOS else ([], text)
            scores = proxy_tuned([m for m, _ in trio], [[*begin, *prefix, *rest] for prefix in before], 0.7)
            total += float(scores[:size].log_softmax(-1)[continuation[at]])
        assert found.sums[index] == pytest.approx(total, abs=5e-4), index
    assert np.isfinite(found.sums).all()


def test_text_under_an_objective_with_prefixes_after_bos(trio):
    subject, tokenizer = make(trio, "proxy_tuning(alpha=0.7)", PREFIXES), make_tokenizer()
    prompts = ["a dog sat", "the cat", "it was very small and then the bird ran"]
    made = continuations.generate(
        subject, tokenizer, prompts, samples=2, max_new_tokens=6, warpers=[warpers.greedy()], eos_id=()
    )
    before = [tokenizer.encode(text, add_special_tokens=False) for text in PREFIXES]
    for prompt, (text, again) in zip(prompts, made.texts, strict=True):
        own, new = tokenizer.encode(prompt, add_special_tokens=False), []
        for _ in range(6):
            inputs = [[BOS, *prefix, *own, *new] for prefix in before]
            new.append(int(proxy_tuned([m for m, _ in trio], inputs, 0.7)[: len(tokenizer)].argmax()))
        assert text == again == tokenizer.decode(new)


def test_one_model_under_base_equals_the_model_to_the_bit(trio):
    model, tokenizer = trio[0][1], make_tokenizer()
    alone = make(trio[:1], "base")
    options = {"samples": 3, "max_new_tokens": 7, "warpers": warpers.choose(top_k=20, top_p=0.9), "seed": 5}
    ours, theirs = (
        continuations.generate(m, tokenizer, ["a dog", "the cat sat on"], **options) for m in (alone, model)
    )
    assert ours.texts == theirs.texts and (ours.ended == theirs.ended).all()
    requests = [[0, 5, 6], [0, 9]], [[7, 8], [10]]
    whole = generator.as_generator(model)
    np.testing.assert_array_equal(
        likelihood.loglikelihood(whole, *requests).sums, likelihood.loglikelihood(model, *requests).sums
    )


def test_excluded_tokens_have_no_likelihood(trio):
    subject = make(trio[:2], "contrastive(alpha=0.9)")
    found = likelihood.loglikelihood(subject, [[0, 5, 6]] * 260, [[token] for token in range(2, 262)])
    allowed = objectives.plausible(logits(trio[0][0], [0, 5, 6])[-1].numpy(), 0.9)
    np.testing.assert_array_equal(np.isfinite(found.sums), np.asarray(allowed)[2:262])
    assert np.isneginf(found.sums).any()

    surest = make(trio[:2], "contrastive(alpha=1.0)")  # leaves only the most probable token
    question = {"question": "the cat", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "birds"}
    result = mmlu.evaluate(surest, make_tokenizer(), [question], [question], "standard", 1)
    assert result["undecided"] == 1 and result["correct"] == 0
    assert "undecided" not in mmlu.evaluate(trio[0][1], make_tokenizer(), [question], [question], "standard", 1)


def test_the_longest_prefix_shortens_the_context(trio):
    subject = make(trio, "proxy_tuning", PREFIXES)
    longest = max(len(prefix) for prefix in subject.prefixes)
    assert subject.cfg.max_position_embeddings == 96 - longest
    with pytest.raises(UserError, match=f"the model reads {96 - longest}"):
        likelihood.loglikelihood(subject, [[0]], [[2] * (97 - longest)])
    assert np.isfinite(likelihood.loglikelihood(subject, [[0]], [[2] * (96 - longest)]).sums).all()


@pytest.mark.slow
def test_an_objective_with_context_generates_but_cannot_score(trio):
    subject, tokenizer = make(trio[:1], "repetition_penalty(penalty=1000.0)"), make_tokenizer()
    options = {"samples": 1, "max_new_tokens": 8, "warpers": [warpers.greedy()], "eos_id": ()}
    (text,), (plain,) = (
        continuations.generate(m, tokenizer, ["a dog sat"], **options).texts[0] for m in (subject, trio[0][1])
    )
    assert text != plain
    with pytest.raises(UserError, match="likelihood: repetition_penalty needs a context"):
        likelihood.loglikelihood(subject, [[0]], [[5]])


def test_prompts_are_padded_to_a_longer_program_where_that_is_cheaper_than_another(monkeypatch):
    """Texts stay the same; a bucket joins the next longer one that is compiled, however long that is."""
    _, model = make_pair(seed=4)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(2, 260, length).tolist() for length in (70, 40, 9, 30, 5, 66, 17, 18)]
    found, slots = [], []
    generate = decoding.generate

    def recorded(*arguments, **named):
        slots[-1].append(named["prompt_slots"])
        return generate(*arguments, **named)

    monkeypatch.setattr(decoding, "generate", recorded)
    for seconds in (0, 1e9):
        monkeypatch.setattr(continuations, "COMPILE_SECONDS", seconds)
        slots.append([])
        found.append(
            continuations.complete(
                model, prompts, samples=2, max_new_tokens=4, batch_size=6, eos_id=(), warpers=warpers.choose(top_p=0.9)
            )
        )
    assert slots == [[128, 64, 32, 16], [128] * 3]  # 17 tokens take 16 slots, as the last one is read by the loop
    assert [a == b for a, b in zip(found[0][0].flat, found[1][0].flat, strict=True)] == [True] * 16


def test_which_prompts_share_a_program(monkeypatch):
    costs = {16: 1.0, 32: 2.0, 64: 5.0}
    lengths = [50, 20, 20, 21, 4, 4]
    for seconds, expected in (
        (0.0, {50: 64, 20: 32, 21: 32, 4: 16}),
        (2.0, {50: 64, 20: 32, 21: 32, 4: 32}),  # 2 prompts x 1 s, in each evaluation
        (8.0, {50: 64, 20: 32, 21: 32, 4: 32}),
        (9.0, {50: 64, 20: 64, 21: 64, 4: 64}),  # 3 prompts x 3 s
    ):
        monkeypatch.setattr(continuations, "COMPILE_SECONDS", seconds * padded_sizes.PROGRAM_USES)
        assert continuations._buckets(lengths, costs.__getitem__) == expected


def test_few_long_prompts_do_not_make_the_batches_of_all_small():
    """On an H100 LLaMA-2-7B's weights would be read four times as often for 930 short prompts beside ten long ones."""
    cost = functools.partial(
        continuations._seconds_per_prompt, configs=[models.published_config("meta-llama/Llama-2-7b-hf")],
        kind="NVIDIA H100 80GB HBM3", count=1, samples=25, max_new_tokens=20, batch_size=512,
    )  # fmt: skip
    assert continuations._buckets([60] * 930 + [20] * 10 + [400] * 10, cost) == {400: 512, 60: 64, 20: 64}
    assert cost(512) > 2 * cost(64)
