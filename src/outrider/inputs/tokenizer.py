"""The tokenizer as the engine's users see it: text in, text out, and chat messages rendered safely."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outrider.errors import ConfigError, PromptError
from outrider.inputs.vocabulary import Piece, pieces_of, special_ids_of

MAX_TEMPLATE_OUTPUT = 4_000_000


class Tokenizer:
    """A Hugging Face tokenizer; `backend` is what `transformers.AutoTokenizer` gave."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._environment = _chat_environment()

    def clone(self) -> Tokenizer:
        """The same tokenizer with a backend of its own, for another thread."""
        return Tokenizer(deepcopy(self._backend))

    @cached_property
    def vocab(self) -> dict[str, int]:
        return dict(self._backend.get_vocab())

    @cached_property
    def pieces(self) -> dict[int, Piece]:
        """What each token stands for, in bytes that compare across tokenizers."""
        return pieces_of(self._backend)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text."""
        return special_ids_of(self._backend)

    @property
    def eos_id(self) -> int | None:
        return self._backend.eos_token_id

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of what every token id means: files of token ids fit models with the same one."""
        digest = hashlib.sha256()
        for token, token_id in sorted(self.vocab.items(), key=lambda of: (of[1], of[0])):
            digest.update(f"{token_id} {len(token)} {token}\n".encode("utf-8", "surrogatepass"))
        return digest.digest()

    def __len__(self) -> int:
        return len(self._backend)

    @property
    def chat_template(self) -> str | None:
        template = getattr(self._backend, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        return template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The text of one token by itself (bytes that are no whole character become U+FFFD)."""
        return self._backend.decode([token_id], skip_special_tokens=False)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that one token stands for, whole characters or not; none for an id that stands for nothing."""
        return self.pieces.get(token_id, ("special", b""))[1]

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation by the model's own template, in a sandbox.

        Raises:
            ConfigError: the model has no chat template, or it is malformed, or does what the sandbox forbids.
            PromptError: the messages are not what the template expects.
        """
        if self.chat_template is None:
            raise ConfigError("chat", got="a model without a chat template", expected="one", remedy="use generate()")
        if not messages or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
            raise PromptError(
                "chat messages",
                got=repr(messages)[:80],
                expected="a non-empty list of {'role': ..., 'content': ...}",
            )
        special = {name: str(token) for name, token in self._backend.special_tokens_map.items()}
        try:
            text = self._environment.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **special, **variables
            )
        except PromptError:
            raise
        except SecurityError as error:
            raise ConfigError(
                "chat template", got=f"a forbidden operation ({error})", expected="a harmless template"
            ) from error
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                "chat template", got=f"{type(error).__name__}: {error}", expected="a template that renders"
            ) from error
        if len(text) > MAX_TEMPLATE_OUTPUT:
            raise PromptError(
                "rendered chat", got=f"{len(text)} characters", expected=f"at most {MAX_TEMPLATE_OUTPUT}"
            )
        return text


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which `*` and `**` cannot make huge values (Jinja itself bounds `range`)."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(v) if isinstance(v, (str, list, tuple)) else v for v in (left, right)]
        if not all(isinstance(size, (int, float)) and abs(size) <= MAX_TEMPLATE_OUTPUT for size in sizes):
            raise SecurityError(f"operands of {operator} too large")
        if operator == "**" and abs(right) > 64:
            raise SecurityError("exponent too large")
        is_repetition = not all(isinstance(v, (int, float)) for v in (left, right))
        if is_repetition and abs(sizes[0] * sizes[1]) > MAX_TEMPLATE_OUTPUT:
            raise SecurityError("repetition too long")
        return super().call_binop(context, operator, left, right)


def _chat_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it: the names that `transformers` defines, nothing else, sandboxed."""

    def raise_exception(message: str) -> None:
        raise PromptError("chat messages", got=message, expected="what the model's template accepts")

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = _BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.filters["tojson"] = _tojson
    return environment


def _tojson(value: Any, indent: int | None = None) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)
