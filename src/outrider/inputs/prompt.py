"""Prompts as users give them, and the token ids that they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from outrider.errors import PromptError
from outrider.inputs.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, *, name: str = "prompt") -> tuple[str | None, list[int]]:
    """Text and token ids of a prompt: text, ``{"prompt": text}`` or ``{"prompt_token_ids": [...]}``.

    Args:
        name: what errors call this prompt.

    Raises:
        PromptError: it is neither of these, or its text is no valid Unicode.
    """
    if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
        try:
            token_ids = [token if isinstance(token, bool) else index(token) for token in prompt["prompt_token_ids"]]
        except TypeError as error:
            got = repr(prompt["prompt_token_ids"])[:80]
            raise PromptError(f"{name} token ids", got=got, expected="a list of integers") from error
        return prompt.get("prompt"), token_ids
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    if not isinstance(text, str):
        raise PromptError(
            name, got=repr(prompt)[:80], expected="text, {'prompt': text} or {'prompt_token_ids': [...]}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            name, got=f"a lone surrogate at character {error.start}", expected="valid Unicode"
        ) from error
    special = not isinstance(prompt, Mapping) or bool(prompt.get("add_special_tokens", True))
    return text, tokenizer.encode(text, add_special_tokens=special)


def chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, **template_variables: Any) -> Prompt:
    """The prompt of a conversation by the model's own chat template, which writes the special tokens itself.

    Raises:
        ConfigError, PromptError: see `Tokenizer.render_chat`.
    """
    return {"prompt": tokenizer.render_chat(messages, **template_variables), "add_special_tokens": False}


def check_prompt(token_ids: list[int], *, vocab_size: int, context_length: int, name: str = "prompt") -> None:
    """Refuse what cannot be continued.

    Raises:
        PromptError: no tokens, too many for one more to fit, or a token id that the model does not have.
    """
    if not token_ids:
        raise PromptError(name, got="no tokens", expected="at least one", remedy="give some text to continue")
    if len(token_ids) >= context_length:
        raise PromptError(
            f"{name} length",
            got=f"{len(token_ids)} tokens",
            expected=f"fewer than the model's context of {context_length}",
            remedy="shorten the prompt",
        )
    check_token_ids(token_ids, vocab_size, name=f"{name} token id")


def check_token_ids(token_ids: Iterable[int], vocab_size: int, *, name: str) -> None:
    """Refuse token ids outside the vocabulary.

    Raises:
        PromptError: one is no integer in ``[0, vocab_size)``.
    """
    for token in token_ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise PromptError(name, got=repr(token)[:40], expected=f"an integer in [0, {vocab_size})")
