"""Input-guided drafting for edits (aggressive decoding; Ge et al., arXiv 2205.10350; Sun et al., arXiv 2106.04970).

The output is taken to be its input, copied from where the two are aligned. At the first difference the copy is lost;
it goes on where a suffix of the output stands in the input again, next to where it was lost. The papers decode token
by token until then; here what a replacement or an insertion would go on with is guessed as well, and a change that
was made once is drafted wherever the input has the same tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from outrider.config import EditConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome
from outrider.drafting.sources.matches import DISCOUNTS, END_OF_TEXT, MAX_LENGTH, NgramIndex
from outrider.drafting.sources.references import token_references
from outrider.drafting.tree_merge import WeightedPath

MAX_NGRAM = 4  # of a suffix that alignment is found by
MAX_SHIFTS = (0, 8, 32, 128)  # [length of the suffix] how far from the loss it may stand; beyond, anywhere
MAX_CHANGE = 8  # tokens of a change that is drafted again
CHANGED_AGAIN = 0.8  # of a change that was made once
# What is believed of guesses before this request has shown their worth, and how many guesses that belief counts for.
REPLACED, INSERTED, COPIED = 0.15, 0.1, 1.0
NUM_BELIEVED = 4
MOST = 0.98  # confidence


class _Worth:
    """How often guesses of one kind came true, against how often they should have."""

    def __init__(self, prior: float) -> None:
        self._right, self._expected = prior * NUM_BELIEVED, float(NUM_BELIEVED)

    def count(self, right: bool, expected: float = 1.0) -> None:
        self._right += right
        self._expected += expected

    @property
    def rate(self) -> float:
        return self._right / self._expected


@dataclass(eq=False)
class _Alignment:
    """Where one output stands in its input.

    Attributes:
        position: of the input token that is expected next; None while lost.
        length: tokens since the last difference.
        lost_at: the position at the last difference.
        change: output tokens since then.
        changes: what was put in place of a stretch of the input, by its first token.
    """

    text: Sequence[int]
    index: NgramIndex
    num_seen: int
    position: int | None = None
    length: int = 0
    lost_at: int | None = None
    change: list[int] = field(default_factory=list)
    changes: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    replaced: _Worth = field(default_factory=lambda: _Worth(REPLACED))
    inserted: _Worth = field(default_factory=lambda: _Worth(INSERTED))
    copied: _Worth = field(default_factory=lambda: _Worth(COPIED))

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that are new since the last call."""
        for position in range(self.num_seen, len(tokens)):
            token = tokens[position]
            self._judge(token)
            if self.position is not None and self.text[self.position] == token:
                self.position += 1
                self.length += 1
            else:
                if self.position is not None:
                    self.lost_at, self.position, self.change = self.position, None, []
                self.change.append(token)
                self._find(tokens[max(0, position + 1 - MAX_NGRAM) : position + 1])
            if self.position is not None and self.position >= len(self.text):
                self.lost_at, self.position, self.change = self.position, None, []
        self.num_seen = len(tokens)

    def _judge(self, token: int) -> None:
        if self.position is not None:
            expected = 1.0 - DISCOUNTS[min(self.length, MAX_LENGTH)]
            self.copied.count(self.text[self.position] == token, expected)
        elif self.lost_at is not None:
            guess = self.lost_at + len(self.change)
            self.replaced.count(guess < len(self.text) and self.text[guess] == token)
            self.inserted.count(self.lost_at < len(self.text) and self.text[self.lost_at] == token)

    def _find(self, suffix: Sequence[int]) -> None:
        expected = 0 if self.lost_at is None else self.lost_at + len(self.change)
        found = self.index.nearest(suffix, expected)
        if found is None:
            return
        end, length = found
        if length < MAX_NGRAM and (self.lost_at is None or abs(end - expected) > MAX_SHIFTS[length]):
            return
        if self.lost_at is not None:
            self._remember(end, length)
        self.position, self.length = end, length

    def _remember(self, end: int, length: int) -> None:
        """Keep what the change put in place of what, without the tokens by which the alignment was found."""
        assert self.lost_at is not None
        kept = min(length, len(self.change), end - self.lost_at)
        old = tuple(self.text[self.lost_at : end - kept])
        new = tuple(self.change[: len(self.change) - kept])
        if old and len(old) <= MAX_CHANGE and len(new) <= MAX_CHANGE and END_OF_TEXT not in old:
            self.changes[old[0]] = (old, new)


class EditSource:
    name = "edit"
    reads_logits = False

    def __init__(self, config: EditConfig) -> None:
        self._config = config
        self._input: list[int] = []
        for reference in token_references(config):
            self._input += [*reference, END_OF_TEXT]
        self._index = NgramIndex(1, MAX_NGRAM)
        self._index.extend(self._input)
        self._alignments: dict[str, _Alignment] = {}

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        alignment = self._alignments.get(context.request_id)
        if alignment is None:
            alignment = self._alignments[context.request_id] = self._begin(context)
        alignment.follow(context.token_ids)
        depth = min(self._config.depth, context.max_depth, context.max_nodes)
        if depth <= 0:
            return []
        if alignment.position is not None:
            return _copies(alignment, alignment.position, alignment.length, depth)
        if alignment.lost_at is None:
            return []
        paths: list[WeightedPath] = []
        for position, confidence in (
            (alignment.lost_at + len(alignment.change), alignment.replaced.rate),
            (alignment.lost_at, alignment.inserted.rate),
        ):
            paths += [
                WeightedPath(path.tokens, [confidence, *path.confidences[1:]])
                for path in _copies(alignment, position, 1, depth)
            ]
        return paths

    def _begin(self, context: DraftContext) -> _Alignment:
        if self._input:
            # An edit begins with the beginning of its input, more often than not.
            return _Alignment(self._input, self._index, context.num_prompt_tokens, position=0, length=1)
        prompt = context.token_ids[: context.num_prompt_tokens]
        index = NgramIndex(1, MAX_NGRAM)
        index.extend(prompt)
        return _Alignment(prompt, index, context.num_prompt_tokens)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the accepted tokens are read from the next context

    def release(self, request_id: str) -> None:
        self._alignments.pop(request_id, None)


def _copies(alignment: _Alignment, position: int, length: int, depth: int) -> list[WeightedPath]:
    """The input from a position on, with the changes made again that were made before, and as it stands."""
    text = alignment.text
    paths: list[WeightedPath] = []
    tokens: list[int] = []
    confidences: list[float] = []
    worth = alignment.copied.rate
    while len(tokens) < depth and position < len(text) and text[position] != END_OF_TEXT:
        confidence = min(MOST, worth * (1.0 - DISCOUNTS[min(length + len(tokens), MAX_LENGTH)]))
        old, new = alignment.changes.get(text[position], ((), ()))
        if old and tuple(text[position : position + len(old)]) == old:
            unchanged = list(text[position : position + depth - len(tokens)])
            if END_OF_TEXT in unchanged:
                unchanged = unchanged[: unchanged.index(END_OF_TEXT)]
            as_it_stands = [1.0 - CHANGED_AGAIN] + [confidence] * (len(unchanged) - 1)
            paths.append(WeightedPath([*tokens, *unchanged], [*confidences, *as_it_stands]))
            if new:
                tokens += new
                confidences += [CHANGED_AGAIN] + [confidence] * (len(new) - 1)
            position += len(old)
            continue
        tokens.append(text[position])
        confidences.append(confidence)
        position += 1
    if tokens:
        paths.insert(0, WeightedPath(tokens[:depth], confidences[:depth]))
    return paths
