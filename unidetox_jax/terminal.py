"""`unidetox generate`: text from any models under any objective, shown while it is written.

    unidetox generate --models=gpt2 --prompt="The people here"
    unidetox generate --models=gpt2,runs/x/toxic --objective="contrastive(alpha=0.1)" --prompts=- --samples=3
    unidetox generate --models=gpt2,runs/x/toxic --compare=base --prompt="The people here"

With --compare each token stands beside the other objective's, with its probability under each model.
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
    """The command's arguments."""
    parser.add_argument(
        "--models", required=True, metavar="A,B", help="directories or hub ids, in the objective's order"
    )
    parser.add_argument("--objective", metavar="NAME(…)", help="of text from several models; default: contrastive")
    parser.add_argument("--compare", metavar="NAME(…)", help="another objective beside it, token by token")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line, or a data set (jsonl:FILE?text=COLUMN); -: stdin"
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn of a conversation")
    parser.add_argument("--system_prompt", default="", metavar="TEXT", help="of the conversation, before that turn")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="of each prompt")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=50, help="0: off")
    parser.add_argument("--top_p", type=float, default=0.9, help="1: off")
    parser.add_argument("--min_p", type=float, default=0.0, help="0: off")
    parser.add_argument("--seed", type=int, default=42)


def run_command(options: argparse.Namespace) -> int:
    """Writes the texts to standard output; returns 0.

    Raises:
      UserError: no prompt, models or an objective that do not fit together, a tokenizer without a chat template.
    """
    names = [name for name in options.models.split(",") if name]
    chosen = [objectives.get(options.objective or ("contrastive" if len(names) > 1 else "base"))]
    if options.compare:
        chosen.append(objectives.get(options.compare))
    prompts = list(_prompts(options))
    chosen[0].check_models(len(names))
    for other in chosen[1:]:  # may need fewer: those in front
        other.check_models(min(len(names), max(1, other.num_models)))
    distributed.use_compilation_cache()
    loaded = checkpoint.load_all(names)
    models = [LanguageModel(*loaded[name], checkpoint.load_tokenizer(name)) for name in names]
    vocab_size = common_vocabulary([model.tokenizer for model in models], names)
    tokenizer = models[0].tokenizer
    for prompt in prompts:
        tokens = _tokens(tokenizer, prompt, options)
        print(f"> {prompt}", flush=True)
        streams = [_stream(models, objective, tokens, vocab_size, options) for objective in chosen]
        if options.compare:
            print(_compared(streams, tokenizer, [str(objective) for objective in chosen], distinct_names(names)))
        else:
            _write(streams[0], tokenizer, tokens, options.samples)
    return 0


def _prompts(options: argparse.Namespace) -> Iterator[str]:
    """What to continue, in the order of the command line."""
    found = list(options.prompt)
    if options.prompts == "-":
        found += [line.rstrip("\n") for line in sys.stdin]
    elif options.prompts:
        spec = options.prompts if data.is_spec(options.prompts) else f"text:{options.prompts}"
        found += list(data.texts(spec))
    if not found:
        raise UserError("--prompt: none given; write --prompt=TEXT, or --prompts=FILE, or --prompts=- to type them")
    yield from found


def _tokens(tokenizer: Any, prompt: str, options: argparse.Namespace) -> list[int]:
    """What the models read of a prompt."""
    if not options.chat:
        return encode(tokenizer, [prompt])[0] or [first_token(tokenizer, "the model")]
    return chat.encode_prompts(tokenizer, [prompt], options.system_prompt)[0]


def _stream(
    models: Sequence[LanguageModel], objective: Objective, tokens: list[int], vocab_size: int, options
) -> Iterator[Token]:
    """One prompt's samples, token by token; an objective of fewer models takes those in front."""
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


def _write(made: Iterator[Token], tokenizer: Any, prompt: list[int], samples: int) -> None:
    """The first sample while it is written, the others after it."""
    rows: list[list[int]] = [[] for _ in range(samples)]
    shown = ""
    for token in made:
        for row, index, live in zip(rows, token.ids.tolist(), token.live, strict=True):
            row += [index] if live else []
        text = _continuation(tokenizer, prompt, rows[0])
        if not text.endswith("\ufffd"):  # a character's first bytes
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(_continuation(tokenizer, prompt, rows[0])[len(shown) :])
    for row in rows[1:]:
        print(f"--\n{_continuation(tokenizer, prompt, row)}")


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    before, whole = decode(tokenizer, [prompt, [*prompt, *new]])
    return whole[len(before) :]


def _compared(streams: Sequence[Iterator[Token]], tokenizer: Any, titles: Sequence[str], names: Sequence[str]) -> str:
    """A token a line: each objective's, and its probability under each model that the objective reads."""
    columns = []
    for made, title in zip(streams, titles, strict=True):
        tokens = list(made)
        read = names[: len(tokens[0].log_probabilities)]
        columns.append([[title, *read]])
        for token in tokens:
            (text,) = decode(tokenizer, [token.ids[:1].tolist()])
            columns[-1].append([repr(text), *(f"{p:.3f}" for p in np.exp(token.log_probabilities[:, 0]))])
    blank = [[""] * len(column[0]) for column in columns]
    lines = itertools.zip_longest(*columns)
    return format_table(
        [[cell for part, empty in zip(line, blank, strict=True) for cell in part or empty] for line in lines]
    )
