"""UniDetox for JAX: contrastive decoding, dataset distillation and detoxification of any language model."""

__version__ = "0.1.0"
