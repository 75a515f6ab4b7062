"""Input-guided drafting for edits (aggressive decoding; Ge et al., arXiv 2205.10350; Sun et al., arXiv 2106.04970).

The output is taken to be its input, copied from where the two are aligned. At the first difference the copy is lost;
it goes on where a suffix of the output stands in the input again. The authors' code takes a suffix of one to three
tokens that stands there only once, and decodes plainly until there is one. Ours is to take the place next to where
the copy was lost, to guess until then what a replacement or an insertion would go on with, and to draft a change that
was made once wherever the input has the same tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from outrider.config import EditConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.matches import DISCOUNTS, END_OF_TEXT, MAX_LENGTH, NgramIndex
from outrider.drafting.sources.references import token_references
from outrider.drafting.tree_merge import WeightedPath

MAX_NGRAM = 4  # of a suffix that alignment is found by
MAX_SHIFTS = (0, 8, 32, 128)  # [length of the suffix] how far from the loss it may stand; beyond, anywhere
MAX_CHANGE = 8  # tokens of a change that is drafted again
MIN_STAY = 8  # tokens copied from elsewhere before the place where the copy was lost is given up
# What is believed of guesses before this request has shown their worth, and how many guesses that belief counts for:
# that the copy goes on behind as many tokens as were put in their place, behind one, at once; that a change is made
# again; that a copy goes on as a match of its length does.
REPLACED, REPLACED_ONE, INSERTED, CHANGED_AGAIN, COPIED = 0.15, 0.15, 0.1, 0.8, 1.0
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
        length: of the match by which it was found, and what was copied since.
        lost_at: the position at the last difference; None before the first one.
        change: output tokens since then, as long as the copy has not gone on from there.
        stay: tokens still to be copied before a far away `position` is more than an excursion, such as to the
            instruction that names what to change; 0 if it is.
        changes: what was put in place of a stretch of the input, by its first token.
    """

    text: Sequence[int]
    index: NgramIndex
    num_seen: int
    position: int | None = None
    length: int = 0
    lost_at: int | None = None
    change: list[int] = field(default_factory=list)
    stay: int = 0
    changes: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    replaced: _Worth = field(default_factory=lambda: _Worth(REPLACED))
    replaced_one: _Worth = field(default_factory=lambda: _Worth(REPLACED_ONE))
    inserted: _Worth = field(default_factory=lambda: _Worth(INSERTED))
    changed_again: _Worth = field(default_factory=lambda: _Worth(CHANGED_AGAIN))
    copied: _Worth = field(default_factory=lambda: _Worth(COPIED))

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that are new since the last call."""
        for position in range(self.num_seen, len(tokens)):
            token = tokens[position]
            self._judge(token)
            if self.position is not None and self.text[self.position] == token:
                self.position += 1
                self.length += 1
                if self.stay:
                    self.stay -= 1
                    self.change.append(token)
            else:
                self._lose()
                self.change.append(token)
                self._find(tokens[max(0, position + 1 - MAX_NGRAM) : position + 1])
            if self.position is not None and self.position >= len(self.text):
                self._lose()
        self.num_seen = len(tokens)

    def _lose(self) -> None:
        if self.position is not None and not self.stay:
            self.lost_at, self.change = self.position, []
        self.position, self.stay = None, 0

    def guesses(self) -> list[tuple[int, _Worth]]:
        """Where the copy may go on while it is lost, without anything to show for it."""
        if self.lost_at is None or (self.position is not None and not self.stay):
            return []
        return [
            (self.lost_at + len(self.change), self.replaced),
            (self.lost_at + 1, self.replaced_one),
            (self.lost_at, self.inserted),
        ]

    def _judge(self, token: int) -> None:
        if self.position is not None:
            change = self.change_at(self.position)
            if change is not None:
                self.changed_again.count(change[1][:1] == (token,))
            else:
                expected = 1.0 - DISCOUNTS[min(self.length, MAX_LENGTH)]
                self.copied.count(self.text[self.position] == token, expected)
        for guess, worth in self.guesses():
            worth.count(guess < len(self.text) and self.text[guess] == token)

    def change_at(self, position: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """What stands at a position, and what was put in its place elsewhere."""
        change = self.changes.get(self.text[position])
        return change if change and tuple(self.text[position : position + len(change[0])]) == change[0] else None

    def _find(self, suffix: Sequence[int]) -> None:
        expected = 0 if self.lost_at is None else self.lost_at + len(self.change)
        found = self.index.nearest(suffix, expected)
        if found is None:
            return
        end, length = found
        if length < MAX_NGRAM and (self.lost_at is None or abs(end - expected) > MAX_SHIFTS[length]):
            return
        if self.lost_at is not None:
            if self.lost_at <= end <= expected + MAX_CHANGE:
                self._remember(end, length)
            else:
                self.stay = MIN_STAY
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
        paths: list[WeightedPath] = []
        if alignment.position is not None:
            paths += _copies(alignment, alignment.position, alignment.length, depth)
        for position, worth in alignment.guesses():
            paths += [
                WeightedPath(path.tokens, [worth.rate, *path.confidences[1:]])
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

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
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
        change = alignment.change_at(position)
        if change is not None:
            old, new = change
            again = min(MOST, alignment.changed_again.rate)
            unchanged = list(text[position : position + depth - len(tokens)])
            if END_OF_TEXT in unchanged:
                unchanged = unchanged[: unchanged.index(END_OF_TEXT)]
            as_it_stands = [1.0 - again] + [confidence] * (len(unchanged) - 1)
            paths.append(WeightedPath([*tokens, *unchanged], [*confidences, *as_it_stands]))
            if new:
                tokens += new
                confidences += [again] + [confidence] * (len(new) - 1)
            position += len(old)
            continue
        tokens.append(text[position])
        confidences.append(confidence)
        position += 1
    if tokens:
        paths.insert(0, WeightedPath(tokens[:depth], confidences[:depth]))
    return paths
