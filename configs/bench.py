"""How fast this machine decodes, trains and evaluates, beside PyTorch where that is asked for.

    unidetox bench --config=configs/bench.py                                            GPT-2 small's shape
    unidetox bench --config=configs/bench.py --config.bench.against_torch=True          PyTorch's `generate` beside it
    unidetox bench --config=configs/bench.py:xl                                         GPT-2 XL's, for accelerators
    unidetox bench --config=configs/bench.py --config.bench.what="('train',)"           one benchmark alone

Weights are random: they change no shape and no time. Measure on a machine that does nothing else.
"""

from unidetox_jax.stages.settings import default_config, parse_argument


def get_config(argument=None):
    chosen = parse_argument(argument, xl=False)
    config = default_config()
    config.name = "bench"
    config.bench.update(what=("decode",), model="openai-community/gpt2", batch_sizes=(16, 64), new_tokens=128)
    if chosen.xl:
        config.bench.update(model="openai-community/gpt2-xl", batch_sizes=(128, 256, 320), new_tokens=255)
    return config
