"""Adapters against PEFT: the same logits, gradients and steps; and all model functions with an adapter."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from test_training_parity import CONFIGS, STEPS, make_batch, train_torch
from variants import VARIANTS, init_on, params_from_torch, torch_model

from unidetox_jax import models, sharding, training
from unidetox_jax.errors import UserError
from unidetox_jax.models import lora
from unidetox_jax.recipe import Lora

RANK, ALPHA = 4, 6.0
LORA = Lora(rank=RANK, alpha=ALPHA)
VARIANT_NAMES = ["gpt2", "opt-350m", "falcon-7b", "falcon-40b", "falcon-rw-1b", "llama-3", "llama-biases",
                 "gemma-3", "phi-4-mini"]  # fmt: skip


def peft_model(model, settings: Lora = LORA, seed: int = 1, random_b: bool = True):
    """A PyTorch model with a PEFT adapter. B is random, or zero as PEFT initialises it."""
    cfg = with_lora(model, settings)
    torch.manual_seed(seed)
    options = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.rslora,
        target_modules=sorted({lora.short_name(name) for name in lora.modules(cfg)}),
        fan_in_fan_out=cfg.family == "gpt2",
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, options)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name and random_b:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def with_lora(model, settings: Lora = LORA) -> models.ModelConfig:
    return dataclasses.replace(models.config_from_hf(model.config.to_dict()), lora=settings)


def adapter_of(adapted, cfg, values=lambda parameter: parameter) -> lora.Adapter:
    """PEFT's matrices as our adapter."""
    named = {name: values(p).detach().numpy() for name, p in adapted.named_parameters() if "lora_" in name}

    def matrix(name: str, letter: str) -> np.ndarray:
        peft_name = f"base_model.model.{name}.lora_{letter}.default.weight"
        if not lora.is_per_layer(name):
            return named.pop(peft_name).copy()
        return np.stack([named.pop(peft_name.format(layer=layer)) for layer in range(cfg.num_layers)])

    adapter = {name: {letter: matrix(name, letter) for letter in "AB"} for name in lora.modules(cfg)}
    assert not named
    return adapter


def make_tokens(rows: int = 3, length: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 131, (rows, length)).astype(np.int32)


def torch_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_logits_are_pefts_and_the_merged_models(variant):
    adapted = peft_model(torch_model(VARIANTS[variant]))
    cfg, tokens = with_lora(adapted.get_base_model()), make_tokens()
    plain = dataclasses.replace(cfg, lora=Lora())
    params = params_from_torch(torch_model(VARIANTS[variant]), plain)
    with adapted.disable_adapter():
        expected_base = torch_logits(adapted, tokens)
    expected = torch_logits(adapted, tokens)
    attached = lora.attach(jax.tree.map(jnp.asarray, params), adapter_of(adapted, cfg), cfg)
    assert np.abs(expected - expected_base).max() > 0.1
    found = models.forward(attached, tokens, cfg)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(models.forward(params, tokens, plain), expected_base, rtol=0, atol=1e-4)
    merged = lora.merge(models.Model(attached, cfg))
    assert merged.cfg == plain
    assert jax.tree.structure(merged.params) == jax.tree.structure(params)
    np.testing.assert_allclose(models.forward(*merged[:1], tokens, merged.cfg), found, rtol=0, atol=1e-4)


def test_rank_stabilised_scale_is_pefts():
    adapted = peft_model(torch_model(VARIANTS["llama-3"]), dataclasses.replace(LORA, rslora=True))
    cfg = with_lora(adapted.get_base_model(), dataclasses.replace(LORA, rslora=True))
    params = params_from_torch(torch_model(VARIANTS["llama-3"]), cfg)
    found = models.forward(lora.attach(params, adapter_of(adapted, cfg), cfg), make_tokens(), cfg)
    np.testing.assert_allclose(found, torch_logits(adapted, make_tokens()), rtol=0, atol=1e-4)


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_detach_is_the_inverse_of_attach(variant):
    cfg = dataclasses.replace(models.config_from_hf(VARIANTS[variant]), lora=LORA)
    params = models.init(cfg, jax.random.key(0))
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), lora.abstract(cfg))
    attached = lora.attach(params, adapter, cfg)
    assert all(one is other for one, other in zip(*map(base_leaves, (params, attached)), strict=True))
    jax.tree.map(np.testing.assert_array_equal, lora.detach(attached, cfg), adapter)


def base_leaves(params) -> list:
    """The leaves outside the adapter."""
    named = jax.tree_util.tree_leaves_with_path(params)
    return [leaf for path, leaf in named if "lora" not in sharding.path_string(path)]


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("variant", ["gpt2", "falcon-40b"])
def test_with_zero_b_the_logits_are_exactly_the_base_models(variant):
    plain = models.config_from_hf(VARIANTS[variant])
    cfg, tokens = dataclasses.replace(plain, lora=LORA), make_tokens()
    params = models.init(plain, jax.random.key(0))
    adapter = lora.init(cfg, jax.random.key(1))
    attached = lora.attach(params, adapter, cfg)
    expected = models.forward(params, tokens, plain)
    np.testing.assert_array_equal(models.forward(attached, tokens, cfg), expected)
    nudged = jax.tree.map(lambda leaf: leaf + 1e-3, adapter)
    assert (models.forward(lora.attach(params, nudged, cfg), tokens, cfg) != expected).any()


def test_an_adapter_is_initialised_as_in_peft():
    """A is uniform within ±1/√in and depends on the seed; B is zero."""
    cfg = dataclasses.replace(models.config_from_hf(VARIANTS["llama-3"]), lora=LORA)
    first, again, other = (lora.init(cfg, jax.random.key(seed)) for seed in (0, 0, 1))
    theirs = adapter_of(peft_model(torch_model(VARIANTS["llama-3"]), random_b=False), cfg)
    for name, pair in first.items():
        assert not pair["B"].any() and not theirs[name]["B"].any()
        bound = pair["A"].shape[-1] ** -0.5
        for matrix in (pair["A"], theirs[name]["A"]):
            assert 0.95 * bound < np.abs(matrix).max() <= bound
            assert np.std(matrix) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert len(np.unique(pair["A"])) > 0.99 * pair["A"].size
        np.testing.assert_array_equal(pair["A"], again[name]["A"])
        assert (pair["A"] != other[name]["A"]).any()


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize(("variant", "loop"), [("gpt2", "scan"), ("gpt2", "unroll"), ("llama-3", "unroll")])
def test_prefill_and_decode_are_forward(variant, loop):
    cfg = dataclasses.replace(models.config_from_hf(VARIANTS[variant]), lora=LORA, layer_loop=loop)
    adapter = jax.tree.map(lambda leaf: leaf + 0.05, lora.init(cfg, jax.random.key(1)))
    params = lora.attach(models.init(cfg, jax.random.key(0)), adapter, cfg)
    tokens = make_tokens(length=8)
    expected = models.forward(params, tokens, cfg)
    prepared = models.prepare(params, cfg)
    cache = models.init_cache(cfg, len(tokens), 8)
    logits, cache = models.prefill(prepared, tokens[:, :5], cfg, cache)
    for step in range(5, 8):
        np.testing.assert_allclose(logits, expected[:, step - 1], rtol=0, atol=1e-4)
        logits, cache = models.decode_step(prepared, tokens[:, step], cfg, cache)
    early = models.early_exit(models.Model(params, cfg), 2)
    assert (models.forward(early.params, tokens, early.cfg) != expected).any()


@pytest.mark.slow
def test_dropout_is_on_the_input_of_a_and_in_training_only():
    cfg = dataclasses.replace(models.config_from_hf(VARIANTS["llama-3"]), lora=dataclasses.replace(LORA, dropout=0.5))
    params, tokens = models.init(cfg, jax.random.key(0)), make_tokens()
    zero = lora.init(cfg, jax.random.key(1))
    other = jax.tree.map(lambda leaf: leaf + 0.05, zero)
    key = jax.random.key(2)
    plain = models.forward(params, tokens, dataclasses.replace(cfg, lora=Lora()))
    np.testing.assert_array_equal(models.forward(lora.attach(params, zero, cfg), tokens, cfg, dropout_key=key), plain)
    attached = lora.attach(params, other, cfg)
    without = models.forward(attached, tokens, dataclasses.replace(cfg, lora=LORA), dropout_key=key)
    np.testing.assert_array_equal(models.forward(attached, tokens, cfg), without)
    assert (models.forward(attached, tokens, cfg, dropout_key=key) != without).any()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (Lora(rank=4, targets=("q_prj",)), "lora.targets: no linear layer 'q_prj'; did you mean 'q_proj'"),
        (Lora(rank=4, targets=("lm_head",)), "lora.targets: no linear layer 'lm_head'"),
        (Lora(rank=33), "lora.rank: found 33, but 'self_attn.q_proj' is a matrix of 32 by 32; expected 1 to 32"),
        (Lora(rank=17, targets=("v_proj",)), "lora.rank: found 17, but 'self_attn.v_proj' is a matrix of 32 by 16"),
    ],
)  # fmt: skip
def test_invalid_settings_are_named(settings, line):
    cfg = dataclasses.replace(models.config_from_hf(VARIANTS["llama-3"]), lora=settings)
    with pytest.raises(UserError, match=line) as caught:
        lora.abstract(cfg)
    assert "\n" not in str(caught.value)


def test_targets_are_suffixes_of_names():
    cfg = models.config_from_hf(VARIANTS["gpt2"])

    def names(*targets):
        return [lora.short_name(name) for name in lora.modules(dataclasses.replace(cfg, lora=Lora(4, targets=targets)))]

    assert names() == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names("c_proj") == ["attn.c_proj", "mlp.c_proj"]
    assert names("mlp.c_proj") == ["mlp.c_proj"]
    assert names("c_attn", "mlp.c_fc") == ["attn.c_attn", "mlp.c_fc"]


def train(params, adapter, cfg, settings, batches, mesh=None, **options):
    """(losses, final state) of one step per batch."""
    state = training.init_state(jax.tree.map(jnp.array, adapter), settings)
    step = training.make_train_step(cfg, settings, mesh, **options)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch, params)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("family", CONFIGS)
def test_fifty_steps_are_pefts(family):
    settings = training.Optimizer(learning_rate=1e-3, steps=STEPS, weight_decay=0.1)
    adapted = peft_model(torch_model(CONFIGS[family]), random_b=False)
    cfg = with_lora(adapted.get_base_model())
    params = params_from_torch(torch_model(CONFIGS[family]), cfg)
    before = jax.tree.map(np.copy, params)
    losses, state = train(params, adapter_of(adapted, cfg), cfg, settings, map(make_batch, range(STEPS)))
    expected = train_torch(adapted, settings, STEPS)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert abs(losses[-1] - losses[0]) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, params, before)
    theirs = adapter_of(adapted, cfg)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-4), state.params, theirs)
    assert all(pair["B"].any() for pair in theirs.values())


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("family", CONFIGS)
def test_first_gradients_are_pefts(family):
    adapted = peft_model(torch_model(CONFIGS[family]))  # B is random, or A would have no gradient
    cfg = with_lora(adapted.get_base_model())
    params = params_from_torch(torch_model(CONFIGS[family]), cfg)
    batch = make_batch(0)

    def mean(adapter):
        return training.loss(lora.attach(params, adapter, cfg), batch, cfg)[0]

    found = jax.jit(jax.grad(mean))(adapter_of(adapted, cfg))
    labels = torch.where(torch.from_numpy(batch["loss_mask"]), torch.from_numpy(batch["tokens"]).long(), -100)
    mask = torch.from_numpy(batch["loss_mask"]).long()
    adapted(torch.from_numpy(batch["tokens"]).long(), attention_mask=mask, labels=labels).loss.backward()
    expected = adapter_of(adapted, cfg, lambda parameter: parameter.grad)

    def compare(one, other):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
        assert np.abs(other).max() > 0

    jax.tree.map(compare, found, expected)


ON_MESHES = dataclasses.replace(
    models.config_from_hf({**CONFIGS["llama"], "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 136}),
    lora=LORA,
)


def train_on(mesh, cfg=ON_MESHES, param_dtype="float32", **options):
    """(losses, final state) of ten steps on one batch of eight rows."""
    settings = training.Optimizer(learning_rate=1e-2, steps=10)
    params = init_on(cfg, mesh, param_dtype)
    batch = {name: np.tile(rows, (2, 1)) for name, rows in make_batch(0).items()}
    adapter = lora.init(cfg, jax.random.key(1), mesh)
    losses, state = train(params, adapter, cfg, settings, 10 * [batch], mesh, **options)
    abstract = training.abstract_state(cfg, settings, mesh)
    for leaf, described in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(described.sharding, leaf.ndim) and leaf.dtype == described.dtype
    return losses, state


@pytest.fixture(scope="module")
def one_device():
    losses, _ = train_on(None)
    assert losses[-1] < losses[0] - 0.01
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp:8", "model:8", "data:2,fsdp:2,model:2"])
def test_steps_on_eight_devices_are_those_on_one(one_device, layout):
    mesh = sharding.make_mesh(layout)
    losses, state = train_on(mesh)
    np.testing.assert_allclose(losses, one_device, rtol=1e-5)
    shards = mesh.shape["fsdp"] * mesh.shape["model"]
    moment = state.opt_state[1].mu["model.layers.{layer}.mlp.up_proj"]["A"]
    for leaf in (moment, *jax.tree.leaves(lora.init(ON_MESHES, jax.random.key(1), mesh))):
        assert leaf.addressable_shards[0].data.size == leaf.size // shards


def test_microbatches_equal_the_batch(one_device):
    np.testing.assert_allclose(train_on(None, accumulation=2)[0], one_device, rtol=1e-5)


@pytest.mark.slow
def test_in_bfloat16_the_adapter_stays_in_float32(one_device):
    """With bfloat16 weights and arithmetic, adapter and moments are float32, and losses about the same."""
    losses, state = train_on(None, dataclasses.replace(ON_MESHES, dtype="bfloat16"), "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {"float32"}
    np.testing.assert_allclose(losses, one_device, rtol=0.01)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.slow
def test_a_step_computes_no_gradient_of_the_models_weights():
    """Not even of the head, whose gradient the loss computes in its forward pass: the compiler removes it."""
    cfg = models.config_from_hf({**VARIANTS["llama-3"], "vocab_size": 4096})
    batch = {"tokens": jax.ShapeDtypeStruct((2, 16), jnp.int32), "loss_mask": jax.ShapeDtypeStruct((2, 16), bool)}
    settings = training.Optimizer(learning_rate=1e-3, steps=10)

    def operations(cfg, *base):
        """The compiled step's operations with the shape of embedding and head."""
        state = training.abstract_state(cfg, settings, None)
        text = training.make_train_step(cfg, settings, remat="full").lower(state, batch, *base).compile().as_text()
        return set(re.findall(r"= f32\[4096,32\]\S* ([\w-]+)\(", text)) - {"parameter", "get-tuple-element"}

    jax.config.update("jax_disable_most_optimizations", False)
    try:
        assert operations(cfg) & {"dot", "fusion"}
        assert not operations(dataclasses.replace(cfg, lora=LORA), models.abstract_params(cfg))
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
