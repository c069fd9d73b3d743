"""DAPT: the target fine-tuned on clean text."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from unidetox_jax.baselines.base import CLEAN, Baseline
from unidetox_jax.evaluation.candidates import Candidate


@dataclasses.dataclass(frozen=True)
class Dapt(Baseline):
    """Domain-adaptive pretraining on text that is not toxic: the target's clean twin.

    Gururangan et al., "Don't Stop Pretraining" (ACL 2020); for detoxification Gehman et al. (2020), section 5.1.
    """

    needs: ClassVar[str] = "Text that a classifier or people found not to be toxic, as much of it as can be had."

    def twins(self) -> tuple[str, ...]:
        return (CLEAN,)

    def candidate(self, twins: Mapping[str, str], own: str) -> Candidate:
        return Candidate((twins[CLEAN],))
