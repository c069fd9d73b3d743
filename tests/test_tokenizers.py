"""Tokenizers as published: the tokens agree with the library that defines each file format."""

import csv
import io
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from tests.eval_helpers import make_pair, make_tokenizer
from unidetox_jax import checkpoint, data
from unidetox_jax.data.tokens import decode, encode, prefix
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import continuations, mmlu, perplexity, text_perplexity

PROBES = ["Hello", " Hello", "Once  upon\n  x", "", " ", "  naïve 😀 don't!\t<unk>", "a\u0301 x ▁ y\r\n"]


def ids(tokenizer, texts=PROBES, special=False):
    return [tokenizer(text, add_special_tokens=special).input_ids for text in texts]


def library(tokenizer: Tokenizer, texts=PROBES, special=False):
    return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=special)]


def write(directory: pathlib.Path, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def texts(shared):
    """Every ToxiGen prompt, every MMLU cell, and probes of rare cases."""
    found = []
    for path in sorted((shared / "data/toxigen").glob("*.csv")):
        found += [row["text"] for row in csv.DictReader(path.open(encoding="utf-8"))]
    for path in sorted((shared / "data/mmlu").rglob("*.csv")):
        found += itertools.chain.from_iterable(csv.reader(path.open(encoding="utf-8")))
    assert len(found) > 18_000
    return found + PROBES


@pytest.fixture(scope="module")
def pieces(shared):
    return sentencepiece.SentencePieceProcessor(str(shared / "tokenizers/llama2/tokenizer.model"))


@pytest.fixture(scope="module")
def llama2(shared):
    return checkpoint.load_tokenizer(shared / "tokenizers/llama2")


@pytest.fixture(scope="module")
def forms(shared, llama2, tmp_path_factory):
    """LLaMA-2's and GPT-2's tokenizer in every file format, without any other file."""
    gpt2, place = shared / "tokenizers/gpt2", tmp_path_factory.mktemp("forms")
    llama2.save_pretrained(place / "made")
    model, whole = shared / "tokenizers/llama2/tokenizer.model", place / "made/tokenizer.json"
    sources = {
        "llama2 model": [model],
        "llama2 json": [whole],
        "llama2 both": [model, whole],
        "gpt2 json": [gpt2 / "tokenizer.json"],
        "gpt2 bpe": [gpt2 / "vocab.json", gpt2 / "merges.txt"],
    }
    for name, files in sources.items():
        (place / name).mkdir()
        for path in files:
            shutil.copy(path, place / name)
    return place


def copy(forms, form, directory):
    return shutil.copytree(forms / form, directory / form.replace(" ", "-"))


def test_llama2_on_real_text(llama2, pieces, texts):
    assert ids(llama2, [" Hello", "Once  upon\n  x"]) == [[29871, 15043], [9038, 29871, 2501, 13, 29871, 921]]
    expected = pieces.encode(texts)
    assert encode(llama2, texts, begin=False) == expected
    assert encode(llama2, texts) == [[1, *row] for row in expected]
    assert ids(llama2, texts[:100] + PROBES, special=True) == encode(llama2, texts[:100] + PROBES)
    assert decode(llama2, expected) == pieces.decode(expected)


@pytest.mark.slow
def test_gpt2_on_real_text(forms, shared, texts):
    expected = library(Tokenizer.from_file(str(shared / "tokenizers/gpt2/tokenizer.json")), texts)
    for form in ("gpt2 json", "gpt2 bpe"):
        tokenizer = checkpoint.load_tokenizer(forms / form)
        assert encode(tokenizer, texts) == expected, form
        assert ids(tokenizer, ["a<|endoftext|>b"]) == [[64, 50256, 65]]


KINDS = ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", None]


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *itertools.product(["llama2 json", "gpt2 json"], KINDS),
        *itertools.product(["llama2 both", "llama2 model", "gpt2 bpe"], ["LlamaTokenizer", "GPT2Tokenizer", None]),
    ],
)
def test_no_class_name_changes_the_tokens(form, kind, forms, pieces, shared, tmp_path, texts):
    directory = copy(forms, form, tmp_path)
    write(directory, tokenizer_config={"tokenizer_class": kind, "legacy": False}, config={"model_type": "llama"})
    tokenizer = checkpoint.load_tokenizer(directory)
    sample = texts[:: 1 if (form, kind) == ("llama2 json", "LlamaTokenizer") else 50] + PROBES
    if form.startswith("gpt2"):
        expected = library(Tokenizer.from_file(str(shared / "tokenizers/gpt2/tokenizer.json")), sample)
    elif form == "llama2 model":
        expected = pieces.encode(sample)
    else:
        raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
        assert encode(tokenizer, sample) == library(raw, sample, special=True)
        expected = [row for text, row in zip(sample, pieces.encode(sample), strict=True) if "<unk>" not in text]
        sample = [text for text in sample if "<unk>" not in text]
    assert encode(tokenizer, sample, begin=False) == expected
    assert prefix(tokenizer) == ([] if form.startswith("gpt2") else [1])


def test_every_published_configuration(shared, forms, tmp_path):
    """Beside a tokenizer.json, none of them changes a token."""
    raw = Tokenizer.from_file(str(shared / "models/stories260K/tokenizer.json"))
    expected, places = library(raw, special=True), sorted((shared / "hub").glob("*/*token*.json"))
    directories = sorted({path.parent for path in places})
    assert len(directories) > 90
    for index, source in enumerate(directories):
        directory = tmp_path / str(index)
        directory.mkdir()
        for path in source.glob("*.json"):
            shutil.copy(path, directory)
        shutil.copy(shared / "models/stories260K/tokenizer.json", directory)
        tokenizer = checkpoint.load_tokenizer(directory)
        assert ids(tokenizer, special=True) == expected, source.name
        assert len(tokenizer) == 512, source.name


PUBLISHED = {
    "published--A-meta-llama--Llama-2-7b-hf": [1],
    "published--A-huggyllama--llama-7b": [1],
    "published--A-lmsys--vicuna-7b-v1.3": [1],
    "published--resaved-meta-llama--Llama-2-70b-chat-hf__tf4.31.0": [1],
    "published--resaved-TinyLlama--TinyLlama-1.1B-Chat__tf5.5.4": [1],
    "published--A-01-ai--Yi-6B-Chat": [],
}


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_beside_a_sentencepiece_model(name, forms, pieces, shared, tmp_path):
    directory = copy(forms, "llama2 model", tmp_path)
    for path in (shared / "hub" / name).glob("*.json"):
        shutil.copy(path, directory)
    tokenizer = checkpoint.load_tokenizer(directory)
    assert encode(tokenizer, PROBES) == [PUBLISHED[name] + row for row in pieces.encode(PROBES)]
    if PUBLISHED[name]:
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize(
    ("form", "settings", "expected"),
    [
        ("llama2 model", {}, [1, 15043]),
        ("llama2 model", {"add_bos_token": False}, [15043]),
        ("llama2 model", {"add_eos_token": True}, [1, 15043, 2]),
        ("llama2 json", {"add_bos_token": False, "add_eos_token": True}, [1, 15043]),  # the file says it
        ("gpt2 json", {"add_bos_token": True, "bos_token": "<|endoftext|>"}, [50256, 15496]),  # the file says nothing
        ("gpt2 json", {"add_bos_token": True, "bos_token": "[CLS]"}, [15496]),
        ("gpt2 bpe", {"add_bos_token": True}, [50256, 15496]),
        ("gpt2 bpe", {"add_eos_token": True}, [15496, 50256]),
        ("gpt2 bpe", {"add_prefix_space": True}, [18435]),
    ],
)
def test_special_tokens_around_a_text(form, settings, expected, forms, tmp_path):
    directory = copy(forms, form, tmp_path)
    write(directory, tokenizer_config={**settings, "tokenizer_class": "LlamaTokenizer"})
    tokenizer = checkpoint.load_tokenizer(directory)
    assert tokenizer("Hello").input_ids == expected
    ended = settings.get("add_eos_token") and "json" not in form
    assert encode(tokenizer, ["Hello"]) == [expected[:-1] if ended else expected]
    tokenizer.save_pretrained(tmp_path / "again")
    assert checkpoint.load_tokenizer(tmp_path / "again")("Hello").input_ids == expected


@pytest.mark.slow
def test_special_tokens_in_every_spelling(forms, tmp_path):
    for index, (named, config) in enumerate(
        [
            ({"bos_token": "", "eos_token": "", "unk_token": ""}, {"bos_token_id": 0, "eos_token_id": 1}),
            ({"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": {"content": "</s>"}}, {}),
            ({"bos_token": None, "eos_token": None, "pad_token": "<pad>"}, {"pad_token_id": -1}),
            ({"bos_token": "[CLS]", "eos_token": "</s>"}, {"bos_token_id": 1, "eos_token_id": []}),
        ]
    ):
        directory = copy(forms, "llama2 model", tmp_path / str(index))
        write(directory, tokenizer_config={**named, "tokenizer_class": "LLaMATokenizer"}, config=config)
        tokenizer = checkpoint.load_tokenizer(directory)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None), named
        assert tokenizer("Hello").input_ids == [1, 15043] and len(tokenizer) == 32000
    directory = copy(forms, "llama2 json", tmp_path)
    write(directory, special_tokens_map={"pad_token": "!"}, config={"bos_token_id": 1, "eos_token_id": 2})
    tokenizer = checkpoint.load_tokenizer(directory)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "!")
    assert ids(tokenizer, ["Hi!!"]) == library(Tokenizer.from_file(str(directory / "tokenizer.json")), ["Hi!!"])


def test_opt_starts_with_its_end_token(shared, tmp_path):
    """OPT's files: byte-level BPE whose special tokens are named in tokenizer_config.json alone."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    learner.train_from_iterator(["the house on the hill, and the house in the town"] * 3, trainer)
    learner.model.save(str(tmp_path))
    shutil.copy(shared / "hub/published--A-facebook--opt-125m/tokenizer_config.json", tmp_path)
    tokenizer = checkpoint.load_tokenizer(tmp_path)
    text = "the house, in  the hills ünd"
    bare = library(learner, [text])[0]
    assert tokenizer(text).input_ids == [2, *bare] and encode(tokenizer, [text]) == [[2, *bare]]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    assert tokenizer.decode([2, *bare, 2], skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["published--B-EleutherAI--gpt-j-6b", "published--B-microsoft--phi-1_5"])
def test_added_tokens_keep_their_ids(name, shared, forms, tmp_path):
    directory = copy(forms, "gpt2 bpe", tmp_path)
    for path in (shared / "hub" / name).glob("*.json"):
        shutil.copy(path, directory)
    tokenizer = checkpoint.load_tokenizer(directory)
    for token, index in json.loads((directory / "added_tokens.json").read_text()).items():
        assert ids(tokenizer, ["a" + token + "b"]) == [[64, index, 65]]


def test_added_tokens_of_a_sentencepiece_model(forms, pieces, tmp_path):
    directory = copy(forms, "llama2 model", tmp_path)
    tokens = {"32000": {"content": "<|im_start|>", "special": True}, "32003": {"content": "wörd", "special": False}}
    write(directory, tokenizer_config={"added_tokens_decoder": tokens, "eos_token": "<|im_start|>"})
    tokenizer = checkpoint.load_tokenizer(directory)
    assert ids(tokenizer, ["Hello<|im_start|>Hello wörd"]) == [[15043, 32000, 15043, 29871, 32003]]
    assert tokenizer.eos_token_id == 32000 and tokenizer.bos_token_id == 1
    assert decode(tokenizer, [[15043, 32000, 32003]]) == ["Hellowörd"]
    assert ids(tokenizer) == pieces.encode(PROBES)


@pytest.mark.parametrize(
    "settings",
    [
        {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"byte_fallback": False},
        {"byte_fallback": True, "add_dummy_prefix": False, "user_defined_symbols": ["<turn>"], "pad_id": 3},
    ],
)
def test_sentencepiece_models_with_other_settings(settings, shared, texts, tmp_path):
    lines = (shared / "data/text/valid.txt").read_text(encoding="utf-8").splitlines()[:1500]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=900, model_type="bpe", minloglevel=2, **settings
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    tokenizer = checkpoint.load_tokenizer(tmp_path)
    original = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    sample = [*texts[::10], *PROBES, *settings.get("user_defined_symbols", ()), "a<turn>b"]
    assert encode(tokenizer, sample) == [[1, *row] for row in original.encode(sample)]
    assert tokenizer.pad_token_id == settings.get("pad_id")


@pytest.mark.slow
def test_saved_tokenizers_load_again_here_and_in_transformers(forms, shared, tmp_path):
    for index, source in enumerate([*sorted(forms.glob("*2 *")), shared / "models/stories260K"]):
        tokenizer, place = checkpoint.load_tokenizer(source), tmp_path / str(index)
        tokenizer.save_pretrained(place)
        write(place, config={"model_type": "llama"})
        again, theirs = checkpoint.load_tokenizer(place), transformers.AutoTokenizer.from_pretrained(place)
        assert again.special_tokens_map == tokenizer.special_tokens_map == theirs.special_tokens_map
        assert ids(again, special=True) == ids(tokenizer, special=True)
        plain = [text for text in PROBES if "<unk>" not in text]
        assert ids(theirs, plain, special=True) == ids(tokenizer, plain, special=True)


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models(name, real_models, texts, tmp_path):
    raw = Tokenizer.from_file(str(real_models / name / "tokenizer.json"))
    tokenizer = checkpoint.load_tokenizer(real_models / name)
    sample = texts[::20] + PROBES
    assert encode(tokenizer, sample, end=True) == library(raw, sample, special=True)
    assert encode(tokenizer, sample, begin=False) == library(raw, sample)
    config = json.loads((real_models / name / "config.json").read_text())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    tokenizer.save_pretrained(tmp_path)
    assert encode(checkpoint.load_tokenizer(tmp_path), sample) == encode(tokenizer, sample)


def test_appended_end_token_changes_no_metric():
    """An end token between a context and its continuation would change all of them."""
    _, model = make_pair(context=256)
    plain, ending = make_tokenizer(), make_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert ending("a cat").input_ids == [*plain("a cat").input_ids, 1]
    question = {"question": "a cat?", "choices": ("sat", "ran", "a hill", "it"), "answer": 1, "subject": "cats"}

    def metrics(tokenizer):
        values, _ = perplexity.conditional(model, tokenizer, ["the cat", "a"], [[" sat", " ran on"], ["", " dog"]])
        yield np.nan_to_num(values).tolist()
        yield text_perplexity.of_texts(model, tokenizer, ["the cat sat on a hill"], "here")
        yield [mmlu.evaluate(model, tokenizer, [question], [question], form) for form in mmlu.SPLITS]
        yield continuations.generate(model, tokenizer, ["the cat"], samples=2, max_new_tokens=8).texts
        yield data.tokenize(["a cat sat"], tokenizer, 16)[0].tolist()

    assert list(metrics(ending)) == list(metrics(plain))
    pytest.importorskip("lm_eval")
    from unidetox_jax.evaluation import harness

    pairs = [harness.HarnessLM(model, tokenizer)._encode_pair("the cat ", "sat") for tokenizer in (plain, ending)]
    assert pairs[0] == pairs[1] and 1 not in pairs[1][0]


def test_truncation_in_the_file_is_ignored(shared, tmp_path):
    raw = Tokenizer.from_file(str(shared / "models/stories260K/tokenizer.json"))
    long = "Once upon a time there was " * 20
    expected = library(raw, [long], special=True)
    raw.enable_truncation(8)
    raw.enable_padding(length=8)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = checkpoint.load_tokenizer(tmp_path)
    assert ids(tokenizer, [long], special=True) == expected == encode(tokenizer, [long])
    assert tokenizer.pad_token is None


def test_unusable_files(forms, tmp_path):
    cases = {
        "tokenizer.json": (b"{", "its tokenizer cannot be read"),
        "tokenizer.model": (b"IQ== 0\nIg== 1\n", "tokenizer.model: not a sentencepiece model"),
        "vocab.json": (b"{}", "vocab.json: no merges.txt beside it"),
    }
    for name, (content, message) in cases.items():
        directory = tmp_path / name.replace(".", "-")
        directory.mkdir()
        (directory / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            checkpoint.load_tokenizer(directory)
    directory = copy(forms, "gpt2 bpe", tmp_path)
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: not JSON"):
        checkpoint.load_tokenizer(directory)
