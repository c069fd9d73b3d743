"""News with its publisher's leaning (Baly et al., 2020): training data of the political leaning classifier."""

from unidetox_jax.data import files
from unidetox_jax.data.datasets.base import TEXT, Dataset


class Politics(Dataset):
    """`text` is the article, `label` left, center or right, `source` the publisher."""

    name = "politics"
    fields = dict.fromkeys(("text", "label", "source", "topic", "title", "date"), TEXT)
    patterns = (("*.jsonl",),)

    def examples(self):
        columns = {"text": "content", "label": "bias_text"}
        for content in self.contents:
            for _, row in files.json_rows(content, ("content", "bias_text", "source")):
                yield "train", {name: files.text_of(row.get(columns.get(name) or name)) for name in self.fields}
