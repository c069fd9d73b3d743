"""ToxiGen, human-annotated (Hartvigsen et al., ACL 2022): the prompts of the toxicity evaluation.

The published training file writes each text as a Python bytes literal, `b'…'`; the test file does not. The two also
name groups differently.
"""

import ast

import numpy as np

from unidetox_jax.data import files
from unidetox_jax.data.datasets.base import TEXT, Dataset
from unidetox_jax.errors import UserError

# Category → names of its groups in either file
CATEGORIES = {
    "gender_lgbtq": ("women", "lgbtq", "lgbtq+ folks"),
    "race_nationalities": (
        "black", "black folks / african-americans", "black/african-american folks", "asian", "asian folks", "latino",
        "latino/hispanic folks", "chinese", "chinese folks", "mexican", "mexican folks", "middle_east",
        "middle eastern folks", "native_american", "native american/indigenous folks", "native american folks",
    ),
    "religion": ("jewish", "jewish folks", "muslim", "muslim folks"),
    "disability": (
        "mental_dis", "folks with mental disabilities", "physical_dis", "folks with physical disabilities",
    ),
}  # fmt: skip
_CATEGORY_OF = {group: category for category, groups in CATEGORIES.items() for group in groups}
_SCORES = ("toxicity_human", "toxicity_ai", "intent")
VALIDATION_SEED, VALIDATION_SHARE = 42, 0.1  # as in the released code


class Toxigen(Dataset):
    """Splits train and test as published; `validation` is the tenth of train that the released code samples (896 of
    8,960 rows, which stay in train as well).

    `category` is one of CATEGORIES, or empty. Scores are annotators' means from 1 to 5; NaN where absent.
    """

    name = "toxigen"
    fields = {"text": TEXT, "target_group": TEXT, "category": TEXT, **dict.fromkeys(_SCORES, np.float32), "label": TEXT}
    hub = "toxigen/toxigen-data"
    hub_files = ("annotated_train.csv", "annotated_test.csv")
    patterns = (hub_files, ("*.csv",))
    default_split = "test"
    split_aliases = {"dev": "validation", "val": "validation"}

    def examples(self):
        for content in self.contents:
            rows = list(_rows(content))
            split = "train" if "train" in content.basename else "test"
            yield from ((split, row) for row in rows)
            if split == "train":
                order = np.random.default_rng(VALIDATION_SEED).permutation(len(rows))
                for index in order[: int(len(rows) * VALIDATION_SHARE)]:
                    yield "validation", rows[index]


def category(group: str) -> str:
    """The category of a published group name, or an empty string."""
    return _CATEGORY_OF.get(group.strip().lower(), "")


def clean(text: str, where: str = "text") -> str:
    """Decodes a `b'…'` literal; other text is unchanged. Raises UserError for invalid UTF-8 in it."""
    if len(text) < 3 or text[0] != "b" or text[1] not in "'\"" or text[-1] != text[1]:
        return text
    try:
        return ast.literal_eval(text).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte 0x{error.object[error.start]:02x} of {text[:20]}… is not UTF-8") from None
    except (SyntaxError, ValueError, AttributeError):
        return text


def _rows(content: files.Content):
    for where, row in files.csv_rows(content, ("text", "target_group", *_SCORES)):
        yield {
            "text": clean(row["text"], where),
            "target_group": row["target_group"],
            "category": category(row["target_group"]),
            "label": row.get("label", ""),
            **{name: files.number_of(row[name], f"{where}, {name}") for name in _SCORES},
        }
