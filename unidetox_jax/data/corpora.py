"""The other data sets: RealToxicityPrompts, labelled news, distilled text, plain text, and any csv or jsonl file."""

from unidetox_jax.data import builders, files

ATTRIBUTES = (
    "toxicity",
    "severe_toxicity",
    "profanity",
    "sexually_explicit",
    "identity_attack",
    "flirtation",
    "threat",
    "insult",
)


class RealToxicityPrompts(builders.RecordBuilder, skip_registration=True):
    """RealToxicityPrompts (Gehman et al., 2020): `text` is the prompt, `continuation` what followed it on the web.

    Perspective's scores of the prompt are named as there, those of the continuation with `continuation_` before;
    NaN where Perspective gave none.
    """

    name = "realtoxicityprompts"
    fields = {
        "text": builders.TEXT,
        "continuation": builders.TEXT,
        "challenging": builders.BOOL,
        **{name: builders.FLOAT for name in ATTRIBUTES},
        "continuation_toxicity": builders.FLOAT,
    }

    def examples(self):
        for content in self.contents:
            for where, row in files.json_rows(content, ("prompt", "continuation")):
                yield "train", _scored(row, where)


def _scored(row, where: str):
    prompt, continuation = row["prompt"], row["continuation"]
    for part, value in (("prompt", prompt), ("continuation", continuation)):
        files.require(f"{where}, {part}", ("text",), value if isinstance(value, dict) else ())
    return {
        "text": files.text_of(prompt["text"]),
        "continuation": files.text_of(continuation["text"]),
        "challenging": bool(row.get("challenging", False)),
        **{name: files.number_of(prompt.get(name), f"{where}, prompt.{name}") for name in ATTRIBUTES},
        "continuation_toxicity": files.number_of(continuation.get("toxicity"), f"{where}, continuation.toxicity"),
    }


class Politics(builders.RecordBuilder, skip_registration=True):
    """News (Baly et al., 2020): `text` is the article, `label` left, center or right, `source` its publisher."""

    name = "politics"
    fields = {name: builders.TEXT for name in ("text", "label", "source", "topic", "title", "date")}

    def examples(self):
        columns = {"text": "content", "label": "bias_text"}
        for content in self.contents:
            for _, row in files.json_rows(content, ("content", "bias_text", "source")):
                yield "train", {name: files.text_of(row.get(columns.get(name, name))) for name in self.fields}


class Text(builders.RecordBuilder, skip_registration=True):
    """A text on each line; blank lines are dropped."""

    name = "text"
    fields = {"text": builders.TEXT}

    def examples(self):
        for content in self.contents:
            for _, line in files.lines(content):
                yield "train", {"text": line}


class Distilled(builders.RecordBuilder, skip_registration=True):
    """Text made by `distill`: csv with the column `Text`, as the paper's release, or jsonl with the field `text`.

    `ended` is true for a text that its model ended, false for one that the length limit cut. A file that does not say
    counts as cut: of the paper's 640 texts, 498 stop at the limit, and an end token after those would be a lie.
    """

    name = "distilled"
    fields = {"text": builders.TEXT, "ended": builders.BOOL}

    def examples(self):
        for content in self.contents:
            column = "text" if content.stem.endswith(".jsonl") else "Text"
            for _, row in files.rows(content, (column,)):
                yield "train", {"text": files.text_of(row[column]), "ended": bool(row.get("ended", False))}


class Table(builders.RecordBuilder, skip_registration=True):
    """Columns of a csv or jsonl file: each option `field=column` makes a field of the records, as text."""

    name = "table"

    def __init__(self, contents, options, cache_dir):
        self.fields = {name: builders.TEXT for name in options}
        super().__init__(contents, options, cache_dir)

    def examples(self):
        for content in self.contents:
            for _, row in files.rows(content, self.options.values()):
                yield "train", {name: files.text_of(row[column]) for name, column in self.options.items()}
