"""All variants of all families against PyTorch on random weights, and properties of any causal model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from variants import (
    EVERY,
    TOLERANCE,
    VARIANTS,
    assert_near,
    chosen,
    name_in_file,
    params_from_tensors,
    params_from_torch,
    torch_model,
)

from unidetox_jax import models
from unidetox_jax.errors import UserError


@functools.cache
def build(name):
    """(PyTorch model, our parameters, our config) of one variant."""
    reference = torch_model(VARIANTS[name])
    cfg = models.config_from_hf(VARIANTS[name])
    return reference, params_from_torch(reference, cfg), cfg


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """Every variant, for tests of its arithmetic."""
    return build(request.param)


SAMPLE = chosen("gpt2", "opt-350m", "falcon-40b", "falcon-rw-1b", "llama-3.1", "gemma-3")


@pytest.fixture(scope="module", params=SAMPLE)
def sample(request):
    """A variant for each kind of positions and blocks, for tests of the shared transformer."""
    return build(request.param)


LOOPED = [
    *((name, "scan") for name in chosen(*SAMPLE, "mistral-1")),
    *((name, "unroll") for name in chosen("gpt2", "llama-3.1", "gemma-3")),
]


@pytest.fixture(scope="module", params=LOOPED, ids="-".join)
def looped(request):
    """(parameters, config) of the sample, and of some variants with either layer loop, for both kinds of caches."""
    name, layer_loop = request.param
    _, params, cfg = build(name)
    return params, dataclasses.replace(cfg, layer_loop=layer_loop)


def tokens_of(cfg, batch, length, seed=0):
    return np.random.default_rng(seed).integers(3, cfg.vocab_size, (batch, length)).astype(np.int32)


def torch_logits(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.quick_variants(
    "gpt2", "opt-125m", "falcon-40b", "llama-3", "gemma-2", "qwen-3", "mistral-1", "olmo-3", "phi-4-mini", "pythia"
)
def test_logits_equal_pytorch_with_any_padding(pair, record_property):
    reference, params, cfg = pair
    for length in {16, cfg.window + 100, 500} if EVERY else {500}:
        tokens = tokens_of(cfg, 3, length)
        mask = np.ones((3, length), np.int32)
        mask[1, : length // 3] = 0  # left
        mask[2, -length // 4 :] = 0  # right
        logits = np.asarray(models.forward(params, tokens, cfg, mask))
        for row in range(3):
            real = mask[row] == 1
            expected = torch_logits(reference, tokens[row : row + 1, real])[0]
            assert_near(logits[row, real], expected, record_property, f"logits at {length} tokens", cfg)
        assert np.abs(expected).max() > 0.1  # the comparison is not of zeros


@pytest.mark.quick_variants(2)
def test_hidden_states_equal_pytorch(sample):
    reference, params, cfg = sample
    tokens = tokens_of(cfg, 2, 16)
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True).hidden_states
    _, cache = models.prefill(params, tokens[:, :-1], cfg, models.init_cache(cfg, 2, 16))
    ours, _ = models.decode_states(params, tokens[:, -1], cfg, cache)
    for layer in range(cfg.num_layers):  # transformers returns the last one after the final norm
        assert np.abs(ours.layers[:, layer] - theirs[layer][:, -1].numpy()).max() <= TOLERANCE


@pytest.mark.quick_variants("gpt2", "opt-350m", "falcon-7b", "llama-3.1", "gemma-3")
def test_unpadded_logits_and_their_gradients_equal_pytorch(pair, record_property):
    reference, params, cfg = pair
    tokens = tokens_of(cfg, 2, 16)
    reference.zero_grad()
    ids = torch.tensor(tokens, dtype=torch.long)
    output = reference(ids, labels=ids)
    output.loss.backward()
    gradients = {name_in_file(name, cfg): p.grad.numpy() for name, p in reference.named_parameters()}

    def loss(params):
        logits = models.forward(params, tokens, cfg)
        log_probabilities = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).mean(), logits

    ours, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert_near(logits, output.logits.detach().numpy(), record_property, "logits", cfg)
    theirs = params_from_tensors(gradients, cfg, models.key_table(cfg))
    norms = jax.tree.map(lambda g: float(np.linalg.norm(g)), theirs)
    total = np.sqrt(sum(norm**2 for norm in jax.tree.leaves(norms)))
    relative = jax.tree.map(lambda a, b, n: float(np.linalg.norm(a - b)) / max(n, 1e-12), ours, theirs, norms)
    checked = [
        (path, error)
        for (path, error), norm in zip(
            jax.tree_util.tree_leaves_with_path(relative), jax.tree.leaves(norms), strict=True
        )
        if norm > 1e-6 * total
    ]
    assert len(checked) >= 8
    record_property(f"gradients, {cfg.family}", max(error for _, error in checked))
    assert max(error for _, error in checked) <= 1e-3, checked


@pytest.mark.quick_variants(2)
def test_prefill_and_steps_equal_forward(looped, record_property):
    params, cfg = looped
    near = functools.partial(assert_near, record=record_property, what="cache", cfg=cfg)
    tokens = tokens_of(cfg, 3, 12)
    mask = np.ones((3, 12), np.int32)
    mask[1, :3] = 0  # left
    mask[2, 5:8] = 0  # right, within the prompt of eight tokens
    expected = models.forward(params, tokens, cfg, mask)
    prepared = models.prepare(params, cfg)
    cache = models.init_cache(cfg, 3, 10)
    logits, cache = models.prefill(prepared, tokens[:, :8], cfg, cache, mask[:, :8])
    last = [7, 7, 4]
    near(logits, expected[np.arange(3), last])
    cache = models.grow_cache(cache, cfg, 14)
    hidden, extended = models.extend(prepared, tokens[:, 8:], cfg, cache)  # the same four tokens at once
    near(models.logits(params, hidden, cfg), expected[:, 8:])
    assert int(extended.slot) == 12 and extended.positions.tolist() == [12, 9, 9]
    for t in range(8, 12):
        logits, cache = models.decode_step(prepared, tokens[:, t], cfg, cache)
        near(logits, expected[:, t])
    assert int(cache.slot) == 12 and cache.positions.tolist() == [12, 9, 9]


@pytest.mark.quick_variants(2)
def test_branches_of_a_prompt_equal_forward(looped, record_property):
    """Two continuations of each prompt that share its keys and values, read at once and token by token."""
    params, cfg = looped
    near = functools.partial(assert_near, record=record_property, what="shared prefix", cfg=cfg)
    prompts, new = tokens_of(cfg, 3, 8), tokens_of(cfg, 10, 4)[4:]
    mask = np.ones((3, 8), np.int32)
    mask[1, :3] = 0
    mask[2, 5:] = 0
    tokens = np.concatenate([np.repeat(prompts, 2, axis=0), new], axis=1)
    expected = models.forward(
        params, tokens, cfg, np.pad(np.repeat(mask, 2, axis=0), ((0, 0), (0, 4)), constant_values=1)
    )
    prepared = models.prepare(params, cfg)
    _, cache = models.prefill(prepared, prompts, cfg, models.init_cache(cfg, 3, 8), mask)
    cache = models.branch_cache(cache, cfg, 2, 6)
    hidden, extended = models.extend(prepared, new, cfg, cache)
    near(models.logits(params, hidden, cfg), expected[:, 8:])
    assert int(extended.slot) == 4 and extended.positions.tolist() == [12, 12, 9, 9, 9, 9]
    for t in range(4):
        logits, cache = models.decode_step(prepared, new[:, t], cfg, cache)
        near(logits, expected[:, 8 + t])
    with pytest.raises(ValueError, match="cannot branch again"):
        models.branch_cache(cache, cfg, 2, 6)


@pytest.mark.quick_variants(2)
def test_causal_by_gradients(sample):
    _, params, cfg = sample
    embed = params["embed"]["tokens"]["embedding"]
    tied = {**params, "final": {**params.get("final", {}), "head": {"embedding": np.array(embed)}}}
    cfg = dataclasses.replace(cfg, tie_word_embeddings=False)  # so that gradients pass through the input alone

    def output(embedding, position):
        moved = {**tied, "embed": {**tied["embed"], "tokens": {"embedding": embedding}}}
        return models.forward(moved, np.arange(3, 11, dtype=np.int32)[None], cfg)[0, position].sum()

    gradient = jax.jit(jax.grad(output), static_argnums=1)(jnp.asarray(embed), 4)
    seen = np.abs(gradient[np.arange(3, 11)]).max(axis=1) > 0
    assert seen.tolist() == [True] * 5 + [False] * 3


@pytest.mark.quick_variants(2)
def test_packed_texts_equal_texts_alone(sample, record_property):
    _, params, cfg = sample
    tokens = tokens_of(cfg, 1, 20)
    segments = np.array([[1] * 8 + [2] * 8 + [3] * 2 + [0] * 2], np.int32)
    packed = models.forward(params, tokens, cfg, segment_ids=segments)
    for start, end in ((0, 8), (8, 16), (16, 18)):
        alone = models.forward(params, tokens[:, start:end], cfg)
        assert_near(packed[:, start:end], alone, record_property, "packed", cfg)


@pytest.mark.quick_variants(2)
def test_bfloat16_stays_near_float32(sample):
    _, params, cfg = sample
    tokens = tokens_of(cfg, 2, 16)
    exact = models.forward(params, tokens, cfg)
    rough = models.forward(params, tokens, dataclasses.replace(cfg, dtype="bfloat16"))
    assert rough.dtype == jnp.float32 and np.isfinite(rough).all()
    assert np.abs(rough - exact).mean() <= 0.05 * np.abs(exact).mean() + 0.02


def test_config_goes_back_to_hugging_face(pair):
    _, _, cfg = pair
    from transformers import AutoConfig

    hf = models.config_to_hf(cfg)
    again = models.config_from_hf(hf)
    assert again == cfg
    kind = hf.pop("model_type")
    assert models.config_from_hf(AutoConfig.for_model(kind, **hf).to_dict()) == cfg


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama-3"])
def test_rematerialised_gradients_are_the_same(name):
    cfg = models.config_from_hf(VARIANTS[name])
    params = models.init(cfg, jax.random.key(0))
    tokens = tokens_of(cfg, 2, 8)

    def loss(params, remat):
        return models.forward(params, tokens, cfg, remat=remat).var()

    plain, *others = (jax.jit(jax.grad(loss), static_argnums=1)(params, mode) for mode in ("none", "dots", "full"))
    for again in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain, again)


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("name", ["gpt2", "opt-125m", "falcon-rw-1b", "llama-2-linear", "gemma-3"])
def test_scan_equals_unrolled_with_and_without_dropout(name):
    cfg = models.config_from_hf({**VARIANTS[name], "attention_dropout": 0.5} if name != "gpt2" else VARIANTS[name])
    params = models.init(cfg, jax.random.key(0))
    tokens = tokens_of(cfg, 2, 8)
    unrolled = dataclasses.replace(cfg, layer_loop="unroll")
    key = jax.random.key(1)
    for settings in ({}, {"dropout_key": key}):
        scan, unroll = (models.forward(params, tokens, c, **settings) for c in (cfg, unrolled))
        np.testing.assert_allclose(scan, unroll, atol=1e-5)
    assert np.abs(scan - models.forward(params, tokens, cfg)).max() > 1e-3
    np.testing.assert_array_equal(scan, models.forward(params, tokens, cfg, dropout_key=key))


@pytest.mark.parametrize("norm", [False, True])
def test_early_exit_is_the_model_of_fewer_layers(norm):
    reference = torch_model(VARIANTS["gpt2"])
    cfg = models.config_from_hf(VARIANTS["gpt2"])
    model = models.early_exit(models.Model(params_from_torch(reference, cfg), cfg), 2, norm)
    tokens = tokens_of(cfg, 1, 8)
    with torch.no_grad():
        hidden = reference(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True).hidden_states[2]
        expected = reference.lm_head(reference.transformer.ln_f(hidden) if norm else hidden).numpy()
    assert np.abs(models.forward(model.params, tokens, model.cfg) - expected).max() <= TOLERANCE
    with pytest.raises(ValueError, match="expected 1 to 3"):
        models.early_exit(models.Model(model.params, cfg), 4)
    narrow = models.config_from_hf(VARIANTS["opt-350m"])
    with pytest.raises(ValueError, match="states of 32 do not fit a head of 16"):
        models.early_exit(models.Model(models.init(narrow, jax.random.key(0)), narrow), 1)


def test_dynamic_rope_is_refused_beyond_its_original_length():
    config = {**VARIANTS["llama-2-dynamic"], "max_position_embeddings": 32}
    cfg = models.config_from_hf(config)
    params = models.init(cfg, jax.random.key(0))
    models.forward(params, np.zeros((1, 32), np.int32), cfg)
    with pytest.raises(UserError, match="33 tokens.*at most 32.*dynamic"):
        models.forward(params, np.zeros((1, 33), np.int32), cfg)


def test_a_real_model_continues_greedily_as_in_pytorch(shared):
    from transformers import AutoModelForCausalLM

    source = shared / "models" / "stories260K"
    cfg = models.config_from_hf(source)
    reference = AutoModelForCausalLM.from_pretrained(source).eval()
    params = params_from_torch(reference, cfg)
    expected = reference.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)[0, 1:].tolist()

    def generate(params, cache):
        logits, cache = models.prefill(params, jnp.array([[1]]), cfg, cache)

        def step(carry, _):
            logits, cache = carry
            token = logits.argmax(-1)
            return models.decode_step(params, token, cfg, cache), token[0]

        return jax.lax.scan(step, (logits, cache), None, length=200)[1]

    tokens = jax.jit(generate)(params, models.init_cache(cfg, 1, 256)).tolist()
    tokens = tokens[: tokens.index(2) + 1] if 2 in tokens else tokens
    assert tokens == expected and len(expected) > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not implemented"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_type 'ntk'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
        ({"num_key_value_heads": 3}, "not a multiple of 3"),
    ],
)
def test_unimplemented_options_are_named(change, message):
    with pytest.raises(UserError, match=message):
        models.config_from_hf({**VARIANTS["llama-2-linear"], "rope_scaling": None, **change})


def test_initial_weights_follow_the_family():
    cfg = models.config_from_hf({**VARIANTS["gpt2"], "n_embd": 128, "initializer_range": 0.05})
    params = models.init(cfg, jax.random.key(0), param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    up, down = (np.asarray(params["blocks"]["mlp"][name]["kernel"], np.float32).std() for name in ("up", "down"))
    assert up == pytest.approx(0.05, rel=0.05) and down == pytest.approx(0.05 / np.sqrt(6), rel=0.05)
    layers = np.asarray(params["blocks"]["attention"]["query"]["kernel"], np.float32)
    assert np.abs(layers[0] - layers[1]).max() > 0.01  # layers differ
    assert models.num_params(cfg) == sum(leaf.size for leaf in jax.tree.leaves(params))
