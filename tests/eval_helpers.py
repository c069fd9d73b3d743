"""Tiny models with equal random weights here and in PyTorch, and a tokenizer for them."""

import dataclasses

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from unidetox_jax import models as our_models
from unidetox_jax import sharding

torch.set_num_threads(1)  # threads slow tiny models down

WORDS = "a the cat dog bird sat ran sang on under near mat tree hill and then it was very small green slowly".split()
SPECIAL = ["<s>", "</s>"]


def make_tokenizer(bos: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE that encodes any text, with the WORDS as single tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    merges = []
    for word in [*WORDS, *(f"Ġ{word}" for word in WORDS)]:
        left = word[0]
        for character in word[1:]:
            if left + character not in vocabulary:
                merges.append((left, character))
                vocabulary[left + character] = len(vocabulary)
            left += character
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_pair(seed: int = 0, vocab_size: int = 384, context: int = 96, mesh=None, spread: float = 0.4):
    """A tiny LLaMA as (PyTorch model in eval mode, our model) with equal weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch_model = transformers.LlamaForCausalLM(config).eval()
    return torch_model, from_torch(torch_model, mesh)


def from_torch(torch_model, mesh=None) -> our_models.Model:
    """Our Model with a PyTorch model's weights."""
    cfg = dataclasses.replace(our_models.config_from_hf(torch_model.config.to_dict()), dtype="float32")
    state = {name: tensor.float().numpy() for name, tensor in torch_model.state_dict().items()}
    params: dict = {}
    for key in our_models.key_table(cfg):
        layers = [key.hf.format(layer=i) for i in range(cfg.num_layers)] if "{layer}" in key.hf else [key.hf]
        parts = [key.split(state[name]) for name in layers]
        for index, path in enumerate(key.ours):
            leaves = [part[index] for part in parts]
            *parents, leaf = path.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = np.stack(leaves) if "{layer}" in key.hf else leaves[0]
    import jax

    placement = sharding.param_shardings(params, mesh or sharding.single_device_mesh())
    return our_models.Model(jax.tree.map(jax.device_put, params, placement), cfg)


@torch.no_grad()
def torch_logprobs(torch_model, tokens) -> torch.Tensor:
    """Log-probability of every next token: [len(tokens) - 1, V], float64."""
    return torch_model(torch.tensor([list(tokens)])).logits[0, :-1].double().log_softmax(-1)
