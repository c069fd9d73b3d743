"""ProFS: projects the subspace in which toxic and clean text differ out of the MLPs' outputs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unidetox_jax import models, sharding
from unidetox_jax.baselines.base import CLEAN, TOXIC, Baseline, Corpora, Twins
from unidetox_jax.data.tokens import encode
from unidetox_jax.errors import UserError
from unidetox_jax.method import LanguageModel
from unidetox_jax.models.transformer import extend_layers
from unidetox_jax.recipe import Recipe

BATCH_SIZE = 16  # texts


@dataclasses.dataclass(frozen=True)
class ProFS(Baseline):
    """Projection filter for subspaces. Uppaal et al., "Model Editing as a Robust and Denoised Variant of DPO: A Case
    Study on Toxicity" (ICLR 2025), section 4.

    Each row of a layer's X⁺ (toxic texts) or X⁻ (clean texts) is the mean of the layer's output over a text's tokens.
    T = (X⁺ − X⁻)(I − μμᵀ/‖μ‖²), where μ is the mean of X⁻ and v_1 … v_k are T's first right singular vectors. In every
    layer from `first_layer` on, the MLP's output matrix W becomes W (I − Σ v_i v_iᵀ).

    rank: k, in the authors' code 2 for GPT-2 medium and 10 for larger models. first_layer: a fraction of the depth,
    by default the authors' for GPT-2 medium. pairs: number of text pairs. The authors' pairs continue the same prompt;
    here toxic and clean texts are paired at random.
    """

    needs: ClassVar[str] = "Clean text beside the toxic text, and a separate edit of every target's matrices."
    texts: ClassVar[tuple[str, ...]] = (TOXIC, CLEAN)

    rank: int = 2
    first_layer: float = 10 / 24
    pairs: int = 500
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "pairs", "max_length"):
            self.check(name, getattr(self, name) >= 1, "at least 1")
        self.check("first_layer", 0 <= self.first_layer < 1, "at least 0 and less than 1")

    def make(self, target: LanguageModel, twins: Twins, texts: Corpora, recipe: Recipe, **where: Any) -> LanguageModel:
        rng = np.random.default_rng(recipe.seed)
        first = int(self.first_layer * target.cfg.num_layers)
        count = min(self.pairs, *(len(texts[kind]) for kind in (TOXIC, CLEAN)))
        sampled = [[texts[kind][i] for i in rng.permutation(len(texts[kind]))[:count]] for kind in (TOXIC, CLEAN)]
        if self.rank > min(count, target.cfg.hidden_size):
            expected = f"at most {min(count, target.cfg.hidden_size)}, from {count} pairs of texts"
            raise UserError(f"baseline profs: rank: found {self.rank}, expected {expected}")
        toxic, clean = (layer_means(target, texts, first, self.max_length) for texts in sampled)
        subspaces = np.stack([subspace(*pair, self.rank) for pair in zip(toxic, clean, strict=True)])
        return target._replace(params=projected(target.params, subspaces, first))


def subspace(toxic: np.ndarray, clean: np.ndarray, rank: int) -> np.ndarray:
    """The first right singular vectors [rank, D] of the centred differences of embeddings [N, D], in float64."""
    toxic, clean = toxic.astype(np.float64), clean.astype(np.float64)
    mean = clean.mean(axis=0)
    difference = toxic - clean
    difference -= np.outer(difference @ mean, mean) / (mean @ mean)
    return np.linalg.svd(difference, full_matrices=False)[2][:rank]


def projected(params: Any, subspaces: np.ndarray, first: int) -> Any:
    """W (I − Σ v vᵀ) in float32 for the layers from `first` on; subspaces: [layers, rank, hidden]."""
    blocks, mesh = params["blocks"], sharding.mesh_of(params) or sharding.single_device_mesh()
    down = blocks["mlp"]["down"]

    @functools.partial(jax.jit, out_shardings=down["kernel"].sharding)
    def project(kernel, vectors):  # [L, inner, hidden], [layers, rank, hidden]
        weights = kernel[first:].astype(jnp.float32)
        along = jnp.einsum("lio,lko->lik", weights, vectors, precision="highest")
        weights -= jnp.einsum("lik,lko->lio", along, vectors, precision="highest")
        return kernel.at[first:].set(weights.astype(kernel.dtype))

    vectors = sharding.put(subspaces.astype(np.float32), sharding.replicated(mesh))
    down = {**down, "kernel": project(down["kernel"], vectors)}
    return {**params, "blocks": {**blocks, "mlp": {**blocks["mlp"], "down": down}}}


def layer_means(model: LanguageModel, texts: Sequence[str], first: int, max_length: int) -> np.ndarray:
    """The mean of the output of every layer from `first` on over each text's tokens: float32 [layers, N, hidden]."""
    mesh = sharding.mesh_of(model.params) or sharding.single_device_mesh()
    rows = [tokens[:max_length] for tokens in encode(model.tokenizer, texts)]
    length = max(map(len, rows))
    results = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        tokens, mask = np.zeros((BATCH_SIZE, length), np.int32), np.zeros((BATCH_SIZE, length), bool)
        for row, text in enumerate(batch):
            tokens[row, : len(text)], mask[row, : len(text)] = text, True
        with jax.set_mesh(mesh):
            means = _program(mesh)(model.params, *sharding.put([tokens, mask], sharding.replicated(mesh)), model.cfg)
        results.append(np.asarray(means)[first:, : len(batch)])
    return np.concatenate(results, axis=1)


@functools.cache
def _program(mesh: Mesh):
    """`_means`, with its result replicated to every host."""
    return jax.jit(_means, static_argnames="cfg", out_shardings=sharding.replicated(mesh))


def _means(params: Any, tokens: jax.Array, mask: jax.Array, cfg: models.ModelConfig) -> jax.Array:
    """Means over real tokens, [L, B, hidden], of right-padded tokens and mask [B, T]."""
    rows, length = tokens.shape
    _, states, _ = extend_layers(params, tokens, cfg, models.init_cache(cfg, rows, length), all_layers=True)
    states = states[1:].astype(jnp.float32)  # without the embeddings
    return jnp.sum(states * mask[..., None], axis=2) / jnp.maximum(mask.sum(axis=1), 1)[:, None]
