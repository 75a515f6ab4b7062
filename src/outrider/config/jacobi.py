"""Settings of the drafters whose drafts the target itself refines from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from outrider.config.checks import check_int, require

JacobiMode = Literal["jacobi", "gs_jacobi", "hybrid"]
InitialTokens = Literal["last", "prompt", "random", "zero", "ngram"]


@dataclass(frozen=True)
class JacobiConfig:
    """Jacobi decoding: a block of guesses, replaced in each step by the target's choices after them.

    Attributes:
        mode: "jacobi" (the block slides with the text and is always full), "gs_jacobi" (a block is iterated until all
            of it is fixed, then the next begins) or "hybrid" ("gs_jacobi" for `parallel_length` tokens of output,
            then plain decoding).
        block_size: guesses in a block.
        initial: what a position holds before its first iteration: "last" (the last known token), "prompt" (the
            prompt's tokens in order), "random" (any token, keyed by the request's seed), "zero" (token 0) or "ngram"
            (what last followed the token before it).
        parallel_length: tokens of output that mode "hybrid" decodes in blocks.
    """

    method: Literal["jacobi"] = "jacobi"
    mode: JacobiMode = "gs_jacobi"
    block_size: int = 4
    initial: InitialTokens = "ngram"
    parallel_length: int = 256

    def __post_init__(self) -> None:
        modes = get_args(JacobiMode)
        require(self.mode in modes, "jacobi.mode", self.mode, f"one of {', '.join(modes)}")
        check_int("jacobi.block_size", self.block_size, 1, 512)
        check_initial("jacobi", self.initial)
        check_int("jacobi.parallel_length", self.parallel_length, 0, 2**32)


@dataclass(frozen=True)
class LookaheadConfig:
    """Lookahead decoding: a window of Jacobi trajectories yields n-grams, which are verified where they fit.

    Attributes:
        window: W, columns of the window: how far ahead trajectories run.
        ngram: N, tokens of an n-gram; the window has N - 1 levels.
        guesses: G, n-grams verified in a step, and kept for each first token (the least recently seen goes).
        max_keys: first tokens with n-grams, of each request; the least recently used goes.
        text_ngrams: also pool the n-grams of the prompt and of the output.
        initial: what a position holds before its first iteration, as in `JacobiConfig`.
    """

    method: Literal["lookahead"] = "lookahead"
    window: int = 3
    ngram: int = 6
    guesses: int = 3
    max_keys: int = 4096
    text_ngrams: bool = True
    initial: InitialTokens = "ngram"

    def __post_init__(self) -> None:
        check_int("lookahead.window", self.window, 1, 128)
        check_int("lookahead.ngram", self.ngram, 2, 32)
        check_int("lookahead.guesses", self.guesses, 1, 128)
        check_int("lookahead.max_keys", self.max_keys, 1, 2**20)
        require(isinstance(self.text_ngrams, bool), "lookahead.text_ngrams", self.text_ngrams, "true or false")
        check_initial("lookahead", self.initial)


def check_initial(method: str, initial: object) -> None:
    kinds = get_args(InitialTokens)
    require(initial in kinds, f"{method}.initial", initial, f"one of {', '.join(kinds)}")
