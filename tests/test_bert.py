"""BERT and RoBERTa classifiers against the PyTorch models on the same random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from unidetox_jax.errors import UserError
from unidetox_jax.models import bert

COMMON = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
    num_labels=5,
    initializer_range=0.5,  # the default of 0.02 would leave the logits near zero, where everything agrees
)


def torch_model(family: str):
    torch.manual_seed(0)
    if family == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**COMMON))
    else:
        config = transformers.RobertaConfig(**COMMON, type_vocab_size=1, layer_norm_eps=1e-5)
        model = transformers.RobertaForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):  # initialised to 1 and 0, which hides a swap
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def convert(model, cfg) -> dict:
    """Parameters from a PyTorch model through the key table; every tensor must be used or ignored by name."""
    left = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    params: dict = {}
    for key in bert.key_table(cfg):
        if "{layer}" in key.hf:
            value = np.stack([key.split(left.pop(key.hf.format(layer=i)))[0] for i in range(cfg.num_layers)])
        else:
            value = key.split(left.pop(key.hf))[0]
        *path, leaf = key.ours[0].split("/")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    assert not [name for name in left if not any(re.fullmatch(r, name) for r in bert.ignored_keys(cfg))]
    return params


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_logits_equal_pytorch(family):
    model = torch_model(family)
    cfg = bert.config_from_hf(model.config.to_dict())
    params = convert(model, cfg)
    abstract = jax.eval_shape(lambda: bert.init(cfg, jax.random.key(0)))
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, abstract)
    assert cfg.max_length == (38 if family == "roberta" else 40)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, cfg.vocab_size, (4, cfg.max_length))
    mask = np.ones_like(tokens)
    for row, length in enumerate((cfg.max_length, 17, 5, 1)):
        tokens[row, length:], mask[row, length:] = cfg.pad_token_id, 0
    with torch.no_grad():
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    assert np.abs(expected).max() > 0.3
    found = jax.jit(bert.forward, static_argnums=2)(params, tokens.astype(np.int32), cfg, mask)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_padding_changes_nothing_and_a_row_of_padding_is_finite():
    cfg = bert.config_from_hf(transformers.RobertaConfig(**COMMON, type_vocab_size=1).to_dict())
    params = jax.jit(bert.init, static_argnums=0)(cfg, jax.random.key(1))
    short = jnp.array([[5, 6, 7]], jnp.int32)
    padded = jnp.array([[5, 6, 7, 1, 1], [1, 1, 1, 1, 1]], jnp.int32)
    forward = jax.jit(bert.forward, static_argnums=2)
    found = forward(params, padded, cfg)
    np.testing.assert_allclose(found[:1], forward(params, short, cfg), atol=1e-5)
    assert np.isfinite(found).all()


def test_config_says_what_it_cannot_do():
    good = transformers.BertConfig(**COMMON).to_dict()
    named = bert.config_from_hf(good | {"id2label": {"10": "c", "2": "b", "0": "a"}})
    assert named.labels == ("a", "b", "c")
    for change, words in [
        ({"model_type": "gpt2"}, "expected 'bert' or 'roberta'"),
        ({"hidden_act": "mish"}, "expected one of gelu"),
        ({"position_embedding_type": "relative_key"}, "absolute"),
        ({"is_decoder": True}, "encoder"),
    ]:
        with pytest.raises(UserError, match=words):
            bert.config_from_hf(good | change)
