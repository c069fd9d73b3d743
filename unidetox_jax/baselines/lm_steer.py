"""LM-Steer: a linear map of the states that enter the head, trained on toxic text and applied with opposite sign."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from unidetox_jax import method, models, sharding, training
from unidetox_jax.baselines.base import TOXIC, AnyRecipe, Baseline, Corpora, Twins
from unidetox_jax.baselines.task_arithmetic import extrapolate
from unidetox_jax.method import LanguageModel
from unidetox_jax.models import ModelConfig
from unidetox_jax.recipe import Lora, Recipe

INITIAL_STD = 1e-2  # of P1 and P2


@dataclasses.dataclass(frozen=True)
class LMSteer(Baseline):
    """z = h′ Eᵀ with h′ = h + v ε (h P1) P2ᵀ, so E′ = E + v ε E P2 P1ᵀ; v (`steer`) is 1 in training, on toxic
    text, and negative afterwards.

    Han et al., "Word Embeddings Are Steers for Language Models" (ACL 2024), section 3, with the low-rank form, settings
    and constant learning rate of the authors' code. As E′ is linear in v, the model of v = 1 is trained once and all
    others are computed from it.
    """

    needs: ClassVar[str] = (
        "Separate training on every target, an output matrix untied from the embedding, and a tuned steer."
    )
    texts: ClassVar[tuple[str, ...]] = (TOXIC,)

    steer: float = -1.0
    rank: int = 1000
    epsilon: float = 1e-3
    learning_rate: float = 1e-2
    batch_size: int = 32
    steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "batch_size", "steps"):
            self.check(name, getattr(self, name) >= 1, "at least 1")
        self.check("learning_rate", self.learning_rate >= 0, "at least 0")

    def twins(self) -> tuple[str, ...]:
        if self.steer == 1.0:
            return ()
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        trained = {**dataclasses.asdict(self), "steer": 1.0}
        settings = (f"{name}={value!r}" for name, value in trained.items() if value != defaults[name])
        return (f"lm_steer({', '.join(settings)})",)

    def recipe(self, default: AnyRecipe) -> AnyRecipe | None:
        if self.twins():
            return None
        return dataclasses.replace(
            default,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            steps=self.steps,
            warmup_steps=0,
            decay=False,
            weight_decay=0.0,
            clip_norm=0.0,
            dropout=False,
            lora=Lora(),
            precision="float32",
            reproduce_release=False,
        )

    def make(self, target: LanguageModel, twins: Twins, texts: Corpora, recipe: Recipe, **where: Any) -> LanguageModel:
        target = untied(target)
        for steered in twins.values():
            original, trained = (models.head(model.params, model.cfg) for model in (target, steered))
            return target._replace(params=with_head(target.params, extrapolate(original, trained, self.steer)))
        width = target.cfg.embedding_size
        if self.rank > width:
            logging.info("lm_steer: rank %d exceeds the width of the head's input; using %d", self.rank, width)
        criterion = Steer(min(self.rank, width), self.epsilon)
        return method.finetune(target, texts[TOXIC], recipe, criterion=criterion, **where)


@dataclasses.dataclass(frozen=True)
class Steer(training.Criterion):
    """The language-modelling loss, with P1 [D, rank] and P2 [D, rank] as the only trainable parameters, float32:
    {"steer": {"A": P1ᵀ, "B": P2}}. The model must have an untied head (`untied`)."""

    rank: int
    epsilon: float

    def has_base(self, cfg: ModelConfig) -> bool:
        return True

    def abstract(self, cfg: ModelConfig, param_dtype: str) -> Any:
        width = cfg.embedding_size
        shapes = {"A": (self.rank, width), "B": (width, self.rank)}
        return {"steer": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}}

    def initial(self, cfg: ModelConfig, weights: Callable[[], Any], seed: int, mesh: Mesh) -> Any:
        shapes = self.abstract(cfg, "float32")

        def make(key):
            keys = dict(zip(("A", "B"), jax.random.split(key), strict=True))
            return {
                "steer": {
                    name: INITIAL_STD * jax.random.normal(keys[name], leaf.shape, leaf.dtype)
                    for name, leaf in shapes["steer"].items()
                }
            }

        return jax.jit(make, out_shardings=sharding.param_shardings(shapes, mesh))(jax.random.key(seed))

    def model(self, base: Any, params: Any, cfg: ModelConfig) -> Any:
        matrix, steer = models.head(base, cfg), params["steer"]
        steer = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), steer)
        product = functools.partial(jnp.matmul, precision="highest")
        change = product(product(matrix.astype(jnp.float32), steer["B"]), steer["A"])
        return with_head(base, (matrix.astype(jnp.float32) + self.epsilon * change).astype(matrix.dtype))


def untied(model: LanguageModel) -> LanguageModel:
    """The same model with an output matrix separate from its embedding."""
    cfg = model.cfg
    if not cfg.tie_word_embeddings:
        return model
    params = with_head(model.params, jnp.copy(models.head(model.params, cfg)))
    return model._replace(params=params, cfg=dataclasses.replace(cfg, tie_word_embeddings=False))


def with_head(params: Any, matrix: jax.Array) -> Any:
    """The parameters with another output matrix [V, D]."""
    return {**params, "final": {**params.get("final", {}), "head": {"embedding": matrix}}}
