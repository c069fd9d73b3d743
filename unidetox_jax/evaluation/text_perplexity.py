"""Perplexity of held-out text under the evaluated model: a file as one stream, or the texts of a data set."""

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

LONGEST_WINDOW = 2048  # default limit in tokens: longer contexts add little, but attention becomes expensive


class TextPerplexity(Metric):
    """Perplexity of config.evaluate.text_file."""

    field = "text_file"
    loads = "subject"
    nothing = None

    def compute(self, subject: Subject) -> Result:
        return Result(subject.keep("text.json", lambda: self._measure(subject)))

    def _measure(self, subject: Subject) -> dict[str, Any]:
        settings = subject.settings
        source = subject.path(settings.text_file)
        options: dict[str, Any] = {"batch_size": settings.score_batch_size, "label": "text"}
        if data.is_spec(source):
            texts = data.texts(source, data_dir=subject.data_dir)
            result = of_texts(*subject.load(), texts, source, **options)
        else:
            result = of_file(*subject.load(), source, **options)
        return {"file": settings.text_file, **result}

    def cells(self, summary: Mapping[str, Any]) -> dict[Quantity, Cell]:
        explanation = "Perplexity of text: of held-out text, under the model itself."
        quantity = Quantity("text_perplexity", "Perplexity of text", True, 2, explanation=explanation)
        return {quantity: Cell(summary["ppl"])}


def of_file(model: Model | Generator, tokenizer: Any, path: epath.PathLike, **options: Any) -> dict[str, Any]:
    """`of_texts` for a text file as one stream. Raises UserError also for a missing file or one that is not UTF-8."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    return of_texts(model, tokenizer, [text], str(path), **options)


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
    """Perplexity of texts, each in windows of `length` tokens that slide by `stride`.

    Every token but a text's first is scored once, with a context of at least length − stride tokens if that many
    precede it. Length 0 means the model's context, at most 2,048; stride 0 half the length. `where` names the source in
    error messages.

    Returns:
      {"ppl", "nll" (nats per token), "bits_per_byte", "texts", "tokens" (scored), "bytes", "length", "stride"}.

    Raises:
      UserError: fewer than two tokens in every text.
    """
    length = length or min(model.cfg.max_position_embeddings, LONGEST_WINDOW)
    stride = stride or length // 2
    per_text = [windows(tokens, length, stride) for tokens in encode(tokenizer, texts)]
    contexts, continuations = ([window for text in per_text for window in text[side]] for side in (0, 1))
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
    begin = 1
    while begin < len(tokens):
        end = min(begin + (length if begin == 1 else stride), len(tokens))
        start = max(0, end - 1 - length)
        contexts.append(tokens[start:begin])
        continuations.append(tokens[begin:end])
        begin = end
    return contexts, continuations
