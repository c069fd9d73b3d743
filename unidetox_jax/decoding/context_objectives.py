"""Objectives that see more than this step's logits; also examples of how to write one. Letters as in `context`."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import rel_entr

from unidetox_jax.decoding import sampling
from unidetox_jax.decoding.context import Context, Prompt, with_state
from unidetox_jax.decoding.objective import Arrays, Range
from unidetox_jax.decoding.plausible_sets import float32, log_softmax, nucleus, on, plausible
from unidetox_jax.errors import UserError

Share = Annotated[float, Range("(0, 1]")]
Weight = Annotated[float, Range("[0, inf)")]
Count = Annotated[int, Range("[1, inf)")]
SUBSPACE = Arrays("w", "b")


def repetition_penalty(base, *, context: Context, penalty: Annotated[float, Range("(0, inf)")] = 1.2):
    """z_b of a token that stands in the prompt or the text, divided by θ where it is positive, else times θ.

    Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation" (2019), Sec. 4.1: θ 1.2.
    There every such score is divided, which favours those below zero; this is what transformers and others do.
    """
    seen = jnp.concatenate([context.prompt, context.tokens], 1)
    real = jnp.concatenate([context.prompt_mask, context.tokens_mask], 1)
    rows = jnp.arange(len(seen))[:, None]
    seen = jnp.zeros(base.shape, bool).at[rows, jnp.where(real, seen, base.shape[1])].set(True, mode="drop")
    return jnp.where(seen, jnp.where(base > 0, base / penalty, base * penalty), base)


def dola_dynamic(
    final, *, context: Context, alpha: Share = 0.1, layers: tuple = (), high: bool = False, norm: bool = False
):
    """l_N − l_M on APC(z_N, α), where M is, in each row and step, the layer whose law is farthest from the last one's:
    the largest Jensen–Shannon divergence ½ KL(p_N‖m) + ½ KL(p_M‖m), m their mean.

    Chuang et al., "DoLa: Decoding by Contrasting Layers" (ICLR 2024), eq. 2 to 4: α 0.1; `layers` () is every second
    one of the lower half, from 2 on, as for long answers there, or of the upper if `high`, of 20 at most. (Where the
    head is not the embedding, theirs begin with the embedding: name it, layer 0.) norm: whether the final norm stands
    between a layer and the head; in the authors' code it does not. That code takes KL(m‖p_N) and KL(m‖p_M); here it is
    the paper's.
    """
    final, states = float32(final), context.layers[0]
    premature = log_softmax(context.head(states[:, _candidates(layers, high, states.shape[1] - 1)], norm=norm))
    law, laws = jax.nn.softmax(final, -1)[:, None], jnp.exp(premature)  # [B,1,V], [B,C,V]
    mean = (law + laws) / 2
    divergence = (rel_entr(law, mean) + rel_entr(laws, mean)).sum(-1) / 2
    farthest = jnp.take_along_axis(premature, divergence.argmax(1)[:, None, None], 1)[:, 0]
    return on(plausible(final, alpha), log_softmax(final) - farthest)


def _candidates(layers: tuple, high: bool, count: int) -> np.ndarray:
    """The premature layers of a model of `count`."""
    lower = tuple(range(2, min(count // 2, 20), 2)) or (max(1, min(2, count // 2)),)
    chosen = layers or (tuple(range(max(count // 2, count - 20), count, 2)) if high else lower)
    if not all(isinstance(layer, int) and 0 <= layer < count for layer in chosen):
        raise UserError(f"objective dola_dynamic: layers: found {chosen}, expected whole numbers from 0 to {count - 1}")
    return np.array(chosen)


def _directions(states: jax.Array) -> jax.Array:
    states = float32(states)
    return states / jnp.maximum(jnp.linalg.norm(states, axis=-1, keepdims=True), 1e-12)


def _no_directions(prompt: Prompt) -> jax.Array:
    """Directions of the states of all tokens [B,P+1+S,width]; those of the prompt but for its last are known."""
    read = jnp.where(prompt.mask[:, :-1, None], _directions(prompt.hidden[0]), 0.0)
    return jnp.pad(read, ((0, 0), (0, 1 + prompt.room), (0, 0)))


@with_state(_no_directions)
def contrastive_search(base, *, context: Context, k: Count = 8, alpha: Annotated[float, Range("[0, 1]")] = 0.6):
    """(1−α) p_b(v) − α max_j cos(h_v, h_j) for the k most probable tokens v: h_v is the state that the model would have
    after v, for which it reads all k in every step, h_j those of all tokens before, the prompt's among them.

    Su et al., "A Contrastive Framework for Neural Text Generation" (NeurIPS 2022), eq. 5: α 0.6, k 8, and the
    best token is taken (temperature 0). States are those that meet the head.
    """
    batch, count = context.prompt.shape
    rows = jnp.arange(batch)[:, None]
    place = count - 1 + context.step
    past = context.state.at[:, place].set(_directions(context.hidden[0]))
    known = jnp.arange(past.shape[1]) <= place
    known = known & jnp.pad(context.prompt_mask, ((0, 0), (0, past.shape[1] - count)), constant_values=True)
    values, tokens = sampling.top_candidates(base, min(k, base.shape[-1]))
    ahead = _directions(context.look_ahead(tokens))
    cosines = jnp.einsum("bkd,bnd->bkn", ahead, past, precision="highest")
    penalty = jnp.where(known[:, None], cosines, -jnp.inf).max(-1)
    law = jnp.exp(values - jax.nn.logsumexp(base, -1, keepdims=True))
    return jnp.full_like(base, -jnp.inf).at[rows, tokens].set((1 - alpha) * law - alpha * penalty), past


def sasa(
    base, *, context: Context, subspace: Annotated[str, SUBSPACE], beta: Weight, top_p: Share = 0.9, k: Count = 20
):
    """z_b(v) + β (w·h_v + b)/‖w‖ on TopP(z_b, q): by how much the text with v added would be on the harmless side, h_v
    the state that meets the head after v. `subspace` is an .npz file of w [width] and b, see `fit_subspace`.

    Ko et al., "Large Language Models can Become Strong Self-Detoxifiers" (ICLR 2025). β trades toxicity for fluency
    there and has no default; q 0.9 is the nucleus that toxicity is usually measured with. The model reads every
    candidate in every step, here at most the k most probable ones; the set ends with them.
    """
    w, b = SUBSPACE.load(subspace, "objective sasa: subspace")
    width = context.hidden[0].shape[-1]
    if w.shape != (width,) or b.shape != ():
        raise UserError(f"objective sasa: {subspace}: found w {w.shape}, b {b.shape}, expected ({width},) and ()")
    rows = jnp.arange(len(base))[:, None]
    values, tokens = sampling.top_candidates(on(nucleus(base, top_p), base), min(k, base.shape[-1]))
    states = float32(context.look_ahead(tokens))
    margin = (jnp.einsum("bkd,d->bk", states, w, precision="highest") + b) / np.linalg.norm(w)
    return jnp.full_like(base, -jnp.inf).at[rows, tokens].set(values + beta * margin)


def fit_subspace(harmless: np.ndarray, toxic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w [width] and b of the best linear boundary between two normal laws of one covariance, w·h + b > 0 for harmless.

    harmless, toxic: states [N,width] of texts' last tokens (`models.hidden_states`). SASA's closed form (Ko et al.,
    Sec. 3): w = Σ⁺ (μ₁ − μ₂), at the middle of the means b cancels it. `np.savez(path, w=w, b=b)` is what `sasa` reads.
    """
    harmless, toxic = (np.asarray(states, np.float64) for states in (harmless, toxic))
    means = harmless.mean(0), toxic.mean(0)
    within = np.concatenate([harmless - means[0], toxic - means[1]])
    covariance = within.T @ within / (len(within) - 2)
    w = np.linalg.pinv(covariance, rcond=1e-6, hermitian=True) @ (means[0] - means[1])
    return w, np.asarray(-w @ (means[0] + means[1]) / 2)


CONTEXT_OBJECTIVES = {
    function.__name__: function for function in (repetition_penalty, dola_dynamic, contrastive_search, sasa)
}
