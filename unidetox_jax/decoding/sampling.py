"""Samples one token per row from scores, inside the compiled loop, with noise that is a function of the token id.

B batch, V vocabulary, k of top-k. It differs from `jax.random.categorical`:

- A row's key is fold_in(fold_in(key(seed), row id), step), and a candidate's noise is the Threefry hash of that key and
  the token id. It thus depends on seed, row, step and id alone, not on the batch, the mesh, the candidate's rank or the
  other candidates (with noise by position among candidates, one borderline candidate more or less would shift the noise
  of all that follow). Rounding changes a sample only if two perturbed scores nearly tie. The cost is the same: 0.06 ms
  for 16 rows of 50 candidates.
- With top-k, the other warpers act on the candidates only. They are searched in the best blocks of the vocabulary
  (`block_top_k`): GPUs and TPUs sort what they search, and on CPUs that is faster too. No output of a `lax.top_k`
  may be sliced, as XLA's CPU compiler then makes it a sort, eighty times slower.
- Without top-k, one uniform number per row goes through the inverse cumulative distribution, by blocks of the
  vocabulary: two passes, in a twentieth of the time of Gumbel noise for every token. Top-p makes some thirty passes
  more, so on CPU a few rows are taken at a time that stay in the cache: a quarter of the time for 262,144 tokens.
- Under `jax.set_mesh`, a vocabulary sharded over the axis `model` is searched per shard; scores are never gathered.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from unidetox_jax import sharding
from unidetox_jax.decoding import warpers as warpers_
from unidetox_jax.decoding.warpers import Greedy, MinP, Temperature, TopK, TopP, Warper

_BLOCK = 256  # tokens per block sum in `inverse_cdf`
BLOCKS = 128, 16  # block sizes of `block_top_k`: for k = 51 of 50,257 tokens it searches 393, 408 and 816 values
_CACHE_BYTES = 2**22  # of scores at a time on a CPU; twice or half as much is as fast
_SMALL_VOCABULARY = 2048  # tokens, cheap to sort
_ROW_STREAM = 0xFFFFFFFF  # in place of a token id, for a row's uniform number; no token has this id


def row_keys(seed: jax.typing.ArrayLike, row_ids: jax.Array) -> jax.Array:
    """One key per row: int32 [B] → keys [B]. Threefry regardless of JAX's default, so equal on all backends."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed, impl="threefry2x32"), row_ids)


def step_keys(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """The rows' keys for one step: keys [B], index of the new token (a number, or int32 [B]) → keys [B]."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(step, jnp.uint32), keys.shape))


def sample(scores: jax.Array, warpers: Sequence[Warper], keys: jax.Array) -> jax.Array:
    """Samples one token per row from softmax(warped scores).

    The distribution is exactly that of `warpers.apply`: a row whose k-th score ties with the next, so that more than k
    tokens survive, is sampled from the whole vocabulary.

    Args:
      scores: float [B,V], logits; −inf excludes a token. At least one finite entry per row.
      warpers: in any order; applied in that of `warpers.in_order`. `Greedy` needs no key.
      keys: keys [B] of `step_keys`.
    Returns: int32 [B].
    """
    scores = scores.astype(jnp.float32)
    warpers = warpers_.in_order(warpers)
    if any(isinstance(warper, Greedy) for warper in warpers):
        return jnp.argmax(scores, -1).astype(jnp.int32)
    size = scores.shape[-1]
    k = next((warper.k for warper in warpers if isinstance(warper, TopK)), size)
    if k >= size:
        return _sample_vocabulary(scores, [warper for warper in warpers if not isinstance(warper, TopK)], keys)
    # One more than k, to detect a tie with the k-th; read by reductions, as slicing would make XLA sort.
    values, ids = _candidates(scores, k + 1)
    rank = jnp.arange(k + 1)[None]
    last, next_ = (jnp.max(values, -1, where=rank == r, initial=-jnp.inf) for r in (k - 1, k))
    tied = (last == next_) & (last > -jnp.inf)
    tokens = _sample_candidates(jnp.where(rank < k, values, -jnp.inf), ids, warpers, keys)
    return lax.cond(
        jnp.any(tied),
        lambda: jnp.where(tied, _sample_vocabulary(scores, warpers, keys), tokens),
        lambda: tokens,
    )


def token_noise(keys: jax.Array, ids: jax.Array) -> jax.Array:
    """Gumbel noise of token ids: keys [B], int32 [B,k] → float32 [B,k], a function of each (key, id) alone."""
    bits = _hash(keys, ids).astype(jnp.float32)
    # u in (0, 1). Small u, whose large noise decides the sample, keeps all 32 bits; 24 are enough for the others.
    u = jnp.minimum(bits * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-u))


def _hash(keys, ids):
    """keys [B], int [B,k] → uint32 [B,k], uniform bits."""
    # Folding a number into a Threefry key hashes both to 64 uniform bits; 32 are used.
    return jax.random.key_data(jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, ids))[..., 0]


def top_candidates(scores: jax.Array, k: int, blocks: Sequence[int] = BLOCKS) -> tuple[jax.Array, jax.Array]:
    """The k largest scores of each row, of ties the lower ids: float32 [B,V] → float32 [B,k], token ids int32 [B,k].

    If the mesh shards the vocabulary, each device finds its own k candidates, of which the k largest are taken.
    Slice neither output (see the module's docstring).
    """
    rows, model, has_mesh = _mesh_axes(scores.shape)

    def local(scores):
        size = scores.shape[-1]
        values, ids = block_top_k(scores, min(k, size), blocks)
        if model:
            ids = ids + lax.axis_index(model) * size
            values, ids = (lax.all_gather(x, model, axis=1, tiled=True) for x in (values, ids))
            # Gathered in the order of devices, hence of ids: ties again go to the lower id.
            values, places = lax.top_k(values, k)
            ids = jnp.take_along_axis(ids, places, -1)
        return values, ids

    if has_mesh:
        local = jax.shard_map(
            local,
            in_specs=PartitionSpec(rows, model),
            out_specs=PartitionSpec(rows, None),
            check_vma=False,
        )
    return local(scores)


def block_top_k(scores: jax.Array, k: int, blocks: Sequence[int] = BLOCKS) -> tuple[jax.Array, jax.Array]:
    """Equal to `lax.top_k`, ties included, without sorting the vocabulary: float32 [B,V] → float32 [B,k], int32 [B,k].

    The k best tokens are in the k blocks with the largest maxima (of ties the first), since each of these has a token
    at least as good as any outside. Each round uses smaller blocks.
    """
    values, ids = scores, None
    for size in blocks:
        count = -(-values.shape[1] // size)
        if count <= k:
            continue
        values = jnp.pad(values, ((0, 0), (0, count * size - values.shape[1])), constant_values=-jnp.inf)
        values = values.reshape(-1, count, size)
        _, best = lax.top_k(values.max(-1), k)
        best = jnp.sort(best, -1)[..., None]  # by id, so that ties keep their order in the next round
        values = jnp.take_along_axis(values, best, 1).reshape(-1, k * size)
        places = (best * size + jnp.arange(size)).reshape(-1, k * size)
        ids = places if ids is None else jnp.take_along_axis(ids, places, 1)
    values, places = lax.top_k(values, k)
    return values, places if ids is None else jnp.take_along_axis(ids, places, 1)


def _candidates(scores, k):
    """`top_candidates`, but with ties in any order. On CPU `lax.top_k` takes half the time if the likely tokens come
    first, so a vocabulary too small for blocks is first sorted by the mean score over rows."""
    if sharding.device_of().platform != "cpu" or scores.shape[-1] > _SMALL_VOCABULARY or _mesh_axes(scores.shape)[1]:
        return top_candidates(scores, k)
    order = jnp.argsort(-scores.mean(0)).astype(jnp.int32)
    values, places = top_candidates(scores[:, order], k, blocks=())
    return values, order[places]


def _sample_candidates(values, ids, warpers, keys):
    """float32 [B,k] scores and int32 [B,k] ids of the top-k candidates, in any order → int32 [B]."""
    for warper in warpers:
        match warper:
            case Temperature() | MinP():
                values = warper(values)
            case TopP(tail=tail):
                values, ids = _in_order(values, ids)
                rank = jnp.arange(values.shape[-1])[None]
                at_or_below = (rank.T >= rank).astype(jnp.float32)  # a matrix product: cumsum is slow on CPU
                mass = jnp.dot(jax.nn.softmax(values, -1), at_or_below, precision="highest")
                values = jnp.where((mass > tail) | (rank == 0), values, -jnp.inf)
    values += token_noise(keys, ids)
    best = values == values.max(-1, keepdims=True)
    return jnp.min(ids, -1, where=best, initial=jnp.iinfo(jnp.int32).max)  # a third of an argmax's time on CPU


def _in_order(values, ids):
    """Sorts candidates by descending (value, id), the reverse of top-p's order over the vocabulary. They are already in
    descending order but for ties, so most steps need no sort."""
    tied = jnp.any((values == jnp.roll(values, 1, -1)) & (values > -jnp.inf))
    return lax.cond(tied, lambda: tuple(x[:, ::-1] for x in lax.sort((values, ids), num_keys=2)), lambda: (values, ids))


def _sample_vocabulary(scores, warpers, keys):
    """Samples from the whole vocabulary with any warpers: float32 [B,V] → int32 [B]."""
    stream = jnp.full((*keys.shape, 1), _ROW_STREAM, jnp.uint32)
    uniform = (_hash(keys, stream)[:, 0] >> 8).astype(jnp.float32) * 2.0**-24
    rows, model, has_mesh = _mesh_axes(scores.shape)
    if model:  # bisection needs sums over all shards, which the partitioner adds; the inverse adds them itself
        return jax.shard_map(
            functools.partial(inverse_cdf, axis=model),
            in_specs=(PartitionSpec(rows, model), PartitionSpec(rows)),
            out_specs=PartitionSpec(rows),
            check_vma=False,
        )(warpers_.apply(warpers, scores), uniform)

    def local(scores, uniform):
        return _in_cache(lambda scores, uniform: inverse_cdf(warpers_.apply(warpers, scores), uniform), scores, uniform)

    if has_mesh:
        specs = PartitionSpec(rows, None), PartitionSpec(rows)
        local = jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(rows), check_vma=False)
    return local(scores, uniform)


def _in_cache(function, scores, uniform):
    """`function` of scores [B,V] and uniform [B]; on a CPU, of as many rows at a time as its cache holds, because top-p
    passes over them some thirty times."""
    batch, size = scores.shape
    most = max(1, _CACHE_BYTES // (4 * size))
    if sharding.device_of().platform != "cpu" or batch <= most:
        return function(scores, uniform)
    rows = next(rows for rows in range(most, 0, -1) if batch % rows == 0)
    return lax.map(lambda chunk: function(*chunk), (scores.reshape(-1, rows, size), uniform.reshape(-1, rows))).ravel()


def inverse_cdf(scores: jax.Array, uniform: jax.Array, axis: str | None = None) -> jax.Array:
    """The first token id at which the cumulative distribution of softmax(scores) exceeds `uniform`, in [0, 1).

    Args:
      scores: float32 [B,V]; inside `shard_map` over `axis`, the local shard of the vocabulary.
      uniform: float32 [B].
    Returns: int32 [B]; never a token of score −inf.
    """
    batch, size = scores.shape
    blocks = -(-size // _BLOCK)
    top = scores.max(-1, keepdims=True)
    if axis:
        top = lax.pmax(top, axis)
    mass = jnp.pad(jnp.exp(scores - top), ((0, 0), (0, blocks * _BLOCK - size))).reshape(batch, blocks, _BLOCK)
    sums = mass.sum(-1)
    first: jax.typing.ArrayLike = 0
    owned: jax.typing.ArrayLike = True
    if axis:
        shard_sums = lax.all_gather(sums.sum(-1), axis, axis=1)
        shard, uniform = _locate(shard_sums, uniform * shard_sums.sum(-1))
        first, owned = lax.axis_index(axis) * size, shard == lax.axis_index(axis)
    else:
        uniform = uniform * sums.sum(-1)
    block, uniform = _locate(sums, uniform)
    offset, _ = _locate(jnp.take_along_axis(mass, block[:, None, None], 1)[:, 0], uniform)
    token = first + block * _BLOCK + offset
    return lax.psum(jnp.where(owned, token, 0), axis) if axis else token


def _locate(mass, target):
    """Where the cumulative mass exceeds the target: float32 [B,n], [B] → the index [B] and the rest of the target
    within that entry [B]."""
    cumulative = jnp.cumsum(mass, -1)
    # By rounding, the cumulative sum may exceed the target at an entry without mass, or nowhere.
    passed = (cumulative > target[:, None]) & (mass > 0)
    index = jnp.where(passed.any(-1), jnp.argmax(passed, -1), jnp.argmax(mass, -1)).astype(jnp.int32)
    before = (jnp.take_along_axis(cumulative, index[:, None], -1) - jnp.take_along_axis(mass, index[:, None], -1))[:, 0]
    return index, jnp.maximum(target - before, 0.0)


def _mesh_axes(shape: tuple[int, ...]) -> tuple[tuple[str, ...] | None, str | None, bool]:
    """How the mesh shards scores [B,V]: axes of the rows, axis of the vocabulary, and whether there is a mesh at all.

    A dimension that an axis does not divide is replicated, yet still computed per device with `shard_map`: the
    partitioner would turn top_k into a sort.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None, None, False
    rows = tuple(name for name in ("data", "fsdp") if mesh.shape.get(name, 1) > 1)
    shards = mesh.shape.get("model", 1)
    return (
        rows if rows and shape[0] % math.prod(mesh.shape[name] for name in rows) == 0 else None,
        "model" if shards > 1 and shape[1] % shards == 0 else None,
        True,
    )
