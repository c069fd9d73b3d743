"""Imports transformers' configurations and tokenizers, and other packages, without PyTorch.

Where PyTorch is installed, transformers imports it with every configuration, although none uses it. That takes as long
as all other imports of a command together.
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any


class _Torch(types.ModuleType):
    """A stand-in for torch that imports PyTorch at the first attribute access."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get("torch") is self:
            del sys.modules["torch"]
        return getattr(importlib.import_module("torch"), name)


@contextlib.contextmanager
def torch_on_demand() -> Iterator[None]:
    """Within the context, `import torch` imports PyTorch only when it is used."""
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None:
        yield
        return
    torch, activations = _Torch("torch"), types.ModuleType("transformers.activations")
    torch.__spec__ = spec  # transformers checks this to see whether torch is installed
    activations.__dict__["ACT2FN"] = {}  # LLaMA's configuration looks up its activation here
    stand_ins = {module.__name__: module for module in (torch, activations)}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


@contextlib.contextmanager
def torch_hidden() -> Iterator[None]:
    """Within the context, `import torch` fails unless PyTorch was imported before: for packages that do without it."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def config_class(model_type: str) -> Any:
    """Transformers' configuration class of a model_type. Raises KeyError if there is none."""
    with torch_on_demand():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[model_type]
