"""Jacobi decoding (Song et al., arXiv 2002.03629; Santilli et al., arXiv 2305.10427).

Decoding m tokens is solving m equations, each token being the target's choice after those before it. A step puts a
block of guesses behind the root and reads the choice after each: one parallel iteration of all the equations.

    position       0     1    2    3    4         root at 0, guesses y1..y4
    iteration k    root  y1   y2   y3   y4
    choices        c0    c1   c2   c3   c4        c0 is exact; c1 is, if y1 = c0; and so on
    iteration k+1        c0 | c1   c2   c3   c4   with y1 wrong: c0 is the new root, the others the new guesses

The guesses that are right are the accepted path, so an iteration fixes at least one token, and the fixed point is
plain decoding's output. With the request's keyed noise the same holds for sampling (2002.03629: fixed noise).

The papers' Jacobi mode iterates all positions of an output at once, which begin as padding; here a window slides over
them, and what positions begin with is a setting. Gauss-Seidel over blocks and the hybrid are Santilli et al.'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from outrider.config import JacobiConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.initial_guess import InitialGuess
from outrider.drafting.target_choices import TargetChoices
from outrider.token_tree import TokenTree

MAX_TRACES = 64  # requests whose iterations are remembered


@dataclass(eq=False)
class _Trace:
    """The iterations of one request so far; see `JacobiDrafter.fixed_at`."""

    num_iterations: int = 0
    fixed_at: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Block:
    """Guesses behind the committed tokens.

    Attributes:
        length: committed tokens; ``guesses[i]`` stands at position ``length + i``.
        since: the iteration in which each guess took its value; 0 for initial ones.
    """

    length: int
    initial: InitialGuess
    guesses: list[int] = field(default_factory=list)
    since: list[int] = field(default_factory=list)


class JacobiDrafter:
    """One chain a request, without confidences: a planner that cut it would stop the iteration of what it cut.

    Under rejection rules at a temperature, which make choices only along the path, guesses are refined by the
    target's most probable tokens.
    """

    name = "jacobi"
    returns_probs = False
    num_without_room = 0

    def __init__(self, config: JacobiConfig, style: DraftStyle, vocab_size: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self.reads_logits = style.noise == "independent"
        self.max_nodes = config.block_size
        self._blocks: dict[str, _Block] = {}
        self._traces: OrderedDict[str, _Trace] = OrderedDict()

    def fixed_at(self, request_id: str) -> tuple[int, ...]:
        """The iteration in which each output token took its final value, 0 if it was guessed at the start.

        This is the decoding dependency graph of arXiv 2305.10427. The last `MAX_TRACES` requests are
        remembered, finished ones too; others give an empty tuple.
        """
        trace = self._traces.get(request_id)
        return tuple(trace.fixed_at) if trace else ()

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        block = self._aligned_block(context)
        self._fill(block, context)
        size = min(context.max_nodes, context.max_depth)
        return TokenTree.chain(context.token_ids[-1], block.guesses[: max(size, 0)])

    def _aligned_block(self, context: DraftContext) -> _Block:
        length = len(context.token_ids)
        block = self._blocks.get(context.request_id)
        if block is None or length < block.length:
            block = _Block(length, InitialGuess(self._config.initial, self._vocab_size))
            self._blocks[context.request_id] = block
            self._start_trace(context)
        skipped, block.length = length - block.length, length  # steps of which nobody told us
        del block.guesses[:skipped], block.since[:skipped]
        return block

    def _start_trace(self, context: DraftContext) -> None:
        is_new = len(context.token_ids) == context.num_prompt_tokens
        if is_new or context.request_id not in self._traces:
            self._traces[context.request_id] = _Trace()
            self._traces.move_to_end(context.request_id)
            if len(self._traces) > MAX_TRACES:
                self._traces.popitem(last=False)

    def _fill(self, block: _Block, context: DraftContext) -> None:
        config = self._config
        num_missing = config.block_size - len(block.guesses)
        if config.mode != "jacobi" and block.guesses:
            return  # Gauss-Seidel over blocks: the next one starts from the last one's solution
        if config.mode == "hybrid":
            num_output = len(context.token_ids) - context.num_prompt_tokens
            num_missing = min(num_missing, max(config.parallel_length - num_output, 0))
        if num_missing > 0:
            before = block.guesses[-1] if block.guesses else context.token_ids[-1]
            first = block.length + len(block.guesses)
            block.guesses += block.initial.tokens(context, first, num_missing, before)
            block.since += [0] * num_missing

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            block, trace = self._blocks.get(outcome.request_id), self._traces.get(outcome.request_id)
            if block is None:
                continue
            trace = trace or _Trace()
            trace.num_iterations += 1
            new_tokens = outcome.new_tokens
            for index, token in enumerate(new_tokens):
                was_right = index < len(block.guesses) and block.guesses[index] == token
                trace.fixed_at.append(block.since[index] if was_right else trace.num_iterations)
            self._iterate(block, TargetChoices(outcome).along(block.guesses), trace.num_iterations)
            block.length += len(new_tokens)
            del block.guesses[: len(new_tokens)], block.since[: len(new_tokens)]

    def _iterate(self, block: _Block, refined: Sequence[int], iteration: int) -> None:
        for index, token in enumerate(refined):
            if index == len(block.guesses):
                if self._config.mode == "jacobi":  # one position further: part of a block that slides
                    block.guesses.append(token)
                    block.since.append(iteration)
            elif block.guesses[index] != token:
                block.guesses[index], block.since[index] = token, iteration

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._blocks.pop(request_id, None)
