"""AttaQ (Kour et al., 2023): questions meant to draw a harmful answer, for models that chat."""

from unidetox_jax.data import files
from unidetox_jax.data.datasets.base import TEXT, Dataset


class Attaq(Dataset):
    """`text` is the question, `category` the kind of harm ("deception", "pii", …)."""

    name = "attaq"
    fields = {"text": TEXT, "category": TEXT}
    patterns = (("AttaQ*.csv",), ("*.csv",))
    hub = "ibm-research/AttaQ"
    hub_files = ("AttaQ-v1.csv",)

    def examples(self):
        for content in self.contents:
            for _, row in files.csv_rows(content, ("label", "input")):
                yield "train", {"text": row["input"], "category": row["label"]}
