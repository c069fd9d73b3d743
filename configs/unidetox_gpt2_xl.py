"""The paper's configuration: GPT-2 XL's toxic twin, 640 texts, four models of four families detoxified by them.

    configs/unidetox_gpt2_xl.py                       detoxification at learning rate 5e-5
    configs/unidetox_gpt2_xl.py:lr=1e-5               the other published one
    configs/unidetox_gpt2_xl.py:reproduce_release     with every quirk of the released code
    configs/unidetox_gpt2_xl.py:one_gpu               for one GPU of 80 GB: targets trained in bfloat16

Needs models and data sets from the hub (LLaMA-2 requires accepting its licence), or `--config.data_dir=DIR`.
"""

from unidetox_jax.stages.settings import default_config, parse_argument


def get_config(argument=None):
    options = parse_argument(argument, lr=5e-5, reproduce_release=False, one_gpu=False)
    config = default_config()
    config.name = "unidetox-gpt2-xl"
    config.targets = (
        "openai-community/gpt2-xl",
        "facebook/opt-6.7b",
        "tiiuae/falcon-7b",
        "meta-llama/Llama-2-7b-hf",
    )
    config.control_targets = ("openai-community/gpt2-xl",)
    config.detoxify.learning_rate = options.lr
    for section in (config.toxify, config.detoxify):
        section.remat = "dots"
    if options.one_gpu:
        config.name += "-one-gpu"
        config.detoxify.update(precision="bfloat16", remat="full")
    if options.reproduce_release:
        config.name += "-release"
        config.toxify.data = "dghs:official"
        for section in (config.toxify, config.detoxify, config.evaluate):
            section.reproduce_release = True
        config.distill.cache = "official"
    return config
