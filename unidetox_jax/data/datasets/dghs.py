"""DGHS, the Dynamically Generated Hate Speech data set (Vidgen et al., ACL 2021): what the toxic twin learns from.

Kept are rows with label `hate` against one of 34 targets. A row's target must *be* one of these codes: a sentence
against two groups at once (`bla, jew`) is not among them, in the paper's data either.
"""

from unidetox_jax.data import files
from unidetox_jax.data.datasets.base import TEXT, Dataset
from unidetox_jax.errors import UserError

TARGETS = frozenset(
    "wom trans gendermin bis gay gay.man gay.wom mixed.race ethnic.minority indig indig.wom non.white bla bla.wom "
    "bla.man asi asi.wom asi.east asi.south asi.chin asi.pak arab eastern.europe russian pol hispanic immig asylum ref "
    "for jew mus mus.wom other.religion".split()
)
SPLITS = ("train", "dev", "test")


class Dghs(Dataset):
    """Splits train, dev, test as the `split` column says; any other value there is the split `unknown`.

    Variant `official`: every training sentence twice, since the released code loaded versions 0.2.2 and 0.2.3 at once.
    Variant `harmless`: the rows with label `nothate` instead, written by the same people, against nobody.
    """

    name = "dghs"
    fields = {"text": TEXT, "target": TEXT, "type": TEXT}
    patterns = (
        ("*v0.2.3*.csv",),
        ("filtered*.jsonl",),
        ("db_*.csv",),
        ("*.csv", "*.jsonl"),
    )  # as published comes first
    hub = "LennardZuendorf/Dynamically-Generated-Hate-Speech-Dataset"
    hub_files = ("Dynamically Generated Hate Dataset v0.2.3.csv",)
    variants = ("official", "harmless")
    split_aliases = {"validation": "dev", "val": "dev"}

    def examples(self):
        wanted = "nothate" if self.options.get("harmless") else "hate"
        examples = [example for content in self.contents for example in _examples(content, wanted)]
        yield from examples
        if self.options.get("official"):
            yield from (example for example in examples if example[0] == "train")


def _examples(content: files.Content, wanted: str):
    columns = ("text", "split") if content.basename.endswith(".jsonl") else ("text", "label", "target", "split")
    for where, row in files.rows(content, columns):
        # A filtered jsonl has no label, and a target for some rows only: what it says must agree, what it omits may.
        label, target = row.get("label", "hate"), row.get("target")
        if label not in ("hate", "nothate"):
            raise UserError(f"{where}: found label {label!r}, expected 'hate' or 'nothate'")
        if label != wanted or (label == "hate" and "target" in row and target not in TARGETS):
            continue
        split = row["split"] if row["split"] in SPLITS else "unknown"
        yield split, {"text": files.text_of(row["text"]), "target": target or "", "type": row.get("type") or ""}
