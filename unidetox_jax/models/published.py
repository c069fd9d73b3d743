"""Configurations of well-known checkpoints, so that planning, benchmarks and dry runs need neither the hub nor weights.

The options of the hub's `config.json` that the family reads, for `models.config_from_hf`.
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
_MISTRAL_7B = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_theta": 10000.0, "sliding_window": 4096, "initializer_range": 0.02, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_QWEN_2_5 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True,
    "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 24,
    "initializer_range": 0.02, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
}  # fmt: skip
_QWEN_3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": True, "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None,
    "use_sliding_window": False, "max_window_layers": 28, "attention_bias": False, "initializer_range": 0.02,
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_GEMMA_2B = {
    "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "vocab_size": 256000, "hidden_size": 2048,
    "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
    "head_dim": 256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "hidden_act": "gelu",
    "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0,
    "initializer_range": 0.02, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
_GEMMA_2_2B = {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": 256000, "hidden_size": 2304,
    "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
_GEMMA_3_1B = {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144, "hidden_size": 1152,
    "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 256, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None,
    "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
_OLMO_2_7B = {
    "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "vocab_size": 100352, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_theta": 500000.0, "attention_bias": False, "pad_token_id": 100277, "eos_token_id": 100257,
}  # fmt: skip
_PHI_3_MINI = {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "vocab_size": 32064, "hidden_size": 3072,
    "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None,
    "sliding_window": 2047, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000,
}  # fmt: skip


def _pythia(hidden_size: int, layers: int, heads: int, vocab_size: int = 50304) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": vocab_size,
        "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
        "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True, "tie_word_embeddings": False,
        "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 0,
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
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-v0.3": {
        **_MISTRAL_7B, "vocab_size": 32768, "rope_theta": 1000000.0, "sliding_window": None,
    },
    "Qwen/Qwen2.5-0.5B": _QWEN_2_5,
    "Qwen/Qwen2.5-7B-Instruct": {
        **_QWEN_2_5, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False, "sliding_window": 131072,
        "max_window_layers": 28, "eos_token_id": 151645,
    },
    "Qwen/Qwen3-0.6B": _QWEN_3,
    "Qwen/Qwen3-1.7B": {**_QWEN_3, "hidden_size": 2048, "intermediate_size": 6144},
    "Qwen/Qwen3-4B": {
        **_QWEN_3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "max_window_layers": 36,
    },
    "Qwen/Qwen3-8B": {
        **_QWEN_3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "max_window_layers": 36, "tie_word_embeddings": False,
    },
    "google/gemma-2b": _GEMMA_2B,
    "google/gemma-2-2b": _GEMMA_2_2B,
    "google/gemma-3-270m": {
        **_GEMMA_3_1B, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    },
    "google/gemma-3-1b-pt": _GEMMA_3_1B,
    "allenai/OLMo-2-0425-1B": {
        **_OLMO_2_7B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16,
    },
    "allenai/OLMo-2-1124-7B": _OLMO_2_7B,
    "microsoft/Phi-3-mini-4k-instruct": _PHI_3_MINI,
    "EleutherAI/pythia-70m": _pythia(512, 6, 8),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "EleutherAI/pythia-1b": _pythia(2048, 16, 8),
    "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16),
    "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, 50432),
    "EleutherAI/pythia-12b": _pythia(5120, 36, 40, 50688),
}  # fmt: skip


def published_config(hub_id: str) -> ModelConfig | None:
    """The ModelConfig of a checkpoint by its hub id; None if unknown."""
    return config_from_hf(PUBLISHED[hub_id], where=hub_id) if hub_id in PUBLISHED else None
