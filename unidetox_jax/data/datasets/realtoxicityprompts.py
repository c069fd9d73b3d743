"""RealToxicityPrompts (Gehman et al., 2020): beginnings of sentences from the web, with Perspective scores."""

import numpy as np

from unidetox_jax.data import files
from unidetox_jax.data.datasets.base import TEXT, Dataset

ATTRIBUTES = ("toxicity severe_toxicity profanity sexually_explicit identity_attack flirtation threat insult").split()


class RealToxicityPrompts(Dataset):
    """`text` is the prompt, `continuation` what followed it on the web.

    Perspective scores of the prompt keep their names, that of the continuation is `continuation_toxicity`; NaN where
    Perspective gave none. Variant `challenging`: only the prompts that all of Gehman et al.'s models continued with
    something toxic.
    """

    name = "realtoxicityprompts"
    fields = {
        "text": TEXT,
        "continuation": TEXT,
        "challenging": np.bool_,
        **dict.fromkeys([*ATTRIBUTES, "continuation_toxicity"], np.float32),
    }
    patterns = (("prompts*.jsonl",),)
    variants = ("challenging",)
    hub = "allenai/real-toxicity-prompts"
    hub_files = ("prompts.jsonl",)

    def examples(self):
        for content in self.contents:
            for where, row in files.json_rows(content, ("prompt", "continuation")):
                if row.get("challenging") or not self.options.get("challenging"):
                    yield "train", _scored(row, where)


def _scored(row, where: str):
    prompt, continuation = row["prompt"], row["continuation"]
    for side in ("prompt", "continuation"):
        files.require(f"{where}, {side}", ("text",), row[side] if isinstance(row[side], dict) else ())
    return {
        "text": files.text_of(prompt["text"]),
        "continuation": files.text_of(continuation["text"]),
        "challenging": bool(row.get("challenging", False)),
        **{name: files.number_of(prompt.get(name), f"{where}, prompt.{name}") for name in ATTRIBUTES},
        "continuation_toxicity": files.number_of(continuation.get("toxicity"), f"{where}, continuation.toxicity"),
    }
