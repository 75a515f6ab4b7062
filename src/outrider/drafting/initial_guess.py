"""What positions hold before anything is known about them: where fixed-point iterations start."""

from __future__ import annotations

from outrider.config import InitialTokens
from outrider.drafting.drafter import DraftContext
from outrider.sampling.noise import Purpose, uniform


class InitialGuess:
    """First guesses for the positions of one request, a pure function of its tokens and its seed.

    Args:
        kind: see `JacobiConfig.initial`.
    """

    def __init__(self, kind: InitialTokens, vocab_size: int) -> None:
        self._kind = kind
        self._vocab_size = vocab_size
        self._follower: dict[int, int] = {}  # token -> what came after it last; at most one entry a token id
        self._num_seen = 0

    def tokens(self, context: DraftContext, first: int, count: int, before: int) -> list[int]:
        """Guesses for the positions ``first, ..., first + count - 1`` of the sequence.

        Args:
            before: the token, or guess, in front of them.
        """
        match self._kind:
            case "last":
                return [context.token_ids[-1]] * count
            case "zero":
                return [0] * count
            case "prompt":
                length = context.num_prompt_tokens
                return [context.token_ids[position % length] for position in range(first, first + count)]
            case "random":
                uniforms = (uniform(context.seed, first + i, Purpose.DRAFT, 0) for i in range(count))
                return [int(u * self._vocab_size) for u in uniforms]
        return self._follow(context, count, before)  # "ngram"

    def _follow(self, context: DraftContext, count: int, token: int) -> list[int]:
        known = context.token_ids
        for index in range(max(self._num_seen, 1), len(known)):
            self._follower[known[index - 1]] = known[index]
        self._num_seen = len(known)
        tokens = []
        for _ in range(count):
            token = self._follower.get(token, token)
            tokens.append(token)
        return tokens
