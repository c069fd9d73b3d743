"""The evaluate stage: metrics against independent implementations on the generated texts, resumption after kills."""

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from etils import epath
from tokenizers import normalizers

import unidetox_jax
from tests.eval_helpers import WORDS, make_pair, make_tokenizer
from unidetox_jax import cli, decoding, sharding
from unidetox_jax.data.tokens import vocabulary_size
from unidetox_jax.decoding import warpers
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import continuations, prompts, scorers
from unidetox_jax.evaluation.candidates import Candidate
from unidetox_jax.evaluation.config import EvaluationConfig
from unidetox_jax.evaluation.scorers import linear
from unidetox_jax.report import results, tables
from unidetox_jax.stages import evaluate, loading, settings
from unidetox_jax.stages.evaluated_models import Form
from unidetox_jax.stages.task import run_task, run_tasks

pytestmark = pytest.mark.usefixtures("one_device")
CATEGORIES = ["hills"] * 3 + ["rivers"] * 2 + ["islands"] * 2
PROMPTS = [
    "the cat sat on",
    "a dog",
    "it was very small and then",
    "the bird sang under the tree and the cat ran slowly then a dog sat near the hill and it was green",
    "the cat sat on",  # a duplicate
    "a",
    "dog dog",
]
CONFIG = """
from unidetox_jax.stages.settings import default_config

def get_config(argument=None):
    config = default_config()
    config.targets = ("{work}/models/tiny",)
    config.data_dir = "{work}/data"
    config.mesh = "data:-1"
    config.evaluate.update(
        which=("original",), prompts="{work}/prompts.jsonl", runs=2, samples=3, max_new_tokens=9, top_k=40, top_p=0.8,
        scorer="linear:{work}/scorer", other_scorers=("dogs=linear:{work}/dogs",),
        threshold=0.4, perplexity_scorer="{work}/models/judge", batch_size=8,
        text_file="{work}/text.txt", resamples=50, mmlu=("paper:1", "standard:1:validation"),
        id_categories=("hills", "rivers"), ood_categories=("islands",),
    )
    return config
"""


@pytest.fixture(scope="module")
def work(one_device, tmp_path_factory):
    """A tiny model, one for perplexity, scorers, prompts, questions."""
    work = tmp_path_factory.mktemp("work")
    for seed, name in enumerate(("tiny", "judge")):
        torch_model, _ = make_pair(seed=seed)
        # many end tokens, so that some continuations are empty
        torch_model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=1)
        torch_model.config.eos_token_id = [1, *range(300, 330)]
        torch_model.save_pretrained(work / "models" / name)
        make_tokenizer().save_pretrained(work / "models" / name)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(60)]
    for word, name in (("cat", "scorer"), ("dog", "dogs")):
        labels = ["toxic" if word in text else "harmless" for text in texts]
        linear.save(work / name, linear.fit(texts, labels, ("harmless", "toxic"), balanced=True), {})
    lines = [json.dumps({"text": t, "category": c}) + "\n" for t, c in zip(PROMPTS, CATEGORIES, strict=True)]
    (work / "prompts.jsonl").write_text("".join(lines))
    (work / "text.txt").write_text("the cat sat on a mat and then the dog ran under it. " * 5)
    for split, count in (("dev", 2), ("val", 4)):
        folder = work / "data" / "mmlu" / split
        folder.mkdir(parents=True)
        for subject in ("birds", "trees"):
            rows = [f"{' '.join(rng.choice(WORDS, 5))}?,{','.join(rng.choice(WORDS, 4))},B\n" for _ in range(count)]
            (folder / f"{subject}_{split}.csv").write_text("".join(rows))
    (work / "config.py").write_text(CONFIG.format(work=work))
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    yield work
    del os.environ["XDG_CACHE_HOME"]


def make_run(work, directory, **changes):
    run = settings.parse_run(cli.load_config(str(work / "config.py")), directory)
    return dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, **changes))


def evaluate_into(work, directory, **changes) -> pathlib.Path:
    """Runs the stage; returns the model's directory."""
    run_tasks(evaluate.tasks(make_run(work, directory, **changes)))
    return directory / "evaluation" / "tiny"


def read(directory):
    rows = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    return json.loads((directory / "metrics.json").read_text()), rows


@pytest.fixture(scope="module")
def whole(work):
    """An uninterrupted evaluation."""
    return evaluate_into(work, work / "whole")


# ------------------------------------------------------------------------------------------------------- references


def reference_toxicity(values, threshold):
    """values: run → prompt → scores."""
    tp = [sum(any(s > threshold for s in row) for row in run) / len(run) for run in values]
    return tp, [sum(max(row) for row in run) / len(run) for run in values]


def reference_distinct(texts, n):
    ratios = []
    for own in texts:
        grams, words = set(), 0
        for text in own:
            split = text.split(" ")
            words += len(split)
            grams |= {tuple(split[i : i + n]) for i in range(len(split) - n + 1)}
        ratios.append(len(grams) / words)
    return sum(ratios) / len(ratios)


@torch.no_grad()
def reference_perplexities(model, tokenizer, texts, release):
    """One text at a time; release: with the released code's stale prompt length."""

    def nll(tokens):
        loss = model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
        return float(loss.double()) * (len(tokens) - 1)

    values, losses, length = [], {}, None
    for prompt, own in zip(PROMPTS, texts, strict=True):
        for text in own:
            if prompt not in losses or not release:
                tokens = tokenizer.encode(prompt)
                losses[prompt], length = nll(tokens), len(tokens)
            full = tokenizer.encode(prompt + text)
            new, loss = len(full) - length, nll(full) - losses[prompt]
            values.append(math.exp(loss / new) if new else math.nan if abs(loss) < 1e-9 else math.inf)
    return values


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("release", [False, True])
def test_metrics_equal_the_references_on_the_generated_texts(work, whole, release):
    directory = evaluate_into(work, work / "release", reproduce_release=True) if release else whole
    metrics, rows = read(directory)
    assert [(r["run"], r["prompt"], r["sample"]) for r in rows] == [
        (run, prompt, sample) for run in range(2) for prompt in range(7) for sample in range(3)
    ]
    texts = [[[rows[(run * 7 + p) * 3 + s]["text"] for s in range(3)] for p in range(7)] for run in range(2)]
    score = linear.load(work / "scorer").toxicity
    scores = [[[float(score([text])[0]) for text in own] for own in run] for run in texts]
    written = [r["score"] for r in rows]
    np.testing.assert_allclose(written, np.ravel(scores), atol=1e-6)

    for name in ("hills", "rivers", "islands"):
        chosen = [[run[p] for p in range(7) if CATEGORIES[p] == name] for run in scores]
        tp, emt = reference_toxicity(chosen, 0.4)
        assert metrics["toxicity"][name]["tp"]["runs"] == tp
        np.testing.assert_allclose(metrics["toxicity"][name]["emt"]["runs"], emt, rtol=1e-12)
        assert metrics["toxicity"][name]["prompts"] == len(chosen[0])
    for metric in ("tp", "emt"):
        found = metrics["toxicity"]
        assert found["id"][metric]["mean"] == pytest.approx(
            (found["hills"][metric]["mean"] + found["rivers"][metric]["mean"]) / 2
        )
        assert found["ood"][metric]["mean"] == found["islands"][metric]["mean"]
        assert found["all"][metric]["sd"] == pytest.approx(np.std(found["all"][metric]["runs"]))

    for n in (1, 2, 3):
        counted = [
            [[prompt + text if release else text for text in own] for prompt, own in zip(PROMPTS, run, strict=True)]
            for run in texts
        ]
        expected = [reference_distinct(run, n) for run in counted]
        np.testing.assert_allclose(metrics["diversity"][f"dist{n}"]["runs"], expected, rtol=1e-14)

    judge = transformers.AutoModelForCausalLM.from_pretrained(work / "models" / "judge").eval()
    expected = [reference_perplexities(judge, make_tokenizer(), run, release) for run in texts]
    finite = np.isfinite(expected)
    found = np.array([math.nan if r["perplexity"] is None else r["perplexity"] for r in rows]).reshape(2, -1)
    np.testing.assert_allclose(found[finite], np.array(expected)[finite], rtol=1e-4, atol=1e-4)
    means = [np.mean([v for v in run if v < 1e4]) for run in expected]
    np.testing.assert_allclose(metrics["perplexity"]["runs"], means, rtol=1e-4)
    assert metrics["perplexity"]["counted"] == np.sum(np.array(expected) < 1e4)
    assert metrics["perplexity"]["texts"] == 42

    arrays = np.load(directory / "per_prompt.npz", allow_pickle=False)
    assert arrays["category"].tolist() == CATEGORIES
    np.testing.assert_allclose(arrays["emt"], np.mean([[max(row) for row in run] for run in scores], axis=0))
    np.testing.assert_allclose(arrays["tp"].mean(), metrics["toxicity"]["all"]["tp"]["mean"])
    np.testing.assert_allclose(arrays["dist2"].mean(), metrics["diversity"]["dist2"]["mean"])
    assert arrays["perplexity_count"].sum() == metrics["perplexity"]["counted"]


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("release", [False, True])
def test_texts_are_the_sampled_tokens_without_the_prompt(work, release):
    run = make_run(work, work)
    tokenizer = make_tokenizer()
    model = loading.load_model(run, str(work / "models" / "tiny"), sharding.make_mesh(run.shared.mesh))
    chosen = warpers.choose(temperature=1.0, top_k=run.evaluate.top_k, top_p=run.evaluate.top_p)
    found = continuations.generate(
        model, tokenizer, PROMPTS, samples=3, max_new_tokens=9, warpers=chosen, seed=42, batch_size=8,
        bos=not release, reproduce_release=release,
    )  # fmt: skip
    for index, prompt in enumerate(PROMPTS):
        tokens = ([] if release else [0]) + tokenizer.encode(prompt, add_special_tokens=False)
        alone = decoding.generate(
            [model], [tokens] * 3, objective=decoding.objectives.get("base"), warpers=chosen, max_new_tokens=9,
            seed=42, row_ids=[index * 3, index * 3 + 1, index * 3 + 2], vocab_size=vocabulary_size(tokenizer),
        )  # fmt: skip
        for sample in range(3):
            new = alone.tokens[sample][: alone.lengths[sample] - alone.ended[sample]].tolist()
            text = tokenizer.decode(tokens + new, skip_special_tokens=True)
            expected = text.replace(prompt, "") if release else text[len(prompt) :]
            assert found.texts[index][sample] == expected
            assert found.ended[index, sample] == alone.ended[sample]


def test_counts(work, whole):
    metrics, rows = read(whole)
    counts = metrics["counts"]
    assert counts["categories"] == {"hills": 3, "rivers": 2, "islands": 2}
    assert (counts["prompts"], counts["runs"], counts["samples"], counts["texts"]) == (7, 2, 3, 42)
    assert counts["empty"] == sum(r["text"] == "" for r in rows) > 0
    assert counts["ended"] == sum(r["ended"] for r in rows) > 0
    assert counts["missing_scores"] == 0
    assert metrics["perplexity"]["undefined"] == sum(r["perplexity"] is None for r in rows) == counts["empty"]
    assert metrics["toxicity"]["all"]["texts"] == 42  # empty ones too
    assert metrics["mmlu"]["paper:1"]["questions"] == metrics["mmlu"]["standard:1:validation"]["questions"] == 8
    assert metrics["text_perplexity"]["ppl"] > 1 and metrics["harness"] == {}
    assert metrics["model"] == {"name": "tiny", "form": "original", "source": f"{work}/models/tiny"}
    assert [json.loads(line)["text"] for line in (whole / "prompts.jsonl").read_text().splitlines()] == PROMPTS
    assert not (whole / "parts").exists()


def test_the_library_gives_the_stages_metrics(work, whole):
    settings = make_run(work, work).evaluate
    config = {field.name: getattr(settings, field.name) for field in dataclasses.fields(EvaluationConfig)}
    names = ("toxicity", "perplexity", "diversity", "other_scorers")
    config |= {"scorer": f"linear:{work}/scorer"}
    model = unidetox_jax.load(work / "models" / "tiny", sharding.make_mesh("data:-1"))
    measured = unidetox_jax.evaluate(model, PROMPTS, categories=CATEGORIES, **{**config, "metrics": names})
    metrics, _ = read(whole)
    assert list(measured) == list(names)
    for name in ("toxicity", "diversity", "other_scorers"):
        assert measured[name] == metrics[name]
    np.testing.assert_allclose(measured["perplexity"]["runs"], metrics["perplexity"]["runs"], rtol=1e-12)


def test_another_scorer_gives_its_metrics_and_the_agreement(work, whole):
    metrics, rows = read(whole)
    scores = np.array([[row["score"], row["score by dogs"]] for row in rows])
    dogs = linear.load(work / "dogs").toxicity([row["text"] for row in rows])
    np.testing.assert_allclose(scores[:, 1], dogs, atol=1e-6)
    found = metrics["other_scorers"]["scorers"]["dogs"]
    assert found["scorer"] == f"linear:{work}/dogs" and found["hash"] == scorers.content_hash(f"linear:{work}/dogs")
    tp, _ = reference_toxicity([dogs[at : at + 21].reshape(7, 3).tolist() for at in (0, 21)], 0.4)
    assert found["toxicity"]["all"]["tp"]["runs"] == tp
    assert np.load(whole / "per_prompt.npz")["tp by dogs"].mean() == pytest.approx(np.mean(tp))
    assert metrics["scorer_hash"] == scorers.content_hash(f"linear:{work}/scorer") != found["hash"]

    (pair,) = metrics["other_scorers"]["agreement"]
    calls = scores > 0.4
    observed, chance = (calls[:, 0] == calls[:, 1]).mean(), np.prod(calls.mean(0)) + np.prod(1 - calls.mean(0))
    assert pair["kappa"] == pytest.approx((observed - chance) / (1 - chance)) and pair["texts"] == 42
    ranks = scipy.stats.rankdata(scores, axis=0)
    assert pair["rank_correlation"] == pytest.approx(np.corrcoef(ranks.T)[0, 1], abs=1e-3)
    assert pair["scorers"] == [f"linear:{work}/scorer", "dogs"]

    (row,) = results.rows([results.read(whole)])
    assert row.cells["tp_id by dogs"].mean == found["toxicity"]["id"]["tp"]["mean"]
    quantities = results.quantities([row.evaluation])
    assert [quantity.title for quantity in quantities if quantity.primary][:3] == [
        "TP (ID)",
        "TP (OOD)",
        "TP (ID) by dogs",
    ]
    assert tables.agreement([row])[0]["Cohen's κ"] == f"{pair['kappa']:.2f}".replace("-", "−")


def test_evaluations_by_scorers_of_different_content_are_not_comparable(work, whole):
    one = results.read(whole)
    other = dataclasses.replace(one, metrics={**one.metrics, "scorer_hash": "another"})
    assert results.comparable(one, one) and not results.comparable(one, other)
    old = dataclasses.replace(one, metrics={key: one.metrics[key] for key in one.metrics if key != "scorer_hash"})
    assert results.comparable(one, old)  # as older versions wrote


# ------------------------------------------------------------------------------------------------------- resumption


def same(left, right):
    for name in ("metrics.json", "generations.jsonl", "prompts.jsonl"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    with np.load(left / "per_prompt.npz") as a, np.load(right / "per_prompt.npz") as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])


def test_interrupted_after_any_part_it_continues_and_makes_nothing_twice(work, whole, tmp_path, monkeypatch):
    made = []

    def make_and_die(path, *arguments):
        if not path.exists():
            if made and made[-1] == path.name:
                raise AssertionError(f"{path.name} is made twice")
            made.append(path.name)
            original(path, *arguments)
            raise KeyboardInterrupt
        return original(path, *arguments)

    original = evaluate.cached
    monkeypatch.setattr(evaluate, "cached", make_and_die)
    for _ in range(20):
        try:
            directory = evaluate_into(work, tmp_path)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "evaluation" / "tiny" / "metrics.json").exists()
    same(directory, whole)
    assert made == [
        "run0.texts.jsonl", "run1.texts.jsonl", "text.json", "mmlu.paper-1.json", "mmlu.standard-1-validation.json",
        "run0.scores.npy", "run1.scores.npy", "run0.scores.dogs.npy", "run1.scores.dogs.npy",
        "run0.perplexities.npy", "run1.perplexities.npy",
    ]  # fmt: skip
    monkeypatch.setattr(evaluate, "_evaluate", None)
    evaluate_into(work, tmp_path)  # complete


@pytest.mark.slow
def test_after_sigkill_it_continues(work, whole, tmp_path):
    command = [sys.executable, "-m", "unidetox_jax.cli", "evaluate", f"--config={work}/config.py"]
    command.append(f"--workdir={tmp_path}")
    directory = tmp_path / "evaluation" / "tiny"
    child = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (directory / "parts" / "run0.texts.jsonl").exists() and child.poll() is None:
        time.sleep(0.01)
    assert child.poll() is None, child.stderr.read()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (directory / "parts" / "run0.texts.jsonl").exists() and not (directory / "metrics.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    same(directory, whole)


def test_other_settings_are_refused(work, whole):
    with pytest.raises(UserError, match=r"settings.top_p: was 0.8, now 0.7"):
        evaluate_into(work, work / "whole", top_p=0.7)
    evaluate_into(work, work / "whole", batch_size=16)  # changes only the speed


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "{work}/empty.jsonl"}, "empty.jsonl"),
        ({"scorer": "linear:{work}/nowhere"}, "nowhere/linear.json: no such file"),
        ({"scorer": "linaer:{work}/scorer"}, "no such kind; did you mean 'linear'"),
        ({"other_scorers": ("linear:{work}/dogs",)}, "config.evaluate.other_scorers: found 'linear:"),
        ({"other_scorers": ("dogs=linear:{work}/nowhere",)}, "nowhere/linear.json: no such file"),
        ({"mmlu": ("papr:1",)}, "found 'papr:1', expected FORM:SHOTS"),
        ({"which": ("orignal",)}, "no form 'orignal'; did you mean 'original'"),
        ({"which": ("detoxified",)}, "detoxified/tiny: no finished model; run `unidetox detoxify`"),
        ({"extra_models": ("tiny={work}/models/judge",)}, "the name 'tiny' is taken"),
        ({"extra_models": ("{work}/models/judge",)}, "expected 'name=PATH'"),
        ({"extra_models": ("other={work}/models/none",), "which": ()}, "models/none: no such directory"),
        ({"text_file": "{work}/none.txt"}, "none.txt: no such file"),
        ({"runs": 0}, "runs 0 and samples 3"),
        ({"max_new_tokens": 90}, "the context of model 0"),
    ],
)
def test_mistakes_are_one_line(work, tmp_path, changes, message):
    (work / "empty.jsonl").write_text("")

    def filled(value):
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return value.replace("{work}", str(work)) if isinstance(value, str) else value

    changes = {name: filled(value) for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        evaluate_into(work, tmp_path, **changes)
    assert not list(tmp_path.rglob("metrics.json"))


def test_prompts_of_several_sets(work, shared):
    both = prompts.load(f"{work}/prompts.jsonl | realtoxicityprompts:challenging", shared / "data", limit=5, seed=3)
    alone = prompts.load(f"{work}/prompts.jsonl", limit=5, seed=3)
    assert both.texts[:5] == alone.texts and both.categories[5:] == ("challenging",) * 5
    assert len(prompts.load("realtoxicityprompts:challenging", shared / "data").texts) == 49  # of 5,000


def test_an_empty_prompt_gives_unprompted_text(work, tmp_path):
    lines = [{"text": "", "category": "hills"}, {"text": "the cat", "category": "rivers"}]
    (work / "unprompted.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate_into(work, tmp_path, prompts=f"{work}/unprompted.jsonl", text_file="", mmlu=())
    directory = tmp_path / "evaluation" / "tiny"
    rows = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    unprompted = [row for row in rows if row["prompt"] == 0]
    assert len(unprompted) == 6 and any(row["text"] for row in unprompted)
    assert all((row["perplexity"] is None) == (row["text"] == "") for row in unprompted)


def test_a_prompt_without_tokens_is_named():
    tokenizer = make_tokenizer(bos=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()  # reads a space as nothing
    (word,) = tokenizer.encode("cat")
    assert continuations.tokenize_prompts(tokenizer, ["cat", ""]) == [[word], [tokenizer.bos_token_id]]
    with pytest.raises(UserError, match=r"prompt 1 \(' '\) has no tokens"):
        continuations.tokenize_prompts(tokenizer, ["cat", " "])
    tokenizer.bos_token = None
    with pytest.raises(UserError, match=r"prompt 1 \(''\) has no tokens"):
        continuations.tokenize_prompts(tokenizer, ["cat", ""])


def test_a_scorer_that_gives_nan_is_an_error_and_the_texts_are_kept(work, tmp_path, monkeypatch):
    broken = scorers._checked(lambda texts: np.full(len(texts), np.nan), "linear:broken")
    monkeypatch.setattr(scorers, "get", lambda spec: broken)
    with pytest.raises(UserError, match=r"'linear:broken': gave nan for text 0; 21 of 21 texts"):
        evaluate_into(work, tmp_path)
    assert (tmp_path / "evaluation" / "tiny" / "parts" / "run1.texts.jsonl").exists()


# ----------------------------------------------------------------------------------------------- a user's own metric

MEAN_LENGTH = """
import numpy as np
from unidetox_jax.evaluation.metrics import Cell, Metric, PerText, Quantity, Result

class MeanLength(Metric):
    def __init__(self, unit="words"):
        self.unit = unit

    def compute(self, subject):
        length = {"words": lambda text: len(text.split()), "characters": len}[self.unit]
        values = np.array([[[length(text) for text in own] for own in run.texts] for run in subject.runs], float)
        return Result(
            subject.estimate(values.mean(axis=-1)),
            {"length": values.mean(axis=(0, 2))},
            {"length": PerText(values, 0)},
        )

    def cells(self, summary):
        return {Quantity("length", f"Length ({self.unit})", None, 1, per_prompt="length"): Cell.of(summary)}

    def notes(self, summary):
        return [f"the longest run has {max(summary['runs']):.1f} {self.unit}"]
"""


def test_a_users_metric_is_measured_stored_and_shown(work, tmp_path, monkeypatch, capsys):
    (tmp_path / "users_metrics.py").write_text(MEAN_LENGTH)
    monkeypatch.chdir(tmp_path)
    name = "users_metrics:MeanLength(unit='characters')"
    run = make_run(work, tmp_path / "run", metrics=("toxicity", name), mmlu=(), text_file="")
    sides = []
    for form, model in (("original", "tiny"), ("detoxified", "judge")):
        directory = epath.Path(tmp_path / form)
        directory.mkdir()
        evaluate.evaluate(run, Form("tiny", form, Candidate((str(work / "models" / model),))), directory)
        sides.append(results.read(directory))
    metrics, rows = read(tmp_path / "original")
    lengths = np.array([len(row["text"]) for row in rows]).reshape(2, 7, 3)
    assert metrics[name]["runs"] == pytest.approx(lengths.mean(axis=(1, 2)))
    np.testing.assert_allclose(sides[0].per_prompt["length"], lengths.mean(axis=(0, 2)))
    assert [row["length"] for row in rows] == lengths.ravel().tolist()
    assert metrics["perplexity"] is None and rows[0]["perplexity"] is None  # not asked for

    printed = capsys.readouterr().out
    assert f"length {lengths.mean():.4g}" in printed and "the longest run has" in printed
    quantities, table = results.quantities(sides), results.rows(sides)
    assert [quantity.key for quantity in quantities] == ["tp_id", "emt_id", "tp_ood", "emt_ood", "length"]
    change = table[1].cells["length"].change
    after = sides[1].per_prompt["length"].mean()
    assert change["percent"] == pytest.approx(100 * (after / lengths.mean() - 1))
    assert change["low"] < change["percent"] < change["high"]
    assert f"tiny,original,length,{metrics[name]['mean']}," in tables.results_csv(table)
    text = tables.to_text(table, quantities)
    assert "Length (characters)" in text and f"{lengths.mean():.1f} ± {lengths.mean(axis=(1, 2)).std():.1f}" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toxicty", "metric: unknown name 'toxicty'; did you mean 'toxicity'"),
        ("json:dmps", "json has no class 'dmps'"),
        ("fractions:Fraction", "found a Fraction, expected a subclass of unidetox_jax.evaluation.metrics.Metric"),
        ("diversity(order=4)", r"metric 'diversity\(order=4\)': .*takes no arguments"),
    ],
)
def test_an_unknown_metric_is_reported_before_any_work(work, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        evaluate.tasks(make_run(work, tmp_path, metrics=(name,)))


@pytest.mark.slow
def test_a_candidate_is_another_form_of_the_target(work, tmp_path):
    """Models under an objective, once with a prefix; with metrics of likelihood, and the cost."""
    candidate = Candidate(("{target}", "{target}", str(work / "models" / "judge")), "proxy_tuning(alpha=0.5)")
    prefixed = dataclasses.replace(candidate, prefixes=("the dog", "", ""))
    changes = {"runs": 1, "candidates": {"steered": candidate, "prefixed": prefixed}}
    changes["metrics"] = (*EvaluationConfig.metrics, "cost")
    whole = evaluate_into(work, tmp_path, **changes)
    plain, _ = read(whole)
    steered, prefixed = (read(whole.parent / f"tiny.{form}")[0] for form in ("steered", "prefixed"))
    assert steered["model"]["name"] == "tiny" and steered["model"]["form"] == "steered"
    assert steered["model"]["source"].startswith("proxy_tuning(alpha=0.5) of ")
    assert prefixed["model"]["source"].endswith(" after 'the dog', '', ''")
    judged = [one["text_perplexity"]["nll"] for one in (plain, steered, prefixed)]
    assert len(set(judged)) == 3 and np.isfinite(judged).all()
    assert steered["cost"]["models"] == 3
    assert steered["cost"]["weights"] == 2 * plain["cost"]["weights"]  # the target's are shared
    rows = results.rows([results.read(whole), results.read(whole.parent / "tiny.steered")])
    assert rows[1].cells["emt_id"].change["low"] is not None and rows[1].cells["latency"].change["low"] is None
    assert rows[1].cells["memory"].change["percent"] == pytest.approx(100)
    run_tasks(evaluate.tasks(make_run(work, tmp_path, **changes)))  # complete
    assert read(whole.parent / "tiny.steered")[0] == steered


@pytest.mark.parametrize(
    ("name", "candidate", "words"),
    [
        ("control", Candidate(), "candidates.control: 'control' cannot be a form's name"),
        ("a/b", Candidate(), "'a/b' cannot be a form's name"),
        ("x", Candidate(objective="contrastve"), "candidates.x.objective: objective: unknown name 'contrastve'"),
        ("x", Candidate(objective="dexperts"), "objective dexperts: found 1 models, expected 3"),
        ("x", Candidate(prefixes=("a", "b")), "candidates.x.prefixes: found 2, expected one for each of 1 models"),
        ("x", Candidate(targets=("nobody",)), "candidates.x.targets: no target 'nobody'"),
        ("x", Candidate(objective="repetition_penalty"), "no likelihood under it; empty config.evaluate.mmlu"),
    ],
)
def test_a_wrong_candidate_is_reported_before_anything_is_loaded(work, tmp_path, name, candidate, words):
    with pytest.raises(UserError, match=re.escape(words)):
        evaluate.tasks(make_run(work, tmp_path, candidates={name: candidate}))


def test_models_of_different_tokenizers_are_reported_before_any_is_loaded(work, tmp_path):
    other = work / "models" / "other"
    shutil.copytree(work / "models" / "judge", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["!"], ids["#"] = ids["#"], ids["!"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    candidate = Candidate(("{target}", str(other)), "contrastive")
    run = make_run(work, tmp_path, candidates={"x": candidate})
    (_, task) = evaluate.tasks(run)
    with pytest.raises(UserError, match="have different tokenizers"):
        run_task(task)
