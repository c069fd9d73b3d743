"""The base class of baseline methods."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.candidates import Candidate
from unidetox_jax.method import LanguageModel
from unidetox_jax.recipe import Recipe

TOXIC, CLEAN = "toxic", "clean"
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
Twins = Mapping[str, LanguageModel]  # by the names in `Baseline.twins`
Corpora = Mapping[str, Sequence[str]]  # texts by kind: TOXIC, CLEAN


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A method. Its fields are settings, each with a default of the field's type.

    needs: what it requires and UniDetox does not, in a sentence. texts: the kinds of text that `make` reads, of TOXIC
    and CLEAN.

    Raises:
      UserError: a setting that is not finite, or not of its default's type; the message begins with its name.
    """

    needs: ClassVar[str]
    texts: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind not in (float, int):
                self.check(field.name, isinstance(value, kind), f"a {kind.__name__}")
                continue
            is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
            expected = "a whole number" if kind is int else "a finite number"
            self.check(field.name, is_number and math.isfinite(value), expected)
            object.__setattr__(self, field.name, kind(value))

    def twins(self) -> tuple[str, ...]:
        """The models derived from the target that it needs: TOXIC or CLEAN for the target fine-tuned on such text, or
        another method's model, in the syntax of `baselines.get`."""
        return ()

    def candidate(self, twins: Mapping[str, str], model: str) -> Candidate:
        """How it generates text. twins: name → path; model: the path of the one from `make`."""
        return Candidate(models=(model,))

    @property
    def makes(self) -> bool:
        """Whether it makes a model of its own."""
        return type(self).make is not Baseline.make

    def recipe(self, default: AnyRecipe) -> AnyRecipe | None:
        """The training recipe of `make`, derived from that of the twins; None if it does not train."""
        return None

    def make(self, target: LanguageModel, twins: Twins, texts: Corpora, recipe: Recipe, **where: Any) -> LanguageModel:
        """Makes the method's model of a target.

        Args:
          target: has float32 parameters without an adapter, like the twins; none of them is modified.
          texts: of the kinds in `self.texts`.
          recipe: from `self.recipe`, or that of the twins. where: `directory`, `mesh` and `label` of `method.finetune`.

        Raises:
          UserError: as `method.finetune`, or a setting that does not suit the model.
        """
        raise NotImplementedError

    def check(self, name: str, allowed: bool, expected: str) -> None:
        """Raises UserError unless the setting is allowed."""
        if not allowed:
            raise UserError(f"{name}: found {getattr(self, name)!r}, expected {expected}")
