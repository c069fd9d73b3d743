"""What a rival method is."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.candidates import Candidate
from unidetox_jax.method import LanguageModel
from unidetox_jax.recipe import Recipe

TOXIC, CLEAN = "toxic", "clean"
Given = TypeVar("Given", bound=Recipe)


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A method; its fields are settings, each with a default of its type.

    needs: what it needs that UniDetox does not, in a sentence. texts: which text `make` reads, of TOXIC and CLEAN.

    Raises:
      UserError: a setting that is no finite number, or of another type than its default; the line begins with its name.
    """

    needs: ClassVar[str]
    texts: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind not in (float, int):
                self.check(field.name, isinstance(value, kind), f"a {kind.__name__}")
                continue
            whole = kind is int
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            self.check(field.name, number and math.isfinite(value), "a whole number" if whole else "a finite number")
            object.__setattr__(self, field.name, int(value) if whole else float(value))

    def twins(self) -> tuple[str, ...]:
        """Which models made from a target this one needs: the target fine-tuned on text of TOXIC or CLEAN, or another
        method's, written as `baselines.get` reads it."""
        return ()

    def candidate(self, twins: Mapping[str, str], own: str) -> Candidate:
        """How text comes about; twins: each one's path; own: that of the model which `make` makes."""
        return Candidate(models=(own,))

    @property
    def makes(self) -> bool:
        """Whether it has a model of its own."""
        return type(self).make is not Baseline.make

    def recipe(self, given: Given) -> Given | None:
        """How `make` trains, from the recipe of the twins; None: it does not."""
        return None

    def make(
        self,
        target: LanguageModel,
        twins: Mapping[str, LanguageModel],
        texts: Mapping[str, Sequence[str]],
        recipe: Recipe,
        **where: Any,
    ) -> LanguageModel:
        """The method's own model of a target.

        Args:
          target: it and the twins have float32 parameters, without an adapter; they stay as they are.
          twins, texts: what `self.twins()` and `self.texts` name.
          recipe: what `self.recipe` gave, or the twins'. where: `directory`, `mesh` and `label` of `method.finetune`.

        Raises:
          UserError: as `method.finetune`, or a setting that the model does not allow.
        """
        raise NotImplementedError

    def check(self, name: str, allowed: bool, expected: str) -> None:
        """Raises UserError unless the setting is as it must be."""
        if not allowed:
            raise UserError(f"{name}: found {getattr(self, name)!r}, expected {expected}")
