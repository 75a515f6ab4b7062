"""SuffixDecoding (Oliaro et al., arXiv 2411.04975): what most often followed the longest match, here or before.

The trees are compressed: a token of code costs 1.3 microseconds and 230 bytes at depth 64, where a plain trie would
make 64 nodes of it. An automaton finds matches as fast, but cannot take one output's counts back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from outrider.config import SuffixConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.calibration import Calibration
from outrider.drafting.sources.guess_tree import ESCAPE
from outrider.drafting.sources.past_outputs import PastOutputs
from outrider.drafting.sources.suffix_guesses import SuffixLimits, SuffixSearch, best_guesses
from outrider.drafting.sources.suffix_index import SuffixTree, new_cursor, new_tree
from outrider.drafting.tree_merge import WeightedPath

HISTORY_ESCAPE = 12.0  # for `ESCAPE` in past outputs: texts of others, which are right less often
PROMPT_TAIL = 8  # tokens of the prompt that stand before an output in the history, so that its beginning is found


class _Request:
    """The tree over a request's own tokens, and where they stand in the tree of past outputs."""

    def __init__(self, config: SuffixConfig, history: SuffixTree) -> None:
        self._config = config
        self._num_followed = 0
        self.tree = new_tree(config.max_match)
        self.cursor = new_cursor(history)

    def follow(self, token_ids: Sequence[int]) -> None:
        new = token_ids[self._num_followed :]
        limit = self._config.request_tokens
        if len(self.tree) + len(new) > limit:  # begin again with the newer half: now and then, not for every token
            self.tree = new_tree(self._config.max_match)
            self.tree.extend(token_ids[-(limit // 2) :])
        else:
            self.tree.extend(new)
        self.cursor.follow(token_ids, len(new))
        self._num_followed = len(token_ids)


class SuffixSource:
    """Proposes the best-scoring tree of guesses from the request's own tokens, and the one from past outputs.

    The paper takes the better one of the two. A score is what a tree promises, and past outputs promise too much in
    one text and too little in another, so both are corrected by what they have kept, and go into one tree.

    The authors' code tries all lengths of match, here a few of the longest are tried; and its trees have one node for
    each token that matches unless told otherwise, here up to 16, since the escape makes short matches promise little.

    Raises:
        LookupFileError: the history file is damaged or is something else.
        VocabularyMismatchError: it was written with another vocabulary.
        OSError: it cannot be read, or its folder does not exist.
    """

    name = "suffix"
    reads_logits = False

    def __init__(self, config: SuffixConfig, *, vocab_size: int, vocab_fingerprint: Callable[[], bytes]) -> None:
        self._config = config
        self._history = PastOutputs(config, vocab_size=vocab_size, vocab_fingerprint=vocab_fingerprint)
        self._requests: dict[str, _Request] = {}
        self._own, self._past = Calibration(), Calibration()
        deepest = config.max_match - config.depth  # so that the tree still knows what follows
        self._in_own, self._in_past = (
            SuffixSearch(num_pending, escape, deepest, config.num_matches, config.max_spec_factor)
            for num_pending, escape in ((1, ESCAPE), (0, HISTORY_ESCAPE))
        )

    def continuations(self, context: DraftContext) -> Sequence[WeightedPath]:
        request = self._requests.get(context.request_id)
        if request is None:
            request = self._requests[context.request_id] = _Request(self._config, self._history.tree)
        request.follow(context.token_ids)
        limits = SuffixLimits(
            min(context.max_nodes, self._config.max_nodes),
            min(context.max_depth, self._config.depth),
            context.min_path_prob,
        )
        own = best_guesses(request.tree, self._in_own, limits)
        past = best_guesses(request.cursor, self._in_past, limits)
        return [
            *self._own.corrected(context.request_id, own),
            *self._past.corrected(context.request_id, past),
        ]

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            for calibration in (self._own, self._past):
                calibration.observe(outcome.request_id, outcome.new_tokens)

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._own.release(request_id)
        self._past.release(request_id)
        self._requests.pop(request_id, None)
        if finished is not None and len(finished.token_ids) > finished.num_prompt_tokens:
            self._history.add(finished.token_ids[max(0, finished.num_prompt_tokens - PROMPT_TAIL) :])
