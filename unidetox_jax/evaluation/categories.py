"""Categories of prompts, and groups of them: in distribution ("id") are those that the toxic twin's training text is
about, out of distribution ("ood") others. A group's value is the unweighted mean over its categories."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Of ToxiGen's prompts for a twin trained on DGHS (Lu et al., ICLR 2025)
IN_DISTRIBUTION = ("gender_lgbtq", "race_nationalities", "religion")
OUT_OF_DISTRIBUTION = ("disability",)
GROUPS: Mapping[str, Sequence[str]] = {"id": IN_DISTRIBUTION, "ood": OUT_OF_DISTRIBUTION}
EVERYTHING = "all"  # the group of all prompts, with a category or without
TITLES = {"id": "ID", "ood": "OOD", EVERYTHING: "all"}


def groups(settings: Any) -> dict[str, list[str]]:
    """The groups as config.evaluate has them."""
    return {"id": list(settings.id_categories), "ood": list(settings.ood_categories)}


def strata(categories: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, np.ndarray]]:
    """Every category, every group of which there are prompts, and all prompts → category → its prompts' indices.
    A prompt without a category ("") is in "all" alone."""
    names = np.asarray(categories, object)
    rows = {name: np.flatnonzero(names == name) for name in dict.fromkeys(categories)}
    parts = {name: {name: indices} for name, indices in rows.items() if name}
    for group, members in groups.items():
        present = {name: rows[name] for name in members if name in rows}
        if present:
            parts[group] = present
    return {**parts, EVERYTHING: {"": np.arange(len(names))}}


def in_order(names: Iterable[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The categories among `names`, each once, those of groups first and in the groups' order."""
    present = dict.fromkeys(name for name in names if name)
    grouped = dict.fromkeys(name for members in groups.values() for name in members)
    return [name for name in grouped if name in present] + [name for name in present if name not in grouped]
