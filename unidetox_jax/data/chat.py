"""Conversations as tokens, by the tokenizer's chat template.

transformers renders the template (jinja2, sandboxed). A template writes BOS itself if the model needs one, so no
special tokens are added to its output, as in `apply_chat_template`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from unidetox_jax.data.tokens import Affixes, encode
from unidetox_jax.errors import UserError
from unidetox_jax.recipe import ANSWER

PLACEHOLDER = "\ue000"  # stands for an answer: a character from Unicode's private use area


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    """A conversation as text; options as for transformers' `apply_chat_template`.

    Raises:
      UserError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise UserError(f"chat: the tokenizer of {tokenizer.name_or_path!r} has no chat template; leave chat out")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except (TemplateError, ValueError) as error:  # a system prompt for Gemma, say
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"chat: the chat template of {tokenizer.name_or_path!r} refuses a conversation of {roles} ({error})"
        ) from None


def encode_prompts(tokenizer: Any, prompts: Sequence[str], system_prompt: str = "") -> list[list[int]]:
    """Token lists that an assistant's turn can follow: each prompt as a user's turn, after the system prompt if any.

    Raises UserError as `render`."""
    rendered = [
        render(tokenizer, prompt_messages(prompt, system_prompt), add_generation_prompt=True) for prompt in prompts
    ]
    return encode(tokenizer, rendered, begin=False)


def response_affixes(tokenizer: Any, prompt: str, system_prompt: str = "", loss_on: str = ANSWER) -> Affixes:
    """The tokens around an assistant's response to `prompt`.

    loss_on: "answer", the response up to its end token; or "all", the conversation before it too.

    Raises:
      UserError: as `render`, or the template does not copy the response once, unchanged.
    """
    messages = [*prompt_messages(prompt, system_prompt), {"role": "assistant", "content": PLACEHOLDER}]
    before, mark, after = render(tokenizer, messages).partition(PLACEHOLDER)
    if not mark or PLACEHOLDER in after:
        raise UserError(
            f"chat: the chat template of {tokenizer.name_or_path!r} does not write an answer once, unchanged"
        )
    prefix, suffix = encode(tokenizer, [before, after], begin=False)
    return Affixes(prefix, suffix, len(prefix) if loss_on == ANSWER else 1)


def prompt_messages(prompt: str, system_prompt: str = "") -> list[dict[str, str]]:
    """The messages before an assistant's turn."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": prompt}]
