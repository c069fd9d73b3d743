"""The settings of every stage: a frozen dataclass per stage, with the paper's values as defaults.

A configuration file builds a `ConfigDict` from `default_config()` and the command line overrides its fields;
`parsing.parse` turns each section into its dataclass, so no other module sees ml_collections.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

import ml_collections
from etils import epath

from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation.candidates import Candidate
from unidetox_jax.evaluation.config import EvaluationConfig
from unidetox_jax.recipe import Recipe
from unidetox_jax.stages.parsing import REMOVED, RENAMED, parse, renamed


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The top level, shared by all stages. Paths and data sets may hold `{workdir}` and `{data_dir}`."""

    name: str = "unidetox"
    base: str = "openai-community/gpt2-xl"  # HF directory or hub id; its toxic twin is made
    targets: tuple[str, ...] = ("openai-community/gpt2-xl",)  # models to detoxify
    control_targets: tuple[str, ...] = ()  # targets also fine-tuned on as many samples of the base model alone
    data_dir: str = ""  # directory of the data sets; empty: the hub
    # Mesh of training, and of stages whose own mesh is auto: data:…,fsdp:…,model:…, at most one of them -1;
    # auto: the fastest that fits (plan.auto_mesh)
    mesh: str = "auto"
    dtype: str = ""  # compute dtype; empty: float32 on CPU, bfloat16 on accelerators


@dataclasses.dataclass(frozen=True)
class TrainingSettings(Recipe):
    """Shared by pretrain, toxify, detoxify and baselines: a recipe and its data."""

    data: str = ""  # a data set, as `data.load` names it
    validation: str = ""  # another one, for the validation loss; empty: none
    export_dtype: str = ""  # of the exported weights; empty: as trained


@dataclasses.dataclass(frozen=True)
class PretrainSettings(TrainingSettings):
    """Training from scratch: the built-in world's models."""

    # Directories with config.json and a tokenizer; DIRECTORY=DATASET trains on another data set than `data`
    models: tuple[str, ...] = ()
    world: bool = False  # write the built-in world to WORKDIR/world first
    world_seed: int = 0
    world_texts: int = 24_000  # training texts, and as many for the perplexity scorer


@dataclasses.dataclass(frozen=True)
class ToxifySettings(TrainingSettings):
    """The toxic twin: the base model fine-tuned on toxic text."""

    data: str = "dghs"
    validation: str = "dghs?split=dev"
    learning_rate: float = 1e-5
    batch_size: int = 4
    steps: int = 15_126  # six epochs of 10,084 texts
    max_length: int = 512


@dataclasses.dataclass(frozen=True)
class RejectSettings:
    """Rejection of distilled texts, which are replaced by further samples; off by default."""

    scorers: tuple[str, ...] = ()  # 'name=SCORER' each: rejects texts that any of them scores above `above`
    above: float = 0.5
    degenerate: bool = False  # rejects empty, wordless and mostly repetitive texts
    copied_words: int = (
        0  # rejects duplicates, and texts that share so many consecutive words with a toxic text; 0: off
    )
    most: float = 4.0  # samples at most, per text of num_texts


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """Text from the contrast between the base model and its toxic twin."""

    # "base" (config.base), "toxic" (WORKDIR/toxic) or paths, in the order of the objective's arguments. PATH@LAYER: the
    # logits of an intermediate layer (DoLa); PATH@LAYER+norm: with the final norm before the head
    models: tuple[str, ...] = ("base", "toxic")
    objective: str = "contrastive(alpha=0.1)"  # of decoding.objectives, or package.module:function(setting=…)
    num_texts: int = 640
    max_length: int = 256  # tokens of a text, BOS included
    batch_size: int = 128
    temperature: float = 1.0
    top_k: int = 50  # of the objective's scores; 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    seed: int = 1234
    prompt: str = ""  # follows BOS; with `chat`, the user's turn
    chat: bool = False  # texts are answers in the chat template of the first model's tokenizer
    system_prompt: str = ""  # of the chat; empty: the template's own
    cache: str = "own"  # "official": the released code's shared cache
    mesh: str = "auto"  # config.mesh; if that is auto too, the fastest for this stage's programs
    scorer: str = ""  # scores the toxicity of the distilled text; empty: none
    reject: RejectSettings = RejectSettings()

    def __post_init__(self) -> None:
        if self.system_prompt and not self.chat:
            raise UserError("system_prompt: plain text has none; set chat, or leave it empty")


@dataclasses.dataclass(frozen=True)
class DetoxifySettings(TrainingSettings):
    """Targets fine-tuned on the distilled text (`data` empty) or on another data set."""

    steps: int = 3_000


@dataclasses.dataclass(frozen=True)
class BaselinesSettings(TrainingSettings):
    """Rival methods. The recipe trains the twins, and methods without a recipe of their own."""

    methods: tuple[str, ...] = ()  # of `baselines`, or package.module:Class, with settings: 'npo(beta=0.1)'
    targets: tuple[str, ...] = ()  # those of config.targets that they are applied to; empty: all
    data: str = ""  # toxic text; empty: config.toxify.data
    clean_data: str = ""  # non-toxic text, for the methods that need it
    learning_rate: float = 1e-5
    batch_size: int = 4
    steps: int = 15_126
    max_length: int = 512


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(EvaluationConfig):
    """An evaluation protocol, and the models and prompts it is applied to."""

    # Forms of every target: as published, detoxified, and for control targets the samples-only control
    which: tuple[str, ...] = ("original", "detoxified", "control")
    extra_models: tuple[str, ...] = ()  # further models, 'name=PATH' each
    candidates: Mapping[str, Candidate] = dataclasses.field(
        default_factory=dict
    )  # name → a further form of the targets
    # toxigen (annotated test), toxigen?split=validation, realtoxicityprompts, a csv or jsonl file
    prompts: str = "toxigen"
    max_prompts: int = 0  # size of a random subset, drawn with `seed`; 0: all
    mesh: str = "auto"  # as config.distill.mesh


@dataclasses.dataclass(frozen=True)
class AnalyzeSettings:
    """Analysis of the distilled text."""

    # Texts to compare with the run's distilled text and samples of the base model, 'name=DATASET' each
    texts: tuple[str, ...] = ()
    toxic_data: str = ""  # checked for copies; empty: config.toxify.data
    leaning: str = ""  # labelled news for a linear classifier ('politics'), or classifier:PATH_OR_HUB_ID; empty: none
    scorer: str = ""  # toxicity scorer; empty: config.distill.scorer, if any
    keywords: int = 20  # per text set
    copy_ngram: int = 8  # consecutive words that count as copied
    neighbours: int = 10  # nearest training sentences shown
    resamples: int = 1000  # of the bootstrap over texts
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """The report's page."""

    examples: int = 6  # prompts whose continuations are shown, before and after
    note: str = ""  # a paragraph at the top, such as what this run can and cannot show


@dataclasses.dataclass(frozen=True)
class OneScorerSettings:
    """A linear toxicity scorer from labelled text."""

    data: str = ""  # csv (with a header), jsonl or parquet, or the name of a data set
    text_field: str = "text"
    label_field: str = "toxicity_human"
    above: float = 3.0  # toxic: the label is a number greater than this …
    positive: tuple[str, ...] = ()  # … or, unless this is empty, one of these
    test_data: str = ""  # another file to test on; empty: a random share of `data`
    held_out: float = 0.1  # that share
    test_text_field: str = ""  # empty: text_field
    test_label_field: str = ""  # empty: label_field, above and positive apply; else the next two
    test_above: float = 3.0
    test_positive: tuple[str, ...] = ()
    analyses: tuple[str, ...] = ("words", "characters")
    strength: float = 4.0  # inverse of the L2 penalty
    balanced: bool = False  # weighs both labels equally: calls more text toxic, and gives uncalibrated probabilities
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class FitScorerSettings(OneScorerSettings):
    """WORKDIR/scorer, and further scorers."""

    others: Mapping[str, OneScorerSettings] = dataclasses.field(
        default_factory=dict
    )  # name → that of WORKDIR/scorer/NAME


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """`unidetox bench`, on models with random weights."""

    what: tuple[str, ...] = ("decode", "train")
    model: str = "openai-community/gpt2"  # configuration: of models.PUBLISHED, or a path
    batch_sizes: tuple[int, ...] = (16, 64)  # of decoding
    new_tokens: int = 128
    train_batch_sizes: tuple[int, ...] = (4, 8)
    train_length: int = 256
    train_shortest: int = 0  # lengths of random texts: uniform from this to train_length; 0: all train_length
    layouts: tuple[str, ...] = ("pack",)  # pack, pad
    precision: str = "float32"  # as config.detoxify.precision
    remat: str = "none"  # as config.detoxify.remat
    data: str = ""  # training texts; empty: random tokens
    tokenizer: str = ""  # of `data`: a directory or hub id; empty: the model's
    steps: int = 10  # timed steps of training
    against_torch: bool = False  # also times the same work in PyTorch
    repeats: int = 3  # rounds of decoding after a warm-up; the fastest counts


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """A grid of settings, and how one variant is chosen (`stages.sweep`)."""

    # Field → values, nested as the fields are: {"detoxify": {"learning_rate": (1e-4, 3e-4)}}. An objective's settings
    # count as fields: {"distill": {"objective": {"alpha": (0.05, 0.1)}}}
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    validation_prompts: str = ""  # to choose on; config.evaluate.prompts are for the test
    # Targets that the choice for all targets is made on, the others getting only that variant; empty: all targets, and
    # each target's own best is tested as well
    choose_on: tuple[str, ...] = ()
    most_perplexity: float = 0.1  # allowed rise of perplexity, relative to the published model


@dataclasses.dataclass(frozen=True)
class Run:
    """A parsed configuration with its working directory, which holds:

    world/                           the built-in world's texts, prompts and model configurations
    pretrained/NAME/                 a model trained from scratch
    scorer/, scorer/NAME/            linear toxicity scorers
    toxic/                           the toxic twin
    distilled/, samples/             texts of the contrast, and of the base model alone for the control
    detoxified/NAME/, control/NAME/  a target fine-tuned on either
    baselines/METHOD/NAME/           a rival's model of a target; METHOD "toxic", "clean": the target's twins
    evaluation/NAME/, NAME.FORM/     a model's evaluation, as published and in other forms
    analysis/, report/
    sweep.json, sweep.csv, cells/    of a sweep
    """

    workdir: epath.Path
    shared: RunSettings
    pretrain: PretrainSettings
    toxify: ToxifySettings
    distill: DistillSettings
    detoxify: DetoxifySettings
    baselines: BaselinesSettings
    evaluate: EvaluateSettings
    analyze: AnalyzeSettings
    report: ReportSettings
    fit_scorer: FitScorerSettings
    bench: BenchSettings
    sweep: SweepSettings
    # Directories that a cell of a sweep has elsewhere: "detoxified/gpt2" → path
    relocated: Mapping[str, epath.Path] = dataclasses.field(default_factory=dict)

    def directory(self, name: str) -> epath.Path:
        """Where a directory of the working directory lies."""
        return epath.Path(self._located(f"{{workdir}}/{name}"))

    def path(self, text: str) -> str:
        """A path, data set or scorer, with `{workdir}`, `{data_dir}` and a leading `~` expanded."""
        return os.path.expanduser(self._located(text).replace("{data_dir}", self.shared.data_dir))

    def _located(self, text: str) -> str:
        if self.relocated:
            text = workdir_pattern(self.relocated).sub(lambda match: str(self.relocated[match[1]]), text)
        return text.replace("{workdir}", str(self.workdir))


# Section of a configuration → its settings
SECTIONS: dict[str, Any] = {
    name: kind for name, kind in get_type_hints(Run).items() if name not in ("workdir", "shared", "relocated")
}


def workdir_pattern(directories: Iterable[str]) -> re.Pattern[str]:
    """Matches `{workdir}/DIRECTORY`, for the longest DIRECTORY of these that fits."""
    names = "|".join(map(re.escape, sorted(directories, key=len, reverse=True)))
    return re.compile(rf"\{{workdir\}}/({names})(?![\w.=-])")


def parse_run(config: ml_collections.ConfigDict, workdir: epath.PathLike = "") -> Run:
    """A configuration with all its sections.

    Raises:
      UserError: an unknown field, a wrong type, or two targets of one name.
    """
    shared = parse({name: value for name, value in config.items() if name not in SECTIONS}, RunSettings)
    names = [model_name(target) for target in shared.targets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"config.targets: two of them are called {name!r}; rename one's directory")
    unknown = sorted(set(shared.control_targets) - set(shared.targets))
    if unknown:
        raise UserError(
            f"config.control_targets: {unknown[0]!r} is not one of config.targets; name some of those, or ()"
        )
    sections = {name: parse(config.get(name, {}), kind, f"config.{name}") for name, kind in SECTIONS.items()}
    return Run(epath.Path(workdir), shared, **sections)


def model_name(source: str) -> str:
    """A model's name in the working directory: the last component of its path or hub id; of MODEL+ADAPTER both."""
    return "-".join(part.rstrip("/").rsplit("/", 1)[-1] for part in source.split("+"))


def default_config() -> ml_collections.ConfigDict:
    """The paper's configuration: `RunSettings` at the top, a section for each stage."""
    config = ml_collections.ConfigDict(dataclasses.asdict(RunSettings()))
    for name, settings in SECTIONS.items():
        config[name] = ml_collections.ConfigDict(dataclasses.asdict(settings()))
        for old, new in (RENAMED | REMOVED).items():
            if new in config[name]:
                config[name][old] = ml_collections.config_dict.placeholder(type(config[name][new]))
    return config


def parse_argument(text: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """The argument of `--config=FILE:name=value,flag,…` for a file's `get_config`, with the defaults' types.

    Raises:
      UserError: an unknown name, or a value of another type.
    """
    values = ml_collections.ConfigDict(defaults)
    for entry in filter(None, (text or "").split(",")):
        name, equals, value = entry.partition("=")
        name = renamed(name, "--config: ")
        if name not in defaults:
            raise UserError(f"--config: no argument {name!r}{suggest(name, defaults)}")
        kind = type(defaults[name])
        try:
            values[name] = kind(value) if equals else True
        except (TypeError, ValueError):
            raise UserError(f"--config: {name}={value!r}, expected {kind.__name__}") from None
    return values
