"""What was gained and lost: toxicity, perplexity, diversity, knowledge, batched and on the device."""

from unidetox_jax.evaluation import diversity, likelihood, mmlu, perplexity, prompts, scorers, toxicity

__all__ = ["diversity", "likelihood", "mmlu", "perplexity", "prompts", "scorers", "toxicity"]
