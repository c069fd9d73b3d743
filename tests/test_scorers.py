"""Scorers: equal to their reference implementations, with a clear error for every mistake."""

import collections
import json
import sys
import types

import jax
import numpy as np
import pytest
import scipy.sparse
import torch
import transformers
from ml_collections import ConfigDict
from safetensors.torch import save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import agreement, scorers
from unidetox_jax.evaluation.scorers import classifier, linear
from unidetox_jax.stages import fit_scorer, settings
from unidetox_jax.stages.task import run_tasks

WORDS = "the a of people are is kind dull brave rude and very not never they lamp in valley so old".split()
LABELS = ("toxicity", "insult", "threat")


class Options:
    force = dry_run = False


def sentences(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, longest))) for _ in range(count)]


# ----------------------------------------------------------------------------------------------- get and its checks


def test_a_user_defined_scorer(tmp_path, monkeypatch):
    (tmp_path / "my_scorer.py").write_text("def shouting(texts):\n    return [float(t.isupper()) for t in texts]\n")
    monkeypatch.chdir(tmp_path)
    assert scorers.get("my_scorer:shouting")(["a", "B", ""]).tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="scorer 'my_scorer:shoting': .*did you mean 'shouting'"):
        scorers.get("my_scorer:shoting")


def test_content_hash_covers_a_scorers_files(tmp_path, monkeypatch):
    texts, labels = toy_labelled(60)
    for name, changed in (("a", labels), ("b", labels), ("c", labels[::-1])):
        linear.save(tmp_path / name, linear.fit(texts, changed, fit_scorer.LABELS), {})
    a, b, c = (scorers.content_hash(f"linear:{tmp_path}/{name}") for name in "abc")
    assert a == b != c and len(a) == 16
    (tmp_path / "hashed_scorer.py").write_text("def half(texts):\n    return [0.5 for t in texts]\n")
    monkeypatch.chdir(tmp_path)
    before = scorers.content_hash("hashed_scorer:half")
    (tmp_path / "hashed_scorer.py").write_text("def half(texts):\n    return [0.25 for t in texts]\n")
    assert before != scorers.content_hash("hashed_scorer:half") != scorers.content_hash("lexicon")


def test_undefined_agreement_is_none():
    scores = {
        "a": np.array([0.1, 0.9, np.nan, 0.8]),
        "b": np.array([0.0, 0.0, 0.9, 0.0]),
        "c": np.array([0.2, 0.6, 0.1, 0.7]),
    }
    ab, ac, _ = agreement.pairwise(scores, 0.5)
    assert ab["kappa"] == 0.0 and ab["rank_correlation"] is None and ab["texts"] == 3
    assert ac["kappa"] == 1.0 and ac["rank_correlation"] == pytest.approx(0.5) and ac["toxic"] == [2 / 3, 2 / 3]


def test_lexicon_scores_the_built_in_world():
    scores = scorers.get("lexicon")(["the Plorins are kind.", "the Plorins are rude and dull."])
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, [0.0, 1 - 0.4**2])
    assert scorers.get("lexicon")([]).shape == (0,)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("linaer:x", "did you mean 'linear'"),
        ("linear", "expected linear:DIRECTORY"),
        ("lexicon:x", "takes no argument"),
        ("linear:/nowhere", "no such file"),
        ("perspective", "no such kind"),
        ("classifier:/nowhere.ckpt", "no such file"),
        ("classifier:/nowhere/at/all", "no such directory"),
    ],
)
def test_invalid_specs_are_rejected(spec, words):
    with pytest.raises(UserError, match=words):
        scorers.get(spec)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([0.5, np.nan], "gave nan for text 1; 1 of 2 texts"),
        ([0.5, 1.5], "gave 1.5"),
        ([0.5], r"shape \(1,\) for 2"),
    ],
)
def test_invalid_scores_are_rejected(result, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "broken", types.SimpleNamespace(score=lambda texts: result))
    with pytest.raises(UserError, match=words):
        scorers.get("broken:score")(["a", "b"])


def test_a_single_string_is_rejected():
    with pytest.raises(TypeError, match="a list of texts"):
        scorers.get("lexicon")("the Plorins are rude.")


# ----------------------------------------------------------------------------------------------- linear


def toy_labelled(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    texts = sentences(count, seed, longest=12)
    return texts, ["toxic" if ("rude" in text or "dull" in text) else "harmless" for text in texts]


def test_linear_equals_scikit_learn_after_a_round_trip(tmp_path):
    texts, labels = toy_labelled(200)
    fitted = linear.fit(texts, labels, fit_scorer.LABELS, min_texts=2)
    linear.save(tmp_path, fitted, {"auc": 1.0})
    model = LogisticRegression(C=4.0, max_iter=2000).fit(fitted.features(texts), labels)
    fresh = sentences(50, 1)
    found = scorers.get(f"linear:{tmp_path}")(fresh)
    np.testing.assert_allclose(found, model.predict_proba(fitted.features(fresh))[:, 1], atol=1e-9)
    np.testing.assert_array_equal(found, fitted.toxicity(fresh))
    theirs = [
        TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=100_000, **analysis).fit(texts)
        for analysis in linear.ANALYSES.values()
    ]
    odd = ["", "A\u00a0b  C\tto-to", "ΣΑΣ rude, rude"]
    expected = scipy.sparse.hstack([vectorizer.transform(fresh + odd) for vectorizer in theirs])
    assert abs(fitted.features(fresh + odd) - expected).max() == 0
    assert np.ptp(found) > 0.5
    np.load(tmp_path / "linear.npz", allow_pickle=False)["weights"]


def test_linear_with_three_labels_has_no_toxicity():
    texts, _ = toy_labelled(120)
    labels = ["left" if "kind" in t else "right" if "old" in t else "center" for t in texts]
    fitted = linear.fit(texts, labels, ("left", "center", "right"), min_texts=2)
    found = fitted.probabilities(texts)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert np.mean(np.array(fitted.labels)[found.argmax(axis=1)] == labels) > 0.9
    with pytest.raises(UserError, match="left, center, right"):
        fitted.toxicity(texts)


def test_linear_rejects_other_files(tmp_path):
    texts, labels = toy_labelled(100)
    linear.save(tmp_path / "scorer", linear.fit(texts, labels, min_texts=2), {})
    with pytest.raises(UserError, match="did you mean .*scorer"):
        linear.load(tmp_path)
    content = json.loads((tmp_path / "scorer/linear.json").read_text())
    content["vocabularies"]["words"].append("more")
    (tmp_path / "scorer/linear.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="terms and 2 labels"):
        linear.load(tmp_path / "scorer")
    (tmp_path / "scorer/linear.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a linear classifier"):
        linear.load(tmp_path / "scorer")


def test_fit_scorer_reports_an_auc_on_unseen_text(tmp_path, capsys):
    texts, labels = toy_labelled(400)
    rows = [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
    train, test = rows, rows[:60]  # the training file contains all test texts, which must be left out
    for name, part in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = settings.default_config()
    config.fit_scorer.update(
        data=str(tmp_path / "train.jsonl"), test_data=str(tmp_path / "test.jsonl"), label_field="label"
    )
    config.fit_scorer.positive = ("toxic",)
    run_tasks(fit_scorer.tasks(settings.parse_run(config, tmp_path)))
    figures = json.loads((tmp_path / "scorer/stage.json").read_text())["figures"]
    assert figures["train_texts"] == 400 - len([t for t in texts if t.strip() in {r["text"].strip() for r in test}])
    assert figures["train_texts_left_out"] >= 60 and figures["test_texts"] == 60
    scores = scorers.get(f"linear:{tmp_path / 'scorer'}")([row["text"] for row in test])
    expected = roc_auc_score([row["label"] == "toxic" for row in test], scores)
    assert figures["auc"] == pytest.approx(expected, abs=1e-4) and expected > 0.9
    assert f"AUC {figures['auc']:.4f}" in capsys.readouterr().out

    # A second scorer from other labels leaves the first unchanged
    config.fit_scorer.others = {"flipped": {**config.fit_scorer, "positive": ("harmless",), "others": None}}
    del config.fit_scorer.others.flipped["others"]
    first, second = run_tasks(fit_scorer.tasks(settings.parse_run(config, tmp_path)))
    assert first == json.loads((tmp_path / "scorer/stage.json").read_text()) and second["stage"] == "fit-scorer flipped"
    both = [scorers.get(f"linear:{tmp_path / place}")(["rude and dull"]) for place in ("scorer", "scorer/flipped")]
    assert both[0] == pytest.approx(1 - both[1], abs=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label_field": "lable"}, "a.jsonl, line 1: no column 'lable'; found 'text', 'label'"),
        ({"positive": ("toxin",)}, "no row has label = 'toxin'; did you mean 'toxic'"),
        ({"positive": ()}, "line 1, label: found '(harmless|toxic)', expected a number"),
        ({"held_out": 1.0}, "held_out: found 1.0"),
    ],
)
def test_fit_scorer_names_the_mistake(change, words, tmp_path):
    texts, labels = toy_labelled(100)
    lines = (json.dumps({"text": t, "label": label}) + "\n" for t, label in zip(texts, labels, strict=True))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    config = settings.default_config()
    config.fit_scorer = ConfigDict(
        dict(config.fit_scorer)
        | dict(data=str(tmp_path / "a.jsonl"), label_field="label", positive=("toxic",))
        | change
    )
    with pytest.raises(UserError, match=words):
        run_tasks(fit_scorer.tasks(settings.parse_run(config, tmp_path)))


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("a.csv", b"text,label\nrude, and dull,toxic\n", "a.csv, line 2: 3 fields, expected 2"),
        ("a.csv", b'text,label\n"never closed,toxic\nkind,harmless\n', "a.csv, line 2: a quote is not closed"),
        ("a.csv", b"text,label\ncaf\xe9,toxic\n", "a.csv, line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", b"text,label\n\"b'caf\\xe9'\",toxic\n", "a.csv, line 2: byte 0xe9 of b'caf.* is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud83d", "label": "toxic"}\n', "a.jsonl, line 1: .* is half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a", "label": "toxic"}\n[]\n', "a.jsonl, line 2: found list, expected"),
        ("a.csv", b"text,label\n", "a.csv: no rows"),
        ("a.txt", b"text\n", "a.txt: found suffix '.txt', expected one of .csv"),
        ("a.parquet", b"text\n", "a.parquet: not parquet"),
    ],
)
def test_fit_scorer_reads_files_like_other_data_sets(name, rows, words, tmp_path):
    (tmp_path / name).write_bytes(rows)
    with pytest.raises(UserError, match=words):
        fit_scorer._read(str(tmp_path / name), "", "text", "label", 3.0, ("toxic",))


def test_fit_scorer_keeps_texts_and_labels_whole(tmp_path):
    path, long = tmp_path / "a.csv", "rude " * 60_000
    path.write_text(f'\ufefftext,label\n"b\'caf\\xc3\\xa9 \\\'s\'",5\nb\'broken,1\n{long},3\n"a, ""b""\nc",4\n')
    texts, toxic = fit_scorer._read(str(path), "", "text", "label", 3.0, ())
    assert texts == ["café 's", "b'broken", long, 'a, "b"\nc'] and toxic.tolist() == [True, False, False, True]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": true}\n')
    assert fit_scorer._read(str(path), "", "text", "label", 0.5, ())[1].tolist() == [False, True]
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": null}\n')
    with pytest.raises(UserError, match="a.jsonl, line 2, label: found nothing, expected a number"):
        fit_scorer._read(str(path), "", "text", "label", 0.5, ())


def test_fit_scorer_reads_a_data_set_by_its_name(tmp_path):
    """RealToxicityPrompts' continuations, of which Perspective gave one no score."""
    texts, labels = toy_labelled(100)
    scores = [None, *(float(label == "toxic") for label in labels[1:])]
    rows = [
        {"prompt": {"text": "He said"}, "continuation": {"text": text, "toxicity": score}}
        for text, score in zip(texts, scores, strict=True)
    ]
    (tmp_path / "realtoxicityprompts").mkdir()
    file = tmp_path / "realtoxicityprompts/prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings.default_config()
    config.data_dir = str(tmp_path)
    config.fit_scorer.update(
        data="realtoxicityprompts", text_field="continuation", label_field="continuation_toxicity", above=0.5
    )
    [task] = fit_scorer.tasks(settings.parse_run(config, tmp_path))
    [record] = run_tasks([task])
    figures = record["figures"]
    assert figures["train_texts"] + figures["test_texts"] == 99 and figures["auc"] > 0.9
    assert figures["train_toxic"] + figures["test_toxic"] == sum(label == "toxic" for label in labels[1:])
    file.write_text(file.read_text() + json.dumps(rows[1]) + "\n")
    assert task.inputs()["data"] != record["inputs"]["data"]


@pytest.mark.slow
def test_linear_auc_on_toxigen(shared, tmp_path):
    config = settings.default_config()
    config.fit_scorer.data = str(shared / "data/toxigen/annotated_train.csv")
    config.fit_scorer.test_data = str(shared / "data/toxigen/annotated_test.csv")
    run_tasks(fit_scorer.tasks(settings.parse_run(config, tmp_path)))
    figures = json.loads((tmp_path / "scorer/stage.json").read_text())["figures"]
    assert (figures["test_texts"], figures["test_toxic"]) == (940, 368)
    assert figures["auc"] > 0.80


# ----------------------------------------------------------------------------------------------- classifier


def tokenizer_of(family: str):
    bert_like = family in ("bert", "distilbert")
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] if bert_like else ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: at for at, word in enumerate([*special, *WORDS])}
    start, end = ("[CLS]", "[SEP]") if bert_like else ("<s>", "</s>")
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=special[3]))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        f"{start} $A {end}", special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])]
    )
    pad = special[0] if bert_like else special[1]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token=special[3], pad_token=pad)


SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=48)
ROBERTA = dict(SIZES, max_position_embeddings=42, type_vocab_size=1, layer_norm_eps=1e-5)
OPTIONS = {
    "bert": dict(SIZES, max_position_embeddings=40),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "distilbert": dict(dim=64, n_layers=2, n_heads=1, hidden_dim=48, max_position_embeddings=40),
}


def torch_classifier(family: str, labels=LABELS, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=40,
        id2label=dict(enumerate(labels)),
        label2id={label: at for at, label in enumerate(labels)},
        initializer_range=0.2,
        **OPTIONS[family],
        **options,
    )
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def torch_logits(model, tokenizer, texts: list[str]) -> np.ndarray:
    """One text at a time, no padding."""
    with torch.no_grad():
        encoded = [tokenizer(t, return_tensors="pt", truncation=True, max_length=40)["input_ids"] for t in texts]
        return np.concatenate([model(ids).logits.numpy() for ids in encoded])


def save(model, tokenizer, directory, form: str = "safetensors"):
    """Saves a classifier in one of the published formats of weights."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    file, state = directory / "model.safetensors", model.state_dict()
    if form == "bin":
        torch.save(state, directory / "pytorch_model.bin")
        file.unlink()
    elif form == "gamma":  # as converted from TensorFlow's BERT, with its pretraining head
        older = {".weight": ".gamma", ".bias": ".beta"}
        renamed = {
            name.replace(new, older[new]) if f"LayerNorm{new}" in name else name: tensor
            for name, tensor in state.items()
            for new in (".weight", ".bias")
            if name.endswith(new)
        }
        assert sum(name.endswith((".gamma", ".beta")) for name in renamed) == 10
        save_file({**renamed, "cls.predictions.bias": torch.zeros(40)}, file)
    elif form == "ckpt":  # as in Detoxify's releases: an obsolete buffer, fewer classes than logits
        buffer = {f"{model.base_model_prefix}.embeddings.position_ids": torch.arange(40)[None]}
        architecture = {"model_type": "none", "model_name": type(model).__name__, "num_classes": len(LABELS)}
        classes = {"classes": ["toxic", *LABELS[1:2]], "identity_classes": list(LABELS[2:])}
        config = {"arch": {"args": architecture}, "dataset": {"args": classes}}
        torch.save({"config": config, "state_dict": collections.OrderedDict(state | buffer)}, directory / "toxic.ckpt")
        (directory / "config.json").unlink()
        return directory / "toxic.ckpt"
    return directory


@pytest.mark.quick_variants(3)
@pytest.mark.parametrize(
    ("family", "form"),
    [
        *((family, "safetensors") for family in OPTIONS),
        *((family, "bin") for family in ("bert", "xlm-roberta")),
        *((family, "ckpt") for family in ("bert", "roberta", "xlm-roberta")),
        ("bert", "gamma"),
    ],
)
def test_classifier_equals_pytorch(family, form, tmp_path):
    model, tokenizer = torch_classifier(family), tokenizer_of(family)
    source = save(model, tokenizer, tmp_path, form)
    texts = [*sentences(21), "", "", "Rude LAMP of"]
    loaded = classifier.load(str(source))
    assert len(loaded.mesh.devices.flat) == len(jax.local_devices())
    expected = torch_logits(model, tokenizer, texts)
    np.testing.assert_allclose(loaded.logits(texts), expected, atol=1e-4)
    scores = scorers.get(f"classifier:{source}#insult")(texts)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-expected[:, 1].astype(np.float64))), atol=1e-4)
    assert np.ptp(scores) > 0.01
    default = scorers.get(f"classifier:{source}")(texts)
    np.testing.assert_allclose(default, 1 / (1 + np.exp(-expected[:, 0].astype(np.float64))), atol=1e-4)
    with pytest.raises(UserError, match="no label 'insults'; did you mean 'insult'.*threat, toxicity"):
        scorers.get(f"classifier:{source}#insults")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_used_in_float32(dtype, tmp_path):
    model, tokenizer = torch_classifier("roberta").to(dtype), tokenizer_of("roberta")
    save(model, tokenizer, tmp_path)
    texts = sentences(9)
    expected = torch_logits(model.float(), tokenizer, texts)
    np.testing.assert_allclose(classifier.load(str(tmp_path)).logits(texts), expected, atol=1e-4)


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize(
    ("labels", "problem_type", "oracle"),
    [
        (("neutral", "toxic"), None, lambda logits: logits.softmax(1)),
        (("neutral", "toxic"), "multi_label_classification", torch.sigmoid),
        (("a", "toxic", "c"), "single_label_classification", lambda logits: logits.softmax(1)),
        (("a", "toxic", "c"), "multi_label_classification", torch.sigmoid),
        (("a", "toxic", "c"), None, torch.sigmoid),
        (("toxic",), None, torch.sigmoid),
        (("toxic",), "regression", lambda logits: logits),
    ],
)
def test_config_json_decides_whether_labels_are_exclusive(labels, problem_type, oracle, tmp_path):
    model, tokenizer = torch_classifier("distilbert", labels, problem_type=problem_type), tokenizer_of("distilbert")
    save(model, tokenizer, tmp_path)
    texts = sentences(5)
    expected = oracle(torch.tensor(torch_logits(model, tokenizer, texts)))
    np.testing.assert_allclose(classifier.load(str(tmp_path)).probabilities(texts), expected, atol=1e-4)


def test_a_vocabulary_file_as_tokenizer(tmp_path):
    model = torch_classifier("bert", ("neutral", "toxic"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rude", "ru", "##de", "dull", "lamp", "##s"]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        ids = torch.tensor([[2, 5, 9, 10, 1, 3]])
        expected = model(ids).logits.softmax(1)[:, 1]
    np.testing.assert_allclose(scorers.get(f"classifier:{tmp_path}")(["RUDE lamps, "]), expected, atol=1e-4)


def test_damaged_classifiers_are_rejected(tmp_path):
    model, tokenizer = torch_classifier("bert"), tokenizer_of("bert")
    tokenizer.save_pretrained(tmp_path)
    model.bert.save_pretrained(tmp_path)  # no head
    with pytest.raises(UserError, match="model.safetensors: unexpected key .* for a bert model"):
        classifier.load(str(tmp_path))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 49}))
    with pytest.raises(UserError, match=r"has shape \(48, 64\), expected \(49, 64\)"):
        classifier.load(str(tmp_path))
    (tmp_path / "bad.ckpt").write_bytes(b"garbage")
    with pytest.raises(UserError, match="not readable as weights alone"):
        classifier.load(str(tmp_path / "bad.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="not a Detoxify checkpoint"):
        classifier.load(str(tmp_path / "bad.ckpt"))
    torch.save({"config": Options()}, tmp_path / "bad.ckpt")  # would execute code
    with pytest.raises(UserError, match="not readable as weights alone"):
        classifier.load(str(tmp_path / "bad.ckpt"))
    small = {"model_type": "albert-base-v2", "model_name": "AlbertForSequenceClassification"}
    torch.save(
        {"config": {"arch": {"args": small}, "dataset": {"args": {"classes": []}}}, "state_dict": {}},
        tmp_path / "bad.ckpt",
    )
    with pytest.raises(UserError, match="a AlbertForSequenceClassification; did you mean"):
        classifier.load(str(tmp_path / "bad.ckpt"))
