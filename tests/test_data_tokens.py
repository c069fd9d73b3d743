"""Tokenisation: special tokens around a text, cut and empty texts, and how they are reported."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unidetox_jax import data
from unidetox_jax.data.tokens import decode, encode
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import continuations

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5, "d": 6}


def make_tokenizer(template=None, **special):
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        ids = [(token, WORDS[token]) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "</s>", **special})


PLAIN = make_tokenizer()
LLAMA = make_tokenizer("<s> $A", bos_token="<s>")
OPT = make_tokenizer("</s> $A", bos_token="</s>", pad_token="<pad>")
ENDING = make_tokenizer("<s> $A </s>", bos_token="<s>")


@pytest.mark.parametrize(
    ("tokenizer", "settings", "expected"),
    [
        (PLAIN, {}, [3, 4, 2]),
        (LLAMA, {}, [1, 3, 4, 2]),
        (OPT, {}, [2, 3, 4, 2]),
        (ENDING, {}, [1, 3, 4, 2]),
        (LLAMA, {"reproduce_release": True}, [1, 3, 4]),
    ],
)
def test_special_tokens_around_a_text(tokenizer, settings, expected):
    assert data.tokenize(["a b"], tokenizer, 8, **settings)[0].tolist() == expected


def test_cut_text_gets_no_end_token():
    texts = data.Texts(({"text": "a b", "ended": False}, {"text": "a b", "ended": True}))
    assert [ids.tolist() for ids in data.tokenize(texts, LLAMA, 8)] == [[1, 3, 4], [1, 3, 4, 2]]


def pieces(alphabet, **changes):
    """A tokenizer that never splits "ab", as sampling may."""
    tokenizer = Tokenizer(models.BPE({**alphabet, "ab": 6}, [("a", "b")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **changes)


SAMPLER = pieces({"<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5})
OTHER = pieces({"<s>": 1, "</s>": 2, "a": 3, "b": 5, "c": 4})
SAMPLED = {"text": "abc", "ended": True, "tokens": (1, 3, 4, 5, 2)}


@pytest.mark.parametrize(
    ("row", "tokenizer", "settings", "expected"),
    [
        (SAMPLED, SAMPLER, {}, [3, 4, 5, 2]),
        ({**SAMPLED, "ended": False, "tokens": [1, 3, 4, 5]}, SAMPLER, {}, [3, 4, 5]),
        ({**SAMPLED, "tokens": ()}, SAMPLER, {}, [6, 5, 2]),
        (SAMPLED, OTHER, {}, [6, 4, 2]),
        ({**SAMPLED, "text": "abca"}, SAMPLER, {}, [6, 5, 3, 2]),
        ({**SAMPLED, "tokens": (3, 4, 5, 2)}, SAMPLER, {}, [6, 5, 2]),
        (SAMPLED, SAMPLER, {"reproduce_release": True}, [6, 5]),
    ],
    ids=["sampled", "cut", "unknown", "other vocabulary", "edited text", "without BOS", "reproduce_release"],
)
def test_sampled_tokens_are_reused_if_they_decode_to_the_text(row, tokenizer, settings, expected):
    texts = data.Texts(({"text": "c", "ended": True}, row, {"text": "c", "ended": True}))
    assert data.tokenize(texts, tokenizer, 8, **settings)[1].tolist() == expected


def test_ragged_storage_and_counts():
    texts = ["a", "", "a b c d", "  \n", "b c"]
    tokens = data.tokenize(texts, PLAIN, 4)
    assert [ids.tolist() for ids in tokens] == [[3, 2], [3, 4, 5, 6], [4, 5, 2]]
    assert tokens.rows.tolist() == [0, 2, 4]
    assert (tokens.truncated, tokens.skipped) == (1, 2)
    assert tokens.ids.dtype == np.int32 and tokens.offsets.tolist() == [0, 2, 6, 9]
    assert tokens.lengths.tolist() == [2, 4, 3]
    assert tokens.report() == (
        "3 texts, 9 tokens (mean 3.0, longest 4, limit 4); 1 cut at the limit; 2 empty ones left out"
    )
    with pytest.raises(IndexError):
        tokens[3]


def test_no_end_token_if_only_that_exceeds_the_limit():
    tokens = data.tokenize(["a b c", "a b c d"], PLAIN, 3)
    assert [ids.tolist() for ids in tokens] == [[3, 4, 5], [3, 4, 5]]
    assert tokens.truncated == 2


def test_batches_of_texts_are_joined_in_order(monkeypatch):
    monkeypatch.setattr("unidetox_jax.data.tokens.BATCH", 2)
    rows = [{"text": text, "ended": len(text) != 1 or text in "ac"} for text in ("a", "b", "c", "d", "a b")]
    tokens = data.tokenize(data.Texts(tuple(rows)), PLAIN, 8)
    assert [ids.tolist() for ids in tokens] == [[3, 2], [4], [5, 2], [6], [3, 4, 2]]


def test_padding_token():
    assert data.tokenize(["a"], OPT, 8).pad_id == 0
    assert data.tokenize(["a"], PLAIN, 8).pad_id == 2, "a tokenizer without one pads with its end token"


@pytest.mark.parametrize(
    ("texts", "tokenizer", "length", "settings", "message"),
    [
        ([], PLAIN, 8, {}, "the data set is empty"),
        (["", " "], PLAIN, 8, {}, "no text is left to train on: all 2 are empty"),
        (["a"], PLAIN, 1, {}, "max_length: found 1, expected at least 2"),
        (["a"], PLAIN, 1025, {"context": 1024}, "max_length: found 1025, beyond the model's context of 1024 tokens"),
        (["a"], make_tokenizer(eos_token=None), 8, {}, "has no eos_token_id"),
        (["a"], make_tokenizer(eos_token=None), 8, {"reproduce_release": True}, "has no eos_token_id"),
    ],
)
def test_mistakes(texts, tokenizer, length, settings, message):
    with pytest.raises(UserError, match=message):
        data.tokenize(texts, tokenizer, length, **settings)


def same_as_transformers(tokenizer, texts):
    for special in (True, False):
        expected = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
        assert encode(tokenizer, texts, begin=special, end=special) == expected
    assert encode(tokenizer, []) == []
    decoded = [tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in expected]
    assert decode(tokenizer, expected) == decoded


@pytest.mark.parametrize("tokenizer", [PLAIN, LLAMA, OPT, ENDING])
def test_rust_library_agrees_with_transformers(tokenizer):
    texts = ["a b c", "", "d </s> a", "a " * 50]
    same_as_transformers(tokenizer, texts)
    tokenizer.backend_tokenizer.enable_truncation(4)
    same_as_transformers(tokenizer, texts)


@pytest.mark.parametrize(
    ("tokenizer", "without_end", "with_end"),
    [(ENDING, [1, 3, 4], [1, 3, 4, 2]), (OPT, [2, 3, 4], [2, 3, 4]), (PLAIN, [3, 4], [3, 4])],
)
def test_no_end_token_before_a_continuation(tokenizer, without_end, with_end):
    assert encode(tokenizer, ["a b"]) == continuations.tokenize_prompts(tokenizer, ["a b"]) == [without_end]
    assert encode(tokenizer, ["a b"], end=True) == [with_end]
    assert encode(tokenizer, ["a b"], begin=False) == [[3, 4]]


def test_rust_library_agrees_with_transformers_on_real_tokenizers(shared):
    for place in ("tokenizers/gpt2", "models/stories260K"):
        same_as_transformers(AutoTokenizer.from_pretrained(shared / place), ["Once upon", " ünïcode \n", "", "don't ."])


def test_real_tokenizers(shared):
    text = "The third house on the left."
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    plain = gpt2(text)["input_ids"]
    assert data.tokenize([text], gpt2, 64)[0].tolist() == [*plain, 50256]
    stories = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    ids = data.tokenize([text], stories, 64)[0].tolist()
    assert ids == [*stories(text)["input_ids"], 2] and ids[0] == 1


def test_released_texts_count_as_cut(shared, tmp_path):
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    spec = "distilled:distilled/generated_texts_alpha=0.1_beta=inf_checkpoint-15126.csv"
    texts = data.texts(spec, data_dir=shared / "data", cache_dir=tmp_path)
    tokens = data.tokenize(texts, gpt2, 256, context=1024)
    assert len(tokens) == 640 and tokens.truncated == 0
    assert np.sum(tokens.lengths >= 255) == 498, "most stop where the length limit did"
    assert 50256 not in tokens.ids
