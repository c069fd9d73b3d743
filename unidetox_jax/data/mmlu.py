"""MMLU (Hendrycks et al., ICLR 2021): 57 subjects of four-choice questions, in the original csv layout.

The files have no header: question, four choices, the answer's letter. The hub serves the same rows as parquet.
"""

import re

from unidetox_jax.data import builders, files
from unidetox_jax.errors import UserError

LETTERS = "ABCD"
SUBJECTS = 57
HUB = "cais/mmlu"
HUB_FILES = tuple(f"all/{split}-00000-of-00001.parquet" for split in ("dev", "validation", "test"))
PREFERENCES = (("dev/*.csv", "val/*.csv", "test/*.csv"), ("*_dev.csv", "*_val.csv", "*_test.csv"))
_FILE = re.compile(r"(?P<subject>\w+)_(?P<split>dev|val|test)\.csv")


class Mmlu(builders.RecordBuilder, skip_registration=True):
    """Splits dev (5 a subject, for the shots), validation and test. `answer` is the index of the right choice."""

    name = "mmlu"
    fields = {
        "question": builders.TEXT,
        "choices": builders.TEXTS,
        "answer": builders.INT,
        "subject": builders.TEXT,
    }
    default_split = "validation"
    split_aliases = {"val": "validation"}

    def examples(self):
        for content in self.contents:
            yield from _parquet(content) if content.stem.endswith(".parquet") else _csv(content)


def _csv(content: files.Content):
    match = _FILE.fullmatch(content.stem)
    if match is None:
        raise UserError(f"{content.name}: expected a name like anatomy_val.csv (SUBJECT_dev, _val or _test)")
    split = {"val": "validation"}.get(match["split"], match["split"])
    for where, row in files.csv_lists(content):
        if len(row) != 6 or row[5].strip() not in tuple(LETTERS):
            raise UserError(
                f"{where}: expected question, four choices and a letter A to D; "
                f"found {len(row)} fields, the last {row[-1]!r}"
            )
        yield (
            split,
            {
                "question": row[0],
                "choices": row[1:5],
                "answer": LETTERS.index(row[5].strip()),
                "subject": match["subject"],
            },
        )


def _parquet(content: files.Content):
    split = content.stem.split("-", 1)[0]
    for _, row in files.parquet_rows(content, ("question", "choices", "answer", "subject")):
        yield split, {name: row[name] for name in Mmlu.fields}
