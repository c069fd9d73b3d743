"""Fine-tuning settings as frozen dataclasses, shared by the stages' configuration, notebooks and the training loop."""

import dataclasses

from unidetox_jax.errors import UserError, suggest

ANSWER, LOSSES = "answer", ("answer", "all")  # the part of a conversation that the loss is on


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2022): a frozen matrix W becomes W + scale · B A, and only A and B are trained."""

    rank: int = 0  # 0: no adapter, all weights are trained
    alpha: float = 16.0  # scale is alpha / rank …
    rslora: bool = False  # … or alpha / √rank (Kalajdzievski 2023)
    dropout: float = 0.0  # on A's input, in training
    # Suffixes of module names in transformers, e.g. 'q_proj', 'mlp.c_proj'; empty: all linear layers of the blocks
    targets: tuple[str, ...] = ()
    merge: bool = False  # a stage also writes the model with the adapter merged into its weights

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW with linear learning-rate decay on shuffled texts; the defaults are the paper's (section 4.1).

    `save_minutes`, `keep`, `evaluate_every` and `log_every` do not affect the result.
    """

    learning_rate: float = 5e-5  # after warm-up; decays linearly to 0
    warmup_steps: int = 0
    decay: bool = True  # False: constant after warm-up
    batch_size: int = 8  # texts per step, on all devices together
    steps: int = 0  # optimizer steps; 0: given by `epochs`
    epochs: float = 0.0
    max_length: int = 256  # tokens per text; longer ones are truncated
    seed: int = 123  # of the order of texts and of dropout
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # maximum global gradient norm; 0: off
    dropout: bool = True  # at the rates of the model's config
    lora: Lora = Lora()  # with a rank: train an adapter instead of the weights
    accumulation: int = 1  # gradient accumulation: microbatches per step
    remat: str = "none"  # what the backward pass recomputes: none, dots, full
    layout: str = "pack"  # or pad: whether rows hold several texts or one
    # float32; bfloat16: weights and moments, with stochastic rounding; release: the released code's arithmetic
    precision: str = "float32"
    reproduce_release: bool = False  # as the released code: precision "release", loss on padding, no end token
    # Each text becomes an assistant's turn by the tokenizer's chat template; max_length is then the conversation's
    chat: bool = False
    system_prompt: str = ""  # the system's turn; empty: the template's default
    user_prompt: str = ""  # the user's turn that the text answers
    loss_on: str = "answer"  # the text and the end of its turn; or all: the turns before it as well
    save_minutes: float = 10.0  # between checkpoints; 0: one with every line of metrics.jsonl
    keep: int = 2  # number of checkpoints kept; a stage deletes its checkpoints when it is complete
    evaluate_every: int = 500  # steps between evaluations, if there is validation data
    log_every: int = 10  # steps between lines of metrics.jsonl

    def __post_init__(self) -> None:
        if self.loss_on not in LOSSES:
            raise UserError(f"loss_on: no {self.loss_on!r}{suggest(self.loss_on, LOSSES)}")
        if self.chat and self.reproduce_release:
            raise UserError("chat: reproduce_release knows no chat; switch one of the two off")
        for name in ("system_prompt", "user_prompt"):
            if getattr(self, name) and not self.chat:
                raise UserError(f"{name}: plain text has none; set chat, or leave it empty")
