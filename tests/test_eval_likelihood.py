"""Batched log-probabilities against PyTorch, one request at a time."""

import jax
import numpy as np
import pytest

from tests.eval_helpers import make_pair, torch_logprobs
from unidetox_jax import sharding
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import likelihood
from unidetox_jax.evaluation.likelihood_batches import Sizes, with_fewer_sizes


def reference(torch_model, context, continuation, limit):
    """The sum, and whether every token is the most probable one, with the last `limit` tokens as input."""
    tokens = [*context, *continuation][-(limit + 1) :]
    scored = torch_logprobs(torch_model, tokens)[-len(continuation) :]
    greedy = bool((scored.argmax(-1).numpy() == np.array(continuation)).all())
    return float(sum(row[token] for row, token in zip(scored, continuation, strict=True))), greedy


def requests(rng, count, vocab=384, longest=70):
    contexts = [rng.integers(0, vocab, rng.integers(1, longest)).tolist() for _ in range(count)]
    return contexts, [rng.integers(0, vocab, rng.integers(1, 30)).tolist() for _ in range(count)]


@pytest.mark.parametrize("layout", ["", "data:2,fsdp:2,model:2"])
def test_equals_pytorch_one_request_at_a_time(layout):
    mesh = sharding.make_mesh(layout, jax.devices() if layout else jax.devices()[:1])
    torch_model, model = make_pair(mesh=mesh)
    contexts, continuations = requests(np.random.default_rng(0), 37)
    for index in (3, 11):  # greedy continuations
        tokens = list(contexts[index])
        for _ in range(6):
            tokens.append(int(torch_logprobs(torch_model, [*tokens, 0])[-1].argmax()))
        continuations[index] = tokens[len(contexts[index]) :]
    found = likelihood.loglikelihood(model, contexts, continuations, batch_size=16)
    for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        total, greedy = reference(torch_model, context, continuation, 96)
        assert found.sums[index] == pytest.approx(total, abs=2e-4)
        assert found.greedy[index] == greedy
        assert found.counts[index] == len(continuation)
        assert found.truncated[index] == max(0, len(context) + len(continuation) - 1 - 96)
    assert found.greedy.sum() >= 2


@pytest.mark.parametrize("layout", ["", "data:2,fsdp:2,model:2"])
def test_rows_with_equal_context_share_its_prefill(layout, monkeypatch):
    mesh = sharding.make_mesh(layout, jax.devices() if layout else jax.devices()[:1])
    torch_model, model = make_pair(mesh=mesh)
    batches = []
    score = likelihood._score
    monkeypatch.setattr(likelihood, "_score", lambda *arguments: batches.append(arguments[2]) or score(*arguments))
    rng = np.random.default_rng(5)
    sizes = {20: 7, 31: 5, 40: 3, 80: 6, 25: 2, 4: 6}  # context length: continuations; the last two are not shared
    contexts, continuations = [], []
    for length, count in sizes.items():
        contexts += [rng.integers(0, 384, length).tolist()] * count
        continuations += [rng.integers(0, 384, rng.integers(1, 15)).tolist() for _ in range(count)]
    order = rng.permutation(len(contexts))
    contexts, continuations = [contexts[i] for i in order], [continuations[i] for i in order]
    found = likelihood.loglikelihood(model, contexts, continuations, batch_size=16)
    for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        total, greedy = reference(torch_model, context, continuation, 96)
        assert found.sums[index] == pytest.approx(total, abs=2e-4)
        assert found.greedy[index] == greedy and found.counts[index] == len(continuation)
    shared = [family for batch in batches for family in batch.families if len(family.prefix)]
    assert sorted(len(family.prefix) + 1 for family in shared) == [20, 31, 40, 80]


def test_requests_that_differ_in_the_last_token_share_a_row(monkeypatch):
    torch_model, model = make_pair()
    rows = []
    score = likelihood._score
    monkeypatch.setattr(
        likelihood, "_score", lambda *arguments: rows.extend(arguments[2].families) or score(*arguments)
    )
    contexts = [[5, 6, 7]] * 5 + [[5, 6, 7, 8]]
    continuations = [[9, token] for token in (1, 2, 3, 4)] + [[9], [9, 2]]
    found = likelihood.loglikelihood(model, contexts, continuations)
    assert len(rows) == 3
    expected = [reference(torch_model, *pair, 96)[0] for pair in zip(contexts, continuations, strict=True)]
    np.testing.assert_allclose(found.sums, expected, atol=1e-4)


def test_chunked_logits_give_the_same_result(monkeypatch):
    _, model = make_pair()
    contexts, continuations = requests(np.random.default_rng(1), 9)
    whole = likelihood.loglikelihood(model, contexts, continuations, batch_size=8)
    monkeypatch.setattr(likelihood, "LOGITS_BYTES", 8 * 384 * 4 * 2)  # two positions at a time
    sliced = likelihood.loglikelihood(model, contexts, continuations, batch_size=8)
    np.testing.assert_allclose(whole.sums, sliced.sums, atol=1e-4)
    assert (whole.greedy == sliced.greedy).all()


def test_few_shapes_are_compiled():
    _, model = make_pair(seed=3)
    mesh = sharding.mesh_of(model.params)
    contexts, continuations = requests(np.random.default_rng(2), 400, longest=40)
    likelihood.program(mesh).clear_cache()
    likelihood.loglikelihood(model, contexts, continuations, batch_size=32)
    assert likelihood.program(mesh)._cache_size() <= 10
    before = likelihood.program(mesh)._cache_size()
    likelihood.loglikelihood(model, contexts[::-1], continuations[::-1], batch_size=32)
    assert likelihood.program(mesh)._cache_size() == before


def test_sizes_are_joined_while_padding_costs_less_than_a_program():
    small, wide, long = Sizes(4, 5, 16, 8, 8, 1), Sizes(4, 5, 16, 8, 8, 4), Sizes(4, 5, 64, 24, 24, 1)
    other, largest = Sizes(4, 1, 0, 32, 8, 1), Sizes(8, 5, 96, 24, 24, 1)
    counts = {small: 10, wide: 2, long: 3, other: 1, largest: 40}
    assert with_fewer_sizes(counts, 0) == {sizes: sizes for sizes in counts}
    assert with_fewer_sizes({**counts, small._replace(families=1): 1}, 320)[small._replace(families=1)] == small
    joined = {**{sizes: sizes for sizes in counts}, small: wide, wide: wide}
    assert with_fewer_sizes(counts, 10 * 20 * 3) == joined  # ten batches of 20 rows with 3 more candidates
    assert with_fewer_sizes(counts, 10 * 20 * 3 - 1) == {sizes: sizes for sizes in counts}
    everything = with_fewer_sizes(counts, 10**9)
    # Rows without a shared context are another program, and no batch outgrows the largest
    assert everything == {small: wide, wide: wide, long: largest, largest: largest, other: other}


@pytest.mark.slow
def test_joined_sizes_give_the_same_result(monkeypatch):
    _, model = make_pair()
    contexts, continuations = requests(np.random.default_rng(2), 40)
    contexts = [context for context in contexts[:20] for _ in range(2)] + [contexts[0]] * 3
    continuations += continuations[:3]
    found, programs = [], []
    for spare in (0, 10**9):
        monkeypatch.setattr(likelihood, "tokens_per_compilation", lambda *_, spare=spare: spare)
        program = likelihood.program(sharding.mesh_of(model.params))
        program.clear_cache()
        found.append(likelihood.loglikelihood(model, contexts, continuations, batch_size=8))
        programs.append(program._cache_size())
    np.testing.assert_allclose(found[1].sums, found[0].sums, rtol=1e-5)
    assert programs[1] < programs[0] / 2


def test_degenerate_requests():
    _, model = make_pair()
    found = likelihood.loglikelihood(model, [[1, 2], []], [[], []])
    assert found.sums.tolist() == [0, 0] and found.counts.tolist() == [0, 0] and found.greedy.all()
    with pytest.raises(UserError, match="request 1 has an empty context"):
        likelihood.loglikelihood(model, [[1], []], [[2], [3]])
    with pytest.raises(UserError, match="request 0 has a continuation of 97 tokens, the model reads 96"):
        likelihood.loglikelihood(model, [[1]], [[2] * 97])
    assert np.isfinite(likelihood.loglikelihood(model, [[1]], [[2] * 96]).sums).all()  # fits exactly
