"""Models whose matrices are filled up, and twins whose vocabularies differ by tokens that were added to one."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import VARIANTS

from unidetox_jax import models
from unidetox_jax.decoding import generate, objectives, warpers
from unidetox_jax.decoding.text_sampling import common_vocabulary
from unidetox_jax.errors import UserError


class Tokenizer:
    bos_token_id, eos_token_id = 0, 1

    def __init__(self, size, added=0, **changed):
        self.tokens = {changed.get(f"t{index}", f"t{index}"): index for index in range(size)}
        self.added = {f"<{index}>": size + index for index in range(added)}

    def get_vocab(self):
        return {**self.tokens, **self.added}

    def get_added_vocab(self):
        return self.added


def test_what_was_added_to_one_is_left_out_and_told(caplog):
    with caplog.at_level(logging.WARNING):
        assert common_vocabulary([Tokenizer(9), Tokenizer(9, added=2)], ["base", "toxic"]) == 9
    assert "toxic: ignoring its last 2 tokens" in caplog.text
    assert common_vocabulary([Tokenizer(9, added=1), Tokenizer(9, added=1)], ["base", "toxic"]) == 10


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Tokenizer(10), r"toxic and base have different tokenizers \(10 and 9 tokens\)"),
        (Tokenizer(9, t4="x"), r"token 4 is 'x' and 't4'"),
    ],
)
def test_other_differences_are_refused(other, message):
    with pytest.raises(UserError, match=message):
        common_vocabulary([Tokenizer(9), other], ["base", "toxic"])


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("choice", [warpers.top_k(200), warpers.temperature(1.5)])
def test_rows_beyond_the_vocabulary_have_no_probability(choice):
    """The filled-up rows of one model say what the other has no word for, as loudly as can be."""
    cfg = models.config_from_hf({**VARIANTS["llama-3"], "vocab_size": 64})
    wide = dataclasses.replace(cfg, vocab_size=72)
    base = models.Model(models.init(cfg, jax.random.key(0)), cfg)
    embedding = lambda tree, change: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, leaf: change(leaf) if "embedding" in jax.tree_util.keystr(path) else leaf, tree
    )
    twin_params = models.init(cfg, jax.random.key(1))
    twin = models.Model(twin_params, cfg)
    padded = models.Model(embedding(twin_params, lambda x: jnp.pad(x, ((0, 8), (0, 0)), constant_values=50.0)), wide)
    settings = {
        "objective": objectives.get("contrastive"), "warpers": [choice], "max_new_tokens": 10, "eos_id": (),
        "log_probabilities": True, "layer_loop": "scan",
    }  # fmt: skip
    prompts = np.array([[5, 6, 7]] * 4)
    found = generate([base, padded], prompts, vocab_size=64, **settings)
    expected = generate([base, twin], prompts, **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, rtol=1e-5)
    with pytest.raises(UserError, match="model 1 .* has a vocabulary of 72 tokens"):
        generate([base, padded], prompts, **settings)
    with pytest.raises(UserError, match="its tokenizer has 70"):
        generate([base, padded], prompts, vocab_size=70, **settings)
