"""Draws one token a row from scores, inside the compiled loop; the noise belongs to the token id.

B batch, V vocabulary, k of top-k. It is not `jax.random.categorical`, because:

- A row's key is fold_in(fold_in(key(seed), row id), step), and a candidate's noise is the Threefry hash of that
  key and the token's id. So it depends on seed, row, step and id and on nothing else: not on the batch, the
  mesh, the candidate's rank, nor on which other tokens are candidates (noise by position among candidates
  sorted by id would shift for all that follow when one borderline candidate comes or goes). Rounding changes
  a draw only where two perturbed scores nearly tie. It costs no more: 0.06 ms for 16 rows of 50.
- With top-k, the other warpers act on the candidates alone. On CPU `lax.top_k` finds them; both of its outputs must
  stay in use and uncut, otherwise XLA makes it a sort of the vocabulary, eighty times slower. On GPUs
  and TPUs it always is: there the best blocks of the vocabulary are found first, and sorted alone (`block_top_k`).
- Without top-k, one uniform number a row goes through the inverse of the cumulative distribution, taken by blocks of
  the vocabulary: two passes, a twentieth of the time of Gumbel noise for every token.
- Under `jax.set_mesh`, a vocabulary split over the axis `model` is searched part by part; whole scores are never
  gathered.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from unidetox_jax import sharding
from unidetox_jax.decoding import warpers as warpers_
from unidetox_jax.decoding.warpers import Greedy, MinP, Temperature, TopK, TopP, Warper

_BLOCK = 256  # tokens of the vocabulary summed together by the inverse of the distribution
BLOCKS = 128, 16  # tokens that `block_top_k` compares by their best; of 50,257 it sorts 393, 408 and 816 for a k of 51
_SMALL_VOCABULARY = 4096  # tokens, sorted in no time
_ROW_STREAM = 0xFFFFFFFF  # folded in for a row's uniform number; no token has this id


def row_keys(seed: jax.typing.ArrayLike, row_ids: jax.Array) -> jax.Array:
    """One key a row: int32 [B] → keys [B]; Threefry, whatever JAX's default is: the same on every backend."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed, impl="threefry2x32"), row_ids)


def step_keys(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """The rows' keys for one step: keys [B], the new token's index (a number, or int32 [B]) → keys [B]."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(step, jnp.uint32), keys.shape))


def sample(scores: jax.Array, warpers: Sequence[Warper], keys: jax.Array) -> jax.Array:
    """One token a row from softmax(warped scores).

    The distribution is that of `warpers.apply`, exactly: a row whose k-th score ties with the next, where more than
    k tokens survive, takes the way without candidates.

    Args:
      scores: float [B,V], logits; −inf excludes a token. At least one finite entry a row.
      warpers: in any order; they act in the order of `warpers.in_order`. `Greedy` needs no key.
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
    # One more than k, to see whether the k-th ties with it; picked by reductions, as a slice would mean a sort.
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
    # u in (0, 1): small u, the large noise that decides a draw, keeps all 32 bits; above, 24 are enough.
    u = jnp.minimum(bits * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-u))


def _hash(keys, ids):
    """keys [B], int [B,k] → uint32 [B,k], uniform bits."""
    # A Threefry key folded with a number is the hash of both: 64 uniform bits, of which 32 are used.
    return jax.random.key_data(jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, ids))[..., 0]


def top_candidates(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest scores of each row, ties by the lower id: float32 [B,V] → float32 [B,k], token ids int32 [B,k].

    Where the mesh splits the vocabulary, each device finds its own k, and the k largest of those are the
    answer. Use both outputs, whole: see above.
    """
    rows, model, split = _mesh_axes(scores.shape)

    def local(scores):
        part = scores.shape[-1]
        values, ids = _top_k(scores, min(k, part))
        if model:
            ids = ids + lax.axis_index(model) * part
            values, ids = (lax.all_gather(x, model, axis=1, tiled=True) for x in (values, ids))
            # In the order of devices, hence of ids: ties go to the lower id again.
            values, places = lax.top_k(values, k)
            ids = jnp.take_along_axis(ids, places, -1)
        return values, ids

    if split:
        local = jax.shard_map(
            local,
            in_specs=PartitionSpec(rows, model),
            out_specs=PartitionSpec(rows, None),
            check_vma=False,
        )
    return local(scores)


def _top_k(scores, k):
    return lax.top_k(scores, k) if sharding.device_of().platform == "cpu" else block_top_k(scores, k)


def block_top_k(scores: jax.Array, k: int, blocks: Sequence[int] = BLOCKS) -> tuple[jax.Array, jax.Array]:
    """What `lax.top_k` gives, ties included, without a sort of the vocabulary: float32 [B,V] → float32 [B,k], int32
    [B,k].

    The k best are among the k blocks of the largest maxima (of equal ones the first), as each of those has a token that
    is at least as good as any outside. Blocks get smaller from one round to the next.
    """
    values, ids = scores, None
    for size in blocks:
        count = -(-values.shape[1] // size)
        if count <= k:
            continue
        values = jnp.pad(values, ((0, 0), (0, count * size - values.shape[1])), constant_values=-jnp.inf)
        values = values.reshape(-1, count, size)
        _, best = lax.top_k(values.max(-1), k)
        best = jnp.sort(best, -1)[..., None]  # by id, so that the next round meets ties in their order
        values = jnp.take_along_axis(values, best, 1).reshape(-1, k * size)
        places = (best * size + jnp.arange(size)).reshape(-1, k * size)
        ids = places if ids is None else jnp.take_along_axis(ids, places, 1)
    values, places = lax.top_k(values, k)
    return values, places if ids is None else jnp.take_along_axis(ids, places, 1)


def _candidates(scores, k):
    """What `top_candidates` gives, but ties in any order. On CPU `lax.top_k` takes half the time where what is likely
    stands in front, and in a small vocabulary that is done by putting what is likely in most rows there."""
    if sharding.device_of().platform != "cpu" or scores.shape[-1] > _SMALL_VOCABULARY or _mesh_axes(scores.shape)[1]:
        return top_candidates(scores, k)
    order = jnp.argsort(-scores.mean(0)).astype(jnp.int32)
    values, places = top_candidates(scores[:, order], k)
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
                upto = (rank.T >= rank).astype(jnp.float32)  # as a product: cumulative sums are slow on CPU
                mass = jnp.dot(jax.nn.softmax(values, -1), upto, precision="highest")
                kept = (mass > tail) | (rank == 0)
                values = jnp.where(kept, values, -jnp.inf)
    values += token_noise(keys, ids)
    best = values == values.max(-1, keepdims=True)
    return jnp.min(ids, -1, where=best, initial=jnp.iinfo(jnp.int32).max)  # a third of the time of an argmax on CPU


def _in_order(values, ids):
    """Candidates by descending (value, id), the reverse of the whole vocabulary's order in top-p. They come by
    descending value, ties in any order: most steps need no sort."""
    tied = jnp.any((values == jnp.roll(values, 1, -1)) & (values > -jnp.inf))
    return lax.cond(tied, lambda: tuple(x[:, ::-1] for x in lax.sort((values, ids), num_keys=2)), lambda: (values, ids))


def _sample_vocabulary(scores, warpers, keys):
    """float32 [B,V] → int32 [B], with any warpers, over the whole vocabulary."""
    scores = warpers_.apply(warpers, scores)
    stream = jnp.full((*keys.shape, 1), _ROW_STREAM, jnp.uint32)
    uniform = (_hash(keys, stream)[:, 0] >> 8).astype(jnp.float32) * 2.0**-24
    rows, model, split = _mesh_axes(scores.shape)
    inverse = lambda scores, uniform: inverse_cdf(scores, uniform, model)  # noqa: E731
    if split:
        inverse = jax.shard_map(
            inverse,
            in_specs=(PartitionSpec(rows, model), PartitionSpec(rows)),
            out_specs=PartitionSpec(rows),
            check_vma=False,
        )
    return inverse(scores, uniform)


def inverse_cdf(scores: jax.Array, uniform: jax.Array, axis: str | None = None) -> jax.Array:
    """The first token, by id, at which the cumulative distribution of softmax(scores) exceeds a number in [0, 1).

    Args:
      scores: float32 [B,V]; inside `shard_map` over `axis`, the local part of the vocabulary.
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
        parts = lax.all_gather(sums.sum(-1), axis, axis=1)
        part, uniform = _step_into(parts, uniform * parts.sum(-1))
        first, owned = lax.axis_index(axis) * size, part == lax.axis_index(axis)
    else:
        uniform = uniform * sums.sum(-1)
    block, uniform = _step_into(sums, uniform)
    place, _ = _step_into(jnp.take_along_axis(mass, block[:, None, None], 1)[:, 0], uniform)
    token = first + block * _BLOCK + place
    return lax.psum(jnp.where(owned, token, 0), axis) if axis else token


def _step_into(mass, target):
    """Where a cumulative mass passes the target: float32 [B,n], [B] → the index [B], and what is left of
    the target within it [B]."""
    upto = jnp.cumsum(mass, -1)
    # A cumulative sum in floating point may pass the target on an entry of no mass, or nowhere: neither is
    # an answer.
    passed = (upto > target[:, None]) & (mass > 0)
    index = jnp.where(passed.any(-1), jnp.argmax(passed, -1), jnp.argmax(mass, -1)).astype(jnp.int32)
    before = (jnp.take_along_axis(upto, index[:, None], -1) - jnp.take_along_axis(mass, index[:, None], -1))[:, 0]
    return index, jnp.maximum(target - before, 0.0)


def _mesh_axes(shape: tuple[int, ...]) -> tuple[tuple[str, ...] | None, str | None, bool]:
    """How the mesh splits scores [B,V]: the rows' axes, the vocabulary's axis, and whether there is a mesh.

    What an axis does not divide stays whole on it, but is still computed device by device: left to
    the partitioner, a top_k becomes a sort.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None, None, False
    rows = tuple(name for name in ("data", "fsdp") if mesh.shape.get(name, 1) > 1)
    parts = mesh.shape.get("model", 1)
    return (
        rows if rows and shape[0] % math.prod(mesh.shape[name] for name in rows) == 0 else None,
        "model" if parts > 1 and shape[1] % parts == 0 else None,
        True,
    )
