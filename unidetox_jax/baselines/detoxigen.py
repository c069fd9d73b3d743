"""DetoxiGen: the target's probabilities, moved away from those of a toxic model."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from unidetox_jax.baselines.base import TOXIC, Baseline
from unidetox_jax.evaluation.candidates import Candidate


@dataclasses.dataclass(frozen=True)
class DetoxiGen(Baseline):
    """max(0, p_b + α (p_b − p_t)), normalised, on TopP(z_b, q); the detoxifier is the target's own toxic twin.

    Niu et al., "Parameter-Efficient Detoxification with Contrastive Decoding" (2024), eq. 1 to 3. They tune a soft
    prompt for the detoxifier; here it is fine-tuned as every twin is, with config.baselines.lora an adapter.
    """

    needs: ClassVar[str] = (
        "A toxic copy (or adapter) of every target, trained anew for it, and both models at every token."
    )

    alpha: float = 1.0
    top_p: float = 0.9

    def twins(self) -> tuple[str, ...]:
        return (TOXIC,)

    def candidate(self, twins: Mapping[str, str], own: str) -> Candidate:
        return Candidate(("{target}", twins[TOXIC]), f"detoxigen(alpha={self.alpha}, top_p={self.top_p})")
