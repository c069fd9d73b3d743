"""Objectives that see more than the current logits, and examples of how to write one. Axes as in `context`."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import rel_entr

from unidetox_jax.decoding import sampling
from unidetox_jax.decoding.context import Context, Prompt, with_state
from unidetox_jax.decoding.objective import Arrays, Fraction, NonNegative, Range
from unidetox_jax.decoding.plausible_sets import float32, log_softmax, nucleus, plausible, restrict
from unidetox_jax.errors import UserError

Count = Annotated[int, Range("[1, inf)")]
SUBSPACE = Arrays("w", "b")


def repetition_penalty(base, *, context: Context, penalty: Annotated[float, Range("(0, inf)")] = 1.2):
    """z_b, but for tokens that occur in the prompt or the text z_b/θ where it is positive, else z_b·θ.

    Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation" (2019), Sec. 4.1: θ 1.2.
    The paper divides all scores of such tokens, which favours negative ones; this is the form that transformers uses.
    """
    tokens = jnp.concatenate([context.prompt, context.tokens], 1)
    real = jnp.concatenate([context.prompt_mask, context.tokens_mask], 1)
    rows = jnp.arange(len(tokens))[:, None]
    seen = jnp.zeros(base.shape, bool).at[rows, jnp.where(real, tokens, base.shape[1])].set(True, mode="drop")
    return jnp.where(seen, jnp.where(base > 0, base / penalty, base * penalty), base)


def dola_dynamic(
    final, *, context: Context, alpha: Fraction = 0.1, layers: tuple = (), high: bool = False, norm: bool = False
):
    """l_N − l_M on APC(z_N, α), where M is, per row and step, the layer whose distribution is farthest from the last
    layer's by the Jensen–Shannon divergence ½ KL(p_N‖m) + ½ KL(p_M‖m), m being their mean.

    Chuang et al., "DoLa: Decoding by Contrasting Layers" (ICLR 2024), eq. 2 to 4: α 0.1. `layers`: candidates for M;
    () takes every second layer of the lower half from 2 on, as the authors do for long answers, or of the upper half if
    `high`, from at most 20 layers. (For untied heads the authors also consider the embedding, which is layer 0 here.)
    norm: apply the final norm between a layer and the head, which the authors' code does not. Their code takes
    KL(m‖p_N) and KL(m‖p_M); this follows the paper.
    """
    final, states = float32(final), context.layers[0]
    premature = log_softmax(context.head(states[:, _candidate_layers(layers, high, states.shape[1] - 1)], norm=norm))
    final_probs, premature_probs = jax.nn.softmax(final, -1)[:, None], jnp.exp(premature)  # [B,1,V], [B,C,V]
    mean = (final_probs + premature_probs) / 2
    divergence = (rel_entr(final_probs, mean) + rel_entr(premature_probs, mean)).sum(-1) / 2
    farthest = jnp.take_along_axis(premature, divergence.argmax(1)[:, None, None], 1)[:, 0]
    return restrict(plausible(final, alpha), log_softmax(final) - farthest)


def _candidate_layers(layers: tuple, high: bool, count: int) -> np.ndarray:
    """The candidate premature layers of a model with `count` layers."""
    lower = tuple(range(2, min(count // 2, 20), 2)) or (max(1, min(2, count // 2)),)
    chosen = layers or (tuple(range(max(count // 2, count - 20), count, 2)) if high else lower)
    if not all(isinstance(layer, int) and 0 <= layer < count for layer in chosen):
        raise UserError(f"objective dola_dynamic: layers: found {chosen}, expected whole numbers from 0 to {count - 1}")
    return np.array(chosen)


def _directions(states: jax.Array) -> jax.Array:
    """States normalised to unit length."""
    states = float32(states)
    return states / jnp.maximum(jnp.linalg.norm(states, axis=-1, keepdims=True), 1e-12)


def _prompt_directions(prompt: Prompt) -> jax.Array:
    """Directions of the states of all tokens, [B,P+1+S,width]: filled in for the prompt without its last token."""
    known = jnp.where(prompt.mask[:, :-1, None], _directions(prompt.hidden[0]), 0.0)
    return jnp.pad(known, ((0, 0), (0, 1 + prompt.room), (0, 0)))


@with_state(_prompt_directions)
def contrastive_search(base, *, context: Context, k: Count = 8, alpha: Annotated[float, Range("[0, 1]")] = 0.6):
    """(1−α) p_b(v) − α max_j cos(h_v, h_j) for the k most probable tokens v: h_v is the model's state after v (so every
    step reads k candidates), h_j are the states of all earlier tokens, the prompt's included.

    Su et al., "A Contrastive Framework for Neural Text Generation" (NeurIPS 2022), eq. 5: α 0.6, k 8, with greedy
    choice (temperature 0). States are those that enter the head.
    """
    batch, prompt_length = context.prompt.shape
    rows = jnp.arange(batch)[:, None]
    position = prompt_length - 1 + context.step
    past = context.state.at[:, position].set(_directions(context.hidden[0]))
    known = jnp.arange(past.shape[1]) <= position
    padding = ((0, 0), (0, past.shape[1] - prompt_length))
    known = known & jnp.pad(context.prompt_mask, padding, constant_values=True)
    values, tokens = sampling.top_candidates(base, min(k, base.shape[-1]))
    ahead = _directions(context.look_ahead(tokens))
    cosines = jnp.einsum("bkd,bnd->bkn", ahead, past, precision="highest")
    penalty = jnp.where(known[:, None], cosines, -jnp.inf).max(-1)
    probabilities = jnp.exp(values - jax.nn.logsumexp(base, -1, keepdims=True))
    return jnp.full_like(base, -jnp.inf).at[rows, tokens].set((1 - alpha) * probabilities - alpha * penalty), past


def sasa(
    base,
    *,
    context: Context,
    subspace: Annotated[str, SUBSPACE],
    beta: NonNegative,
    top_p: Fraction = 0.9,
    k: Count = 20,
):
    """z_b(v) + β (w·h_v + b)/‖w‖ on TopP(z_b, q): adds the distance of the text with v from the boundary to toxic text,
    h_v being the state that enters the head after v. `subspace`: an .npz file of w [width] and b, see `fit_subspace`.

    Ko et al., "Large Language Models can Become Strong Self-Detoxifiers" (ICLR 2025). β trades toxicity for fluency and
    has no default in the paper; q 0.9 is the usual nucleus of toxicity evaluations. The model reads every candidate in
    every step, so the set is limited to the k most probable tokens.
    """
    w, b = SUBSPACE.load(subspace, "objective sasa: subspace")
    width = context.hidden[0].shape[-1]
    if w.shape != (width,) or b.shape != ():
        raise UserError(f"objective sasa: {subspace}: found w {w.shape}, b {b.shape}, expected ({width},) and ()")
    rows = jnp.arange(len(base))[:, None]
    values, tokens = sampling.top_candidates(restrict(nucleus(base, top_p), base), min(k, base.shape[-1]))
    states = float32(context.look_ahead(tokens))
    margin = (jnp.einsum("bkd,d->bk", states, w, precision="highest") + b) / np.linalg.norm(w)
    return jnp.full_like(base, -jnp.inf).at[rows, tokens].set(values + beta * margin)


def fit_subspace(harmless: np.ndarray, toxic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w [width] and b of the best linear boundary between two normal distributions of equal covariance; w·h + b is
    positive for harmless texts.

    harmless, toxic: states [N,width] of the texts' last tokens (`models.hidden_states`). Closed form of SASA (Ko et
    al., Sec. 3): w = Σ⁺ (μ₁ − μ₂), and b puts the boundary midway between the means. `np.savez(path, w=w, b=b)` writes
    the file that `sasa` reads.
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
