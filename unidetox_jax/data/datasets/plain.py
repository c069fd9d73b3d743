"""Any file as a data set: plain text, distilled text, columns of a csv or jsonl file."""

import numpy as np
import tensorflow_datasets as tfds

from unidetox_jax.data import files
from unidetox_jax.data.datasets.base import TEXT, Dataset
from unidetox_jax.errors import UserError


class Text(Dataset):
    """One text a line, blank lines dropped."""

    name = "text"
    fields = {"text": TEXT}

    def examples(self):
        for content in self.contents:
            for _, line in files.lines(content):
                yield "train", {"text": line}


class Distilled(Dataset):
    """Text from `distill`: csv with the column `Text`, as in the paper's release, or jsonl with the field `text`.

    `ended` is true if the model ended the text, false if the length limit cut it. Files without the field count as cut:
    of the paper's 640 texts, 498 stop at the limit and must not be followed by an end token. `tokens` are the sampled
    ones, BOS first and the end token last; empty if the file has none.
    """

    name = "distilled"
    VERSION = tfds.core.Version("1.1.0")
    fields = {"text": TEXT, "ended": np.bool_, "tokens": tfds.features.Sequence(np.int64)}

    def examples(self):
        for content in self.contents:
            column = "text" if content.basename.endswith(".jsonl") else "Text"
            for where, row in files.rows(content, (column,)):
                tokens = row.get("tokens") or []
                if not isinstance(tokens, list) or any(type(token) is not int or token < 0 for token in tokens):
                    raise UserError(f"{where}, tokens: found {str(tokens)[:40]!r}, expected a list of token ids")
                ended = bool(row.get("ended", False))
                yield "train", {"text": files.text_of(row[column]), "ended": ended, "tokens": tokens}


class Table(Dataset):
    """Columns of a csv or jsonl file as text: each option `field=column` makes a field of the records."""

    name = "table"
    columns = {"text": "text"}

    def __init__(self, contents, options, cache_dir):
        self.fields = dict.fromkeys(options, TEXT)
        super().__init__(contents, options, cache_dir)

    def examples(self):
        for content in self.contents:
            for _, row in files.rows(content, self.options.values()):
                yield "train", {name: files.text_of(row[column]) for name, column in self.options.items()}
