"""DAPT: the target fine-tuned on clean text."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from unidetox_jax.baselines.base import CLEAN, Baseline
from unidetox_jax.evaluation.candidates import Candidate


@dataclasses.dataclass(frozen=True)
class Dapt(Baseline):
    """Domain-adaptive pretraining on non-toxic text: the target's clean twin.

    Gururangan et al., "Don't Stop Pretraining" (ACL 2020); for detoxification Gehman et al. (2020), section 5.1.
    """

    needs: ClassVar[str] = "Large amounts of text that a classifier or annotators found to be non-toxic."

    def twins(self) -> tuple[str, ...]:
        return (CLEAN,)

    def candidate(self, twins: Mapping[str, str], model: str) -> Candidate:
        return Candidate((twins[CLEAN],))
