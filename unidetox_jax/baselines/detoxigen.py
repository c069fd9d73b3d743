"""DetoxiGen: the target's probabilities contrasted with those of a toxic model."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from unidetox_jax.baselines.base import TOXIC, Baseline
from unidetox_jax.evaluation.candidates import Candidate


@dataclasses.dataclass(frozen=True)
class DetoxiGen(Baseline):
    """max(0, p_b + α (p_b − p_t)), normalised, on TopP(z_b, q); the detoxifier is the target's own toxic twin.

    Niu et al., "Parameter-Efficient Detoxification with Contrastive Decoding" (2024), eq. 1 to 3. The paper tunes a
    soft prompt for the detoxifier; here it is fine-tuned like every twin, as an adapter with config.baselines.lora.
    """

    needs: ClassVar[str] = "A toxic copy (or adapter) trained for every target, and both models at every token."

    alpha: float = 1.0
    top_p: float = 0.9

    def twins(self) -> tuple[str, ...]:
        return (TOXIC,)

    def candidate(self, twins: Mapping[str, str], model: str) -> Candidate:
        return Candidate(("{target}", twins[TOXIC]), f"detoxigen(alpha={self.alpha}, top_p={self.top_p})")
