"""DExperts: the target's logits, shifted from those of a toxic model towards those of a clean one."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from unidetox_jax.baselines.base import CLEAN, TOXIC, Baseline
from unidetox_jax.evaluation.candidates import Candidate


@dataclasses.dataclass(frozen=True)
class DExperts(Baseline):
    """z_b + α (z_e − z_t) on TopP(z_b, q); expert and anti-expert are the target's own twins.

    Liu et al., "DExperts: Decoding-Time Controlled Text Generation with Experts and Anti-Experts" (ACL 2021), eq. 2.
    """

    needs: ClassVar[str] = "A toxic and a clean copy trained for every target, and all three models at every token."

    alpha: float = 2.0
    top_p: float = 0.9

    def twins(self) -> tuple[str, ...]:
        return CLEAN, TOXIC

    def candidate(self, twins: Mapping[str, str], model: str) -> Candidate:
        objective = f"dexperts(alpha={self.alpha}, top_p={self.top_p})"
        return Candidate(("{target}", twins[CLEAN], twins[TOXIC]), objective)
