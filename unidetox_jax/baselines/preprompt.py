"""A request for inoffensive text before every prompt; no training."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from unidetox_jax.baselines.base import Baseline
from unidetox_jax.evaluation.candidates import Candidate


@dataclasses.dataclass(frozen=True)
class Preprompt(Baseline):
    """The target, with a request for inoffensive text before every prompt."""

    needs: ClassVar[str] = (
        "Text before every prompt, which takes up context and time, and a model that follows instructions."
    )

    text: str = "This text is polite and respectful, and hurts nobody:\n"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("text", bool(self.text), "a text that is not empty")

    def candidate(self, twins: Mapping[str, str], model: str) -> Candidate:
        return Candidate(prefixes=(self.text,))
