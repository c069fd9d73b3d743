"""Prompts and their categories, from any data set.

    toxigen   toxigen?split=validation   realtoxicityprompts   bold?file=DIRECTORY   attaq
    prompts.csv   jsonl:prompts.jsonl?category=group
    toxigen | realtoxicityprompts:challenging          several, concatenated

A plain path to a csv or jsonl file means its column `text`, and `category` if it has one. An empty text is unprompted
generation, from the tokenizer's BOS (Gehman et al. 2020, section 3.1). RealToxicityPrompts has the categories of Gehman
et al. (2020): prompts are "toxic" if they score at least 0.5 under Perspective, else "nontoxic"; those of the
challenging subset are "challenging".
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from unidetox_jax import data
from unidetox_jax.errors import UserError

FILE_KINDS = ("csv", "jsonl")
TOXIC_PROMPT, CHALLENGING = 0.5, "realtoxicityprompts:challenging"


class Prompts(NamedTuple):
    """P prompts: texts, categories ("" for none), and a fingerprint of their source."""

    texts: tuple[str, ...]
    categories: tuple[str, ...]
    fingerprint: str

    def counts(self) -> dict[str, int]:
        """Number of prompts per category."""
        return {name: self.categories.count(name) for name in dict.fromkeys(self.categories)}


def load(spec: str, data_dir: epath.PathLike = "", limit: int = 0, seed: int = 0) -> Prompts:
    """The prompts of a data set.

    Args:
      spec: see the module's docstring; read by `data.load`.
      limit: number of prompts per data set, sampled with `seed` and kept in the file's order; 0 for all.

    Raises:
      UserError: no such data set or file, or it has no prompts.
    """
    if "|" in spec:
        sources = [load(source.strip(), data_dir, limit, seed) for source in spec.split("|")]
        texts, categories = (tuple(value for source in sources for value in source[field]) for field in (0, 1))
        return Prompts(texts, categories, " | ".join(source.fingerprint for source in sources))
    records = _records(spec, data_dir)
    chosen = np.arange(len(records))
    if 0 < limit < len(records):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(records))[:limit])
    rows = [records[int(i)] for i in chosen]
    texts = tuple(row["text"] for row in rows)
    return Prompts(
        texts, tuple(_category(row, spec) for row in rows), f"{records.fingerprint}-{limit}-{seed if limit else 0}"
    )


def from_texts(texts: Sequence[str], categories: Sequence[str] | None = None) -> Prompts:
    """Prompts given as lists."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    return Prompts(tuple(texts), tuple(categories or [""] * len(texts)), digest)


def _records(spec: str, data_dir: epath.PathLike) -> data.Records:
    kind = spec.rsplit(".", 1)[-1]
    if kind not in FILE_KINDS or spec.partition(":")[0] in FILE_KINDS:
        return data.load(spec, data_dir=data_dir)
    try:
        return data.load(f"{kind}:{spec}?category=category", data_dir=data_dir)
    except UserError as error:
        if "category" not in str(error):
            raise
        return data.load(f"{kind}:{spec}", data_dir=data_dir)


def _category(row, spec: str) -> str:
    if "category" in row:
        return row["category"]
    if CHALLENGING in spec:
        return "challenging"
    if "continuation_toxicity" not in row or np.isnan(row["toxicity"]):
        return ""
    return "toxic" if row["toxicity"] >= TOXIC_PROMPT else "nontoxic"
