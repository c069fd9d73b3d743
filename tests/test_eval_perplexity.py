"""Perplexity against PyTorch loops written from the definition, one text at a time."""

import contextlib
import math

import numpy as np
import pytest
import torch

from tests.eval_helpers import make_pair, make_tokenizer, torch_logprobs
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import perplexity, text_perplexity

PROMPTS = ["the cat sat on", "a dog", "it was very small and then", "the cat sat on"]
CONTINUATIONS = [
    [" the mat", " a tree near the hill", ""],
    [" ran", "s and dogs", " sang slowly under the tree"],
    [" green", "", " the bird"],
    [" the hill", " it", ""],  # the first prompt again, after others
]


@torch.no_grad()
def nll(torch_model, tokens) -> float:
    """The sum of a causal language model's loss over its targets."""
    loss = torch_model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
    return float(loss.double()) * (len(tokens) - 1)


def reference(torch_model, tokenizer, release):
    """The definition; as released, the prompt's length is that of the last prompt not seen before."""
    values, losses, length = [], {}, None
    for prompt, texts in zip(PROMPTS, CONTINUATIONS, strict=True):
        for text in texts:
            if prompt not in losses or not release:
                tokens = tokenizer.encode(prompt)
                losses[prompt], length = nll(torch_model, tokens), len(tokens)
            full = tokenizer.encode(prompt + text)
            new = len(full) - length
            loss = nll(torch_model, full) - losses[prompt]
            values.append(math.exp(loss / new) if new else math.nan if abs(loss) < 1e-9 else math.inf)
    return np.array(values)


@pytest.mark.parametrize("bos", [True, False])
def test_an_empty_prompt_is_bos(bos):
    torch_model, model = make_pair(seed=1)
    tokenizer = make_tokenizer(bos)
    prompts, texts = ["a dog", ""], [[" sat", " ran"], ["the cat sat", ""]]
    values, _ = perplexity.conditional(model, tokenizer, prompts, texts, 4)
    tokens = [tokenizer.bos_token_id, *tokenizer.encode("the cat sat", add_special_tokens=False)]
    assert values[1, 0] == pytest.approx(math.exp(nll(torch_model, tokens) / (len(tokens) - 1)), rel=1e-4)
    assert np.isnan(values[1, 1]) and np.isfinite(values[0]).all()
    tokenizer.bos_token = None
    with (
        pytest.raises(UserError, match=r"perplexity: prompt 1 \(''\) has no tokens")
        if not bos
        else contextlib.nullcontext()
    ):
        perplexity.conditional(model, tokenizer, prompts, texts, 4)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("bos", [True, False])
def test_conditional_equals_a_torch_loop(release, bos):
    torch_model, model = make_pair(seed=1)
    tokenizer = make_tokenizer(bos)
    values, truncated = perplexity.conditional(model, tokenizer, PROMPTS, CONTINUATIONS, 4, release)
    expected = reference(torch_model, tokenizer, release)
    assert truncated == 0 and values.shape == (4, 3)
    np.testing.assert_allclose(values.ravel(), expected, rtol=1e-4)
    assert np.isnan(values.ravel()[[2, 7]]).all()  # an empty continuation is 0/0
    assert np.isnan(values.ravel()[11]) != release  # 0/(a stale length) is 1, and counts
    counted = expected[expected < 1e4]
    summary = perplexity.summarize_runs(values[None])
    assert summary["mean"] == pytest.approx(counted.mean(), rel=1e-4)
    undefined = 2 if release else 3
    assert (summary["texts"], summary["counted"], summary["undefined"]) == (12, len(counted), undefined)
    assert summary["excluded"] == 12 - len(counted) - undefined


def test_a_token_across_the_boundary():
    torch_model, model = make_pair(seed=2)
    tokenizer = make_tokenizer()
    prompt, text = "the c", "at sat"  # "cat" is one token, "c" another
    assert tokenizer.encode(prompt + text)[: len(tokenizer.encode(prompt))] != tokenizer.encode(prompt)
    values, _ = perplexity.conditional(model, tokenizer, [prompt], [[text]])
    prompt_tokens, full = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    loss = nll(torch_model, full) - nll(torch_model, prompt_tokens)
    assert values[0, 0] == pytest.approx(math.exp(loss / (len(full) - len(prompt_tokens))), rel=1e-4)
    values, _ = perplexity.conditional(model, tokenizer, ["the c a"], [["t"]])
    assert np.isfinite(values).all()


def test_the_limit_is_strict_and_excluded_texts_are_counted():
    summary = perplexity.summarize_runs(np.array([[[1.0, 1e4], [9999.0, np.nan], [np.inf, 2.0]]]))
    counts = {"texts": 6, "counted": 3, "excluded": 2, "undefined": 1}
    assert summary["mean"] == pytest.approx(10002 / 3) and summary.items() >= counts.items()
    assert perplexity.summarize_runs(np.array([[[np.nan]], [[2.0]]]))["mean"] is None


def test_nan_likelihoods_are_an_error():
    _, model = make_pair()
    import jax

    broken = model._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, model.params))
    with pytest.raises(UserError, match="text 0 .*nan"):
        perplexity.conditional(broken, make_tokenizer(), ["a"], [["b"]])


def test_a_file_by_sliding_windows(tmp_path):
    torch_model, model = make_pair(seed=3, context=24)
    tokenizer = make_tokenizer()
    text = "the cat sat on a mat and then the dog ran under it. " * 4
    path = tmp_path / "text.txt"
    path.write_text(text)
    tokens = tokenizer.encode(text)
    assert len(tokens) > 60
    total, at = 0.0, 1
    while at < len(tokens):  # windows of 24, sliding by 8
        end = min(at + (24 if at == 1 else 8), len(tokens))
        begin = max(0, end - 25)
        scored = torch_logprobs(torch_model, tokens[begin:end])[-(end - at) :]
        total -= sum(float(row[token]) for row, token in zip(scored, tokens[at:end], strict=True))
        at = end
    found = text_perplexity.of_file(model, tokenizer, path, stride=8)
    assert found["ppl"] == pytest.approx(math.exp(total / (len(tokens) - 1)), rel=1e-4)
    assert found["tokens"] == len(tokens) - 1 and found["bytes"] == len(text)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text), rel=1e-4)


def test_unreadable_files_are_named(tmp_path):
    _, model = make_pair()
    with pytest.raises(UserError, match="no such file"):
        text_perplexity.of_file(model, make_tokenizer(), tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="empty.txt: no text with at least 2 tokens"):
        text_perplexity.of_file(model, make_tokenizer(), tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 society")
    with pytest.raises(UserError, match="latin.txt: not UTF-8"):
        text_perplexity.of_file(model, make_tokenizer(), tmp_path / "latin.txt")


def test_texts_are_separate_streams():
    torch_model, model = make_pair()
    tokenizer = make_tokenizer()
    texts = ["the cat sat on the mat", "a bird ran", ""]
    found = text_perplexity.of_texts(model, tokenizer, texts, "here")
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    nll = 0.0
    for row in tokens[:2]:
        nll -= float(torch_logprobs(torch_model, row)[range(len(row) - 1), row[1:]].sum())
    scored = sum(len(row) - 1 for row in tokens)
    assert found["tokens"] == scored and found["texts"] == 3
    np.testing.assert_allclose(found["ppl"], np.exp(nll / scored), rtol=1e-5)
