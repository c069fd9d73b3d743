"""Baselines: each equals its paper's equations in float64, on transformers' models if it makes a model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from variants import FALCON, GPT2, LLAMA, OPT

from unidetox_jax import baselines, checkpoint, method, models, sharding, training
from unidetox_jax.baselines import lm_steer, npo, task_arithmetic
from unidetox_jax.baselines.base import CLEAN, TOXIC, Baseline
from unidetox_jax.decoding import objectives
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.candidates import Candidate

CONFIGS = {  # tied and untied heads, a projection before the head, kernels stored in both orders
    "gpt2": {**GPT2, "n_layer": 2},
    "opt-350m": {**OPT, "num_hidden_layers": 2, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "falcon": {**FALCON, "num_hidden_layers": 2},
    "llama": {**LLAMA, "num_hidden_layers": 2},
}
DOWN = {"gpt2": "mlp.c_proj", "opt-350m": "fc2", "falcon": "mlp.dense_4h_to_h", "llama": "mlp.down_proj"}
TEXTS = [[5, 9, 17, 30, 41], [6, 8], [7, 90, 100, 33, 21, 12, 44]]  # tokens of three texts
RANK, EPSILON = 3, 0.05


def random_model(name, seed=0) -> method.LanguageModel:
    """A model with larger weights than at initialisation, so that differences are visible."""
    cfg = models.config_from_hf(CONFIGS[name])
    params = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 2 else leaf, models.init(cfg, jax.random.key(seed)))
    return method.LanguageModel(params, cfg, None)


def tensors(model, directory) -> dict[str, np.ndarray]:
    """Its weights (or gradients) by their names in transformers."""
    checkpoint.save_hf(directory, model.model)
    return load_file(directory / "model.safetensors")


def in_torch(model, directory):
    """The same model in PyTorch, float64."""
    checkpoint.save_hf(directory, model.model)
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    ).eval()


def batch_of(texts, packed: bool):
    """The texts in separate rows, or packed into one."""
    if packed:
        tokens = np.concatenate(texts)[None]
        segments = np.repeat(np.arange(1, len(texts) + 1), list(map(len, texts)))[None]
        mask = np.concatenate([[False] + [True] * (len(text) - 1) for text in texts])[None]
        filled = {"tokens": tokens, "loss_mask": mask, "segment_ids": segments}
        return {key: jnp.pad(jnp.asarray(rows), ((0, 1), (0, 2))) for key, rows in filled.items()}  # and an empty row
    tokens, mask = np.zeros((4, 8), np.int32), np.zeros((4, 8), bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, True
    return {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(mask)}


def torch_nll(model, text) -> torch.Tensor:
    """−log p of a text, summed over all tokens but the first."""
    ids = torch.tensor([text])
    logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -logprobs.gather(1, ids[0, 1:, None]).sum()


def close(found, expected, **tolerance):
    np.testing.assert_allclose(found, expected, **{"rtol": 2e-4, "atol": 1e-5, **tolerance})


# ------------------------------------------------------------------------------------------ task arithmetic


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_task_arithmetic_equals_its_equation(name, tmp_path):
    target, toxic = random_model(name), random_model(name, 1)
    made = baselines.get("task_arithmetic(scale=0.3)").make(target, {TOXIC: toxic}, {}, method.Recipe())
    own, theirs, found = (tensors(model, tmp_path / str(i)) for i, model in enumerate((target, toxic, made)))
    assert found.keys() == own.keys() and ("lm_head.weight" in found) == (name == "llama")  # a tied head moves once
    for key, leaf in own.items():
        leaf = leaf.astype(np.float64)
        close(found[key], leaf - 0.3 * (theirs[key].astype(np.float64) - leaf), rtol=1e-6, atol=1e-7)


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_task_arithmetic_at_scale_zero_equals_the_target_to_the_bit(dtype):
    target, toxic = (
        jax.tree.map(lambda leaf: leaf.astype(dtype), random_model("gpt2", seed).params) for seed in (0, 1)
    )
    target = jax.tree.map(lambda leaf: leaf.at[..., 0].set(-0.0), target)
    made = task_arithmetic.extrapolate(target, toxic, -0.0)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), made, target))


# ------------------------------------------------------------------------------------------ LM-Steer


def random_steer(cfg, seed=3):
    rng = np.random.default_rng(seed)
    p1, p2 = rng.normal(size=(2, cfg.embedding_size, RANK))
    params = {"steer": {"A": jnp.asarray(p1.T, jnp.float32), "B": jnp.asarray(p2, jnp.float32)}}
    return torch.tensor(p1, requires_grad=True), torch.tensor(p2, requires_grad=True), params


def steer_inside(model, p1, p2, strength):
    """h + v ε (h P1) P2ᵀ before the head of a model in PyTorch."""
    head = model.get_output_embeddings()
    return head.register_forward_pre_hook(lambda _, inputs: (inputs[0] + strength * (inputs[0] @ p1) @ p2.T,))


@pytest.mark.quick_variants(4)
@pytest.mark.parametrize("steer", [1.0, -2.5])
@pytest.mark.parametrize("name", CONFIGS)
def test_lm_steers_edit_equals_a_forward_with_the_map(name, steer, tmp_path):
    target = random_model(name)
    p1, p2, params = random_steer(target.cfg)
    reference = in_torch(target, tmp_path / "target")
    steer_inside(reference, p1, p2, steer * EPSILON)
    own = lm_steer.untied(target)
    assert not own.cfg.tie_word_embeddings
    trained = own._replace(params=lm_steer.Steer(RANK, EPSILON).model(own.params, params, own.cfg))
    made = trained
    if steer != 1.0:
        method_of = baselines.get(f"lm_steer(steer={steer})")
        [twin] = method_of.twins()
        assert baselines.get(twin) == dataclasses.replace(method_of, steer=1.0) and not baselines.get(twin).twins()
        made = method_of.make(target, {twin: trained}, {}, method.Recipe())
    tokens = np.asarray([TEXTS[2]], np.int32)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(tokens)).logits.numpy()
        exported = in_torch(made, tmp_path / "made")(input_ids=torch.tensor(tokens)).logits.numpy()
    close(models.forward(made.params, tokens, made.cfg), expected)
    close(exported, expected)  # and as transformers reads it


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lm_steers_loss_and_gradient(name, packed, tmp_path):
    target = lm_steer.untied(random_model(name))
    p1, p2, params = random_steer(target.cfg)
    criterion, batch = lm_steer.Steer(RANK, EPSILON), batch_of(TEXTS, packed)
    reference = in_torch(target, tmp_path / "target")
    steer_inside(reference, p1, p2, EPSILON)
    expected = sum(torch_nll(reference, text) for text in TEXTS)
    expected.backward()
    total = functools.partial(criterion.total, dropout_key=None, remat="none")
    found, gradients = jax.jit(jax.value_and_grad(lambda p: total(p, target.params, batch, target.cfg)))(params)
    close(found, expected.item())
    close(gradients["steer"]["A"].T, p1.grad.numpy(), rtol=1e-3, atol=1e-4)
    close(gradients["steer"]["B"], p2.grad.numpy(), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------ NPO


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_npos_loss_and_gradient(name, packed, tmp_path):
    policy, reference = random_model(name, 1), random_model(name)
    beta, batch = 0.7, batch_of(TEXTS, packed)
    ours, theirs = in_torch(policy, tmp_path / "policy"), in_torch(reference, tmp_path / "reference")
    losses = []
    for text in TEXTS:
        with torch.no_grad():
            of_reference = torch_nll(theirs, text)
        log_ratio = of_reference - torch_nll(ours, text)
        losses.append(-2 / beta * torch.nn.functional.logsigmoid(-beta * log_ratio))
    expected = torch.stack(losses).mean()
    expected.backward()

    criterion = npo.NegativePreference(beta)
    count = criterion.count(batch, training.target_mask(batch).sum())
    assert float(count) == len(TEXTS)

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        whole = criterion.total(params, reference.params, batch, policy.cfg, dropout_key=None, remat="none")
        return whole / count

    found, gradients = mean(policy.params)
    close(found, expected.item())
    own = tensors(policy._replace(params=gradients), tmp_path / "gradients")
    for key, parameter in ours.named_parameters():
        close(own[key], parameter.grad.numpy(), rtol=2e-3, atol=1e-4, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", [npo.NegativePreference(0.1), lm_steer.Steer(RANK, 1.0)], ids=["npo", "lm_steer"])
def test_gradient_accumulation_equals_a_single_step(criterion):
    """Training also lowers the loss, with dropout off, and does not change the base weights."""
    target = lm_steer.untied(random_model("gpt2"))
    optimizer, mesh = training.Optimizer(1e-3, 100, decay=False), sharding.make_mesh("data:2,fsdp:4")
    batch = {key: jnp.tile(rows, (4, 1)) for key, rows in batch_of(TEXTS, False).items()}
    batch = sharding.put({key: np.asarray(rows) for key, rows in batch.items()}, sharding.batch_sharding(mesh))
    params = jax.device_put(target.params, sharding.param_shardings(target.params, mesh))
    base = models.prepare(params, target.cfg)
    ends = []
    for accumulation in (1, 2):
        initial = criterion.initial(target.cfg, lambda: jax.tree.map(jnp.copy, params), 0, mesh)
        state = training.init_state(initial, optimizer)
        step = training.make_train_step(target.cfg, optimizer, mesh, accumulation=accumulation, criterion=criterion)
        figures = []
        for _ in range(3):
            state, one = step(state, batch, base)
            figures.append(jax.device_get(one))
        assert figures[2]["loss"] < figures[0]["loss"]
        assert figures[0]["learning_rate"] == figures[2]["learning_rate"] == np.float32(1e-3)
        ends.append((jax.device_get(state.params), figures[0]["loss"]))
    close(ends[0][1], ends[1][1], rtol=1e-5)
    jax.tree.map(functools.partial(close, atol=2e-4), ends[0][0], ends[1][0])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), jax.device_get(target.params))


# ------------------------------------------------------------------------------------------ ProFS


class Words:
    """A tokenizer of numbers, with only the parts that `encode` uses."""

    class backend_tokenizer:
        no_truncation = no_padding = staticmethod(lambda: None)

        @staticmethod
        def encode(text, add_special_tokens):
            return type("Encoding", (), {"ids": [7]})

        @staticmethod
        def encode_batch_fast(texts, add_special_tokens):
            return [type("Encoding", (), {"ids": [int(word) for word in text.split()]}) for text in texts]


def block_outputs(reference, text) -> np.ndarray:
    """Every layer's output for a text in PyTorch, averaged over its tokens: float64 [L, hidden]."""
    found = []
    layers = next(m for m in reference.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [
        layer.register_forward_hook(lambda *call: found.append(call[2][0] if isinstance(call[2], tuple) else call[2]))
        for layer in layers
    ]
    with torch.no_grad():
        reference(input_ids=torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return np.stack([state.reshape(len(text), -1).mean(0).numpy() for state in found])


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize("name", CONFIGS)
def test_profs_equals_its_equations(name, tmp_path):
    target = random_model(name)._replace(tokenizer=Words())
    rng = np.random.default_rng(0)
    texts = {kind: [rng.integers(3, 131, n).tolist() for n in (4, 9, 6, 5, 12, 3)] for kind in (TOXIC, CLEAN)}
    words = {kind: [" ".join(map(str, text)) for text in texts[kind]] for kind in texts}
    recipe = method.Recipe(seed=5)
    made = baselines.get("profs(rank=2, first_layer=0.5, pairs=5)").make(target, {}, words, recipe)

    reference, draw = in_torch(target, tmp_path / "target"), np.random.default_rng(recipe.seed)
    drawn = {kind: [texts[kind][i] for i in draw.permutation(6)[:5]] for kind in (TOXIC, CLEAN)}
    toxic, clean = (
        np.stack([block_outputs(reference, text) for text in drawn[kind]], axis=1) for kind in (TOXIC, CLEAN)
    )
    own, found = load_file(tmp_path / "target/model.safetensors"), tensors(made, tmp_path / "made")
    changed = {key for key, leaf in own.items() if leaf.tobytes() != found[key].tobytes()}
    [key] = changed  # of two layers the upper one
    assert f".1.{DOWN[name]}.weight" in key
    mu = clean[1].mean(axis=0)
    centred = (toxic[1] - clean[1]) @ (np.eye(len(mu)) - np.outer(mu, mu) / (mu @ mu))
    vectors = np.linalg.svd(centred)[2][:2]
    keep = np.eye(len(mu)) - vectors.T @ vectors
    expected = own[key] @ keep if name == "gpt2" else keep @ own[key]  # stored [in, out], elsewhere [out, in]
    close(found[key], expected)


def test_profs_needs_enough_texts():
    target = random_model("gpt2")._replace(tokenizer=Words())
    with pytest.raises(UserError, match="profs: rank: found 2, expected at most 1, from 1 pairs of texts"):
        baselines.get("profs").make(target, {}, {TOXIC: ["5 6"], CLEAN: ["7 8", "9"]}, method.Recipe())


# ------------------------------------------------------------------------------------------ registry and candidates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dexperts", Candidate(("{target}", "CLEAN", "TOXIC"), "dexperts(alpha=2.0, top_p=0.9)")),
        ("dexperts(alpha=1)", Candidate(("{target}", "CLEAN", "TOXIC"), "dexperts(alpha=1.0, top_p=0.9)")),
        ("detoxigen", Candidate(("{target}", "TOXIC"), "detoxigen(alpha=1.0, top_p=0.9)")),
        ("dapt", Candidate(("CLEAN",))),
        ("preprompt(text='Be kind. ')", Candidate(prefixes=("Be kind. ",))),
        (
            "self_debiasing(descriptions=('Rude: ', 'A threat: '))",
            Candidate(("{target}",) * 3, "self_debiasing(decay=50.0, epsilon=0.01)", ("", "Rude: ", "A threat: ")),
        ),
    ],
)
def test_candidates(text, expected):
    one = baselines.get(text)
    found = one.candidate({TOXIC: "TOXIC", CLEAN: "CLEAN"}, "OWN")
    assert found == expected and not one.makes
    objectives.get(found.objective).check_models(len(found.models))


def test_self_debiasing_has_six_descriptions_as_published():
    found = baselines.get("self_debiasing").candidate({}, "")
    assert len(found.models) == len(found.prefixes) == 7 and found.prefixes[0] == ""
    assert all(text.endswith(":\n") for text in found.prefixes[1:])


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_every_baseline_says_what_it_needs(name):
    one = baselines.get(name)
    assert one.needs.endswith(".") and one.needs.count(".") == 1
    assert not one.makes or one.candidate({}, "OWN") == Candidate(("OWN",))


def test_lm_steer_is_trained_as_published():
    trained = baselines.get("lm_steer(steer=1)").recipe(method.Recipe(clip_norm=1.0, lora=method.Lora(rank=4)))
    assert (trained.learning_rate, trained.batch_size, trained.steps, trained.decay) == (1e-2, 32, 1000, False)
    assert trained.clip_norm == trained.weight_decay == trained.lora.rank == 0 and not trained.dropout
    assert baselines.get("lm_steer").recipe(method.Recipe()) is None  # made from the trained one


@dataclasses.dataclass(frozen=True)
class Mine(Baseline):
    needs = "Nothing."
    share: float = 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dexprts", "baseline: unknown name 'dexprts'; did you mean 'dexperts'"),
        ("dexperts(alfa=1)", "baseline dexperts: no setting 'alfa'; did you mean 'alpha'"),
        ("dapt(x=1)", r"baseline dapt: no setting 'x' \(it has none\)"),
        ("task_arithmetic(scale=1e999)", "baseline task_arithmetic: scale: found inf, expected a finite number"),
        ("task_arithmetic(scale='a')", "scale: found 'a', expected a finite number"),
        ("task_arithmetic(scale=True)", "scale: found True, expected a finite number"),
        ("lm_steer(rank=0)", "baseline lm_steer: rank: found 0, expected at least 1"),
        ("lm_steer(rank=1.5)", "rank: found 1.5, expected a whole number"),
        ("npo(beta=0)", "baseline npo: beta: found 0.0, expected more than 0"),
        ("profs(rank=0)", "baseline profs: rank: found 0, expected at least 1"),
        ("profs(first_layer=1)", "first_layer: found 1.0, expected at least 0 and less than 1"),
        ("preprompt(text='')", "text: found '', expected a text that is not empty"),
        ("self_debiasing(descriptions=())", r"descriptions: found \(\), expected at least one text"),
        ("test_baselines:Min", "test_baselines has no class 'Min'; did you mean 'Mine'"),
        ("test_baselines:random_model", "expected a subclass of unidetox_jax.baselines.base.Baseline"),
    ],
)
def test_mistakes_are_one_line(text, words):
    with pytest.raises(UserError, match=words) as caught:
        baselines.get(text)
    assert "\n" not in str(caught.value)


def test_a_user_defined_baseline():
    assert baselines.get("test_baselines:Mine(share=2)") == Mine(2.0)
