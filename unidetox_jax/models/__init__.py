"""Language models as pure functions of (params, tokens, cfg); Flax is used only inside this package."""

from unidetox_jax.models import casting, lora, wide_heads
from unidetox_jax.models.cache import (
    Cache,
    branch_cache,
    cache_axes,
    cache_of,
    grow_cache,
    init_cache,
    share_cache_masks,
)
from unidetox_jax.models.config import ModelConfig, as_ids, default_dtype
from unidetox_jax.models.decode_attention import applies as has_decode_kernel
from unidetox_jax.models.hidden_states import decode_states, early_exit, look_ahead, prefill_states
from unidetox_jax.models.key_tables import Key
from unidetox_jax.models.parameters import Model, abstract_params, head, init, num_params, prepare
from unidetox_jax.models.published import PUBLISHED, published_config
from unidetox_jax.models.registry import config_from_hf, config_to_hf, hf_prefix, ignored_keys, key_table, stored_in_out
from unidetox_jax.models.transformer import decode_step, extend, forward, head_input, hidden_states, logits, prefill
