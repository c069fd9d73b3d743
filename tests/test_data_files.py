"""Malformed source files: one line that names the file, the position, what was found and what was expected."""

import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from unidetox_jax.data import files
from unidetox_jax.data.datasets import dghs, mmlu, realtoxicityprompts, toxigen
from unidetox_jax.errors import UserError


def content(data, name="table.csv"):
    return files.Content(f"somewhere/{name}", data.encode() if isinstance(data, str) else data)


def refused(rows, message):
    with pytest.raises(UserError, match=message) as caught:
        list(rows() if callable(rows) else rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("dghs/filtered_with_split.jsonl", 12_575),
        ("dghs/db_dev.csv", 3_506),
        ("dghs/db_test.csv", 3_571),
        ("dghs/original_columns_500.csv", 500),
        ("toxigen/annotated_test.csv", 940),
        ("toxigen/annotated_train.csv", 8_960),
        ("realtoxicityprompts/prompts_5000.jsonl", 5_000),
        ("distilled/generated_texts_alpha=0.1_beta=inf_checkpoint-15126.csv", 640),
        ("politics/allsides_1300.jsonl", 1_300),
        ("labelled/davidson_tweets.csv", 24_783),
    ],
)
def test_every_row_of_the_real_files_is_read(shared, file, count):
    (source,) = files.read([shared / "data" / file])
    assert sum(1 for _ in files.rows(source, ())) == count


def test_every_line_and_question_of_the_real_files_is_read(shared):
    for part, count in (("dev", 285), ("val", 1_542)):
        questions = [row for one in files.read((shared / "data/mmlu" / part).iterdir()) for row in files.csv_lists(one)]
        assert len(questions) == count and {len(fields) for _, fields in questions} == {6}
    for name in ("valid.txt", "test.txt", "train_5k_lines.txt"):
        (source,) = files.read([shared / "data/text" / name])
        raw = source.data.split(b"\n")
        assert [line.encode() for _, line in files.lines(source)] == [line for line in raw if line.strip()]


def test_csv_without_a_required_column():
    refused(
        files.csv_rows(content("a,Text\n1,x\n"), ["text"]), "table.csv, line 1: no column 'text'; found 'a', 'Text'"
    )
    twice = content("text,label,text\none,1,two\n")
    refused(files.csv_rows(twice, ["text"]), "table.csv, line 1: 2 columns are called 'text'")


def test_empty_csv():
    refused(files.csv_rows(content(""), ["text"]), "table.csv: empty; expected a csv file with a header")
    assert list(files.csv_rows(content("text\n"), ["text"])) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('"two\nlines",1\nonly one\n', "line 4: 1 fields, expected 2 as in the header"),
        ("rude, and dull,1\n", "line 2: 3 fields, expected 2 .*; a field with a comma in it needs quotes"),
        ('fine,1\n"open,1\nnext,0\nlast,1\n', "line 3: a quote is not closed"),
        ('fine,1\n"a "b" c",1\n', "line 3: a quote is not closed, or not doubled"),
        ('"a \\"b\\", c",1\n', "line 2: a quote is not closed, or not doubled"),
    ],
)
def test_malformed_csv_rows_are_refused(rows, message):
    refused(files.csv_rows(content("text,label\n" + rows), ["text"]), f"somewhere/table.csv, {message}")


def test_csv_quotes_newlines_and_blank_lines():
    data = '\ufefftext,n\r\n"a ""b"", c\nd",1\r\n\r\nplain,2\r\n'
    assert list(files.csv_rows(content(data), ["text"])) == [
        ("somewhere/table.csv, line 2", {"text": 'a "b", c\nd', "n": "1"}),
        ("somewhere/table.csv, line 5", {"text": "plain", "n": "2"}),
    ]


def test_field_beyond_the_csv_modules_default_limit():
    ((_, row),) = files.csv_rows(content("text\n" + "x" * 300_000), ["text"])
    assert len(row["text"]) == 300_000


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl", "lines.txt"])
def test_undecodable_bytes_name_the_line(name):
    broken = content(b'text\n{"text": 1}\nfine\ncaf\xe9\n', name)
    refused(files.lines(broken), f"{name}, line 4: byte 0xe9 is not UTF-8")


def test_jsonl_mistakes():
    refused(files.json_rows(content('{"a": 1}\n{"a": \n', "x.jsonl"), ["a"]), "x.jsonl, line 2: not JSON")
    refused(
        files.json_rows(content('{"a": 1}\n\n[1]\n', "x.jsonl"), ["a"]), "line 3: found list, expected a JSON object"
    )
    refused(files.json_rows(content('{"a": 1}\n{"b": 1}\n', "x.jsonl"), ["a"]), "line 2: no column 'a'; found 'b'")
    half = '{"a": "\\ud83d\\ude42"}\n{"a": {"b": ["x \\ud83d"]}}\n'
    refused(files.json_rows(content(half, "x.jsonl"), ["a"]), r"x.jsonl, line 2: '\\ud83d' is half of a surrogate pair")
    refused(
        files.json_rows(content('{"a": ' + "1" * 5000 + "}", "x.jsonl"), ["a"]), "x.jsonl, line 1: JSON that cannot"
    )
    refused(files.json_rows(content("[" * 100_000, "x.jsonl"), ["a"]), "x.jsonl, line 1: JSON that cannot")


def test_parquet_mistakes():
    refused(files.parquet_rows(content(b"not parquet", "x.parquet"), ["a"]), "x.parquet: not parquet")
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(np.array([0, 2], np.int32)), pyarrow.py_buffer(b"a\xe9")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"a": broken}), file := io.BytesIO())
    refused(files.parquet_rows(content(file.getvalue(), "x.parquet"), ["a"]), "x.parquet: not parquet .*UTF8")


def test_unknown_suffix():
    refused(
        lambda: files.rows(content("", "x.xls"), ["a"]),
        "x.xls: found suffix '.xls', expected one of .csv, .jsonl, .json, .parquet",
    )


def test_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "texts.csv").write_text("Text\n")
    refused(lambda: files.find(str(tmp_path / "text.csv"), ""), "no file .*text.csv'; did you mean 'texts.csv'")
    refused(lambda: files.find("nowhere/text.csv", tmp_path), "no file 'nowhere/text.csv' \\(nor .*nowhere/text.csv\\)")
    assert files.find("texts.csv", tmp_path) == tmp_path / "texts.csv"


def test_directory_instead_of_a_file(tmp_path):
    refused(lambda: files.read([tmp_path]), "cannot be read")


def test_numbers():
    assert files.number_of("2.5", "x") == 2.5
    assert files.number_of(None, "x") != files.number_of("", "x")  # both NaN
    with pytest.raises(UserError, match="row 7: found 'many', expected a number"):
        files.number_of("many", "row 7")


def test_text_of_values():
    assert [files.text_of(value) for value in (None, "a", 3, 1.5, True)] == ["", "a", "3", "1.5", "true"]


def builder(cls, data, name, tmp_path):
    return cls((content(data, name),), {}, tmp_path)


def test_mmlu_mistakes(tmp_path):
    row = "What is it?,a,b,c,d,"
    refused(builder(mmlu.Mmlu, row + "E\n", "sums_val.csv", tmp_path).examples(), "line 1: .*the last 'E'")
    refused(builder(mmlu.Mmlu, "What?,a,D\n", "sums_val.csv", tmp_path).examples(), "line 1: .*found 3 fields")
    refused(builder(mmlu.Mmlu, row + "D\n", "sums.csv", tmp_path).examples(), "sums.csv: expected a name like")
    ((split, record),) = builder(mmlu.Mmlu, row + "D\n", "sums_val.csv", tmp_path).examples()
    assert (split, record["answer"], record["subject"]) == ("validation", 3, "sums")


def test_toxigen_score_that_is_not_a_number(tmp_path):
    data = "text,target_group,toxicity_human,toxicity_ai,intent\na line,women,5,1,2\nanother,women,high,1,2\n"
    refused(
        builder(toxigen.Toxigen, data, "annotated_test.csv", tmp_path).examples(),
        "line 3, toxicity_human: found 'high'",
    )


def test_prompts_without_text(tmp_path):
    data = '{"prompt": {"toxicity": 0.1}, "continuation": {"text": "x"}}\n'
    rows = builder(realtoxicityprompts.RealToxicityPrompts, data, "prompts.jsonl", tmp_path).examples()
    refused(rows, "prompts.jsonl, line 1, prompt: no column 'text'; found 'toxicity'")


def test_unknown_dghs_label(tmp_path):
    data = "text,label,target,split\na line,maybe,bla,train\n"
    refused(builder(dghs.Dghs, data, "x.csv", tmp_path).examples(), "x.csv, line 2: found label 'maybe'")
