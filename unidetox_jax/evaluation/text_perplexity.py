"""Perplexity of given text under the evaluated model itself: a file as one stream, or every text of a data set."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unidetox_jax import data
from unidetox_jax.data.tokens import encode
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.generator import Generator
from unidetox_jax.evaluation.likelihood import loglikelihood
from unidetox_jax.evaluation.metrics import Cell, Metric, Quantity, Result, Subject
from unidetox_jax.models import Model

LONGEST_WINDOW = 2048  # tokens, unless asked for: what a longer context adds is small, and attention's cost is not


class TextPerplexity(Metric):
    """Perplexity of config.evaluate.text_file."""

    field = "text_file"
    loads = "subject"
    nothing = None

    def compute(self, subject: Subject) -> Result:
        return Result(subject.keep("text.json", lambda: self._measure(subject)))

    def _measure(self, subject: Subject) -> dict[str, Any]:
        settings = subject.settings
        place = subject.path(settings.text_file)
        options: dict[str, Any] = {"batch_size": settings.score_batch_size, "label": "text"}
        if data.is_spec(place):
            texts = data.texts(place, data_dir=subject.data_dir)
            measured = of_texts(*subject.load(), texts, place, **options)
        else:
            measured = of_file(*subject.load(), place, **options)
        return {"file": settings.text_file, **measured}

    def cells(self, summary: Mapping[str, Any]) -> dict[Quantity, Cell]:
        explanation = "Perplexity of text: of held-out text, under the model itself."
        quantity = Quantity("text_perplexity", "Perplexity of text", True, 2, explanation=explanation)
        return {quantity: Cell(summary["ppl"])}


def of_file(
    model: Model | Generator,
    tokenizer: Any,
    path: epath.PathLike,
    stride: int = 0,
    length: int = 0,
    batch_size: int = 256,
    label: str | None = None,
) -> dict[str, Any]:
    """`of_texts` of a text file as one stream. Raises UserError also where there is no such file, or no UTF-8 in it."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    return of_texts(model, tokenizer, [text], str(path), stride, length, batch_size, label)


def of_texts(
    model: Model | Generator,
    tokenizer: Any,
    texts: Sequence[str],
    where: str,
    stride: int = 0,
    length: int = 0,
    batch_size: int = 256,
    label: str | None = None,
) -> dict[str, Any]:
    """Perplexity of texts, each a stream of tokens of its own, by windows of `length` tokens that slide by `stride`.

    Every token of a text but the first is scored once, with at least length − stride tokens before it where there are
    as many. Length 0 means the model's context, but at most 2,048; stride 0 half the length. `where` is for messages.

    Returns:
      {"ppl", "nll" (nats a token), "bits_per_byte", "texts", "tokens" (scored), "bytes", "length", "stride"}.

    Raises:
      UserError: fewer than two tokens in every text.
    """
    length = length or min(model.cfg.max_position_embeddings, LONGEST_WINDOW)
    stride = stride or length // 2
    pieces = [windows(tokens, length, stride) for tokens in encode(tokenizer, texts)]
    contexts, continuations = ([piece for part in pieces for piece in part[side]] for side in (0, 1))
    scored, size = sum(map(len, continuations)), sum(len(text.encode()) for text in texts)
    if not scored:
        raise UserError(f"{where}: no text with at least 2 tokens")
    likelihoods = loglikelihood(model, contexts, continuations, batch_size, max_length=length, label=label)
    nll = -float(likelihoods.sums.sum())
    return {
        "ppl": float(np.exp(nll / scored)),
        "nll": nll / scored,
        "bits_per_byte": nll / np.log(2) / size,
        "texts": len(texts),
        "tokens": scored,
        "bytes": size,
        "length": length,
        "stride": stride,
    }


def windows(tokens: Sequence[int], length: int, stride: int) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Contexts and continuations that score every token but the first once, in inputs of at most `length` tokens."""
    contexts, continuations = [], []
    at = 1
    while at < len(tokens):
        end = min(at + (length if at == 1 else stride), len(tokens))
        start = max(0, end - 1 - length)
        contexts.append(tokens[start:at])
        continuations.append(tokens[at:end])
        at = end
    return contexts, continuations
