"""The paper's method on newer models: Qwen3, Gemma 3, Llama 3.2, OLMo 2, Mistral.

    configs/modern.py            four models of 1 to 2 billion parameters and one of 7, all weights trained
    configs/modern.py:large      70 billion parameters, LoRA of rank 16, for eight GPUs or a TPU slice

The text is distilled once, from GPT-2 XL, and every model is fine-tuned on it with the same settings.
`config.detoxify.data='distilled:PATH'` uses existing text.
"""

from unidetox_jax.stages.settings import default_config, parse_argument


def get_config(argument=None):
    options = parse_argument(argument, lr=5e-5, large=False)
    config = default_config()
    config.name = "unidetox-modern"
    config.targets = (
        "Qwen/Qwen3-1.7B",
        "google/gemma-3-1b-pt",
        "meta-llama/Llama-3.2-1B",
        "allenai/OLMo-2-0425-1B",
        "mistralai/Mistral-7B-v0.3",
    )
    config.detoxify.learning_rate = options.lr
    config.toxify.remat = config.detoxify.remat = "dots"
    if options.large:
        config.name += "-large"
        config.targets = ("meta-llama/Llama-3.1-70B",)
        config.detoxify.remat = "full"
        config.detoxify.lora.rank = 16
    config.evaluate.mmlu = ("paper:1", "standard:5")
    return config
