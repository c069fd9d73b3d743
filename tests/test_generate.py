"""Greedy generation against PyTorch's."""

import numpy as np
import pytest
import torch
from variants import VARIANTS, params_from_torch, torch_model

from unidetox_jax import models
from unidetox_jax.decoding import generate, loop, objectives, warpers
from unidetox_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_fast")
BASE = objectives.get("base")


def model_of(name, seed=0):
    reference = torch_model({**VARIANTS[name], "pad_token_id": 0, "eos_token_id": 2}, seed)
    cfg = models.config_from_hf({**VARIANTS[name], "pad_token_id": 0, "eos_token_id": 2})
    return reference, models.Model(params_from_torch(reference, cfg), cfg)


def prompts_of(cfg, batch=3, length=6):
    tokens = np.random.default_rng(0).integers(3, cfg.vocab_size, (batch, length)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[1, :2] = 0
    mask[2, :5] = 0
    return np.where(mask, tokens, 0), mask


@pytest.mark.parametrize("layer_loop", ["unroll", "scan"])
@pytest.mark.parametrize("name", ["gpt2", "opt-125m"])
def test_greedy_equals_pytorch_with_left_padding(name, layer_loop):
    reference, model = model_of(name)
    tokens, mask = prompts_of(model.cfg)
    ours = generate([model], tokens, objective=BASE, warpers=[warpers.temperature(0.0)], max_new_tokens=12,
                    attention_mask=mask, layer_loop=layer_loop)  # fmt: skip
    for row in range(3):
        ids = torch.tensor(tokens[row][mask[row] == 1], dtype=torch.long)[None]
        expected = reference.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
        assert ours.tokens[row, : ours.lengths[row]].tolist() == expected
        assert bool(ours.ended[row]) == (expected[-1] == 2)


def test_samples_share_their_prompts_pass_and_change_nothing():
    _, model = model_of("falcon-rw-1b")
    tokens, mask = prompts_of(model.cfg)
    chosen = {"objective": BASE, "warpers": [warpers.top_k(9)], "max_new_tokens": 7, "seed": 3}
    row_ids = np.arange(12) + 5
    ours = generate([model], tokens, attention_mask=mask, row_ids=row_ids, samples=4, **chosen)
    repeated, masks = np.repeat(tokens, 4, axis=0), np.repeat(mask, 4, axis=0)
    each = generate([model], repeated, attention_mask=masks, row_ids=row_ids, **chosen)
    assert ours.tokens.tolist() == each.tokens.tolist()
    assert ours.lengths.tolist() == each.lengths.tolist()
    assert len({tuple(row) for row in ours.tokens[:4]}) > 1
    with pytest.raises(UserError, match="samples 0"):
        generate([model], tokens, samples=0, **chosen)


@pytest.mark.parametrize(
    ("slots", "new", "expected"),
    [
        (0, 20, (64,)),
        (48, 20, (80,)),
        (60, 20, (68,)),
        (40, 80, (24, 88)),
        (40, 90, (24, 152)),
        (40, 200, (24, 88, 152, 216)),
    ],
)
def test_segments_of_a_few_tokens_are_joined_to_their_neighbours(slots, new, expected):
    assert loop.plan_segments(slots, new) == expected
