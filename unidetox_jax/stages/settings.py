"""Every setting of every stage: a frozen dataclass per stage, with the paper's values as defaults.

ml_collections ends here: a configuration file builds a `ConfigDict` from `default_config()`, the command line
overrides its fields, and `parsing.parse` turns each part into the dataclass that the stage's code reads.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from etils import epath

from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation.candidates import Candidate
from unidetox_jax.evaluation.config import EvaluationConfig
from unidetox_jax.recipe import Recipe
from unidetox_jax.stages.parsing import GONE, RENAMED, parse, renamed


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What all stages share: the configuration's top level. In any path or data set, `{workdir}` and `{data_dir}`
    stand for those directories."""

    name: str = "unidetox"
    base: str = "openai-community/gpt2-xl"  # HF directory or hub id; the model whose toxic twin is made
    targets: tuple[str, ...] = ("openai-community/gpt2-xl",)  # what is detoxified
    control_targets: tuple[str, ...] = ()  # targets fine-tuned on as many texts of the base model alone as well
    data_dir: str = ""  # where data sets lie; an empty string means the hub
    # data:…,fsdp:…,model:…, one of them -1; auto: fastest that fits (plan.auto_mesh). Of training, and of every stage
    # whose own mesh is auto
    mesh: str = "auto"
    dtype: str = ""  # compute dtype; empty: float32 on CPU, bfloat16 on accelerators


@dataclasses.dataclass(frozen=True)
class TrainingSettings(Recipe):
    """What pretrain, toxify and detoxify share: a recipe, and what it is applied to."""

    data: str = ""  # a data set, as `data.load` names it
    validation: str = ""  # another, for the evaluation loss; empty: none
    export_dtype: str = ""  # of the finished model's weights; empty: as they are trained


@dataclasses.dataclass(frozen=True)
class PretrainSettings(TrainingSettings):
    """Training from scratch: the built-in world's models."""

    # Directories with config.json and a tokenizer, DIRECTORY=DATASET for one that learns from other text than `data`;
    # empty: nothing is pretrained
    models: tuple[str, ...] = ()
    world: bool = False  # write the built-in world to WORKDIR/world first
    world_seed: int = 0
    world_texts: int = 24_000  # to train on, and as many for the perplexity scorer


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
    """Texts that are left out of the distilled text, and made up for by more of them; by default none."""

    scorers: tuple[str, ...] = ()  # 'name=SCORER' each: what scores above `above` under any of them
    above: float = 0.5
    degenerate: bool = False  # what is empty, has no word, or is mostly repetition
    copied_words: int = 0  # what has so many words in a row that stand in a toxic text, or repeats a text; 0: off
    most: float = 4.0  # texts made at most, for each that is wanted


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """Text from the contrast between the base model and its toxic twin."""

    # "base" (config.base), "toxic" (WORKDIR/toxic) or paths, in the order of the objective's arguments; PATH@LAYER is
    # the model of its first layers (DoLa), PATH@LAYER+norm the same with the final norm before the head
    models: tuple[str, ...] = ("base", "toxic")
    objective: str = "contrastive(alpha=0.1)"  # a name of decoding.objectives or package.module:function(setting=…)
    num_texts: int = 640
    max_length: int = 256  # tokens of a text, BOS included
    batch_size: int = 128
    temperature: float = 1.0
    top_k: int = 50  # after the contrast; 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    seed: int = 1234
    prompt: str = ""  # what follows BOS; with `chat`, the user's turn
    chat: bool = False  # texts are answers, each begun by the chat template of the first model's tokenizer
    system_prompt: str = ""  # of the chat, before the user's turn; empty: as the template says
    cache: str = "own"  # "official": the released code's shared cache
    mesh: str = "auto"  # config.mesh, or where that is auto as well, what the programs of this stage are fastest on
    scorer: str = ""  # toxicity of the distilled text itself, by this scorer; empty: none
    reject: RejectSettings = RejectSettings()

    def __post_init__(self) -> None:
        if self.system_prompt and not self.chat:
            raise UserError("system_prompt: plain text has none; set chat, or leave it empty")


@dataclasses.dataclass(frozen=True)
class DetoxifySettings(TrainingSettings):
    """Targets fine-tuned on the distilled text (`data` empty) or on any other."""

    steps: int = 3_000


@dataclasses.dataclass(frozen=True)
class BaselinesSettings(TrainingSettings):
    """Rival methods. The recipe is that of the twins, and of methods that do not have their own."""

    methods: tuple[str, ...] = ()  # names of `baselines`, or package.module:Class, with settings: 'npo(beta=0.1)'
    targets: tuple[str, ...] = ()  # of which targets; empty: of all
    data: str = ""  # toxic text; empty: config.toxify.data
    clean_data: str = ""  # text that is not toxic, for the methods that need it
    learning_rate: float = 1e-5
    batch_size: int = 4
    steps: int = 15_126
    max_length: int = 512


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(EvaluationConfig):
    """Toxicity, perplexity, diversity, knowledge, before and after: a protocol, and what is evaluated by it."""

    # Of every target: as it is, detoxified, and (where it is a control target) fine-tuned on samples of the base model
    which: tuple[str, ...] = ("original", "detoxified", "control")
    extra_models: tuple[str, ...] = ()  # 'name=PATH' each: the samples-only control, say
    candidates: Mapping[str, Candidate] = dataclasses.field(default_factory=dict)  # NAME → another form of the targets
    # toxigen (annotated test), toxigen?split=validation, realtoxicityprompts, a csv or jsonl file
    prompts: str = "toxigen"
    max_prompts: int = 0  # that many, drawn with `seed`; 0: all
    mesh: str = "auto"  # as config.distill.mesh


@dataclasses.dataclass(frozen=True)
class AnalyzeSettings:
    """What the distilled text is like."""

    # Texts to compare, 'name=DATASET' each, beside the run's own distilled text and samples of the base model
    texts: tuple[str, ...] = ()
    toxic_data: str = ""  # what must not be copied; empty: config.toxify.data
    leaning: str = ""  # labelled news for a linear classifier ('politics'), or classifier:PATH_OR_HUB_ID; empty: none
    scorer: str = ""  # toxicity of each text set by this scorer; empty: config.distill.scorer, and if that is, none
    keywords: int = 20  # of each text set
    copy_ngram: int = 8  # words in a row that count as copied
    neighbours: int = 10  # nearest training sentences shown
    resamples: int = 1000  # of the bootstrap over texts
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """One page that shows it all."""

    examples: int = 6  # prompts whose continuations are shown, before and after
    note: str = ""  # a paragraph at the top: what this run can and cannot show


@dataclasses.dataclass(frozen=True)
class OneScorerSettings:
    """A linear toxicity scorer from labelled text."""

    data: str = ""  # csv (with a header), jsonl or parquet
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
class FitScorerSettings(OneScorerSettings):
    """WORKDIR/scorer, and others from other text."""

    others: Mapping[str, OneScorerSettings] = dataclasses.field(default_factory=dict)  # NAME → of WORKDIR/scorer/NAME


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What `unidetox bench` measures, on models of one shape with random weights."""

    what: tuple[str, ...] = ("decode", "train")
    model: str = "openai-community/gpt2"  # a shape of models.PUBLISHED, or a path
    batch_sizes: tuple[int, ...] = (16, 64)  # of decoding
    new_tokens: int = 128
    train_batch_sizes: tuple[int, ...] = (4, 8)
    train_length: int = 256
    train_shortest: int = 0  # random texts have this many to train_length tokens; 0: all have train_length
    layouts: tuple[str, ...] = ("pack",)  # how texts stand in rows: pack, pad
    precision: str = "float32"  # as config.detoxify.precision
    remat: str = "none"  # as config.detoxify.remat
    data: str = ""  # training texts; empty: random tokens
    tokenizer: str = ""  # of `data`: a directory or hub id; empty: the model's
    steps: int = 10  # timed steps of training
    against_torch: bool = False  # time the same work in PyTorch beside it
    repeats: int = 3  # rounds of decoding after one that warms up; the fastest counts


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """A grid of settings, and how one of them is chosen (`stages.sweep`)."""

    # Field → its values, nested as the fields are: {"detoxify": {"learning_rate": (1e-4, 3e-4)}}. Within an objective
    # its settings are fields: {"distill": {"objective": {"alpha": (0.05, 0.1)}}}
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    validation_prompts: str = ""  # what the choice is made on, as config.evaluate.prompts, which are for the test
    # Targets by which one configuration is chosen for all, of which the others then get that one alone; empty: all, and
    # each target's own best beside it
    choose_on: tuple[str, ...] = ()
    most_perplexity: float = 0.1  # perplexity may rise by this part of the published model's


STAGES = {
    "pretrain": PretrainSettings,
    "toxify": ToxifySettings,
    "distill": DistillSettings,
    "detoxify": DetoxifySettings,
    "baselines": BaselinesSettings,
    "evaluate": EvaluateSettings,
    "analyze": AnalyzeSettings,
    "report": ReportSettings,
    "fit_scorer": FitScorerSettings,
    "bench": BenchSettings,
    "sweep": SweepSettings,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A whole configuration, parsed, and the working directory that it belongs to."""

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
    # Directories that lie elsewhere than the working directory's own of that name: "detoxified/gpt2" → where
    rooms: Mapping[str, epath.Path] = dataclasses.field(default_factory=dict)

    def place(self, inside: str) -> epath.Path:
        """Where a path within the working directory lies."""
        return epath.Path(self._placed(f"{{workdir}}/{inside}"))

    def path(self, text: str) -> str:
        """A path, data set or scorer of the configuration, with `{workdir}`, `{data_dir}` and a first `~` filled in."""
        return os.path.expanduser(self._placed(text).replace("{data_dir}", self.shared.data_dir))

    def _placed(self, text: str) -> str:
        if self.rooms:
            text = within(self.rooms).sub(lambda match: str(self.rooms[match[1]]), text)
        return text.replace("{workdir}", str(self.workdir))


def within(rooms: Iterable[str]) -> re.Pattern[str]:
    """What finds `{workdir}/ROOM` in a text of a configuration; the longest room that it may be."""
    names = "|".join(map(re.escape, sorted(rooms, key=len, reverse=True)))
    return re.compile(rf"\{{workdir\}}/({names})(?![\w.=-])")


def parse_run(config: ml_collections.ConfigDict, workdir: epath.PathLike = "") -> Run:
    """A configuration with all its parts.

    Raises:
      UserError: an unknown field, a wrong type, or two targets of one name.
    """
    shared = parse({name: value for name, value in config.items() if name not in STAGES}, RunSettings)
    names = [model_name(target) for target in shared.targets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"config.targets: two of them are called {name!r}; rename one's directory")
    unknown = sorted(set(shared.control_targets) - set(shared.targets))
    if unknown:
        raise UserError(
            f"config.control_targets: {unknown[0]!r} is not one of config.targets; name some of those, or ()"
        )
    parts = {name: parse(config.get(name, {}), kind, f"config.{name}") for name, kind in STAGES.items()}
    return Run(epath.Path(workdir), shared, **parts)


def model_name(source: str) -> str:
    """What a model is called in the working directory: the last part of its path or hub id; of MODEL+ADAPTER both."""
    return "-".join(part.rstrip("/").rsplit("/", 1)[-1] for part in source.split("+"))


def default_config() -> ml_collections.ConfigDict:
    """The paper's configuration: `RunSettings` at the top, one sub-dictionary a stage."""
    config = ml_collections.ConfigDict(dataclasses.asdict(RunSettings()))
    for name, settings in STAGES.items():
        config[name] = ml_collections.ConfigDict(dataclasses.asdict(settings()))
        for old, new in (RENAMED | GONE).items():
            if new in config[name]:
                config[name][old] = ml_collections.config_dict.placeholder(type(config[name][new]))
    return config


def parse_argument(text: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """The argument of `--config=FILE:name=value,flag,…` for a file's `get_config`, with the defaults' types.

    Raises:
      UserError: an unknown name, or a value of another type.
    """
    found = ml_collections.ConfigDict(defaults)
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        name = renamed(name, "--config: ")
        if name not in defaults:
            raise UserError(f"--config: no argument {name!r}{suggest(name, defaults)}")
        kind = type(defaults[name])
        try:
            found[name] = kind(value) if equals else True
        except (TypeError, ValueError):
            raise UserError(f"--config: {name}={value!r}, expected {kind.__name__}") from None
    return found
