"""UniDetox on one page (Lu et al., ICLR 2025, section 3): functions for a notebook, which the stages call as well.

import unidetox_jax as ud

base = ud.load("gpt2")                                                     # params, cfg, tokenizer
toxic = ud.finetune(base, toxic_texts, learning_rate=1e-5, steps=15_126)   # 1. the toxic twin
texts = ud.distill(base, toxic, num_texts=640, alpha=0.1)                  # 2. text from the contrast
clean = ud.finetune(ud.load("any/other-model"), texts, steps=3_000)        # 3. any model, any vocabulary

ud.generate(clean, ["A prompt"], samples=3)
ud.evaluate(clean, prompts, scorer="lexicon")                              # toxicity and diversity of what it writes
ud.save(clean, "out")                                                      # for transformers' from_pretrained
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from unidetox_jax import checkpoint, data, extensions, models, sharding, training
from unidetox_jax.data import chat as conversations
from unidetox_jax.data.texts import Texts
from unidetox_jax.data.tokens import encode
from unidetox_jax.decoding import objectives, warpers
from unidetox_jax.decoding import text_sampling as sampling
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation import continuations, scorers
from unidetox_jax.evaluation.config import EvaluationConfig
from unidetox_jax.evaluation.metrics import ModelCache, Subject, measure
from unidetox_jax.evaluation.prompts import from_texts
from unidetox_jax.models import lora
from unidetox_jax.recipe import Lora, Recipe
from unidetox_jax.training import loop

EVALUATED = "the evaluated model"


class LanguageModel(NamedTuple):
    """A model that reads and writes text.

    params: nested dictionary of arrays; cfg: `models.ModelConfig`, frozen; tokenizer: of transformers; history: the
    figures of the training that made it (steps, loss, tokens a second: `training.metrics.summary`), else empty.
    """

    params: Any
    cfg: models.ModelConfig
    tokenizer: Any
    history: Mapping[str, Any] = {}

    @property
    def model(self) -> models.Model:
        """Parameters and configuration: what the rest of the package takes."""
        return models.Model(self.params, self.cfg)


def load(source: epath.PathLike, mesh: Mesh | None = None, param_dtype: str | None = None) -> LanguageModel:
    """A model and its tokenizer, from a Hugging Face directory, a hub id, or a directory that this package wrote.

    mesh: where its parameters live (`sharding.make_mesh`); None: the first device. param_dtype: None: as stored.
    """
    return LanguageModel(*checkpoint.load(source, mesh, param_dtype), checkpoint.load_tokenizer(source))


def save(model: LanguageModel, directory: epath.PathLike, dtype: str | None = None) -> None:
    """Writes the model as transformers' `from_pretrained` reads it, tokenizer included; whole or not at all."""
    checkpoint.save_hf(directory, model.model, model.tokenizer, dtype)


def save_adapter(model: LanguageModel, directory: epath.PathLike, base: str = "") -> None:
    """Writes the adapter of a model that has one, in PEFT's format; whole or not at all.

    base: where the model without it lies, for PEFT and for people; load(f"{base}+{directory}") gives this one again.
    """
    checkpoint.save_adapter(directory, model.model, base)


def finetune(
    model: LanguageModel,
    texts: Sequence[str],
    recipe: Recipe | None = None,
    *,
    validation: Sequence[str] = (),
    directory: epath.PathLike | None = None,
    mesh: Mesh | None = None,
    label: str = "finetune",
    criterion: training.Criterion = training.LANGUAGE_MODELLING,
    **changes: Any,
) -> LanguageModel:
    """Steps 1 and 3: fine-tunes on texts with the ordinary language-modelling loss; the given model stays as it is.

    Args:
      model: its `params` may be a function that makes them, which is called unless `directory` holds a checkpoint. An
        adapter that it has is merged into them first.
      texts: strings. Those of `distill` and `data.texts` know which ended by themselves, and get an end token; sampled
        ones keep their tokens for a model of the same tokenizer.
      recipe, changes: learning_rate, steps, batch_size, max_length, seed, …: the fields of `Recipe`. With
        lora=Lora(rank=16) the weights stay as they are and an adapter is trained, which the result holds beside them.
      validation: texts whose loss is followed.
      directory: gets checkpoints/, metrics.jsonl and tensorboard/, and a killed call continues from them; None:
        nothing is kept.
      mesh: where the training happens; None: where the parameters are.
      criterion: another loss, or other parameters to train.

    Raises:
      UserError: as `data.tokenize` and `training.fit`. Preempted: SIGTERM came, and the state is saved.
    """
    recipe = dataclasses.replace(recipe or Recipe(steps=3_000), **changes)
    model = _merged(model)
    cfg = dataclasses.replace(model.cfg, lora=recipe.lora)
    lora.check(cfg, recipe)
    mesh = mesh or sharding.mesh_of(model.params) or sharding.single_device_mesh()
    tokens = _tokenize(model, texts, recipe, release=recipe.reproduce_release)
    held_out = _tokenize(model, validation, recipe) if len(validation) else None
    steps = recipe.steps or math.ceil(recipe.epochs * len(tokens) / recipe.batch_size)
    batches = data.Batches(
        tokens,
        recipe.batch_size,
        seed=recipe.seed,
        layout=recipe.layout,
        row_multiple=sharding.batch_shards(mesh) * recipe.accumulation,
        max_shapes=loop.worthwhile_shapes(steps, most=8),
    )
    initial, frozen = _beginning(model.params, cfg, criterion, recipe.seed, mesh)
    params, history = training.fit(
        directory,
        cfg,
        initial,
        batches,
        training.LoopSettings(steps, recipe.save_minutes, recipe.keep, recipe.evaluate_every, recipe.log_every),
        optimizer(recipe, steps),
        mesh,
        criterion=criterion,
        base=frozen,
        validation=held_out,
        accumulation=recipe.accumulation,
        remat=recipe.remat,
        dropout_seed=recipe.seed if recipe.dropout else None,
        label=label,
    )
    history |= {"texts": len(tokens), "text_tokens": len(tokens.ids), "truncated": tokens.truncated}
    params = criterion.model(frozen if callable(model.params) else model.params, params, cfg)
    return model._replace(params=params, cfg=cfg, history=history)


def _beginning(
    weights: Any, cfg: models.ModelConfig, criterion: training.Criterion, seed: int, mesh: Mesh
) -> tuple[Callable[[], Any], Any]:
    """(what makes the first parameters to train, the weights that stay beside them: None without any).

    The latter are cast to the compute dtype once, so that no step does it.
    """
    give, frozen = weights if callable(weights) else lambda: jax.tree.map(jnp.copy, weights), None
    if criterion.has_base(cfg):
        frozen = weights() if callable(weights) else weights
        frozen = models.prepare(frozen, dataclasses.replace(cfg, layer_loop="scan"))
        frozen = jax.device_put(frozen, sharding.param_shardings(frozen, mesh))
    return lambda: criterion.initial(cfg, give, seed, mesh), frozen


def _merged(model: LanguageModel) -> LanguageModel:
    """The model with its adapter, if it has one, in its weights."""
    if not model.cfg.lora.rank:
        return model
    cfg, weights = model.cfg, model.params
    plain = dataclasses.replace(cfg, lora=Lora())
    if callable(weights):
        return model._replace(params=lambda: lora.merge(models.Model(weights(), cfg)).params, cfg=plain)
    return model._replace(params=lora.merge(model.model).params, cfg=plain)


def optimizer(recipe: Recipe, steps: int) -> training.Optimizer:
    """AdamW as a recipe says, for a training of that many steps. Raises UserError for an unknown precision."""
    if recipe.precision not in training.PRECISIONS:
        raise UserError(f"precision: no {recipe.precision!r}{suggest(recipe.precision, training.PRECISIONS)}")
    return training.Optimizer(
        learning_rate=recipe.learning_rate,
        steps=steps,
        warmup_steps=recipe.warmup_steps,
        decay=recipe.decay,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
        precision="release" if recipe.reproduce_release else recipe.precision,
        seed=recipe.seed,
    )


def distill(
    *language_models: LanguageModel,
    objective: str = "contrastive",
    num_texts: int = 640,
    max_length: int = 256,
    prompt: str = "",
    chat: bool = False,
    system_prompt: str = "",
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 1234,
    batch_size: int = 128,
    cache: str = "own",
    names: Sequence[str] = (),
    reject: Callable[[Sequence[str]], Sequence[str]] | None = None,
    most: float = 4.0,
    keep: Callable = sampling.uncached,
    label: str | None = "distill",
    **settings: Any,
) -> Texts:
    """Step 2: texts from softmax(log p_base − log p_toxic) on the tokens with p_base ≥ α · max p_base (equation 3).

    Args:
      language_models: base and toxic twin, or whatever the objective asks for, in the order of its arguments. As
        params they may have what `decoding.preparation.prepare` made of all of them.
      objective, settings: a name of `decoding.objectives`, "name(setting=…)" or "package.module:function", and its
        settings, such as alpha=0.1.
      prompt: what follows BOS in every text. max_length: tokens of a text, BOS included.
      chat: texts are answers to `prompt` as a user's turn, after `system_prompt` if there is one; the conversation is
        no part of them, but counts for max_length.
      reject: texts → why each is left out, empty for one that is kept. The others: see `sample_texts`.

    Raises:
      UserError: models of different tokenizers, settings out of range, a context that is too short.
    """
    chosen = objectives.get(objective, **settings)
    chosen.check_models(len(language_models))
    names = sampling.distinct_names(names or chosen.arguments)
    tokenizers = [one.tokenizer for one in language_models]
    vocab_size = sampling.common_vocabulary(tokenizers, names)
    for one, name in zip(language_models, names, strict=True):
        if max_length > one.cfg.max_position_embeddings:
            context = one.cfg.max_position_embeddings
            raise UserError(f"max_length: {max_length} tokens, but the context of {name!r} is {context}")
    begin = [sampling.first_token(tokenizers[0], names[0])]
    if chat:
        (before,) = conversations.encode_prompts(tokenizers[0], [prompt], system_prompt)
    else:
        before = begin + encode(tokenizers[0], [prompt], begin=False)[0]
    return sampling.sample_texts(
        [one.model for one in language_models],
        tokenizers[0],
        before,
        objective=chosen,
        warpers=warpers.choose(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
        num_texts=num_texts,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        cache=cache,
        names=names,
        reject=reject,
        most=most,
        keep=keep,
        begin=begin if chat else None,
        vocab_size=vocab_size,
        label=label,
    )


def generate(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 0.9,
    seed: int = 42,
    chat: bool = False,
    system_prompt: str = "",
) -> list[list[str]]:
    """`samples` continuations of each prompt, without the prompt; the paper's sampling by default (its section 4.3).
    chat: answers to it as a user's turn, after `system_prompt` if there is one."""
    made = continuations.generate(
        model.model,
        model.tokenizer,
        prompts,
        samples=samples,
        max_new_tokens=max_new_tokens,
        warpers=warpers.choose(temperature=temperature, top_k=top_k, top_p=top_p),
        seed=seed,
        chat=chat,
        system_prompt=system_prompt,
    )
    return made.texts


def evaluate(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    scorer: str = EvaluationConfig.scorer,
    metrics: Sequence[str] = ("toxicity", "diversity"),
    categories: Sequence[str] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What a model writes after prompts: metric → its summary, as metrics.json of `unidetox evaluate` has it.

    Args:
      scorer: of toxicity, see `evaluation.scorers.get`. metrics: see `evaluation.metrics`.
      categories: of each prompt; None: without.
      settings: samples, runs (1 unless given), perplexity_scorer, …: the fields of `EvaluationConfig`.

    Raises:
      UserError: no such metric or scorer, a prompt without tokens or too long for the model's context.
    """
    config = EvaluationConfig(**{"scorer": scorer, "metrics": tuple(metrics), "runs": 1, **settings})

    def load_pair(source: str) -> tuple[models.Model, Any]:
        found = model if source == EVALUATED else load(source, sharding.mesh_of(model.params))
        return found.model, found.tokenizer

    others = extensions.parse_named(config.other_scorers, "other_scorers", "SCORER")
    score, loaded = scorers.get(scorer), ModelCache(load_pair)
    runs = continuations.generate_runs(lambda: loaded(EVALUATED), prompts, config, sampling.uncached)
    subject = Subject(config, from_texts(prompts, categories), runs, score=score)
    subject = dataclasses.replace(subject, others={name: scorers.get(spec) for name, spec in others.items()})
    results = measure(config.metrics, subject, EVALUATED, loaded)
    return {name: result.summary for name, result in results.items()}


def _tokenize(model: LanguageModel, texts: Sequence[str], recipe: Recipe, release: bool = False) -> data.Tokens:
    affixes = None
    if recipe.chat:
        affixes = conversations.response_affixes(
            model.tokenizer, recipe.user_prompt, recipe.system_prompt, recipe.loss_on
        )
    return data.tokenize(
        texts,
        model.tokenizer,
        recipe.max_length,
        context=model.cfg.max_position_embeddings,
        vocab_size=model.cfg.vocab_size,
        affixes=affixes,
        reproduce_release=release,
    )
