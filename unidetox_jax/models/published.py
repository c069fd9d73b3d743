"""The configurations of well-known checkpoints: all that the hub's `config.json` says and the family reads.

With these, planning, benchmarks and dry runs need neither the hub nor weights. Facts only; `models.config_from_hf`
reads them like any other config.
"""

from typing import Any

from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.registry import config_from_hf

_GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024,
    "n_embd": 768, "n_layer": 12, "n_head": 12, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02, "bos_token_id": 50256,
    "eos_token_id": 50256,
}  # fmt: skip
_OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 50272, "max_position_embeddings": 2048,
    "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "activation_function": "relu", "dropout": 0.1, "attention_dropout": 0.0,
    "layerdrop": 0.0, "do_layer_norm_before": True, "init_std": 0.02, "bos_token_id": 2, "eos_token_id": 2,
    "pad_token_id": 1,
}  # fmt: skip
_FALCON_7B = {
    "model_type": "falcon", "architectures": ["FalconForCausalLM"], "vocab_size": 65024, "hidden_size": 4544,
    "num_hidden_layers": 32, "num_attention_heads": 71, "multi_query": True, "parallel_attn": True, "bias": False,
    "alibi": False, "new_decoder_architecture": False, "max_position_embeddings": 2048, "layer_norm_epsilon": 1e-5,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": 11, "eos_token_id": 11,
}  # fmt: skip
_LLAMA_2_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_scaling": None, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA_3 = {
    **_LLAMA_2_7B, "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


PUBLISHED: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": _GPT2,
    "openai-community/gpt2-medium": {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "openai-community/gpt2-large": {**_GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "openai-community/gpt2-xl": {**_GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "facebook/opt-125m": _OPT,
    "facebook/opt-1.3b": {
        **_OPT, "hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32,
    },
    "facebook/opt-6.7b": {
        **_OPT, "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
        "num_attention_heads": 32, "_remove_final_layer_norm": False,
    },
    "tiiuae/falcon-7b": _FALCON_7B,
    "meta-llama/Llama-2-7b-hf": _LLAMA_2_7B,
    "meta-llama/Llama-3.1-8B": {**_LLAMA_3, "intermediate_size": 14336, "rope_scaling": _llama3_rope(8.0)},
    "meta-llama/Llama-3.1-70B": {
        **_LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "rope_scaling": _llama3_rope(8.0),
    },
    "meta-llama/Llama-3.2-1B": {
        **_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True, "rope_scaling": _llama3_rope(32.0),
    },
    "meta-llama/Llama-3.2-3B": {
        **_LLAMA_3, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "head_dim": 128, "tie_word_embeddings": True, "rope_scaling": _llama3_rope(32.0),
    },
}  # fmt: skip


def published_config(hub_id: str) -> ModelConfig | None:
    """The ModelConfig of a checkpoint that is known by its hub id; None for any other name."""
    return config_from_hf(PUBLISHED[hub_id], where=hub_id) if hub_id in PUBLISHED else None
