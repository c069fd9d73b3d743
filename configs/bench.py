"""Speed of decoding, training and evaluation on this machine, optionally beside PyTorch.

    unidetox bench --config=configs/bench.py                                            GPT-2 small
    unidetox bench --config=configs/bench.py --config.bench.against_torch=True          beside PyTorch's `generate`
    unidetox bench --config=configs/bench.py:xl                                         GPT-2 XL, for accelerators
    unidetox bench --config=configs/bench.py --config.bench.what="('train',)"           only this benchmark

Weights are random, which changes no times. Measure on an otherwise idle machine.
"""

from unidetox_jax.stages.settings import default_config, parse_argument


def get_config(argument=None):
    options = parse_argument(argument, xl=False)
    config = default_config()
    config.name = "bench"
    config.bench.update(what=("decode",), model="openai-community/gpt2", batch_sizes=(16, 64), new_tokens=128)
    if options.xl:
        config.bench.update(model="openai-community/gpt2-xl", batch_sizes=(128, 256, 320), new_tokens=255)
    return config
