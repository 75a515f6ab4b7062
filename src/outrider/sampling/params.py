"""What a user may ask of a generation; names and meanings as vLLM's users know them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from outrider.errors import SamplingParamsError

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1

# Below this, logits divided by the temperature may overflow: measured from the row's maximum, they cannot.
COLD_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Order of application to the target's logits: logit_bias, min_tokens, penalties, temperature, min_p,
    top_k, top_p. In a token tree the penalties and min_tokens follow each node's own path.

    Attributes:
        n: how many sequences to sample from the prompt; sequence 0 is the one that n=1 gives.
        temperature: 0 is greedy decoding (ties: lowest token id).
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most probable tokens whose probability reaches top_p.
        min_p: keep tokens at least min_p times as probable as the most probable one.
        repetition_penalty: divides positive (multiplies negative) logits of tokens seen in prompt or output.
        presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens in the output.
        logit_bias: added to the logits of single token ids, in [-100, 100].
        max_tokens: the most tokens to generate; None generates up to the context length.
        min_tokens: no end-of-sequence or stop token before this many tokens.
        stop: strings that end the generation; the output text ends before the first of them.
        stop_token_ids: token ids that end the generation (kept in token_ids, left out of the text).
        seed: of the keyed noise; None draws one, and the output names it.
        logprobs: also return this many of the most probable alternatives of each token (0: only the token's own).

    Raises:
        SamplingParamsError: a value is out of range, NaN, or of the wrong type.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = 128
    min_tokens: int = 0
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        _check_int("n", self.n, 1, MAX_N)
        _check_float("temperature", self.temperature, 0.0, 1e4)
        _check_int("top_k", self.top_k, -1, 2**31)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 1e4, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31)
        _check_int("min_tokens", self.min_tokens, 0, 2**31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                "min_tokens", got=self.min_tokens, expected=f"at most max_tokens={self.max_tokens}"
            )
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_stops()
        self._check_logit_bias()

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise SamplingParamsError(
                "stop list", got=f"{len(self.stop)} strings", expected=f"at most {MAX_STOP_STRINGS}"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_STRING_LENGTH:
                raise SamplingParamsError(
                    "stop string", got=repr(text)[:60], expected=f"1 to {MAX_STOP_STRING_LENGTH} characters"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise SamplingParamsError(
                "stop_token_ids",
                got=f"{len(self.stop_token_ids)} ids",
                expected=f"at most {MAX_STOP_TOKEN_IDS}",
            )
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, 2**31)

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise SamplingParamsError(
                "logit_bias", got=f"{len(self.logit_bias)} entries", expected=f"at most {MAX_LOGIT_BIAS}"
            )
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias token id", token, 0, 2**31)
            _check_float(f"logit_bias[{token}]", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @cached_property
    def takes_argmax(self) -> bool:
        """Whether every token is the argmax of the model's raw logits, and nothing else of them is asked for."""
        return self.greedy and self._takes_raw_logits

    @cached_property
    def samples_raw_logits(self) -> bool:
        """Whether every token is drawn from all the model's raw logits, and nothing else of them is asked for."""
        keeps_all = self.top_k <= 0 and self.top_p == 1.0 and self.min_p == 0.0
        return self.temperature >= COLD_TEMPERATURE and keeps_all and self._takes_raw_logits

    @property
    def _takes_raw_logits(self) -> bool:
        edits = self.has_penalties or self.logit_bias or self.min_tokens
        return not edits and self.logprobs is None

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SamplingParamsError(name, got=repr(value)[:60], expected=f"an integer in [{low}, {high}]")


def _check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    in_range = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low < value if open_low else low <= value)
        and value <= high
    )
    if not in_range:
        bracket = "(" if open_low else "["
        raise SamplingParamsError(name, got=repr(value)[:60], expected=f"a number in {bracket}{low:g}, {high:g}]")
