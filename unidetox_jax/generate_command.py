"""`unidetox generate`: text from any models under any objective, streamed to the terminal.

    unidetox generate --models=gpt2 --prompt="The people here"
    unidetox generate --models=gpt2,runs/x/toxic --objective="contrastive(alpha=0.1)" --prompts=- --samples=3
    unidetox generate --models=gpt2,runs/x/toxic --compare=base --prompt="The people here"

--compare prints the tokens of two objectives side by side, with their probabilities under each model.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from unidetox_jax import checkpoint, data, distributed
from unidetox_jax.data import chat
from unidetox_jax.data.tokens import decode, encode
from unidetox_jax.decoding import objectives, warpers
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.decoding.stream import Token, stream
from unidetox_jax.decoding.text_sampling import common_vocabulary, distinct_names, first_token
from unidetox_jax.errors import UserError
from unidetox_jax.method import LanguageModel
from unidetox_jax.progress import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--models", required=True, metavar="A,B", help="directories or hub ids, in the objective's order"
    )
    parser.add_argument("--objective", metavar="NAME(…)", help="default: contrastive for several models")
    parser.add_argument("--compare", metavar="NAME(…)", help="a second objective, shown side by side")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a prompt per line, or a data set (jsonl:FILE?text=COLUMN); -: stdin"
    )
    parser.add_argument("--chat", action="store_true", help="prompts are user turns of a conversation")
    parser.add_argument("--system_prompt", default="", metavar="TEXT", help="of the conversation")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="per prompt")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=50, help="0: off")
    parser.add_argument("--top_p", type=float, default=0.9, help="1: off")
    parser.add_argument("--min_p", type=float, default=0.0, help="0: off")
    parser.add_argument("--seed", type=int, default=42)


def run_command(options: argparse.Namespace) -> int:
    """Writes the texts to standard output; returns 0.

    Raises:
      UserError: no prompt, models that do not fit together or the objective, a tokenizer without a chat template.
    """
    names = [name for name in options.models.split(",") if name]
    chosen = [objectives.get(options.objective or ("contrastive" if len(names) > 1 else "base"))]
    chosen[0].check_models(len(names))
    if options.compare:
        chosen.append(objectives.get(options.compare))
        chosen[1].check_models(min(len(names), max(1, chosen[1].num_models)))  # it may use only the first models
    prompts = _prompts(options)
    distributed.use_compilation_cache()
    loaded = checkpoint.load_all(names)
    models = [LanguageModel(*loaded[name], checkpoint.load_tokenizer(name)) for name in names]
    vocab_size = common_vocabulary([model.tokenizer for model in models], names)
    tokenizer = models[0].tokenizer
    for prompt in prompts:
        tokens = _encode(tokenizer, prompt, options)
        print(f"> {prompt}", flush=True)
        streams = [_stream(models, objective, tokens, vocab_size, options) for objective in chosen]
        if options.compare:
            print(_comparison(streams, tokenizer, [str(objective) for objective in chosen], distinct_names(names)))
        else:
            _write(streams[0], tokenizer, tokens, options.samples)
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts == "-":
        prompts += [line.rstrip("\n") for line in sys.stdin]
    elif options.prompts:
        spec = options.prompts if data.is_spec(options.prompts) else f"text:{options.prompts}"
        prompts += list(data.texts(spec))
    if not prompts:
        raise UserError("--prompt: none given; write --prompt=TEXT, or --prompts=FILE, or --prompts=- to type them")
    return prompts


def _encode(tokenizer: Any, prompt: str, options: argparse.Namespace) -> list[int]:
    if not options.chat:
        return encode(tokenizer, [prompt])[0] or [first_token(tokenizer, "the model")]
    return chat.encode_prompts(tokenizer, [prompt], options.system_prompt)[0]


def _stream(
    models: Sequence[LanguageModel], objective: Objective, tokens: list[int], vocab_size: int, options
) -> Iterator[Token]:
    """A prompt's samples, token by token; an objective of fewer models uses the first ones."""
    return stream(
        [model.model for model in (models if objective.takes_more else models[: objective.num_models])],
        np.array([tokens], np.int32),
        objective=objective,
        warpers=warpers.choose(**{name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}),
        max_new_tokens=options.max_new_tokens,
        samples=options.samples,
        seed=options.seed,
        vocab_size=vocab_size,
    )


def _write(tokens: Iterator[Token], tokenizer: Any, prompt: list[int], samples: int) -> None:
    """Streams the first sample, then prints the others."""
    rows: list[list[int]] = [[] for _ in range(samples)]
    shown = ""
    for token in tokens:
        for row, index, live in zip(rows, token.ids.tolist(), token.live, strict=True):
            row += [index] if live else []
        text = _continuation(tokenizer, prompt, rows[0])
        if not text.endswith("\ufffd"):  # an incomplete character
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(_continuation(tokenizer, prompt, rows[0])[len(shown) :])
    for row in rows[1:]:
        print(f"--\n{_continuation(tokenizer, prompt, row)}")


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    prompt_text, text = decode(tokenizer, [prompt, [*prompt, *new]])
    return text[len(prompt_text) :]


def _comparison(streams: Sequence[Iterator[Token]], tokenizer: Any, titles: Sequence[str], names: Sequence[str]) -> str:
    """A line per token: each objective's token, and its probability under each model that the objective uses."""
    columns = []
    for stream_tokens, title in zip(streams, titles, strict=True):
        tokens = list(stream_tokens)
        rows = [[title, *names[: len(tokens[0].log_probabilities)]]]
        for token in tokens:
            (text,) = decode(tokenizer, [token.ids[:1].tolist()])
            rows.append([repr(text), *(f"{p:.3f}" for p in np.exp(token.log_probabilities[:, 0]))])
        columns.append(rows)
    blank = [[""] * len(rows[0]) for rows in columns]
    lines = itertools.zip_longest(*columns)
    return format_table(
        [[cell for part, empty in zip(line, blank, strict=True) for cell in part or empty] for line in lines]
    )
