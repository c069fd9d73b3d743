"""`unidetox distill`: text from the contrast between the base model and its toxic twin; and, for the samples-only
control, as much text of the base model alone.

Writes texts.csv (column `Text`, as the paper's release), texts.jsonl and a card. Surprising: a text depends on the seed
and its own number alone, and the work goes batch by batch into part files that appear whole. So what was killed goes
on with the batch that is missing, and on the same mesh its finished files are those of an undisturbed run, to the byte.
"""

import csv
import dataclasses
import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from unidetox_jax import checkpoint, models, text_statistics
from unidetox_jax.data.tokens import decode, encode
from unidetox_jax.decoding import generate, objectives, warpers
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import scorers
from unidetox_jax.models import Model
from unidetox_jax.progress import Progress
from unidetox_jax.stages import base, parts
from unidetox_jax.stages.settings import DistillSettings, Run

PARTS = "parts"
_EARLY_EXIT = re.compile(r"(.+)@(\d+)")


def tasks(run: Run) -> list[base.Task]:
    """The distilled text, and the samples of the base model where some target has a control.

    Raises:
      UserError: settings that nothing could be made with; no model is loaded for that.
    """
    if not run.distill.models:
        return []
    found = [_task(run, "distill", parts.distilled_directory(run), run.distill)]
    if run.shared.control_targets:
        alone = dataclasses.replace(run.distill, models=("base",), objective="base", cache="own")
        found.append(_task(run, "distill control", parts.samples_directory(run), alone))
    return found


def _task(run: Run, name: str, directory: epath.Path, settings: DistillSettings) -> base.Task:
    check(settings)

    def inputs() -> dict[str, str]:
        found = {f"models.{name}": base.fingerprint(_source(run, name)) for name in settings.models}
        scorer = run.path(settings.scorer).partition(":")[2].partition("#")[0]
        return {**found, "scorer": base.fingerprint(scorer)} if scorer else found

    def body(directory: epath.Path) -> dict[str, Any]:
        figures = make(run, settings, directory, name)
        if parts.first_process():
            print(describe(name, directory, figures))
        return figures

    def operations() -> float:
        alike = {"base": run.shared.base, "toxic": run.shared.base}
        parameters = sum(parts.num_params(run, alike.get(name, name)) for name in settings.models)
        return 2.0 * settings.num_texts * settings.max_length * parameters

    given = {**dataclasses.asdict(settings), "base": run.shared.base, "dtype": run.shared.dtype}
    return base.Task(name, directory, given, inputs, body, operations)


def check(settings: DistillSettings) -> None:
    """Raises UserError for settings that are wrong whatever the models are; the line names the field."""
    for field in ("num_texts", "batch_size"):
        if getattr(settings, field) < 1:
            raise UserError(f"config.distill.{field}: found {getattr(settings, field)}, expected at least 1")
    try:
        objectives.get(settings.objective).check_models(len(settings.models))
        warpers_of(settings)
    except UserError as error:  # these lines begin with the setting's name
        raise UserError(f"config.distill.{error}") from None


def warpers_of(settings: DistillSettings) -> tuple[warpers.Warper, ...]:
    """The settings' warpers."""
    chosen = [warpers.temperature(settings.temperature)]
    if settings.top_k:
        chosen.append(warpers.top_k(settings.top_k))
    if settings.top_p != 1:
        chosen.append(warpers.top_p(settings.top_p))
    if settings.min_p:
        chosen.append(warpers.min_p(settings.min_p))
    return warpers.in_order(chosen)


def make(run: Run, settings: DistillSettings, directory: epath.Path, label: str) -> dict[str, Any]:
    """Generates what is missing, writes the finished files; returns the figures (process 0; elsewhere none)."""
    tokenizer = _tokenizer(run, settings)
    prompt = _prompt(tokenizer, settings)
    mesh = parts.mesh_of(run)
    loaded = _load(run, settings, mesh)
    for source, model in zip(settings.models, loaded, strict=True):
        if settings.max_length > model.cfg.max_position_embeddings:
            raise UserError(
                f"config.distill.max_length: {settings.max_length} tokens, but the context of {source!r} is "
                f"{model.cfg.max_position_embeddings}"
            )
    same = _same_weights(settings.models, loaded)
    if same:
        logging.warning("%s: %s have the same weights; their contrast is noise", label, " and ".join(same))
    hardware = _hardware(mesh, loaded[0].cfg.dtype)
    _generate(settings, loaded, tokenizer, prompt, hardware, directory / PARTS, label)
    if not parts.first_process():
        return {}
    made = list(_parts(directory / PARTS, settings))
    rows = [row for part in made for row in part["rows"]]
    figures = {**figures_of(rows, settings), "same_weights": list(same)}
    _warn(label, figures)
    if settings.scorer:
        figures["toxicity"] = _toxicity(run.path(settings.scorer), [row["text"] for row in rows])
    base.write_text(directory / "texts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    places = sorted({part["made_on"] for part in made})
    base.write_text(directory / "README.md", _card(run, settings, prompt, figures, places))
    base.write_text(directory / "texts.csv", as_csv([row["text"] for row in rows]))
    (directory / PARTS).rmtree()
    return figures


def _generate(
    settings: DistillSettings,
    loaded: Sequence[Model],
    tokenizer,
    prompt: list[int],
    hardware: str,
    directory: epath.Path,
    label: str,
) -> None:
    """Batches that have no part file yet, in order. Every process generates, process 0 writes."""
    size = min(settings.batch_size, settings.num_texts)
    count = -(-settings.num_texts // size)
    first = parts.first_process()
    done = next((i for i in range(count) if not _part(directory, i).exists()), count)
    if jax.process_count() > 1:  # only process 0's directory counts
        done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
    begun = min(done * size, settings.num_texts)
    bar = Progress(settings.num_texts, "texts", label, initial=begun, disable=not first)
    for index in range(done, count):
        started = time.monotonic()
        # The last batch may have rows to spare: they are generated as the others are, so that one program serves all.
        row_ids = np.arange(index * size, (index + 1) * size, dtype=np.int32)
        result = generate(
            loaded,
            np.tile(np.asarray(prompt, np.int32), (size, 1)),
            objective=objectives.get(settings.objective),
            warpers=warpers_of(settings),
            max_new_tokens=settings.max_length - len(prompt),
            seed=settings.seed,
            row_ids=row_ids,
            cache=settings.cache,
            log_probabilities=True,
        )
        rows = [
            _row(int(row_id), result, i, prompt, tokenizer, settings)
            for i, row_id in enumerate(row_ids)
            if row_id < settings.num_texts
        ]
        if first:
            directory.mkdir(exist_ok=True)
            base.write_json(_part(directory, index), {"made_on": hardware, "rows": rows})
        tokens = int(result.lengths[: len(rows)].sum())
        bar.set_postfix({"tokens/s": f"{tokens / (time.monotonic() - started):.0f}"}, refresh=False)
        bar.update(len(rows))
    bar.close()


def _row(row_id: int, result, index: int, prompt: list[int], tokenizer, settings: DistillSettings) -> dict[str, Any]:
    tokens = prompt + result.tokens[index, : result.lengths[index]].tolist()
    return {
        "row": row_id,
        "seed": settings.seed,
        "text": decode(tokenizer, [tokens])[0],
        "ended": bool(result.ended[index]),
        "log_probabilities": {
            name: round(float(value), 5)
            for name, value in zip(_names(settings), result.log_probabilities[:, index], strict=True)
        },
        "tokens": tokens,
    }


def _names(settings: DistillSettings) -> list[str]:
    """The models' names, each once: the second of two equal ones gets its place added."""
    names = settings.models
    return [name if name not in names[:i] else f"{name}#{i + 1}" for i, name in enumerate(names)]


def _part(directory: epath.Path, index: int) -> epath.Path:
    return directory / f"{index:06d}.json"


def _parts(directory: epath.Path, settings: DistillSettings) -> Iterator[dict[str, Any]]:
    size = min(settings.batch_size, settings.num_texts)
    for index in range(-(-settings.num_texts // size)):
        yield base.read_json(_part(directory, index))


def _hardware(mesh: Mesh, dtype: str) -> str:
    layout = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {layout}, computed in {dtype}"


def _source(run: Run, name: str) -> str:
    """Where a model of `config.distill.models` lies, without its layer."""
    match = _EARLY_EXIT.fullmatch(name)
    name = match[1] if match else name
    if name == "base":
        return run.path(run.shared.base)
    if name != "toxic":
        return run.path(name)
    directory = parts.toxic_directory(run)
    if not directory.exists():
        raise UserError(
            f"{directory}: no toxic model there; `unidetox toxify` makes it, config.distill.models names another"
        )
    return str(directory)


def _load(run: Run, settings: DistillSettings, mesh: Mesh) -> list[Model]:
    """The models in the objective's order; one that is named twice is loaded once."""
    whole, loaded = {}, []
    for name in settings.models:
        source = _source(run, name)
        if source not in whole:
            whole[source] = parts.load_model(run, source, mesh)
        model, match = whole[source], _EARLY_EXIT.fullmatch(name)
        if match:
            try:
                model = models.early_exit(model, int(match[2]))
            except ValueError as error:
                raise UserError(f"config.distill.models: {name!r}: {error}") from None
        loaded.append(model)
    return loaded


def _tokenizer(run: Run, settings: DistillSettings):
    """The models' tokenizer. Padding may differ, since no text is padded.

    Raises:
      UserError: two models whose tokens mean different things.
    """
    sources = list(dict.fromkeys(_source(run, name) for name in settings.models))
    first, *others = (checkpoint.load_tokenizer(source) for source in sources)
    vocabulary = first.get_vocab()
    for source, other in zip(sources[1:], others, strict=True):
        theirs = other.get_vocab()
        problem = f"config.distill.models: {source} and {sources[0]} have different tokenizers"
        if theirs != vocabulary:
            if len(theirs) != len(vocabulary):
                raise UserError(f"{problem} ({len(theirs)} and {len(vocabulary)} tokens)")
            token = min(token for token, index in vocabulary.items() if theirs.get(token) != index)
            raise UserError(f"{problem} (token {token!r} is {theirs.get(token)} and {vocabulary[token]})")
        for field in ("bos_token_id", "eos_token_id"):
            if getattr(other, field) != getattr(first, field):
                raise UserError(f"{problem} ({field} {getattr(other, field)} and {getattr(first, field)})")
    return first


def _prompt(tokenizer, settings: DistillSettings) -> list[int]:
    """BOS and the prompt's tokens."""
    begin = tokenizer.bos_token_id
    begin = tokenizer.eos_token_id if begin is None else begin
    if begin is None:
        raise UserError(f"config.distill.models: the tokenizer of {settings.models[0]!r} has neither BOS nor EOS")
    prompt = [begin, *encode(tokenizer, [settings.prompt], begin=False)[0]]
    if len(prompt) >= settings.max_length:
        raise UserError(
            f"config.distill.max_length: found {settings.max_length}, but the prompt alone has {len(prompt)} tokens "
            "with BOS"
        )
    return prompt


def _same_weights(names: Sequence[str], loaded: Sequence[Model]) -> tuple[str, ...]:
    """The first two models whose weights are equal, by name; nothing where all differ."""
    for second in range(len(loaded)):
        for one in range(second):
            if loaded[one].cfg == loaded[second].cfg and _equal(loaded[one].params, loaded[second].params):
                return names[one], names[second]
    return ()


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return one is other or all(bool(jnp.array_equal(a, b)) for a, b in pairs)


def figures_of(rows: Sequence[dict[str, Any]], settings: DistillSettings) -> dict[str, Any]:
    """Counts of texts, tokens and ends, degenerate texts, and mean log-probabilities over texts."""
    texts = [row["text"] for row in rows]
    lengths = [len(row["tokens"]) for row in rows]
    return {
        "texts": len(texts),
        "tokens": sum(lengths),  # with BOS and the end
        "mean_tokens": round(sum(lengths) / len(lengths), 2),
        "ended": sum(row["ended"] for row in rows),
        "degenerate": text_statistics.degenerate_counts(texts),
        "duplicates": text_statistics.duplicates(texts),
        "repeated_4grams": round(float(np.mean([text_statistics.repeated_share(text) for text in texts])), 4),
        "log_probabilities": {
            name: round(float(np.mean([row["log_probabilities"][name] for row in rows])), 4)
            for name in _names(settings)
        },
    }


def _warn(label: str, figures: dict[str, Any]) -> None:
    """One line for whatever makes texts useless to train on."""
    counts = {**figures["degenerate"], "duplicates": figures["duplicates"]}
    found = [f"{count} {reason}" for reason, count in counts.items() if count]
    if found:
        repeated = figures["repeated_4grams"]
        logging.warning(
            "%s: of %d texts %s (a mean %.1f %% of a text's 4-grams occurred in it before)",
            label, figures["texts"], ", ".join(found), 100 * repeated,
        )  # fmt: skip


def _toxicity(spec: str, texts: Sequence[str]) -> dict[str, Any]:
    """Mean score and share of toxic texts (above 0.5) among those that the scorer took."""
    scores = scorers.get(spec)(texts)
    scored = scores[~np.isnan(scores)]
    return {
        "scorer": spec.partition(":")[0],
        "mean": round(float(scored.mean()), 5) if len(scored) else None,
        "above_half": round(float((scored > 0.5).mean()), 5) if len(scored) else None,
        "not_scored": len(scores) - len(scored),
    }


def as_csv(texts: Sequence[str]) -> str:
    """A csv file of one column, `Text`; what pandas and `csv` read back."""
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([["Text"], *([text] for text in texts)])
    return out.getvalue()


def describe(name: str, directory: epath.Path, figures: dict[str, Any]) -> str:
    """The figures in a few lines."""
    degenerate = {**figures["degenerate"], "duplicates": figures["duplicates"]}
    lines = [
        f"{name}: {figures['texts']} texts, {figures['tokens']} tokens, {figures['ended']} ended by themselves",
        "degenerate: " + ", ".join(f"{count} {reason}" for reason, count in degenerate.items()),
        "mean log-probability of a token: "
        + ", ".join(f"{model} {value:.3f}" for model, value in figures["log_probabilities"].items()),
    ]
    if "toxicity" in figures:
        toxicity = figures["toxicity"]
        lines.append(
            f"toxicity ({toxicity['scorer']}): mean {toxicity['mean']}, above 0.5 {toxicity['above_half']}, "
            f"not scored {toxicity['not_scored']}"
        )
    return "\n".join([*lines, f"in {directory}"])


def _card(run: Run, settings: DistillSettings, prompt: list[int], figures: dict[str, Any], places: list[str]) -> str:
    """The data set's card: what a stranger needs to know, and to make it again. Without times and places, so that it
    is the same in every working directory."""
    sources = {
        label: {
            "source": run.shared.base if name.partition("@")[0] == "base" else name,
            "fingerprint": base.fingerprint(_source(run, name)),
        }
        for label, name in zip(_names(settings), settings.models, strict=True)
    }
    objective = objectives.get(settings.objective)
    kind = "one model alone" if len(settings.models) == 1 else f"the contrast of {', '.join(settings.models)}"

    def block(value: Any) -> str:
        return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"

    return f"""# {run.shared.name}: {figures["texts"]} texts from {kind}

**Content warning.** Language models wrote these texts, and nobody has read them. Some may be offensive, hateful or
untrue, and some may name real people. They are meant for fine-tuning models towards less toxic text (UniDetox, Lu et
al., ICLR 2025) and for research on it, and for nothing else.

`texts.csv` has one column, `Text`. `texts.jsonl` has a line for each text: its row and seed, which determine it, all
its tokens (those of the prompt first), whether it ended by itself, and the mean log-probability of its new tokens under
each model.

## How it was made

Tokens were drawn from the objective `{objective}`, after the prompt tokens {prompt} (the first is BOS).

{block({**dataclasses.asdict(settings), "dtype": run.shared.dtype})}

Models, in the order of the objective's arguments ({", ".join(objective.arguments)}):

{block(sources)}

Made on {"; ".join(places)}. The same settings, models, mesh and versions make the same bytes.

{block(base.versions())}

## What is in it

{block(figures)}
"""
