"""Categories of prompts, and groups of categories: "id" (in distribution) are covered by the toxic model's training
text, "ood" (out of distribution) are not. A group's value is the unweighted mean over its categories."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# ToxiGen categories for a toxic model trained on DGHS (Lu et al., ICLR 2025)
IN_DISTRIBUTION = ("gender_lgbtq", "race_nationalities", "religion")
OUT_OF_DISTRIBUTION = ("disability",)
GROUPS: Mapping[str, Sequence[str]] = {"id": IN_DISTRIBUTION, "ood": OUT_OF_DISTRIBUTION}
EVERYTHING = "all"  # the group of all prompts, including those without a category
TITLES = {"id": "ID", "ood": "OOD", EVERYTHING: "all"}


def groups(settings: Any) -> dict[str, list[str]]:
    """The groups configured in config.evaluate."""
    return {"id": list(settings.id_categories), "ood": list(settings.ood_categories)}


def strata(categories: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, np.ndarray]]:
    """Category, group with prompts, or "all" → category → indices of its prompts. Prompts without a category ("") are
    in "all" only."""
    names = np.asarray(categories, object)
    rows = {name: np.flatnonzero(names == name) for name in dict.fromkeys(categories)}
    result = {name: {name: indices} for name, indices in rows.items() if name}
    for group, members in groups.items():
        present = {name: rows[name] for name in members if name in rows}
        if present:
            result[group] = present
    return {**result, EVERYTHING: {"": np.arange(len(names))}}


def in_order(names: Iterable[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The distinct categories among `names`: first those in groups, in the groups' order."""
    present = dict.fromkeys(name for name in names if name)
    grouped = dict.fromkeys(name for members in groups.values() for name in members)
    return [name for name in grouped if name in present] + [name for name in present if name not in grouped]
