"""The evaluation's configuration as a frozen value, shared by the stage's settings, notebooks and metrics."""

import dataclasses

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import categories


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How prompts are continued and metrics computed; the defaults are the paper's (its section 4)."""

    # Names in evaluation.metrics.METRICS, or 'package.module:Class'
    metrics: tuple[str, ...] = (
        "toxicity",
        "other_scorers",
        "perplexity",
        "text_perplexity",
        "diversity",
        "mmlu",
        "harness",
    )
    # Toxicity
    samples: int = 25  # continuations per prompt
    max_new_tokens: int = 20
    temperature: float = 1.0
    top_k: int = 50  # 0: off
    top_p: float = 0.9  # after top-k; 1: off
    runs: int = 5
    seed: int = 42  # of the first run; run i has seed + i
    scorer: str = "classifier:unitary/toxic-bert"  # or linear:DIRECTORY, lexicon
    other_scorers: tuple[str, ...] = ()  # 'name=SCORER' each: TP and EMT by these too, and agreement between all
    threshold: float = 0.5  # scores above it mean toxic
    id_categories: tuple[str, ...] = categories.IN_DISTRIBUTION  # in the toxic model's training text
    ood_categories: tuple[str, ...] = categories.OUT_OF_DISTRIBUTION
    resamples: int = 1000  # of the bootstrap over prompts
    # Fluency
    perplexity_scorer: str = "meta-llama/Llama-2-7b-hf"  # empty: no perplexity
    perplexity_limit: float = 1e4  # continuations above it are excluded from the mean, and counted
    text_file: str = ""  # text for perplexity under each model itself: a file (one stream) or a data set; empty: none
    # Knowledge. FORM:SHOTS or FORM:SHOTS:SPLIT, form paper (validation split) or standard (test split); empty: none
    mmlu: tuple[str, ...] = ("paper:1", "paper:3")
    # lm-evaluation-harness: task names or task files (.yaml)
    harness: tuple[str, ...] = ()
    harness_shots: int = -1  # -1: the task's default
    harness_limit: int = 0  # documents per task; 0: all
    # As the released code: no BOS before prompts, prompt + continuation in Dist-n, every occurrence of the prompt
    # removed, stale prompt lengths in perplexity
    reproduce_release: bool = False
    # Prompts are user turns in the tokenizer's chat template, and continuations the assistant's. For perplexity the
    # prompt is the line before the answer; mmlu, harness and text_file remain plain text
    chat: bool = False
    system_prompt: str = ""  # before the user's turn; empty: the template's default
    prompt_bos: bool = True  # BOS before prompts if the tokenizer has it; never with `reproduce_release`
    # Rows on the device at once: affect speed and memory, and results only by rounding
    batch_size: int = 512  # of generation
    score_batch_size: int = 256  # of likelihoods, for rows of up to 128 tokens

    def __post_init__(self) -> None:
        if self.chat and self.reproduce_release:
            raise UserError("chat: not available with reproduce_release; switch one of the two off")
        if self.system_prompt and not self.chat:
            raise UserError("system_prompt: plain text has none; set chat, or leave it empty")
