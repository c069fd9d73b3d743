"""The distill stage from the command line: its files, resumption after SIGKILL, errors."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pandas
import pytest
from etils import epath

from unidetox_jax import checkpoint, cli, models, text_statistics
from unidetox_jax.data import toymodels
from unidetox_jax.decoding import text_sampling, warpers
from unidetox_jax.stages import distill, rejection, settings
from unidetox_jax.stages.settings import DistillSettings

CONFIG = """
from unidetox_jax.stages import settings


def get_config():
    config = settings.default_config()
    config.base = {base!r}
    config.mesh = "data:-1"
    config.distill.update(num_texts=11, batch_size=4, max_length=20, top_k=20)
    return config
"""
SENTENCES = [f"the {noun} of the {place} is {kind}." for noun in "baker miller smith".split()
             for place in "hill valley town".split() for kind in "kind tall old".split()]  # fmt: skip
FILES = ("texts.csv", "texts.jsonl", "README.md")


def random_model(directory, tokenizers, name="gpt2", seed=0, **changes):
    """A tiny model with random weights, and its tokenizer."""
    cfg = models.config_from_hf(str(tokenizers / name))
    cfg = dataclasses.replace(cfg, hidden_size=32, head_size=8, intermediate_size=64, dtype="float32")
    params = models.init(cfg, jax.random.key(seed))
    params = jax.tree.map(lambda leaf: leaf * 4, params)  # for a distribution far from uniform
    params = {**params, **{key: change(params[key]) for key, change in changes.items()}}
    checkpoint.save_hf(directory, models.Model(params, cfg), checkpoint.load_tokenizer(tokenizers / name))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models base, toxic and llama (of another vocabulary), and a configuration."""
    place = epath.Path(tmp_path_factory.mktemp("world"))
    toymodels.write(place / "tokenizers", SENTENCES)
    random_model(place / "base", place / "tokenizers")
    random_model(place / "toxic", place / "tokenizers", seed=1)
    random_model(place / "llama", place / "tokenizers", "llama")
    (place / "config.py").write_text(CONFIG.format(base=str(place / "base")))
    return place


@pytest.fixture
def workdir(world, tmp_path):
    (tmp_path / "run").mkdir()
    os.symlink(world / "toxic", tmp_path / "run" / "toxic")
    return epath.Path(tmp_path / "run")


def command(world, workdir, *more):
    return ["distill", f"--config={world / 'config.py'}", f"--workdir={workdir}", *more]


def contents(directory):
    return {name: (directory / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """An uninterrupted run."""
    workdir = epath.Path(tmp_path_factory.mktemp("finished"))
    os.symlink(world / "toxic", workdir / "toxic")
    assert cli.main(command(world, workdir, "--config.distill.scorer=lexicon")) == 0
    return workdir


def rows_of(directory):
    return [json.loads(line) for line in (directory / "texts.jsonl").read_text().splitlines()]


def test_files(world, finished):
    directory = finished / "distilled"
    assert {path.name for path in directory.iterdir()} == {*FILES, "stage.json"}
    rows = rows_of(directory)
    assert [row["row"] for row in rows] == list(range(11))
    frame = pandas.read_csv(directory / "texts.csv", keep_default_na=False)
    assert list(frame.columns) == ["Text"] and frame["Text"].tolist() == [row["text"] for row in rows]
    tokenizer = checkpoint.load_tokenizer(world / "base")
    for row in rows:
        assert row["tokens"][0] == tokenizer.bos_token_id and len(row["tokens"]) <= 20
        assert row["ended"] == (row["tokens"][-1] == tokenizer.eos_token_id) or len(row["tokens"]) == 1
        assert row["text"] == tokenizer.decode(row["tokens"], skip_special_tokens=True)
        assert row["seed"] == 1234
    record = json.loads((directory / "stage.json").read_text())
    assert record["figures"]["texts"] == 11 and record["figures"]["ended"] == sum(row["ended"] for row in rows)
    assert record["figures"]["toxicity"]["scorer"] == "lexicon" and record["figures"]["same_weights"] == []
    card = (directory / "README.md").read_text()
    for needed in ("Content warning", "contrastive(alpha=0.1)", '"seed": 1234', '"jax"', "mesh data:8", '"duplicates"'):
        assert needed in card
    assert record["inputs"]["models.toxic"] in card and str(finished) not in card


def test_log_probabilities_are_those_of_the_forward_pass(world, finished):
    """Mean over new tokens, the end token included."""
    for row in rows_of(finished / "distilled")[:4]:
        for name in ("base", "toxic"):
            params, cfg = checkpoint.load(world / name)
            logits = models.forward(params, np.asarray([row["tokens"]]), cfg)
            log_probs = jax.nn.log_softmax(logits[0, :-1], -1)
            expected = np.mean([log_probs[i, token] for i, token in enumerate(row["tokens"][1:])])
            np.testing.assert_allclose(row["log_probabilities"][name], expected, atol=1e-4)


def test_a_text_depends_only_on_its_row(world, finished, workdir):
    assert cli.main(command(world, workdir, "--config.distill.num_texts=5", "--config.distill.batch_size=5")) == 0
    expected = [row["tokens"] for row in rows_of(finished / "distilled")[:5]]
    assert [row["tokens"] for row in rows_of(workdir / "distilled")] == expected


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_bytes(world, finished, workdir):
    more = ["--config.distill.scorer=lexicon"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "unidetox_jax.cli", *command(world, workdir, *more)], env={**os.environ, **DEVICES}
    )
    parts = workdir / "distilled" / "parts"
    while not (parts / "000000.json").exists() and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (workdir / "distilled" / "texts.csv").exists(), "it was finished before it was killed"
    first = (parts / "000000.json").stat().mtime
    (parts / ".000001.json.tmp").write_text('{"rows": [{"ro')  # killed while writing
    (parts / "000001.json").unlink(missing_ok=True)
    calls = []
    real = text_sampling.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_sampling, "generate", lambda *a, **k: calls.append(k["row_ids"][0]) or real(*a, **k))
        assert (parts / "000000.json").stat().mtime == first
        assert cli.main(command(world, workdir, *more)) == 0
    assert calls[0] == 4 and 0 not in calls
    assert contents(workdir / "distilled") == contents(finished / "distilled")
    assert not parts.exists()


DEVICES = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}


def test_killed_while_cleaning_up(world, finished, workdir):
    """All files written, the batches removed, the record not: made again, and the same."""
    target = workdir / "distilled"
    assert cli.main(command(world, workdir, "--config.distill.scorer=lexicon")) == 0
    before = contents(target)
    record = json.loads((target / "stage.json").read_text())
    (target / "stage.partial.json").write_text(
        json.dumps({key: record[key] for key in ("stage", "settings", "inputs")})
    )
    (target / "stage.json").unlink()
    assert cli.main(command(world, workdir, "--config.distill.scorer=lexicon")) == 0
    assert contents(target) == before == contents(finished / "distilled")


def test_the_control_samples_the_base_model_alone(world, workdir, capsys):
    base = str(world / "base")
    more = [f"--config.targets=('{base}',)", f"--config.control_targets=('{base}',)", "--config.distill.num_texts=4"]
    assert cli.main(command(world, workdir, *more)) == 0
    rows = rows_of(workdir / "samples")
    assert len(rows) == len(rows_of(workdir / "distilled")) == 4
    assert all(list(row["log_probabilities"]) == ["base"] for row in rows)
    record = json.loads((workdir / "samples" / "stage.json").read_text())
    assert (record["settings"]["objective"], record["settings"]["top_k"]) == ("base", 20)
    assert cli.main(command(world, workdir, *more)) == 0  # complete


def test_prompt_early_exit_and_a_users_objective(world, workdir, monkeypatch):
    place = epath.Path(workdir) / "here"
    (place / "my_pkg").mkdir(parents=True)
    (place / "my_pkg" / "__init__.py").write_text("")
    (place / "my_pkg" / "my_mod.py").write_text(
        "import jax.numpy as jnp\n\n\ndef my_objective(final, early, tau=1.0):\n"
        "    return jnp.where(final >= final.max(-1, keepdims=True) - 3, (final - early) / tau, -jnp.inf)\n"
    )
    monkeypatch.chdir(place)
    changes = (
        "objective=my_pkg.my_mod:my_objective(tau=0.5)",
        "models=('base','base@1+norm')",
        "prompt=the baker",
        "num_texts=4",
    )
    assert cli.main(command(world, workdir, *(f"--config.distill.{change}" for change in changes))) == 0
    rows = rows_of(workdir / "distilled")
    assert all(row["text"].startswith("the baker") for row in rows)
    assert all(len(row["tokens"]) <= 20 and list(row["log_probabilities"]) == ["base", "base@1+norm"] for row in rows)
    assert "my_objective(tau=0.5)" in (workdir / "distilled" / "README.md").read_text()


def test_degenerate_text_gives_a_warning(world, workdir, caplog):
    """Greedy decoding repeats one text, and a model has no contrast to itself."""
    more = ["--config.distill.temperature=0.0", "--config.distill.models=('base','base')"]
    assert cli.main(command(world, workdir, "--config.distill.num_texts=4", *more)) == 0
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("base and base have the same weights" in line for line in warned), warned
    assert any("of 4 texts" in line and "3 duplicates" in line for line in warned), warned
    figures = json.loads((workdir / "distilled" / "stage.json").read_text())["figures"]
    assert figures["same_weights"] == ["base", "base"] and figures["duplicates"] == 3


MISTAKES = {
    "alpha": (["objective=contrastive(alpha=1.5)"], "config.distill.objective contrastive: alpha: found 1.5"),
    "no alpha": (["objective=contrastive(alpha=0.0)"], "expected a number in (0, 1]"),
    "temperature": (["temperature=-1.0"], "config.distill.temperature: found -1.0"),
    "top_k": (["top_k=-2"], "config.distill.top_k: found -2"),
    "prompt": (["prompt=" + "the baker is tall " * 20], "the prompt alone has"),
    "context": (["max_length=129"], "config.distill.max_length: 129 tokens, but the context of 'base' is 128"),
    "objective": (["objective=contrastiv"], "did you mean 'contrastive'? (known: anti_expert"),
    "count": (["models=('base',)"], "found 1 models, expected 2 (base, toxic)"),
    "comma": (["models=('base,toxic',)"], "config.distill.models: a comma inside an element"),
    "text": (["models=base,toxic"], "config.distill.models"),
    "layer": (["models=('base','base@9')"], "layer 9: expected 1 to 2"),
    "number": (["num_texts=0"], "config.distill.num_texts: found 0, expected at least 1"),
    "cache": (["cache=theirs"], "cache: found 'theirs'"),
    "no such model": (["models=('base','{workdir}/nowhere')"], "nowhere: no such directory"),
    "vocabulary": (["models=('base','WORLD/llama')"], "have different tokenizers"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(world, workdir, capsys, name):
    changes, expected = MISTAKES[name]
    changes = [f"--config.distill.{change.replace('WORLD', str(world))}" for change in changes]
    refused(command(world, workdir, *changes), expected, capsys)
    assert not (workdir / "distilled").exists()


def refused(arguments, expected, capsys):
    capsys.readouterr()
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unidetox:")]
    assert len(lines) == 1 and expected in lines[0], lines


def test_no_toxic_model(world, tmp_path, capsys):
    refused(command(world, tmp_path / "new"), "toxic: no toxic model;", capsys)
    assert not (tmp_path / "new").exists()


def test_nan_weights(world, workdir, tmp_path, capsys):
    def broken(final):
        return jax.tree.map(lambda leaf: leaf.at[0].set(np.nan), final)

    random_model(tmp_path / "broken", world / "tokenizers", seed=1, final=broken)
    change = f"--config.distill.models=('base','{tmp_path / 'broken'}')"
    refused(command(world, workdir, change), "model 1 gives logits that are not finite", capsys)
    assert not (workdir / "distilled").exists()
    assert cli.main(command(world, workdir, "--config.distill.num_texts=4")) == 0  # not refused


def test_other_settings_are_refused_by_name(world, finished, capsys):
    before = contents(finished / "distilled")
    refused(command(world, finished, "--config.distill.seed=1"), "settings.seed: was 1234, now 1", capsys)
    assert contents(finished / "distilled") == before


def test_csv_preserves_every_text():
    texts = ["plain", 'a "quote", a comma', "two\nlines", "", " spaces ", "carriage\rreturn", "äöü 言葉", "NA"]
    text = distill.to_csv(texts)
    assert [row[0] for row in csv.reader(text.splitlines(keepends=True))] == ["Text", *texts]


def test_defaults_are_the_papers():
    settings = DistillSettings()
    assert (settings.objective, settings.num_texts, settings.max_length) == ("contrastive(alpha=0.1)", 640, 256)
    assert (settings.top_k, settings.batch_size, settings.seed) == (50, 128, 1234)
    assert [warper.k for warper in warpers.choose(top_k=settings.top_k) if hasattr(warper, "k")] == [50]


def one_in_three(texts):
    """A scorer: toxic are texts whose length is divisible by three."""
    return [float(len(text) % 3 == 0) for text in texts]


@pytest.fixture
def rejecting(world, monkeypatch):
    """Arguments that reject some texts."""
    monkeypatch.chdir(os.path.dirname(__file__))
    (world / "toxic.txt").write_text("nothing of this\n")
    return [
        "--config.distill.reject.scorers=('thirds=test_distill:one_in_three',)",
        "--config.distill.reject.degenerate=True",
        "--config.distill.reject.copied_words=6",
        f"--config.toxify.data=text:{world / 'toxic.txt'}",
    ]


def test_rejected_texts_are_replaced(world, finished, workdir, rejecting, capsys):
    assert cli.main(command(world, workdir, *rejecting)) == 0
    figures = json.loads((workdir / "distilled" / "stage.json").read_text())["figures"]
    rows, plain = rows_of(workdir / "distilled"), rows_of(finished / "distilled")
    kept = [row for row in plain if len(row["text"]) % 3 and not text_statistics.degenerate(row["text"])]
    assert 0 < len(kept) < len(plain) == len(rows)
    assert rows[: len(kept)] == kept and not any(one_in_three(row["text"] for row in rows))
    assert [row["row"] for row in rows] == sorted({row["row"] for row in rows})
    assert figures["rejected"]["toxic by thirds"] > 0
    assert figures["made"] % 4 == 0 and figures["made"] - sum(figures["rejected"].values()) - len(rows) in range(4)
    assert f"of {figures['made']} texts " in capsys.readouterr().out
    assert '"made"' in (workdir / "distilled" / "README.md").read_text()


def test_rejection_goes_on_after_a_kill_to_the_same_bytes(world, workdir, rejecting, tmp_path):
    """Interrupted after each new batch; stored batches are judged again."""
    assert cli.main(command(world, workdir, *rejecting)) == 0
    other = tmp_path / "other"
    other.mkdir()
    os.symlink(world / "toxic", other / "toxic")
    real, made = distill.cached, []

    def make_and_die(path, *arguments):
        new = not path.exists()
        value = real(path, *arguments)
        if new:
            made.append(path.name)
            raise KeyboardInterrupt
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "cached", make_and_die)
        while code := cli.main(command(world, other, *rejecting)):
            assert code == 130 and not (other / "distilled" / "texts.csv").exists()
    figures = [json.loads((place / "distilled/stage.json").read_text())["figures"] for place in (workdir, other)]
    assert figures[0] == figures[1] and len(made) == len(set(made)) == figures[0]["made"] // 4
    assert contents(epath.Path(other) / "distilled") == contents(workdir / "distilled")


def test_rejecting_too_many_is_an_error(world, workdir, rejecting, capsys):
    assert cli.main(command(world, workdir, *rejecting, "--config.distill.reject.most=1.0")) == 2
    assert re.search(r"config.distill.reject: left \d+ of 11 texts, expected 11; reject", capsys.readouterr().err)


def test_reasons_of_rejection():
    judges = {"a": lambda texts: np.array([0.9 if "bad" in text else 0.1 for text in texts])}
    rejected = rejection.Rejection(
        settings.RejectSettings(degenerate=True, copied_words=4), judges, ["they said that the oaf is dull"]
    )
    texts = [
        "a bad day",
        "- - -",
        "He: THEY SAID THAT the",
        "they said that, the",
        "a  Bad day",
        "A good day",
        "a good day",
    ]
    expected = ["toxic by a", "no words", "copied", "", "copied", "", "copied"]
    assert [*rejected(texts[:3]), *rejected(texts[3:])] == expected
    assert rejected.made == 7 and rejected.counts == {"toxic by a": 1, "no words": 1, "copied": 3}


def test_tokens_that_one_tokenizer_adds_are_reported_once(world, workdir, caplog):
    larger = workdir / "larger"
    shutil.copytree(world / "toxic", larger)
    tokenizer = checkpoint.load_tokenizer(larger)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(larger)
    change = f"--config.distill.models=('base','{larger}')"
    assert cli.main(command(world, workdir, change, "--config.distill.num_texts=4")) == 0
    assert caplog.text.count("ignoring its last 1 tokens") == 1


def test_without_rejection_the_record_does_not_mention_it(finished):
    record = json.loads((finished / "distilled" / "stage.json").read_text())
    assert "reject" not in record["settings"] and "made" not in record["figures"]
