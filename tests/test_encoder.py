"""Classifiers against transformers' PyTorch classes on the same random weights."""

import jax
import numpy as np
import pytest
import torch
import transformers
from etils import epath

from unidetox_jax import models
from unidetox_jax.checkpoint import hf
from unidetox_jax.checkpoint.weights import Weights
from unidetox_jax.errors import UserError
from unidetox_jax.models import encoder
from unidetox_jax.sharding import single_device_mesh

COMMON = dict(vocab_size=97, max_position_embeddings=40, num_labels=5, initializer_range=0.5)  # at 0.02 logits are 0
BERT = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
OPTIONS = {
    "bert": BERT,
    "roberta": {**BERT, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "xlm-roberta": {**BERT, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"},
    "distilbert": dict(dim=32, n_layers=3, n_heads=4, hidden_dim=48),
}


def torch_model(kind: str, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **OPTIONS[kind], **options})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):  # initialised to 1 and 0, which hides a swap
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def converted(model, directory):
    model.save_pretrained(directory)
    cfg = encoder.from_hf(epath.Path(directory))
    return hf.read_params(Weights(directory), cfg, single_device_mesh(), "float32"), cfg


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize(("kind", "longest"), [("bert", 40), ("roberta", 38), ("xlm-roberta", 38), ("distilbert", 40)])
def test_logits_equal_pytorch_with_padding_up_to_the_last_position(kind, longest, tmp_path):
    model = torch_model(kind)
    params, cfg = converted(model, tmp_path)
    assert cfg.length_limit == longest
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, cfg.vocab_size, (4, longest))
    tokens[1, 4] = cfg.pad_token_id  # a text may speak of it: only the mask says what is padding
    mask = np.ones_like(tokens)
    for row, length in enumerate((longest, 17, 5, 1)):
        tokens[row, length:], mask[row, length:] = cfg.pad_token_id, 0
    with torch.no_grad():
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    assert np.abs(expected).max() > 0.3
    found = jax.jit(encoder.forward, static_argnums=2)(params, tokens.astype(np.int32), cfg, mask)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=f"{longest + 1} tokens, but the model reads at most {longest}"):
        encoder.forward(params, np.zeros((1, longest + 1), np.int32), cfg, np.ones((1, longest + 1)))


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize("kind", OPTIONS)
def test_parameters_are_those_that_init_makes(kind, tmp_path):
    params, cfg = converted(torch_model(kind), tmp_path)
    made = models.init(cfg, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, made)


def test_padding_changes_nothing_and_a_row_of_padding_is_finite():
    cfg = encoder.from_hf(transformers.RobertaConfig(**COMMON, **BERT, type_vocab_size=1).to_dict())
    params = models.init(cfg, jax.random.key(1))
    short = np.array([[5, 6, 7]], np.int32)
    padded = np.array([[5, 6, 7, 1, 1], [1, 1, 1, 1, 1]], np.int32)
    forward = jax.jit(encoder.forward, static_argnums=2)
    found = forward(params, padded, cfg, padded != 1)
    np.testing.assert_allclose(found[:1], forward(params, short, cfg, short != 1), atol=1e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(("kind", "pad"), [("bert", 0), ("roberta", 1), ("xlm-roberta", 1), ("distilbert", 0)])
def test_a_pad_token_that_is_null_is_the_familys(kind, pad):
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **OPTIONS[kind]}).to_dict()
    assert encoder.from_hf(config | {"pad_token_id": None}) == encoder.from_hf(config)
    assert encoder.from_hf(config).pad_token_id == pad


def test_config_says_what_it_cannot_do(tmp_path):
    good = transformers.BertConfig(**COMMON, **BERT).to_dict()
    named = encoder.from_hf(good | {"id2label": {"10": "c", "2": "b", "0": "a"}})
    assert named.labels == ("a", "b", "c")
    for change, words in [
        ({"model_type": "albert"}, r"model_type 'albert' is not implemented \(known: bert, roberta, xlm-roberta, dist"),
        ({"hidden_act": "mish"}, "activation 'mish' is not implemented"),
        ({"position_embedding_type": "relative_key"}, "expected 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True, expected False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads 5"),
        ({"pad_token_id": 97}, "pad_token_id is 97, expected a token below vocab_size 97"),
        ({"problem_type": "ranking"}, "config.json: .*problem_type"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            encoder.from_hf(good | change)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="config.json: no such file"):
        encoder.from_hf(tmp_path)
    with pytest.raises(UserError, match="model_type 'bert' is not implemented"):  # as a language model
        models.config_from_hf(good)
