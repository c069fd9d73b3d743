"""Evaluation of language models: toxicity, perplexity, diversity and knowledge, batched on the device.

Each metric is a class in its own file, registered in `metrics`. Submodules are imported on first use.
"""

import importlib

__all__ = ["diversity", "likelihood", "metrics", "mmlu", "perplexity", "prompts", "scorers", "toxicity"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
