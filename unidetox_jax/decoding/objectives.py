"""Decoding objectives: pure functions (*logits, **settings) → scores, and `get`, which finds them by name.

B batch, V vocabulary. Logits are [..., V] of any float dtype, one array per model. Scores are float32 [..., V]: logits
of the distribution that the next token is sampled from, −inf for excluded tokens. All arithmetic is in float32.

z: logits, l = log_softmax(z), p = softmax(z), and two sets of plausible tokens:
  APC(z, α)  = {v : z[v] ≥ log α + max z}, the adaptive plausibility constraint (Li et al., 2023);
  TopP(z, q) = the smallest set of most probable tokens whose mass exceeds q.
Scores are restricted to a set after the logits are combined, never before: 0·(−inf) and −inf + inf are NaN.

An objective of your own is another such function, here or in any module: parameters without a default are models'
logits, the others are settings. A function that declares `context` sees more (`context`; examples are in
`context_objectives`). `get("my_package.my_module:my_objective(tau=0.5)")` finds it.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from unidetox_jax.decoding import order_statistics
from unidetox_jax.decoding.context_objectives import CONTEXT_OBJECTIVES
from unidetox_jax.decoding.objective import Fraction, NonNegative, Objective, Range, resolve
from unidetox_jax.decoding.plausible_sets import float32, log_softmax, nucleus, plausible, restrict


def get(name: str, **settings) -> Objective:
    """An objective as a frozen value: by name ("contrastive"), or a user's by import path ("package.module:function").

    The text may include literal settings: "contrastive(alpha=0.2)". Omitted settings take their defaults.

    Raises:
      UserError: an unknown name, module, function or setting (the message lists known ones), or a value out of range.
    """
    return resolve(name, settings, OBJECTIVES)


def base(base):
    """z_b: one model alone."""
    return float32(base)


def contrastive(base, toxic, alpha: Fraction = 0.1):
    """z_b − z_t on APC(z_b, α): UniDetox's objective, the limit β → ∞ of `contrastive_beta`.

    Lu, Isonuma, Mori, Sakata, "UniDetox" (ICLR 2025), eq. of Sec. 2.1: α 0.1.
    """
    base, toxic = float32(base), float32(toxic)
    return restrict(plausible(base, alpha), base - toxic)


def contrastive_beta(base, toxic, alpha: Fraction = 0.1, beta: NonNegative = 0.5):
    """(1+β) z_b − β z_t on APC(z_b, α).

    O'Brien and Lewis, "Contrastive Decoding Improves Reasoning in Large Language Models" (2023), Sec. 2.1: α 0.1,
    β 0.5.
    """
    base, toxic = float32(base), float32(toxic)
    return restrict(plausible(base, alpha), (1 + beta) * base - beta * toxic)


def contrastive_amateur(
    expert,
    amateur,
    alpha: Fraction = 0.1,
    weight: NonNegative = 1.0,
    temperature: Annotated[float, Range("(0, inf)")] = 0.5,
):
    """l_b − c·z_s/τ on APC(z_b, α), where b is the expert, s the amateur, τ the amateur's temperature.

    Li et al., "Contrastive Decoding: Open-ended Text Generation as Optimization" (ACL 2023), Sec. 3: α 0.1, c 1, τ 0.5.
    """
    expert, amateur = float32(expert), float32(amateur)
    return restrict(plausible(expert, alpha), jax.nn.log_softmax(expert, -1) - weight * (amateur / temperature))


def dexperts(base, expert, anti_expert, alpha: NonNegative = 2.0, top_p: Fraction = 0.9):
    """z_b + a (z_e − z_t) on TopP(z_b, q).

    Liu et al., "DExperts: Decoding-Time Controlled Text Generation with Experts and Anti-Experts" (ACL 2021), eq. 2:
    a 2, q 0.9.
    """
    base, expert, anti_expert = float32(base), float32(expert), float32(anti_expert)
    return restrict(nucleus(base, top_p), base + alpha * (expert - anti_expert))


def anti_expert(base, anti_expert, alpha: NonNegative = 2.0, top_p: Fraction = 0.9):
    """(1+a) z_b − a z_t on TopP(z_b, q): DExperts with the base model as expert.

    Liu et al. (ACL 2021), Sec. 3.1, "anti-only": a 2, q 0.9.
    """
    base, anti_expert = float32(base), float32(anti_expert)
    return restrict(nucleus(base, top_p), (1 + alpha) * base - alpha * anti_expert)


def proxy_tuning(base, expert, anti_expert, alpha: NonNegative = 1.0):
    """z_b + a (z_e − z_t) on the whole vocabulary: a small tuned model and its untuned version steer a large model.

    Liu et al., "Tuning Language Models by Proxy" (COLM 2024), eq. 1: a 1.
    """
    base, expert, anti_expert = float32(base), float32(expert), float32(anti_expert)
    return restrict(base > -jnp.inf, base + alpha * (expert - anti_expert))


def classifier_free_guidance(conditional, unconditional, scale: NonNegative = 1.5):
    """l_u + g (l_c − l_u): the same model with (c) and without (u) its prompt; g = 1 means no guidance.

    Sanchez et al., "Stay on Topic with Classifier-Free Guidance" (ICML 2024), eq. 7: g 1.5.
    """
    conditional, unconditional = log_softmax(conditional), log_softmax(unconditional)
    return restrict(conditional > -jnp.inf, unconditional + scale * (conditional - unconditional))


def context_aware(with_context, without_context, alpha: NonNegative = 0.5):
    """(1+a) z_ctx − a z_noctx: the same model with and without the context that its answer should follow.

    Shi et al., "Trusting Your Evidence: Hallucinate Less with Context-aware Decoding" (NAACL 2024), Sec. 2: a 0.5.
    """
    with_context, without_context = float32(with_context), float32(without_context)
    return restrict(with_context > -jnp.inf, (1 + alpha) * with_context - alpha * without_context)


def dola(final, premature, alpha: Fraction = 0.1):
    """l_N − l_M on APC(z_N, α): the last layer against a fixed earlier one of the same model (`models.early_exit`).

    Chuang et al., "DoLa: Decoding by Contrasting Layers" (ICLR 2024), eq. 3 (DoLa-static): α 0.1.
    """
    final = float32(final)
    return restrict(plausible(final, alpha), jax.nn.log_softmax(final, -1) - log_softmax(premature))


def detoxigen(base, toxic, alpha: NonNegative = 1.0, top_p: Fraction = 0.9):
    """log of the normalised max(0, p_b + a (p_b − p_t)), on TopP(z_b, q).

    If that leaves a row no mass (the toxic model is more certain of every token in the set), the row is l_b on the set.
    Niu et al., "Parameter-Efficient Detoxification with Contrastive Decoding" (2024), eq. 1 to 3. The paper does not
    fix a and q: a 1 is the simplest choice, q 0.9 that of DExperts.
    """
    base, toxic = float32(base), float32(toxic)
    base_mass, allowed = jax.nn.softmax(base, -1), nucleus(base, top_p)
    mass = jnp.maximum(0.0, base_mass + alpha * (base_mass - jax.nn.softmax(toxic, -1)))
    scores = jnp.log(mass) - jnp.log(mass.sum(-1, keepdims=True))
    has_mass = jnp.any(allowed & (mass > 0), -1, keepdims=True)
    return restrict(allowed, jnp.where(has_mass, scores, jax.nn.log_softmax(base, -1)))


def self_debiasing(base, *biased, decay: NonNegative = 50.0, epsilon: Annotated[float, Range("[0, 1]")] = 0.01):
    """log of the normalised w·p_b, w = 1 where d = p_b − max_k p_k ≥ 0, else max(ε, exp(λ d)); λ is `decay`.

    `biased`: the same model, its prompt preceded by one description of undesired text each.
    Schick, Udupa, Schütze, "Self-Diagnosis and Self-Debiasing" (TACL 2021), eq. 2 and 3: λ 50, ε 0.01.
    """
    log_base = log_softmax(base)
    most_biased = jnp.max(jnp.stack([jax.nn.softmax(float32(logits), -1) for logits in biased]), 0)
    difference = jnp.exp(log_base) - most_biased
    # In logarithms, since w·p_b would underflow.
    log_weight = jnp.maximum(jnp.log(jnp.asarray(epsilon, jnp.float32)), decay * jnp.minimum(difference, 0.0))
    return jax.nn.log_softmax(log_base + log_weight, -1)


def soft_contrastive(base, toxic, min_k: Annotated[float, Range("[1, inf)")] = 10, shift_invariant: bool = True):
    """z_b, minus a·l_t on the tokens that the toxic model favours most (a·z_t as published, if not `shift_invariant`).

    d = ‖p_b − p_t‖₂, t = log(1+d), a = t/(1+t), k = clamp(⌊aV⌋, min_k, V); the tokens are those among the k largest of
    l_t − l_b where it is positive. HSPD's soft contrast: the more the models differ, the stronger and wider its effect;
    min_k 10. As published, adding a constant to z_t changes the distribution; with l_t it does not.
    """
    base, toxic = float32(base), float32(toxic)
    log_base, log_toxic = jax.nn.log_softmax(base, -1), jax.nn.log_softmax(toxic, -1)
    distance = jnp.linalg.norm(jnp.exp(log_base) - jnp.exp(log_toxic), axis=-1, keepdims=True)
    strength = jnp.log1p(distance) / (1 + jnp.log1p(distance))
    size = base.shape[-1]
    k = jnp.minimum(jnp.maximum(jnp.floor(strength * size), min_k), size)
    favoured = jnp.where(base > -jnp.inf, log_toxic - log_base, -jnp.inf)
    chosen = (favoured > 0) & (favoured >= order_statistics.kth_largest(favoured, k))
    return jnp.where(chosen, base - strength * (log_toxic if shift_invariant else toxic), base)


OBJECTIVES: dict[str, Callable[..., jax.Array]] = {
    function.__name__: function
    for function in (
        base,
        contrastive,
        contrastive_beta,
        contrastive_amateur,
        dexperts,
        anti_expert,
        proxy_tuning,
        classifier_free_guidance,
        context_aware,
        dola,
        detoxigen,
        self_debiasing,
        soft_contrastive,
    )
} | CONTEXT_OBJECTIVES
