"""What was gained and lost: toxicity, perplexity, diversity, knowledge, batched and on the device.

A metric is a class in a file of its own, named in `metrics`. Modules are imported when they are first asked for.
"""

import importlib

__all__ = ["diversity", "likelihood", "metrics", "mmlu", "perplexity", "prompts", "scorers", "toxicity"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
