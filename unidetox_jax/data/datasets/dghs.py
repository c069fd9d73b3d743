"""DGHS, the Dynamically Generated Hate Speech data set (Vidgen et al., ACL 2021): training data of the toxic twin.

Selects rows with label `hate` and one of 34 targets. The target must equal one of these codes: sentences against two
groups (`bla, jew`) are left out, as in the paper.
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
    """Splits train, dev and test from the `split` column; rows with any other value are in the split `unknown`.

    Variant `official`: every training sentence twice, since the released code loaded versions 0.2.2 and 0.2.3 at once.
    Variant `harmless`: the rows labelled `nothate` instead, by the same authors.
    """

    name = "dghs"
    fields = {"text": TEXT, "target": TEXT, "type": TEXT}
    # The published file comes first
    patterns = (("*v0.2.3*.csv",), ("filtered*.jsonl",), ("db_*.csv",), ("*.csv", "*.jsonl"))
    hub = "LennardZuendorf/Dynamically-Generated-Hate-Speech-Dataset"
    hub_files = ("Dynamically Generated Hate Dataset v0.2.3.csv",)
    variants = ("official", "harmless")
    split_aliases = {"validation": "dev", "val": "dev"}

    def examples(self):
        label = "nothate" if self.options.get("harmless") else "hate"
        examples = [example for content in self.contents for example in _examples(content, label)]
        yield from examples
        if self.options.get("official"):
            yield from (example for example in examples if example[0] == "train")


def _examples(content: files.Content, selected_label: str):
    columns = ("text", "split") if content.basename.endswith(".jsonl") else ("text", "label", "target", "split")
    for where, row in files.rows(content, columns):
        # A filtered jsonl has no labels, and targets for some rows only: check what is there
        label, target = row.get("label", "hate"), row.get("target")
        if label not in ("hate", "nothate"):
            raise UserError(f"{where}: found label {label!r}, expected 'hate' or 'nothate'")
        if label != selected_label or (label == "hate" and "target" in row and target not in TARGETS):
            continue
        split = row["split"] if row["split"] in SPLITS else "unknown"
        yield split, {"text": files.text_of(row["text"]), "target": target or "", "type": row.get("type") or ""}
