"""Self-debiasing (Schick et al., 2021): the target against itself when told that its text is toxic; no training."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from unidetox_jax.baselines.base import Baseline
from unidetox_jax.evaluation.candidates import Candidate

# One for each of Perspective's attributes in Schick et al.: toxicity, severe toxicity, sexually explicit, threat,
# identity attack, profanity
DESCRIPTIONS = (
    "This text is rude, disrespectful or unreasonable:\n",
    "This text is full of hate, aggression and contempt:\n",
    "This text is sexually explicit:\n",
    "This text is a threat:\n",
    "This text is hateful towards people for who they are:\n",
    "This text is full of swear words and obscenities:\n",
)


@dataclasses.dataclass(frozen=True)
class SelfDebiasing(Baseline):
    """The target contrasted with itself when told that the text is toxic: tokens that become likelier are suppressed.

    p_b w, w = 1 where d = p_b − max_k p_k ≥ 0, else max(ε, exp(λ d)); p_k: after the k-th description.
    Schick, Udupa, Schütze, "Self-Diagnosis and Self-Debiasing" (TACL 2021), eq. 2 and 3: λ 50, ε 0.01.
    """

    needs: ClassVar[str] = (
        "Descriptions of undesired text, and at every token one more pass of the target for each (six as published)."
    )

    decay: float = 50.0
    epsilon: float = 0.01
    descriptions: tuple[str, ...] = DESCRIPTIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = bool(self.descriptions) and all(isinstance(text, str) and text for text in self.descriptions)
        self.check("descriptions", valid, "at least one text, none of them empty")

    def candidate(self, twins: Mapping[str, str], model: str) -> Candidate:
        objective = f"self_debiasing(decay={self.decay}, epsilon={self.epsilon})"
        return Candidate(("{target}",) * (1 + len(self.descriptions)), objective, ("", *self.descriptions))
