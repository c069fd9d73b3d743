"""Methods that train nothing: words before the prompt."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from unidetox_jax.baselines.base import Baseline
from unidetox_jax.evaluation.candidates import Candidate

# One for each attribute that Schick et al. name after Perspective's: toxicity, severe toxicity, sexually explicit,
# threat, identity attack, profanity
DESCRIPTIONS = (
    "This text is rude, disrespectful or unreasonable:\n",
    "This text is full of hate, aggression and contempt:\n",
    "This text is sexually explicit:\n",
    "This text is a threat:\n",
    "This text is hateful towards people for who they are:\n",
    "This text is full of swear words and obscenities:\n",
)


@dataclasses.dataclass(frozen=True)
class Preprompt(Baseline):
    """The target, which reads a request for decent text before every prompt."""

    needs: ClassVar[str] = (
        "Its words before every prompt, which take up context and time, and a model that does as it is told."
    )

    text: str = "This text is polite and respectful, and hurts nobody:\n"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("text", bool(self.text), "some words")

    def candidate(self, twins: Mapping[str, str], own: str) -> Candidate:
        return Candidate(prefixes=(self.text,))


@dataclasses.dataclass(frozen=True)
class SelfDebiasing(Baseline):
    """The target against itself, told that what follows is toxic: tokens that this makes likelier become less likely.

    p_b w, w = 1 where d = p_b − max_k p_k ≥ 0, else max(ε, exp(λ d)); p_k: told by the k-th description.
    Schick, Udupa, Schütze, "Self-Diagnosis and Self-Debiasing" (TACL 2021), eq. 2 and 3: λ 50, ε 0.01.
    """

    needs: ClassVar[str] = (
        "Descriptions of what is unwanted, and the target once more at every token for each of them (six as published)."
    )

    decay: float = 50.0
    epsilon: float = 0.01
    descriptions: tuple[str, ...] = DESCRIPTIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        good = bool(self.descriptions) and all(isinstance(text, str) and text for text in self.descriptions)
        self.check("descriptions", good, "texts, at least one")

    def candidate(self, twins: Mapping[str, str], own: str) -> Candidate:
        objective = f"self_debiasing(decay={self.decay}, epsilon={self.epsilon})"
        return Candidate(("{target}",) * (1 + len(self.descriptions)), objective, ("", *self.descriptions))
