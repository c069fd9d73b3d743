"""How a model is fine-tuned, as one frozen value: what the stages' settings, a notebook and the training loop share."""

import dataclasses

from unidetox_jax.errors import UserError, suggest

ANSWER, LOSSES = "answer", ("answer", "all")  # what of a conversation is learned


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2022): a frozen matrix W becomes W + scale · B A, and only A and B are trained."""

    rank: int = 0  # rows of A; 0: no adapter, all weights are trained
    alpha: float = 16.0  # scale is alpha / rank …
    rslora: bool = False  # … or alpha / √rank (Kalajdzievski 2023)
    dropout: float = 0.0  # of what A reads, in training
    # Ends of the modules' names in transformers: 'q_proj', 'mlp.c_proj'; empty: every linear layer of a block
    targets: tuple[str, ...] = ()
    merge: bool = False  # a stage also writes the whole model, the adapter merged into its weights

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW with a linear decay of the learning rate on shuffled texts; the defaults are the paper's (its section 4.1).

    How often to save, evaluate and log changes what is seen of the work, not its result.
    """

    learning_rate: float = 5e-5  # linear to 0 after the warm-up
    warmup_steps: int = 0
    decay: bool = True  # off: it stays after the warm-up
    batch_size: int = 8  # texts a step, on all devices together
    steps: int = 0  # optimizer steps; 0: as `epochs` say
    epochs: float = 0.0
    max_length: int = 256  # tokens of a text; longer ones are cut
    seed: int = 123  # of the order and of dropout
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the global gradient norm; 0: off
    dropout: bool = True  # as the model's config says
    lora: Lora = Lora()  # an adapter is trained instead of the weights
    accumulation: int = 1  # parts that a step's batch is computed in
    remat: str = "none"  # what the backward pass computes again: none, dots, full
    layout: str = "pack"  # or pad; how a step's texts lie in rows
    # float32; bfloat16: weights and moments in it, stochastically rounded; release: the released code's arithmetic
    precision: str = "float32"
    reproduce_release: bool = False  # the released code: precision "release", padding trained on, no end token
    # Each text is an assistant's turn, as the tokenizer's chat template writes it, and not plain text; max_length is
    # that of the conversation
    chat: bool = False
    system_prompt: str = ""  # the system's turn in front; empty: as the template says
    user_prompt: str = ""  # the user's turn that the text answers
    loss_on: str = "answer"  # the text and the end of its turn; or all, the turns before it as well
    save_minutes: float = 10.0  # between checkpoints; 0: one with every line of metrics.jsonl
    keep: int = 2  # newest checkpoints kept; a stage's own go when it is complete
    evaluate_every: int = 500  # steps between evaluations, where there is validation data
    log_every: int = 10  # steps between lines of metrics.jsonl

    def __post_init__(self) -> None:
        if self.loss_on not in LOSSES:
            raise UserError(f"loss_on: no {self.loss_on!r}{suggest(self.loss_on, LOSSES)}")
        if self.chat and self.reproduce_release:
            raise UserError("chat: reproduce_release knows no chat; switch one of the two off")
        for name in ("system_prompt", "user_prompt"):
            if getattr(self, name) and not self.chat:
                raise UserError(f"{name}: plain text has none; set chat, or leave it empty")
