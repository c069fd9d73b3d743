"""Conversations as a tokenizer's chat template writes them, in tokens.

transformers renders the template (jinja2, in a sandbox). A template writes BOS itself where the model is to see one, so
that nothing is put around what it gives, as `apply_chat_template` does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from unidetox_jax.data.tokens import Around, encode
from unidetox_jax.errors import UserError
from unidetox_jax.recipe import ANSWER

MARK = "\ue000"  # stands for an answer: a character without a meaning, of Unicode's private use


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    """A conversation as text; options: those of transformers' `apply_chat_template`.

    Raises:
      UserError: the tokenizer has no chat template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise UserError(f"chat: the tokenizer of {tokenizer.name_or_path!r} has no chat template; leave chat out")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except (
        TemplateError,
        ValueError,
    ) as error:  # a system prompt for Gemma, say
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"chat: the chat template of {tokenizer.name_or_path!r} refuses a conversation of {roles} ({error})"
        ) from None


def ask(tokenizer: Any, prompts: Sequence[str], system_prompt: str = "") -> list[list[int]]:
    """Token lists of conversations that an assistant's turn is to follow: each prompt as a user's turn, after the
    system's where `system_prompt` is not empty. Raises UserError as `render`."""
    asked = [render(tokenizer, opening(prompt, system_prompt), add_generation_prompt=True) for prompt in prompts]
    return encode(tokenizer, asked, begin=False)


def turn(tokenizer: Any, prompt: str, system_prompt: str = "", loss_on: str = ANSWER) -> Around:
    """What stands around an assistant's turn that answers `prompt`.

    loss_on: "answer", the turn up to the end that the template gives it; or "all", the conversation before it too.

    Raises:
      UserError: as `render`, or a template that does not write the turn as it is.
    """
    whole = render(tokenizer, [*opening(prompt, system_prompt), {"role": "assistant", "content": MARK}])
    before, mark, after = whole.partition(MARK)
    if not mark or MARK in after:
        raise UserError(
            f"chat: the chat template of {tokenizer.name_or_path!r} does not write an answer once, as it is"
        )
    first, last = encode(tokenizer, [before, after], begin=False)
    return Around(first, last, len(first) if loss_on == ANSWER else 1)


def opening(prompt: str, system_prompt: str = "") -> list[dict[str, str]]:
    """The turns before an assistant's."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": prompt}]
