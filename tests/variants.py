"""All published variants of all families, with the options of the hub's configs at sizes that tests can afford."""

import os

import jax
import numpy as np

from unidetox_jax import models, sharding

EVERY = "UNIDETOX_EVERY_VARIANT" in os.environ  # launch/proofs.sh families sets it
TOLERANCE = 2e-4

SMALL = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
GPT2 = {"model_type": "gpt2", **SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 640}
OPT = {
    "model_type": "opt", **SMALL, "pad_token_id": 1, "bos_token_id": 2, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "ffn_dim": 96, "max_position_embeddings": 640, "word_embed_proj_dim": 32,
}  # fmt: skip
FALCON = {
    "model_type": "falcon", **SMALL, "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5,
    "max_position_embeddings": 640,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", **SMALL, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 640, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma", **SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 640,
}  # fmt: skip
GEMMA3 = {**GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window": 5}
PHI3 = {**LLAMA, "model_type": "phi3", "pad_token_id": 0}
GPT_NEOX = {
    "model_type": "gpt_neox", **SMALL, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 640,
}  # fmt: skip
NEW_FALCON = {
    **FALCON,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "hidden_size": 32,
    "new_decoder_architecture": True,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

VARIANTS = {
    "gpt2": GPT2,
    "gpt2-scale-by-layer": {**GPT2, "scale_attn_by_inverse_layer_idx": True},
    "gpt2-upcast-gelu": {**GPT2, "reorder_and_upcast_attn": True, "activation_function": "gelu", "n_inner": 72},
    "gpt2-unscaled-untied": {**GPT2, "scale_attn_weights": False, "tie_word_embeddings": False},
    "opt-125m": OPT,
    "opt-350m": {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "opt-no-final-norm": {**OPT, "_remove_final_layer_norm": True},
    "opt-no-bias": {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "falcon-7b": FALCON,
    "falcon-40b": NEW_FALCON,
    "falcon-11b": {**NEW_FALCON, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 112, "rope_theta": 500042.0,
                   "tie_word_embeddings": False},
    "falcon-rw-1b": {**FALCON, "num_attention_heads": 8, "hidden_size": 64, "alibi": True, "multi_query": False,
                     "parallel_attn": False, "bias": True},
    "falcon-rw-5-heads": {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "llama-1": {**LLAMA, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "llama-2-linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}, "hidden_act": "gelu"},
    "llama-2-dynamic": {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama-3": {**LLAMA, "num_key_value_heads": 2, "rope_theta": 500000.0},
    "llama-3.1": {**LLAMA, "num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama-3.2-transformers-5": {**LLAMA, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True,
                                 "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "gemma-3": {**GEMMA3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "gemma-3-scaled": {**GEMMA3, "num_hidden_layers": 4, "sliding_window_pattern": 3, "query_pre_attn_scalar": 9,
                       "final_logit_softcapping": 2.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                       "rope_theta": 1e6, "rope_local_base_freq": 1e4, "tie_word_embeddings": False},
    "qwen-2": {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 4},
    "qwen-2-window": {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 10,
                      "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen-3": {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True},
    "mistral-1": {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "mistral-3": {**LLAMA, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "gemma-1": {**GEMMA, "hidden_act": "gelu"},
    "gemma-2": {**GEMMA, "model_type": "gemma2", "num_hidden_layers": 3, "query_pre_attn_scalar": 9,
                "sliding_window": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "olmo-2": {**LLAMA, "model_type": "olmo2", "num_key_value_heads": 2, "attention_bias": True},
    "olmo-3": {**LLAMA, "model_type": "olmo3", "sliding_window": 10, "rope_theta": 500000.0,
               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
               "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64,
                                "attention_factor": 1.2079441541679836}},
    "phi-3": {**PHI3, "sliding_window": 10, "num_key_value_heads": 2},
    "phi-4-mini": {**PHI3, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
                   "original_max_position_embeddings": 512, "partial_rotary_factor": 0.75,
                   "tie_word_embeddings": True,
                   "rope_scaling": {"type": "longrope", "long_factor": [4.0] * 6,
                                    "short_factor": [1.0, 1.02, 1.1, 1.3, 1.7, 2.0]}},
    "pythia": {**GPT_NEOX, "rotary_pct": 0.25, "hidden_act": "gelu_fast"},
    "neox-sequential": {**GPT_NEOX, "rotary_pct": 1.0, "rotary_emb_base": 5000, "use_parallel_residual": False,
                        "attention_bias": False},
    "llama-biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
}  # fmt: skip


def chosen(*sample: str) -> tuple[str, ...]:
    """The variants that a test covers: a sample, or all of them."""
    return tuple(VARIANTS) if EVERY else sample


def doubled(config: dict) -> dict:
    """The config with twice as many heads and an even vocabulary, so that a mesh can split them."""
    width, heads = ("n_embd", "n_head") if "n_embd" in config else ("hidden_size", "num_attention_heads")
    return {**config, width: 2 * config[width], heads: 2 * config[heads], "vocab_size": 128}


def init_on(cfg, mesh, param_dtype: str = "float32"):
    """`models.init` of key 0, then on the mesh: a program of one device is smaller, and kept on disk."""
    params = models.init(cfg, jax.random.key(0), None, param_dtype)
    return params if mesh is None else jax.device_put(params, sharding.param_shardings(params, mesh))


def assert_near(ours, expected, record, what: str, cfg, tolerance: float = TOLERANCE):
    """Asserts the tolerance and records the deviation (pytest's `record_property`) for `launch/proofs.sh families`."""
    deviation = float(np.abs(ours - expected).max())
    record(f"{what}, {cfg.family}", deviation)
    assert deviation <= tolerance


def torch_model(config: dict, seed: int = 0, dtype: str = "float32"):
    """A PyTorch model of the config with random weights, including biases and norms, so that tests exercise them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    options = {name: value for name, value in config.items() if name != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **options),
        # transformers' eager Falcon adds ALiBi twice, to the mask and the scores; its sdpa has no soft caps
        attn_implementation="eager" if config["model_type"] == "gemma2" else "sdpa",
        dtype=torch.float32,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(
                    torch.randn_like(parameter) * 0.1 + ("norm" in name or "ln_" in name) * ("weight" in name)
                )
            else:
                parameter.mul_(4.0)
    return model.to(getattr(torch, dtype)).eval()


def params_from_torch(model, cfg) -> dict:
    """A PyTorch model's weights as our parameters, by the key table."""
    tensors = {name_in_file(name, cfg): tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    return params_from_tensors(tensors, cfg, models.key_table(cfg))


def name_in_file(name: str, cfg) -> str:
    """A parameter's name in transformers' checkpoints."""
    return "embed_out.weight" if (name, cfg.family) == ("lm_head.weight", "gpt_neox") else name


def params_from_tensors(tensors: dict[str, np.ndarray], cfg, table) -> dict:
    """Our parameter tree from Hugging Face's tensors (or gradients) by name."""
    tree: dict = {}
    for key in table:
        if "{layer}" in key.hf:
            layers = [key.split(tensors[key.hf.format(layer=layer)]) for layer in range(cfg.num_layers)]
            leaves = [np.stack(arrays) for arrays in zip(*layers, strict=True)]
        else:
            leaves = key.split(tensors[key.hf])
        for path, leaf in zip(key.ours, leaves, strict=True):
            *parents, last = path.split("/")
            node = tree
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = leaf
    return tree
