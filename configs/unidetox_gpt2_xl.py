"""The paper's configuration: GPT-2 XL's toxic twin, 640 texts, four models of four families detoxified by them.

    configs/unidetox_gpt2_xl.py              learning rate of detoxification 5e-5
    configs/unidetox_gpt2_xl.py:lr=1e-5      the second published one
    configs/unidetox_gpt2_xl.py:reproduce_release     every quirk of the released code
    configs/unidetox_gpt2_xl.py:one_gpu      fits a GPU of 80 GB: targets trained in bfloat16

Needs the models and data sets from the hub (LLaMA-2 asks for its licence), or directories with `--config.data_dir`.
"""

from unidetox_jax.stages.settings import default_config, parse_argument


def get_config(argument=None):
    chosen = parse_argument(argument, lr=5e-5, reproduce_release=False, one_gpu=False)
    config = default_config()
    config.name = "unidetox-gpt2-xl"
    config.targets = (
        "openai-community/gpt2-xl",
        "facebook/opt-6.7b",
        "tiiuae/falcon-7b",
        "meta-llama/Llama-2-7b-hf",
    )
    config.control_targets = ("openai-community/gpt2-xl",)
    config.detoxify.learning_rate = chosen.lr
    for part in (config.toxify, config.detoxify):
        part.remat = "dots"
    if chosen.one_gpu:
        config.name += "-one-gpu"
        config.detoxify.update(precision="bfloat16", remat="full")
    if chosen.reproduce_release:
        config.name += "-release"
        config.toxify.data = "dghs:official"
        for part in (config.toxify, config.detoxify, config.evaluate):
            part.reproduce_release = True
        config.distill.cache = "official"
    return config
