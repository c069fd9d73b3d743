"""Every setting of every stage: a frozen dataclass per stage, with the paper's values as defaults.

ml_collections ends here: a configuration file builds a `ConfigDict` from `default_config()`, the command line
overrides its fields, and `parse` turns each part into the dataclass that the stage's code reads.
"""

import dataclasses
import typing
from typing import Any

import ml_collections

from unidetox_jax.errors import UserError, suggest


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What all stages share: the configuration's top level."""

    name: str = "unidetox"
    base: str = "openai-community/gpt2-xl"  # HF directory or hub id; the model whose toxic twin is made
    targets: tuple[str, ...] = ("openai-community/gpt2-xl",)  # what is detoxified
    data_dir: str = ""  # where data sets lie; an empty string means the hub
    mesh: str = "data:1,fsdp:-1,model:1"
    dtype: str = ""  # compute dtype; empty: float32 on CPU, bfloat16 on accelerators


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """Training from scratch: the built-in world's models."""


@dataclasses.dataclass(frozen=True)
class ToxifySettings:
    """The toxic twin: the base model fine-tuned on toxic text."""


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """Text from the contrast between the base model and its toxic twin."""


@dataclasses.dataclass(frozen=True)
class DetoxifySettings:
    """Targets fine-tuned on the distilled text."""


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Toxicity, perplexity, diversity, knowledge, before and after."""

    which: tuple[str, ...] = ("original", "detoxified")  # of the base model and every target
    extra_models: tuple[str, ...] = ()  # 'name=PATH' each: the samples-only control, say
    # Toxicity. Prompts: toxigen (annotated test), toxigen?split=validation, realtoxicityprompts, a csv or jsonl file
    prompts: str = "toxigen"
    max_prompts: int = 0  # that many, drawn with `seed`; 0: all
    samples: int = 25  # continuations of a prompt
    max_new_tokens: int = 20
    temperature: float = 1.0
    top_k: int = 50  # 0: off
    top_p: float = 0.9  # after top-k; 1: off
    runs: int = 5
    seed: int = 42  # of the first run; the next has the next
    scorer: str = "classifier:unitary/toxic-bert"  # or linear:DIRECTORY, lexicon, perspective
    threshold: float = 0.5  # toxic is what scores above it
    id_categories: tuple[str, ...] = ("gender_lgbtq", "race_nationalities", "religion")  # the toxic model saw these
    ood_categories: tuple[str, ...] = ("disability",)
    resamples: int = 1000  # of the bootstrap over prompts
    # Fluency
    perplexity_scorer: str = "meta-llama/Llama-2-7b-hf"  # empty: no perplexity
    perplexity_limit: float = 1e4  # continuations above it are left out of the mean, and counted
    text_file: str = ""  # plain perplexity on it, by each model itself; empty: none
    # Knowledge. FORM:SHOTS or FORM:SHOTS:SPLIT, form paper (validation split) or standard (test split); empty: none
    mmlu: tuple[str, ...] = ("paper:1", "paper:3")
    # lm-evaluation-harness: its task names, or files of tasks (.yaml)
    harness: tuple[str, ...] = ()
    harness_shots: int = -1  # -1: as the task says
    harness_limit: int = 0  # documents of a task; 0: all
    # The released code: no BOS before prompts, prompt + continuation in Dist-n, every occurrence of the prompt removed,
    # stale prompt lengths in perplexity
    official: bool = False
    prompt_bos: bool = True  # BOS before prompts where the tokenizer has it; `official` leaves it out as well
    # Rows on the device at once: they change speed and memory, and the result by rounding at most
    batch_size: int = 512  # of generation
    score_batch_size: int = 256  # of likelihoods, for rows of up to 128 tokens


@dataclasses.dataclass(frozen=True)
class AnalyzeSettings:
    """What the distilled text is like."""


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """One page that shows it all."""


@dataclasses.dataclass(frozen=True)
class FitScorerSettings:
    """A linear toxicity scorer from labelled text."""

    data: str = ""  # csv (with a header) or jsonl
    text_field: str = "text"
    label_field: str = "toxicity_human"
    above: float = 3.0  # toxic: the label is a number greater than this …
    positive: tuple[str, ...] = ()  # … or, where this is not empty, one of these
    test_data: str = ""  # another file to test on; empty: a random part of `data`, held out
    held_out: float = 0.1  # that part
    test_text_field: str = ""  # empty: the field's name is the training file's
    test_label_field: str = ""  # empty: the label is read as the training file's; else by the next two
    test_above: float = 3.0
    test_positive: tuple[str, ...] = ()
    analyses: tuple[str, ...] = ("words", "characters")
    strength: float = 4.0  # inverse of the L2 penalty
    balanced: bool = False  # weigh both labels the same: calls more text toxic, and is calibrated no longer
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What `unidetox bench` measures."""


STAGES = {
    "pretrain": PretrainSettings,
    "toxify": ToxifySettings,
    "distill": DistillSettings,
    "detoxify": DetoxifySettings,
    "evaluate": EvaluateSettings,
    "analyze": AnalyzeSettings,
    "report": ReportSettings,
    "fit_scorer": FitScorerSettings,
    "bench": BenchSettings,
}


def default_config() -> ml_collections.ConfigDict:
    """The paper's configuration: `RunSettings` at the top, one sub-dictionary a stage."""
    config = ml_collections.ConfigDict(dataclasses.asdict(RunSettings()))
    for name, settings in STAGES.items():
        config[name] = ml_collections.ConfigDict(dataclasses.asdict(settings()))
    return config


def parse(part: typing.Mapping[str, Any], settings: type, where: str = "config"):
    """One part of a configuration as its frozen dataclass.

    Raises:
      UserError: an unknown field (with the nearest known one), or a value of another type than the default's.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}
    types = typing.get_type_hints(settings)
    values = {}
    for name, value in dict(part).items():
        if name in STAGES and settings is RunSettings:
            continue
        if name not in fields:
            raise UserError(f"{where}.{name}: no such field{suggest(name, fields)}")
        values[name] = _checked(value, types[name], f"{where}.{name}")
    return settings(**values)


def _checked(value: Any, expected: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is tuple:
        if isinstance(value, str):
            raise UserError(f"{where}: found the text {value!r}, expected a list written ('a','b')")
        if any(isinstance(item, str) and "," in item for item in value):
            raise UserError(f"{where}: a comma inside an element of {tuple(value)!r}; write ('a','b')")
        return tuple(_checked(item, arguments[0], where) for item in value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected in (int, float, str, bool) and type(value) is not expected:
        raise UserError(f"{where}: found {value!r}, expected {expected.__name__}")
    return value
