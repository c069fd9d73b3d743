"""MMLU (Hendrycks et al., ICLR 2021): four-choice questions on 57 subjects.

The original csv files have no header: question, four choices, the answer's letter. The hub has the rows as parquet.
"""

import re

import numpy as np
import tensorflow_datasets as tfds

from unidetox_jax.data import files
from unidetox_jax.data.datasets.base import TEXT, Dataset
from unidetox_jax.errors import UserError

LETTERS = "ABCD"
_FILE = re.compile(r"(?P<subject>\w+)_(?P<split>dev|val|test)\.csv")


class Mmlu(Dataset):
    """Splits dev (5 questions a subject, for few-shot prompts), validation and test. `answer` indexes `choices`."""

    name = "mmlu"
    fields = {"question": TEXT, "choices": tfds.features.Sequence(TEXT), "answer": np.int64, "subject": TEXT}
    patterns = (("dev/*.csv", "val/*.csv", "test/*.csv"), ("*_dev.csv", "*_val.csv", "*_test.csv"))
    hub = "cais/mmlu"
    hub_files = tuple(f"all/{split}-00000-of-00001.parquet" for split in ("dev", "validation", "test"))
    default_split = "validation"
    split_aliases = {"val": "validation"}

    def examples(self):
        for content in self.contents:
            yield from _parquet(content) if content.basename.endswith(".parquet") else _csv(content)


def _csv(content: files.Content):
    match = _FILE.fullmatch(content.basename)
    if match is None:
        raise UserError(f"{content.name}: expected a name like anatomy_val.csv (SUBJECT_dev, _val or _test)")
    subject, split = match["subject"], Mmlu.split_aliases.get(match["split"], match["split"])
    for where, row in files.csv_lists(content):
        if len(row) != 6 or row[5].strip() not in tuple(LETTERS):
            raise UserError(
                f"{where}: expected question, four choices and a letter A to D; "
                f"found {len(row)} fields, the last {row[-1]!r}"
            )
        answer = LETTERS.index(row[5].strip())
        yield split, {"question": row[0], "choices": row[1:5], "answer": answer, "subject": subject}


def _parquet(content: files.Content):
    split = content.basename.split("-", 1)[0]
    for _, row in files.parquet_rows(content, Mmlu.fields):
        yield split, {name: row[name] for name in Mmlu.fields}
