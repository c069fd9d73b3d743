"""Transformers without PyTorch, for what this package takes from it: configurations and tokenizers.

Where PyTorch is installed, transformers imports it with every configuration, which takes as long as all else that a
command imports, and no configuration uses it.
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any


class _Torch(types.ModuleType):
    """What `import torch` gives meanwhile: PyTorch is imported when something is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get("torch") is self:
            del sys.modules["torch"]
        return getattr(importlib.import_module("torch"), name)


@contextlib.contextmanager
def torch_on_demand() -> Iterator[None]:
    """Context: what is imported here imports PyTorch when it uses it."""
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None:
        yield
        return
    torch, activations = _Torch("torch"), types.ModuleType("transformers.activations")
    torch.__spec__ = spec  # by which transformers sees that it is installed
    activations.__dict__["ACT2FN"] = {}  # by which LLaMA's configuration checks a name, as a family here does
    stand_ins = {module.__name__: module for module in (torch, activations)}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def config_class(model_type: str) -> Any:
    """Transformers' configuration class.

    Raises:
      KeyError: it has none of that name.
    """
    with torch_on_demand():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[model_type]
