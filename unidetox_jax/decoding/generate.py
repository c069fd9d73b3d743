"""`generate`: the host side of decoding. It checks and pads the inputs, runs one compiled program, unpacks the result.

B batch, T time. Prompts are left-padded to a bucket of cache slots, so other prompts of the same bucket reuse the
compiled program; padding costs reads of cache slots, but no positions. The batch size is not bucketed: another number
of rows compiles another program.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unidetox_jax import padded_sizes, sharding
from unidetox_jax.decoding import loop, preparation
from unidetox_jax.decoding import warpers as warpers_
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.decoding.preparation import Prepared
from unidetox_jax.decoding.warpers import Warper
from unidetox_jax.errors import UserError
from unidetox_jax.models import Model, ModelConfig

CACHES = ("own", "official")


class Generation(NamedTuple):
    """The result of a generation, as NumPy arrays.

    tokens: int32 [B, max_new_tokens], padded after the end token. lengths: int32 [B], including the end token. ended:
    bool [B], whether a row reached an end token. log_probabilities: float32 [M,B], the mean log-probability of a row's
    tokens under each model alone (untruncated), or None.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    log_probabilities: np.ndarray | None


def generate(
    models: Sequence[Model],
    prompts: Any,
    *,
    objective: Objective,
    warpers: Sequence[Warper] = (),
    max_new_tokens: int,
    seed: int = 0,
    attention_mask: Any = None,
    eos_id: int | Sequence[int] | None = None,
    row_ids: Any = None,
    samples: int = 1,
    prompt_slots: int = 0,
    cache: str = "own",
    log_probabilities: bool = False,
    layer_loop: str | None = None,
    vocab_size: int | None = None,
) -> Generation:
    """Continues prompts with tokens sampled from an objective over one or several models.

    Args:
      models: in the order of the objective's arguments, with equal vocabulary sizes (see vocab_size), all on one mesh
        or none. For repeated calls, pass the result of `preparation.prepare`.
      prompts: int [B,T], or a list with one such array for each model (T may differ).
      objective, warpers: from `decoding.objectives` and `decoding.warpers`.
      seed: 0 ≤ seed < 2³². A token's random numbers depend only on seed, row id, step and token id.
      attention_mask: 1 for real prompt tokens, same form as `prompts`; None: all are real. Left or right padding.
      eos_id: end tokens; None: the first model's; (): never end.
      samples: continuations of each prompt, which is prefilled once; adjacent in the result's B·samples rows.
      prompt_slots: minimum number of cache slots for the prompt; calls with equal values share a program.
      row_ids: int [B·samples], default 0, 1, …; a row with the same id gets the same text in any batch.
      cache: "own", or "official": after the prompt all models attend to the first one's keys and values.
      log_probabilities: also return the tokens' mean log-probability under each model.
      layer_loop: "scan" or "unroll" instead of the faster one; ignored for prepared models.
      vocab_size: only smaller token ids are sampled, as embedding matrices may be padded. None: all ids, and the models
        must have equal vocabulary sizes.

    Raises:
      UserError: inconsistent models, prompts or settings; non-finite logits (names row and step).
    """
    request = make_request(
        models,
        prompts,
        objective=objective,
        max_new_tokens=max_new_tokens,
        seed=seed,
        attention_mask=attention_mask,
        eos_id=eos_id,
        row_ids=row_ids,
        samples=samples,
        prompt_slots=prompt_slots,
        cache=cache,
        log_probabilities=log_probabilities,
        layer_loop=layer_loop,
        vocab_size=vocab_size,
    )
    platform = sharding.device_of(request.mesh).platform
    with preparation.mesh_context(request.mesh):
        output = loop.program_for(platform)(
            request.params, request.inputs, objective, warpers_.in_order(warpers), plan=request.plan
        )
    output = jax.tree.map(np.asarray, output)
    batch = request.batch
    check_finite(output.bad[:, :batch], output.step, objective)
    return Generation(
        tokens=output.tokens[:batch, :max_new_tokens],
        lengths=output.lengths[:batch],
        ended=output.ended[:batch],
        log_probabilities=output.log_probabilities[:, :batch] if log_probabilities else None,
    )


class Request(NamedTuple):
    """A validated generation, placed on the devices: the arguments of its program. batch: rows without padding."""

    params: tuple[Any, ...]
    inputs: loop.Inputs
    plan: loop.Plan
    mesh: Mesh | None
    batch: int


def make_request(
    models: Sequence[Model],
    prompts: Any,
    *,
    objective: Objective,
    max_new_tokens: int,
    seed: int = 0,
    attention_mask: Any = None,
    eos_id: int | Sequence[int] | None = None,
    row_ids: Any = None,
    samples: int = 1,
    prompt_slots: int = 0,
    cache: str = "own",
    log_probabilities: bool = False,
    layer_loop: str | None = None,
    vocab_size: int | None = None,
) -> Request:
    """Validates the arguments of `generate`, pads them to static shapes and places them on the models' mesh."""
    models = tuple(models)
    _check_models(models, objective, cache, vocab_size)
    prompts, masks = _prompts(models, prompts, attention_mask)
    for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise UserError(f"{name}: found {value}, expected at least 1")
    batch = len(prompts[0]) * samples
    _check_lengths(models, masks, max_new_tokens)
    mesh = preparation.mesh_of(models)
    same_inputs = cache == "own" and all(np.array_equal(x, arrays[0]) for arrays in (prompts, masks) for x in arrays)
    prepared = models[0].params
    if not isinstance(prepared, Prepared):
        prepared = preparation.prepare(models, layer_loop=layer_loop, side_by_side=same_inputs)[0].params
    elif prepared.side_by_side and not same_inputs:
        raise ValueError("models prepared side by side must read the same prompts and have a cache each")
    prompt_rows = padded_sizes.round_up(len(prompts[0]), sharding.batch_shards(mesh))
    rows = prompt_rows * samples
    may_join = cache == "own" and not objective.needs_context
    same_weights = may_join and preparation.can_be_read_as_one(prepared, rows, mesh)
    lengths = [prompt.shape[1] for prompt in prompts]
    plan = make_plan(
        prepared.configs,
        [max(lengths)] * len(lengths) if same_weights else lengths,
        max_new_tokens,
        cache=cache,
        same_weights=same_weights,
        log_probabilities=log_probabilities,
        samples=samples,
        prompt_slots=prompt_slots,
        vocab_size=0 if all(model.cfg.vocab_size == vocab_size for model in models) else vocab_size or 0,
    )
    inputs = loop.Inputs(
        prompts=tuple(_pad_to(x, prompt_rows, slots + 1) for x, slots in zip(prompts, plan.prompt_slots, strict=True)),
        masks=tuple(_pad_to(x, prompt_rows, slots + 1) for x, slots in zip(masks, plan.prompt_slots, strict=True)),
        row_ids=_row_ids(row_ids, batch, rows),
        live=np.arange(rows) < batch,
        seed=_seed(seed),
        limit=np.int32(max_new_tokens),
        eos_ids=_eos_ids(models[0].cfg, eos_id),
        pad=_pad_id(models[0].cfg, eos_id),
    )
    trees = prepared.trees[:1] if same_weights else prepared.trees
    return Request(trees, _place(inputs, mesh), plan, mesh, batch)


def make_plan(
    configs: Sequence[ModelConfig],
    prompt_lengths: Sequence[int],
    max_new_tokens: int,
    cache: str = "own",
    same_weights: bool = False,
    log_probabilities: bool = False,
    samples: int = 1,
    prompt_slots: int = 0,
    vocab_size: int = 0,
) -> loop.Plan:
    """The static part of a generation. configs: those of a `WeightLayout`; prompt_lengths: T for each model."""
    slots = tuple(
        max(length - 1, min(max(padded_sizes.prompt_slots(length - 1), prompt_slots), cfg.max_position_embeddings))
        for length, cfg in zip(prompt_lengths, configs, strict=True)
    )
    single_segment = samples == 1 and cache == "own" and all(cfg.decode_kernel for cfg in configs)
    return loop.Plan(
        configs=tuple(configs),
        prompt_slots=slots,
        segments=loop.plan_segments(max(slots) if samples == 1 else 0, max_new_tokens, single_segment),
        official_cache=cache == "official",
        same_weights=same_weights,
        log_probabilities=log_probabilities,
        samples=samples,
        vocab_size=vocab_size,
    )


def _check_models(models: Sequence[Model], objective: Objective, cache: str, vocab_size: int | None) -> None:
    objective.check_models(len(models))
    if cache not in CACHES:
        raise UserError(f"cache: found {cache!r}, expected 'own' or 'official'")
    first = models[0].cfg
    for index, (_, cfg) in enumerate(models):
        if vocab_size is not None and cfg.vocab_size < vocab_size:
            raise UserError(
                f"models: model {index} ({cfg.family}) has a vocabulary of {cfg.vocab_size} tokens, but its tokenizer "
                f"has {vocab_size}"
            )
        if vocab_size is None and cfg.vocab_size != first.vocab_size:
            raise UserError(
                f"models: model {index} ({cfg.family}) has a vocabulary of {cfg.vocab_size} tokens, but model 0 "
                f"({first.family}) has {first.vocab_size}; an objective combines logits token by token"
            )
        shapes = [(c.num_layers, c.num_kv_heads, c.head_size, c.local, c.window) for c in (first, cfg)]
        if cache == "official" and shapes[0] != shapes[1]:
            raise UserError(
                f"cache 'official': model {index} has {shapes[1]} layers, key-value heads, head size and windows, "
                f"but model 0 has {shapes[0]}; only models of equal shape can share keys and values"
            )


def _prompts(models, prompts, attention_mask) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each model's prompts, int32 [B,T], and masks, bool [B,T], left-padded."""
    count = len(models)
    prompts = _per_model(prompts, count, "prompts")
    masks = [None] * count if attention_mask is None else _per_model(attention_mask, count, "attention_mask")
    result = []
    for index, (model, tokens, mask) in enumerate(zip(models, prompts, masks, strict=True)):
        if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"prompts: found {tokens.dtype} {tokens.shape} for model {index}, expected integers [B,T]")
        if len(tokens) != len(prompts[0]):
            raise UserError(f"prompts: {len(tokens)} rows for model {index}, but {len(prompts[0])} for model 0")
        mask = np.ones(tokens.shape, bool) if mask is None else mask != 0
        if mask.shape != tokens.shape:
            raise UserError(f"attention_mask: found shape {mask.shape} for model {index}, expected {tokens.shape}")
        if not mask.any(1).all():
            raise UserError(f"attention_mask: row {int(np.argmin(mask.any(1)))} has no real token")
        invalid = mask & ((tokens < 0) | (tokens >= model.cfg.vocab_size))
        if invalid.any():
            row, column = (int(i) for i in np.argwhere(invalid)[0])
            raise UserError(
                f"prompts: token {int(tokens[row, column])} in row {row}, but model {index} has a vocabulary of "
                f"{model.cfg.vocab_size}"
            )
        result.append(_left_padded(tokens, mask))
    return [tokens for tokens, _ in result], [mask for _, mask in result]


def _per_model(value: Any, count: int, name: str) -> list[np.ndarray]:
    """A list of 2-D arrays holds one for each model; anything else is shared by all models."""
    if not isinstance(value, list | tuple) or np.ndim(value[0]) != 2:
        return [np.asarray(value)] * count
    if len(value) != count:
        raise UserError(f"{name}: found {len(value)} arrays, expected one for each of {count} models")
    return [np.asarray(item) for item in value]


def _left_padded(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves real tokens to the right end and drops columns that are padding in every row."""
    order = np.argsort(mask, axis=1, kind="stable")
    longest = int(mask.sum(1).max())
    tokens, mask = (np.take_along_axis(x, order, 1)[:, -longest:] for x in (tokens, mask))
    return np.where(mask, tokens, 0).astype(np.int32), mask


def _check_lengths(models: Sequence[Model], masks: Sequence[np.ndarray], max_new_tokens: int) -> None:
    for index, (model, mask) in enumerate(zip(models, masks, strict=True)):
        cfg, prompt = model.cfg, mask.shape[1]
        if prompt + max_new_tokens > cfg.max_position_embeddings:
            raise UserError(
                f"prompts: the longest has {prompt} tokens and max_new_tokens is {max_new_tokens}, together "
                f"{prompt + max_new_tokens}, but the context of model {index} ({cfg.family}) is "
                f"{cfg.max_position_embeddings}"
            )


def _pad_to(x: np.ndarray, rows: int, slots: int) -> np.ndarray:
    """Pads with zero columns on the left and copies of the last row at the bottom."""
    x = np.pad(x, ((0, 0), (slots - x.shape[1], 0)))
    return np.pad(x, ((0, rows - x.shape[0]), (0, 0)), mode="edge")


def _row_ids(row_ids: Any, batch: int, rows: int) -> np.ndarray:
    row_ids = np.arange(batch) if row_ids is None else np.asarray(row_ids)
    if row_ids.shape != (batch,) or not np.issubdtype(row_ids.dtype, np.integer):
        raise UserError(f"row_ids: found {row_ids.dtype} {row_ids.shape}, expected {batch} integers, one a row")
    return np.pad(row_ids.astype(np.int32), (0, rows - batch))


def _seed(seed: int) -> np.uint32:
    if isinstance(seed, bool) or not 0 <= int(seed) < 1 << 32:
        raise UserError(f"seed: found {seed!r}, expected a whole number from 0 to 2**32 - 1")
    return np.uint32(seed)


def _eos_ids(cfg: ModelConfig, eos_id: int | Sequence[int] | None) -> np.ndarray:
    return np.atleast_1d(np.asarray(cfg.eos_token_ids if eos_id is None else eos_id, np.int32))


def _pad_id(cfg: ModelConfig, eos_id: int | Sequence[int] | None) -> np.int32:
    candidates = (cfg.pad_token_id, *_eos_ids(cfg, eos_id), 0)
    return np.int32(next(token for token in candidates if token is not None and 0 <= token < cfg.vocab_size))


def _place(inputs: loop.Inputs, mesh: Mesh | None) -> loop.Inputs:
    """Shards rows over the mesh's batch axes; every process passes the same inputs."""
    if mesh is None:
        return inputs
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    targets = loop.Inputs(
        prompts=rows, masks=rows, row_ids=rows, live=rows, seed=whole, limit=whole, eos_ids=whole, pad=whole
    )
    return jax.tree.map(lambda target, part: sharding.put(part, target), targets, inputs)


def check_finite(bad: np.ndarray, step: Any, objective: Objective) -> None:
    """Raises UserError if a model's logits or the objective's scores (last row of bad, bool [M+1,B]) were bad."""
    failures = np.argwhere(bad.T)
    if len(failures):
        row, source = (int(i) for i in failures[0])
        problem = (
            f"model {source} gives logits that are not finite"
            if source < len(bad) - 1
            else f"objective {objective} leaves no token"
        )
        raise UserError(f"generate: {problem} (NaN or no maximum), first in row {row} at new token {int(step) - 1}")
