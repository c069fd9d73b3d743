"""UniDetox for JAX: contrastive decoding, dataset distillation and detoxification of any language model.

The steps of the method are functions of this package (`load`, `finetune`, `distill`, `generate`, `evaluate`, `save`,
`save_adapter`: see `method`), imported on first use.
"""

__version__ = "0.1.0"
__all__ = ["LanguageModel", "Lora", "distill", "evaluate", "finetune", "generate", "load", "save", "save_adapter"]


def __getattr__(name: str):
    if name in __all__:
        from unidetox_jax import method

        return getattr(method, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
