"""Data sets on real files: their rows and splits, and how prepared ones are identified."""

import collections
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from unidetox_jax import data
from unidetox_jax.data import datasets, files
from unidetox_jax.data.datasets import dghs, mmlu, toxigen
from unidetox_jax.errors import UserError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def load(shared, cache):
    return lambda spec, split=None: data.load(spec, split, data_dir=shared / "data", cache_dir=cache)


DGHS_HEADER = "acl.id,text,label,type,target,split\n"
DGHS_ROWS = (
    "1,the Ulmi are dull,hate,derogation,bla,train\n"
    "2,the Ulmi are kind,nothate,none,bla,train\n"
    '3,two at once,hate,derogation,"bla, jew",train\n'
    "4,the tall are odd,hate,animosity,dis,train\n"
    '5,"the Orri, again",hate,animosity,mus.wom,dev\n'
    "6,who knows where,hate,animosity,for,\n"
)


def write_dghs(directory, rows=DGHS_ROWS, name="Dynamically Generated Hate Dataset v0.2.3.csv"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(DGHS_HEADER + rows)
    return directory / name


# ---------------------------------------------------------------- DGHS


@pytest.mark.parametrize(("file", "split", "rows"), [("db_dev.csv", "dev", 998), ("db_test.csv", "test", 1046)])
def test_dghs_filter_on_real_files(load, file, split, rows):
    records = load(f"dghs?file=dghs/{file}", split)
    assert len(records) == rows
    assert {record["target"] for record in records} <= dghs.TARGETS
    with pytest.raises(UserError, match=f"no split 'train'; found {split} \\({rows} rows\\)"):
        load(f"dghs?file=dghs/{file}")


def test_dghs_as_published_and_filtered(load):
    assert len(load("dghs?file=dghs/original_columns_500.csv", "test")) == 414
    counts = {split: len(load("dghs", split)) for split in ("train", "dev", "test", "unknown", "train+unknown")}
    assert counts == {"train": 7746, "dev": 998, "test": 1099, "unknown": 2732, "train+unknown": 10478}
    assert load("dghs?split=train+unknown").column("text") == load("dghs", "train+unknown").column("text")


def test_dghs_filter_split_and_doubling(tmp_path, cache):
    write_dghs(tmp_path / "dghs")
    load = lambda spec, split: data.load(spec, split, tmp_path, cache)  # noqa: E731
    assert load("dghs", "train").column("text") == ["the Ulmi are dull"]
    assert load("dghs", "validation").column("text") == ["the Orri, again"]
    assert load("dghs", "unknown").column("text") == ["who knows where"]
    assert load("dghs:official", "train").column("text") == ["the Ulmi are dull"] * 2
    assert load("dghs:harmless", "train").column("text") == ["the Ulmi are kind"]
    assert len(load("dghs:official", "dev")) == 1
    assert len(dghs.TARGETS) == 34


def test_dghs_prefers_the_published_file(tmp_path, cache):
    write_dghs(tmp_path / "dghs")
    write_dghs(
        tmp_path / "dghs", "1,older,hate,derogation,bla,train\n", "Dynamically Generated Hate Dataset v0.2.2.csv"
    )
    (tmp_path / "dghs" / "filtered_with_split.jsonl").write_text('{"text": "another", "split": "train"}\n')
    assert list(data.texts("dghs", "train", tmp_path, cache)) == ["the Ulmi are dull"]


def test_filtered_jsonl_rows_contradicting_the_filter_are_dropped(tmp_path, cache):
    rows = [
        {"text": "one", "split": "train"},
        {"text": "two", "split": "train", "target": "dis"},
        {"text": "three", "split": "elsewhere", "target": "bla"},
        {"text": "four", "split": "train", "label": "nothate"},
    ]
    file = tmp_path / "filtered.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert list(data.texts(f"dghs?file={file}", "train+unknown", cache_dir=cache)) == ["one", "three"]


# ---------------------------------------------------------------- ToxiGen


def test_toxigen_test_rows_have_at_most_one_category(load):
    records = load("toxigen")
    assert records.split == "test"
    assert collections.Counter(records.column("category")) == {
        "gender_lgbtq": 131,
        "race_nationalities": 476,
        "religion": 170,
        "disability": 163,
    }
    groups = [group for groups in toxigen.CATEGORIES.values() for group in groups]
    assert len(groups) == len(set(groups))
    assert set(records.column("target_group")) <= set(groups)
    assert all(1 <= score <= 5 for score in records.column("toxicity_human"))


def test_toxigen_train_text_is_cleaned_and_validation_is_a_tenth(load):
    train, validation = load("toxigen", "train"), load("toxigen", "validation")
    assert (len(train), len(validation)) == (8960, 896)
    assert not any(text.startswith(("b'", 'b"')) for text in train.column("text"))
    assert "" not in train.column("category")
    order = np.random.default_rng(42).permutation(8960)[:896]
    assert validation.column("text") == [train[index]["text"] for index in order]
    assert set(train.column("label")) == {"hate", "neutral"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("b'plain'", "plain"),
        ('b"it\'s"', "it's"),
        (r"b'caf\xc3\xa9\n'", "café\n"),
        ("b", "b"),
        ("b'open", "b'open"),
        ("bold 'word'", "bold 'word'"),
        ("b'one' and b'two'", "b'one' and b'two'"),
        (" spaces stay ", " spaces stay "),
    ],
)
def test_bytes_literals(written, meant):
    assert toxigen.clean(written) == meant


def test_invalid_utf8_in_a_bytes_literal():
    with pytest.raises(UserError, match=r"x.csv, line 7: byte 0xff of b'caf.xff'… is not UTF-8"):
        toxigen.clean(r"b'caf\xff'", "x.csv, line 7")


def test_unknown_group_has_no_category():
    assert toxigen.category("the Ulmi") == ""
    assert toxigen.category("Women") == "gender_lgbtq"


# ---------------------------------------------------------------- other data sets


def answers_of(shared, subject):
    """The last field of each line, read without the code under test."""
    lines = (shared / "data" / "mmlu" / "dev" / f"{subject}_dev.csv").read_text().splitlines()
    return [line[-1] for line in lines]


def test_mmlu(load, shared):
    validation, shots = load("mmlu"), load("mmlu", "dev")
    assert (len(validation), len(shots)) == (1542, 285)
    assert len(set(validation.column("subject"))) == len(set(shots.column("subject"))) == 57
    assert all(len(row["choices"]) == 4 and 0 <= row["answer"] < 4 for row in validation)
    anatomy = [row for row in shots if row["subject"] == "anatomy"]
    assert len(anatomy) == 5
    assert [row["answer"] for row in anatomy] == [
        mmlu.LETTERS.index(letter) for letter in answers_of(shared, "anatomy")
    ]
    with pytest.raises(UserError, match="no split 'test'; found dev \\(285 rows\\), validation"):
        load("mmlu", "test")
    with pytest.raises(UserError, match="no field 'text'; found question"):
        load("mmlu").column("text")


def test_mmlu_from_parquet_as_the_hub_has_it(tmp_path, cache):
    import pyarrow
    import pyarrow.parquet

    rows = {"question": ["one and one?"], "subject": ["sums"], "choices": [["1", "2", "3", "4"]], "answer": [1]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "validation-00000-of-00001.parquet")
    record = data.load(f"mmlu?file={tmp_path / 'validation-00000-of-00001.parquet'}", cache_dir=cache)[0]
    assert record == {"question": "one and one?", "choices": ("1", "2", "3", "4"), "answer": 1, "subject": "sums"}


def test_real_toxicity_prompts(load):
    records = load("realtoxicityprompts")
    assert len(records) == 5000
    assert records[0]["toxicity"] == pytest.approx(0.051236086, abs=1e-7)
    assert records[0]["continuation_toxicity"] == pytest.approx(0.98082525, abs=1e-7)
    missing = sum(math.isnan(score) for score in records.column("profanity"))
    assert 0 < missing < 100, "a missing Perspective score is NaN"


def test_politics_text_distilled_and_csv(load):
    assert set(load("politics").column("label")) == {"left", "center", "right"}
    wikitext = load("text:text/valid.txt")
    assert len(wikitext) == 2461 and all(text.strip() for text in wikitext.column("text"))
    distilled = load("distilled:distilled/generated_texts_alpha=0.1_beta=inf_checkpoint-15126.csv")
    assert len(distilled) == 640 and distilled.column("ended") == [False] * 640
    tweets = load("csv:labelled/davidson_tweets.csv?text=tweet&label=class")
    assert len(tweets) == 24783 and set(tweets.column("label")) == {"0", "1", "2"}
    assert data.Texts(tweets.rows).ended is None
    assert len(load("csv:labelled/davidson_tweets.csv?text=tweet&label=class&split=train[:10%]")) == 2478


def test_distilled_jsonl_has_ended_and_tokens(tmp_path, cache):
    file = tmp_path / "texts.jsonl"
    rows = [{"text": "whole.", "ended": True, "tokens": [1, 7, 2]}, {"text": "cut", "ended": False}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = data.texts(f"distilled:{file}", cache_dir=cache)
    assert (list(texts), texts.ended) == (["whole.", "cut"], [True, False])
    assert [row["tokens"] for row in texts.rows] == [(1, 7, 2), ()]
    file.write_text('{"text": "whole.", "tokens": [1, "7"]}\n')
    with pytest.raises(UserError, match="texts.jsonl, line 1, tokens: found .*, expected a list of token ids"):
        data.texts(f"distilled:{file}", cache_dir=cache)


def test_a_data_set_from_outside(tmp_path, cache, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "from unidetox_jax.data import files\nfrom unidetox_jax.data.datasets.base import TEXT, Dataset\n\n\n"
        "class Letters(Dataset):\n"
        "    name, fields, patterns, default_split = 'letters', {'text': TEXT}, (('*.txt',),), 'odd'\n\n"
        "    def examples(self):\n"
        "        for content in self.contents:\n"
        "            for number, (_, line) in enumerate(files.lines(content), 1):\n"
        "                yield 'odd' if number % 2 else 'even', {'text': line}\n"
    )
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "abc.txt").write_text("a\nb\nc\n")
    monkeypatch.chdir(tmp_path)
    spec = "my_data:Letters"
    assert data.is_spec(spec) and not data.is_spec("valid.txt") and not data.is_spec("gs://bucket/valid.txt")
    assert list(data.texts(spec, data_dir=tmp_path, cache_dir=cache)) == ["a", "c"]
    assert list(data.texts(f"{spec}?split=even", data_dir=tmp_path, cache_dir=cache)) == ["b"]
    assert data.fingerprint(spec, tmp_path) != data.fingerprint(f"{spec}?split=even", tmp_path)
    monkeypatch.setitem(datasets.DATASETS, "letters", spec)  # what a line in the registry does
    assert list(data.texts("letters", data_dir=tmp_path, cache_dir=cache)) == ["a", "c"]
    with pytest.raises(UserError, match="data set 'my_data:Leters': my_data has no class 'Leters'; did you mean"):
        data.load("my_data:Leters", data_dir=tmp_path, cache_dir=cache)


def test_newlines_quotes_and_unicode_separators_are_preserved(tmp_path, cache):
    texts = ['a "quoted", word', "two\nlines", "one\u2028line", "naïve \U0001f642", ""]
    table = tmp_path / "texts.jsonl"
    table.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n")
    assert list(data.texts(f"jsonl:{table}", cache_dir=cache)) == texts
    lines = tmp_path / "lines.txt"
    lines.write_bytes(b"\xef\xbb\xbffirst\r\n\r\n  \none\xe2\x80\xa8line\n last")
    assert list(data.texts(f"text:{lines}", cache_dir=cache)) == ["first", "one\u2028line", " last"]


# ---------------------------------------------------------------- prepared data


def test_edited_file_is_a_new_data_set(tmp_path, cache):
    file = tmp_path / "lines.txt"
    file.write_text("before\n")
    first = data.load(f"text:{file}", cache_dir=cache)
    file.write_text("beyond\n")
    second = data.load(f"text:{file}", cache_dir=cache)
    assert (first[0]["text"], second[0]["text"]) == ("before", "beyond")
    assert first.fingerprint != second.fingerprint
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(file, moved / "lines.txt")
    assert data.load(f"text:{moved / 'lines.txt'}", cache_dir=cache).fingerprint == second.fingerprint


def test_fingerprint_follows_source_and_spec(tmp_path):
    file = write_dghs(tmp_path / "dghs")
    first = data.fingerprint("dghs", tmp_path)
    assert data.fingerprint("dghs:official", tmp_path) != first
    file.write_text(file.read_text().replace("dull", "grey"))
    assert data.fingerprint("dghs", tmp_path) != first


def test_prepared_data_set_is_reused(tmp_path, cache, monkeypatch):
    write_dghs(tmp_path / "dghs")
    first = data.load("dghs", "train", tmp_path, cache)
    monkeypatch.setattr(dghs.Dghs, "examples", lambda self: pytest.fail("parsed again"))
    assert data.load("dghs", "train", tmp_path, cache).rows == first.rows


def test_two_processes_prepare_at_once(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("".join(f"line {number}\n" for number in range(500)))
    code = (
        "import sys; from unidetox_jax import data; "
        "texts = data.texts('text:' + sys.argv[1], cache_dir=sys.argv[2]); "
        "assert texts[499] == 'line 499', texts[-1]; assert 'tensorflow' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        error = process.communicate()[1]
        assert process.returncode == 0, error
    assert not list((tmp_path / "cache").glob("text/*/*incomplete*"))


def test_another_process_finishes_preparing_first(tmp_path, cache, monkeypatch):
    file = write_dghs(tmp_path)
    contents = (files.Content(str(file), file.read_bytes()),)
    first, second = dghs.Dghs(contents, {}, cache / "race"), dghs.Dghs(contents, {}, cache / "race")

    def lose():
        first.prepare()
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(second, "download_and_prepare", lose)
    second.prepare()
    assert [row["text"] for row in second.read("train")] == ["the Ulmi are dull"]


def test_default_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(data.default_cache_dir()) == str(tmp_path / "unidetox_jax" / "tfds")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(data.default_cache_dir()) == str(tmp_path / ".cache" / "unidetox_jax" / "tfds")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dhgs", "no data set 'dhgs'; did you mean 'dghs'"),
        ("dhgs:official", "no module 'dhgs'.*did you mean 'dghs'"),
        ("dghs:oficial", "no variant 'oficial' of dghs; did you mean 'official'"),
        ("toxigen:official", "no variant 'official' of toxigen \\(it has none\\)"),
        ("text", "expected text:FILE"),
        ("dghs?splt=train", "no option 'splt'; did you mean 'split'"),
        ("text:a.txt?text=b", "no option 'text'"),
        ("csv:a.csv?text", "found option 'text', expected key=value"),
        ("politics", "'politics' is not on the hub: set data_dir"),
    ],
)
def test_mistakes_in_a_spec(spec, message):
    with pytest.raises(UserError, match=message):
        data.load(spec)


@pytest.mark.parametrize("split", ["train[", "train[1:2:3]", "train-dev", "train[:10%", ""])
def test_mistakes_in_a_split(tmp_path, cache, split):
    write_dghs(tmp_path / "dghs")
    if split:
        with pytest.raises(UserError, match="split"):
            data.load("dghs", split, tmp_path, cache)
    else:
        assert data.load("dghs", split, tmp_path, cache).split == "train"


def test_an_empty_slice_is_refused(tmp_path, cache):
    write_dghs(tmp_path / "dghs")
    with pytest.raises(UserError, match="'train\\[:0\\]' is empty"):
        data.load("dghs", "train[:0]", tmp_path, cache)


def test_data_dir_without_the_data_set(tmp_path, cache):
    with pytest.raises(UserError, match="no directory .*/toxigen for the data set 'toxigen'"):
        data.load("toxigen", data_dir=tmp_path, cache_dir=cache)
    (tmp_path / "toxigen").mkdir()
    with pytest.raises(UserError, match="toxigen: holds none of annotated_train.csv"):
        data.load("toxigen", data_dir=tmp_path, cache_dir=cache)


def test_filter_that_leaves_no_rows(tmp_path, cache):
    write_dghs(tmp_path / "dghs", "1,kind words,nothate,none,bla,train\n")
    with pytest.raises(UserError, match="v0.2.3.csv: no row belongs to the data set 'dghs'"):
        data.load("dghs", "train", tmp_path, cache)


def test_unreachable_hub_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for spec in ("dghs", "toxigen", "mmlu", "realtoxicityprompts", "csv:hf://owner/name/file.csv"):
        with pytest.raises(UserError, match="of the hub's data set .*: download failed") as caught:
            data.load(spec, cache_dir=tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is written hf://OWNER/NAME/FILE"):
        data.load("csv:hf://owner/file.csv", cache_dir=tmp_path)


def test_published_files_are_fetched_from_the_hub(monkeypatch, tmp_path, cache):
    asked = []

    def fetch(repository, filename, repo_type):
        asked.append((repository, filename, repo_type))
        return str(write_dghs(tmp_path, name=filename))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert list(data.texts("dghs", cache_dir=cache)) == ["the Ulmi are dull"]
    assert asked == [(dghs.Dghs.hub, "Dynamically Generated Hate Dataset v0.2.3.csv", "dataset")]
    named = map(datasets.get, datasets.DATASETS)
    assert all(bool(dataset.hub_files) == bool(dataset.hub) for dataset in named)


def test_unwritable_cache(tmp_path):
    (tmp_path / "lines.txt").write_text("a line\n")
    (tmp_path / "blocked").write_text("a file where a directory is wanted")
    with pytest.raises(UserError, match="set cache_dir or XDG_CACHE_HOME"):
        data.load(f"text:{tmp_path / 'lines.txt'}", cache_dir=tmp_path / "blocked")


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "lines.txt").write_text("".join(f"{number} {'word ' * 200}\n" for number in range(2000)))
    code = (
        "import resource, signal, sys; from unidetox_jax import data; from unidetox_jax.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: data.texts('text:' + sys.argv[1], cache_dir=sys.argv[2])\n"
        "except UserError as error: print('UserError:', error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lines.txt"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "UserError:" in done.stdout and "cannot be written" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert data.texts(f"text:{tmp_path / 'lines.txt'}", cache_dir=tmp_path / "cache")[1999].startswith("1999 ")


def test_no_tensorflow_and_nothing_on_stdout(tmp_path):
    (tmp_path / "lines.txt").write_text("a line\n")
    code = (
        "import sys; from unidetox_jax import data; data.texts('text:' + sys.argv[1], cache_dir=sys.argv[2]); "
        "assert 'tensorflow' not in sys.modules; assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lines.txt"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# ---------------------------------------------------------------- prompts with categories


def test_bold_has_one_file_per_domain(tmp_path, cache):
    gender = {"Painters": {"Ada_Hill": ["Ada Hill is a painter who ", "In 1950, Hill "]}, "Sculptors": {"Bo": ["Bo "]}}
    faith = {"sunism": {"Sunism": ["Sunism \\u2013 a faith that "]}}
    for name, content in (("gender_prompt.json", gender), ("religious_ideology_prompt.json", faith)):
        (tmp_path / "bold" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bold" / name).write_text(json.dumps(content))
    records = data.load("bold", data_dir=tmp_path, cache_dir=cache)
    assert [row["text"] for row in records][:3] == ["Ada Hill is a painter who", "In 1950, Hill", "Bo"]
    assert records.column("category") == ["Painters", "Painters", "Sculptors", "sunism"]
    assert set(records.column("domain")) == {"gender", "religious_ideology"}
    one = data.load(f"bold?file={tmp_path}/bold/gender_prompt.json", cache_dir=cache)
    assert one.column("entity") == ["Ada_Hill", "Ada_Hill", "Bo"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": {"b": ["c "]}', "line 1: not JSON"),
        ('["c"]', "found list, expected {category: {entity"),
        ('{"a": ["c"]}', "race_prompt.json, a: found list"),
        ('{"a": {"b": "c"}}', "race_prompt.json, a, b: found 'c', expected a list of prompts"),
    ],
)
def test_malformed_bold_is_refused(tmp_path, cache, content, words):
    (tmp_path / "race_prompt.json").write_text(content)
    with pytest.raises(UserError, match=words):
        data.load(f"bold?file={tmp_path}/race_prompt.json", cache_dir=cache)


def test_attaq(tmp_path, cache):
    rows = 'label,input,additional_info\ndeception,"How, then, do I lie?",{}\npii,Where does Bo live?,{}\n'
    (tmp_path / "AttaQ-v1.csv").write_text(rows)
    records = data.load(f"attaq?file={tmp_path}/AttaQ-v1.csv", cache_dir=cache)
    assert records.column("text") == ["How, then, do I lie?", "Where does Bo live?"]
    assert records.column("category") == ["deception", "pii"]
