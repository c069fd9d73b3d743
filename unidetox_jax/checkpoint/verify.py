"""`unidetox verify SRC DST`: do two checkpoints give the same logits?

The prompt has about 500 tokens, since short ones hide mistakes in rotary positions. If PyTorch is installed and SRC is
in Hugging Face's format, SRC is run by transformers.
"""

import argparse
import dataclasses
import importlib.util
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax

from unidetox_jax import models
from unidetox_jax.checkpoint.model_io import load, load_config
from unidetox_jax.checkpoint.source import resolve, split_adapter
from unidetox_jax.errors import UserError

PROMPT_TOKENS = 500
MAX_DIFFERENCE = 2e-3  # of float32 logits; summing thousands of terms in another order changes them by 1e-4
MAX_KL = 1e-5  # nats


class Agreement(NamedTuple):
    """How far apart two models' logits on one prompt are.

    difference: largest |a - b|. kl: largest KL(a‖b) over positions, nats. top1: share of positions with the same most
    probable token. top10: mean overlap of the ten most probable tokens.
    """

    difference: float
    kl: float
    top1: float
    top10: float

    @property
    def agrees(self) -> bool:
        """Whether the two are the same function up to float32 rounding."""
        return self.difference <= MAX_DIFFERENCE and self.kl <= MAX_KL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", metavar="SRC", help="a checkpoint in any format that `convert` reads")
    parser.add_argument("destination", metavar="DST", help="the checkpoint to compare with it")


def run_command(options: argparse.Namespace) -> int:
    """Prints the comparison; 0 if the two agree, 1 if they do not."""
    left, right = load_config(options.source), load_config(options.destination)
    if left.vocab_size != right.vocab_size:
        raise UserError(f"{options.destination}: {right.vocab_size} tokens, but {options.source} has {left.vocab_size}")
    tokens = prompt(left)
    by_torch = (
        not split_adapter(options.source)[1]
        and resolve(options.source).kind == "hf"
        and importlib.util.find_spec("torch") is not None
    )
    first = torch_logits(options.source, tokens) if by_torch else our_logits(options.source, tokens)
    result = compare(first, our_logits(options.destination, tokens))
    print(f"{options.source} ({'PyTorch' if by_torch else 'JAX'}) and {options.destination} (JAX), float32,")
    print(f"a prompt of {tokens.shape[1]} tokens:\n")
    for label, value, limit in (
        ("largest difference of logits", f"{result.difference:.2e}", f"at most {MAX_DIFFERENCE:.0e}"),
        ("largest KL divergence, nats", f"{result.kl:.2e}", f"at most {MAX_KL:.0e}"),
        ("same most probable token", f"{result.top1:.2%}", ""),
        ("common among the ten most probable", f"{result.top10:.2%}", ""),
    ):
        print(f"  {label:<36}{value:>10}   {limit}".rstrip())
    print(f"\n{'they agree' if result.agrees else 'THEY DISAGREE'}")
    return 0 if result.agrees else 1


def prompt(cfg: models.ModelConfig) -> np.ndarray:
    """Random tokens int32 [1, T], T = 500 or the context length."""
    length = min(PROMPT_TOKENS, cfg.max_position_embeddings, cfg.length_limit or PROMPT_TOKENS)
    return np.random.default_rng(0).integers(0, cfg.vocab_size, (1, length)).astype(np.int32)


def our_logits(source: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits float32 [T,V] of a checkpoint, computed in float32."""
    params, cfg = load(source)
    return np.asarray(models.forward(params, tokens, dataclasses.replace(cfg, dtype="float32"))[0])


def torch_logits(source: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits float32 [T,V] by transformers in float32, with SDPA attention ("eager" applies Falcon's ALiBi twice)."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = str(resolve(source).directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits[0].numpy()


def compare(first: np.ndarray, second: np.ndarray) -> Agreement:
    """Agreement of logits float32 [T,V]."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise UserError("logits are not finite: one of the checkpoints is damaged")
    log_first, log_second = (log_softmax(x, axis=-1) for x in (first, second))
    kl = (np.exp(log_first) * (log_first - log_second)).sum(-1)
    k = min(10, first.shape[-1])
    tops = [np.argsort(-logits, axis=-1, kind="stable")[:, :k] for logits in (first, second)]
    overlap = [len(np.intersect1d(a, b)) / k for a, b in zip(*tops, strict=True)]
    return Agreement(
        difference=float(np.abs(first - second).max()),
        kl=float(max(kl.max(), 0.0)),
        top1=float((tops[0][:, 0] == tops[1][:, 0]).mean()),
        top10=float(np.mean(overlap)),
    )
