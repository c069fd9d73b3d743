"""UniDetox on one page (Lu et al., ICLR 2025, section 3): functions for a notebook, which the stages call too.

import unidetox_jax as ud

base = ud.load("gpt2")                                                     # params, cfg, tokenizer
toxic = ud.finetune(base, toxic_texts, learning_rate=1e-5, steps=15_126)   # 1. the toxic twin
texts = ud.distill(base, toxic, num_texts=640, alpha=0.1)                  # 2. text from the contrast
clean = ud.finetune(ud.load("any/other-model"), texts, steps=3_000)        # 3. any model, any vocabulary

ud.generate(clean, ["A prompt"], samples=3)
ud.evaluate(clean, prompts, scorer="lexicon")                              # toxicity and diversity of its continuations
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
from unidetox_jax.decoding import objectives, text_sampling, warpers
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
    """A model with its tokenizer.

    Attributes:
      params: nested dictionary of arrays.
      tokenizer: of transformers.
      history: of the training that made it: steps, loss, tokens per second, … (`training_log.summary`), or empty.
    """

    params: Any
    cfg: models.ModelConfig
    tokenizer: Any
    history: Mapping[str, Any] = {}

    @property
    def model(self) -> models.Model:
        """Parameters and configuration, as the rest of the package takes them."""
        return models.Model(self.params, self.cfg)


def load(source: epath.PathLike, mesh: Mesh | None = None, param_dtype: str | None = None) -> LanguageModel:
    """Loads a model and its tokenizer from a Hugging Face directory, a hub id, or a directory that this package wrote.

    mesh: where the parameters live (`sharding.make_mesh`); None: the first device. param_dtype: None: as stored.
    """
    return LanguageModel(*checkpoint.load(source, mesh, param_dtype), checkpoint.load_tokenizer(source))


def save(model: LanguageModel, directory: epath.PathLike, dtype: str | None = None) -> None:
    """Writes the model and tokenizer for transformers' `from_pretrained`, atomically."""
    checkpoint.save_hf(directory, model.model, model.tokenizer, dtype)


def save_adapter(model: LanguageModel, directory: epath.PathLike, base: str = "") -> None:
    """Writes a model's LoRA adapter in PEFT's format, atomically.

    base: path or hub id of the base model, recorded for PEFT; load(f"{base}+{directory}") gives this model again.
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
    """Steps 1 and 3: a copy of the model, fine-tuned on texts with the language-modelling loss.

    Args:
      model: its `params` may be a function that returns them, called only if they are needed. A LoRA adapter is first
        merged into the weights.
      texts: strings. Those of `distill` and `data.texts` record whether they ended, and get an end token if so; sampled
        texts are not tokenized again for a model with the same tokenizer.
      recipe, changes: fields of `Recipe`: learning_rate, steps, batch_size, max_length, seed, …. With
        lora=Lora(rank=16) the weights stay frozen and the result has an adapter.
      validation: texts for the validation loss.
      directory: gets checkpoints/, metrics.jsonl and tensorboard/, from which an interrupted call continues; None:
        nothing is written.
      mesh: where to train; None: where the parameters are.
      criterion: another loss, or other trained parameters.

    Raises:
      UserError: as `data.tokenize` and `training.fit`.
      Preempted: after SIGTERM, with the state saved.
    """
    recipe = dataclasses.replace(recipe or Recipe(steps=3_000), **changes)
    model = _merged(model)
    cfg = dataclasses.replace(model.cfg, lora=recipe.lora)
    lora.check(cfg, recipe)
    mesh = mesh or sharding.mesh_of(model.params) or sharding.single_device_mesh()
    tokens = _tokenize(model, texts, recipe, release=recipe.reproduce_release)
    validation_tokens = _tokenize(model, validation, recipe) if len(validation) else None
    steps = recipe.steps or math.ceil(recipe.epochs * len(tokens) / recipe.batch_size)
    batches = data.Batches(
        tokens,
        recipe.batch_size,
        seed=recipe.seed,
        layout=recipe.layout,
        row_multiple=sharding.batch_shards(mesh) * recipe.accumulation,
        max_shapes=loop.worthwhile_shapes(steps, most=8),
    )
    initial, frozen = _initial(model.params, cfg, criterion, recipe.seed, mesh)
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
        validation=validation_tokens,
        accumulation=recipe.accumulation,
        remat=recipe.remat,
        dropout_seed=recipe.seed if recipe.dropout else None,
        label=label,
    )
    history |= {"texts": len(tokens), "text_tokens": len(tokens.ids), "truncated": tokens.truncated}
    params = criterion.model(frozen if callable(model.params) else model.params, params, cfg)
    return model._replace(params=params, cfg=cfg, history=history)


def _initial(
    params: Any, cfg: models.ModelConfig, criterion: training.Criterion, seed: int, mesh: Mesh
) -> tuple[Callable[[], Any], Any]:
    """(() → parameters to train, the frozen weights beside them or None).

    Frozen weights are cast to the compute dtype once, instead of in every step.
    """
    make = params if callable(params) else lambda: jax.tree.map(jnp.copy, params)
    frozen = None
    if criterion.has_base(cfg):
        frozen = params() if callable(params) else params
        frozen = models.prepare(frozen, dataclasses.replace(cfg, layer_loop="scan"))
        frozen = jax.device_put(frozen, sharding.param_shardings(frozen, mesh))
    return lambda: criterion.initial(cfg, make, seed, mesh), frozen


def _merged(model: LanguageModel) -> LanguageModel:
    """The model with its adapter, if any, merged into its weights."""
    if not model.cfg.lora.rank:
        return model
    cfg, params = model.cfg, model.params
    merged_cfg = dataclasses.replace(cfg, lora=Lora())
    if callable(params):
        return model._replace(params=lambda: lora.merge(models.Model(params(), cfg)).params, cfg=merged_cfg)
    return model._replace(params=lora.merge(model.model).params, cfg=merged_cfg)


def optimizer(recipe: Recipe, steps: int) -> training.Optimizer:
    """A recipe's AdamW over `steps` steps. Raises UserError for an unknown precision."""
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
    vocab_size: int | None = None,
    reject: Callable[[Sequence[str]], Sequence[str]] | None = None,
    most: float = 4.0,
    keep: Callable = text_sampling.uncached,
    label: str | None = "distill",
    **settings: Any,
) -> Texts:
    """Step 2: texts from softmax(log p_base − log p_toxic) on the tokens with p_base ≥ α · max p_base (equation 3).

    Args:
      language_models: base and toxic twin, or the models of another objective, in the order of its arguments. Their
        params may be the result of `decoding.preparation.prepare` for all of them.
      objective, settings: a name of `decoding.objectives` or "package.module:function", and settings such as alpha=0.1.
      prompt: follows BOS in every text. max_length: tokens of a text, BOS included.
      chat: texts are answers to `prompt` as a user's turn, after `system_prompt` if any; the conversation is not part
        of them, but counts towards max_length.
      vocab_size: tokens that all tokenizers share; None: they are compared here.
      reject: texts → the reason why each is rejected, or an empty string.
      batch_size, cache, names, most, keep, label: as in `decoding.text_sampling.sample_texts`.

    Raises:
      UserError: models of different tokenizers, settings out of range, too short a context.
    """
    objective_function = objectives.get(objective, **settings)
    objective_function.check_models(len(language_models))
    names = text_sampling.distinct_names(names or objective_function.arguments)
    vocab_size = vocab_size or text_sampling.common_vocabulary([model.tokenizer for model in language_models], names)
    for model, name in zip(language_models, names, strict=True):
        context = model.cfg.max_position_embeddings
        if max_length > context:
            raise UserError(f"max_length: {max_length} tokens, but the context of {name!r} is {context}")
    tokenizer = language_models[0].tokenizer
    begin = [text_sampling.first_token(tokenizer, names[0])]
    return text_sampling.sample_texts(
        [model.model for model in language_models],
        tokenizer,
        conversations.encode_prompts(tokenizer, [prompt], system_prompt)[0]
        if chat
        else begin + encode(tokenizer, [prompt], begin=False)[0],
        objective=objective_function,
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

    chat: continuations are answers to the prompt as a user's turn, after `system_prompt` if any.
    """
    generated = continuations.generate(
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
    return generated.texts


def evaluate(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    scorer: str = EvaluationConfig.scorer,
    metrics: Sequence[str] = ("toxicity", "diversity"),
    categories: Sequence[str] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluates a model's continuations of prompts: {metric: its summary}, as in metrics.json of `unidetox evaluate`.

    Args:
      scorer: of toxicity, see `evaluation.scorers.get`.
      metrics: names of `evaluation.metrics`.
      categories: one for each prompt; None: none.
      settings: other fields of `EvaluationConfig`: samples, runs (here 1 by default), perplexity_scorer, ….

    Raises:
      UserError: an unknown metric or scorer, a prompt without tokens or too long for the model's context.
    """
    config = EvaluationConfig(**{"scorer": scorer, "metrics": tuple(metrics), "runs": 1, **settings})

    def load_pair(source: str) -> tuple[models.Model, Any]:
        loaded = model if source == EVALUATED else load(source, sharding.mesh_of(model.params))
        return loaded.model, loaded.tokenizer

    others = extensions.parse_named(config.other_scorers, "other_scorers", "SCORER")
    score, current_model = scorers.get(scorer), ModelCache(load_pair)
    runs = continuations.generate_runs(lambda: current_model(EVALUATED), prompts, config, text_sampling.uncached)
    subject = Subject(config, from_texts(prompts, categories), runs, score=score)
    subject = dataclasses.replace(subject, others={name: scorers.get(spec) for name, spec in others.items()})
    results = measure(config.metrics, subject, EVALUATED, current_model)
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
