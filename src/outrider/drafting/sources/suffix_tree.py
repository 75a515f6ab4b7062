"""SuffixDecoding (Oliaro et al., arXiv 2411.04975): what most often followed the longest match, here or before.

The trees are compressed: a token of code costs 1.3 microseconds and 230 bytes at depth 64, where a plain trie would
make 64 nodes of it. An automaton finds matches as fast, but cannot take one output's counts back.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from outrider.config import SuffixConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.calibration import Calibration
from outrider.drafting.sources.guess_tree import ESCAPE, GuessTree, grow
from outrider.drafting.sources.past_outputs import PastOutputs
from outrider.drafting.sources.suffix_index import Cursor, Node, SuffixTree
from outrider.drafting.tree_merge import WeightedPath

HISTORY_ESCAPE = 12.0  # for `ESCAPE` in past outputs: texts of others, which are right less often
PROMPT_TAIL = 8  # tokens of the prompt that stand before an output in the history, so that its beginning is found


@dataclass(frozen=True)
class Place:
    """A match: a point on an edge.

    Attributes:
        length: tokens that match.
        num_pending: of the suffixes that have entered the edge, those that nothing follows yet.
        escape: weight of what never followed, for a match of one token.
    """

    tree: SuffixTree
    node: Node
    offset: int
    length: int
    num_pending: int = 0
    escape: float = ESCAPE


def speculate(place: Place, *, max_nodes: int, max_depth: int, min_path_prob: float = 0.0) -> GuessTree:
    """SuffixDecoding's greedy tree below a match; its score is the paper's SCORE, the sum of D(N) over the nodes.

    A token's probability is its count in proportion to the counts of all that followed, with an escape to what never
    did. The escape grows with the number of different successors and falls with the match's length: method C of
    prediction by partial matching (Moffat 1990) with `escape` / length where that has 1.

    Args:
        max_nodes: MAX_SPEC.
        min_path_prob: nodes with a smaller product are left out.
    """
    tree = place.tree

    def successors(
        made: GuessTree, guess: int, depth: int, state: tuple[Node, int, int]
    ) -> Iterable[tuple[int, float, tuple[Node, int, int]]]:
        node, offset, count = state
        escape = place.escape / (place.length + depth)
        if offset < node.length:
            beyond = offset - tree.known_length(node)
            # A match that reaches the end of the text goes on with what was guessed there.
            token = tree.token_at(node, offset) if beyond < 0 else made.tokens[made.path(guess)[beyond]]
            return ((token, count / (count + escape), (node, offset + 1, count)),)
        children = node.children
        total = escape * len(children) + sum([child.count for child in children.values()])
        best = heapq.nlargest(max_nodes, children.items(), key=_by_count_and_recency)
        return [(token, child.count / total, (child, 1, child.count)) for token, child in best]

    count = place.node.count - place.num_pending
    chain = _along_edge(place, count, min(max_nodes, max_depth), min_path_prob)
    end = (place.node, place.offset + len(chain.tokens), count)
    return grow(end, successors, max_nodes=max_nodes, max_depth=max_depth, min_path_prob=min_path_prob, chain=chain)


def _along_edge(place: Place, count: int, max_nodes: int, min_path_prob: float) -> GuessTree:
    """What stands on the edge of a match behind it: nothing else has followed."""
    chain, product = GuessTree(), 1.0
    for depth, token in enumerate(place.tree.tokens_at(place.node, place.offset, max_nodes)):
        prob = count / (count + place.escape / (place.length + depth))
        product *= prob
        if product < min_path_prob:
            break
        chain.tokens.append(token)
        chain.parents.append(depth - 1)
        chain.probs.append(prob)
        chain.score += product
    return chain


def _by_count_and_recency(child: tuple[int, Node]) -> tuple[int, int]:
    return child[1].count, child[1].start


class _Request:
    """The tree over a request's own tokens, and where they stand in the tree of past outputs."""

    def __init__(self, config: SuffixConfig, history: SuffixTree) -> None:
        self._config = config
        self._num_followed = 0
        self.tree = SuffixTree(config.max_match)
        self.cursor = Cursor(history)

    def follow(self, token_ids: Sequence[int]) -> None:
        new = token_ids[self._num_followed :]
        limit = self._config.request_tokens
        if len(self.tree) + len(new) > limit:  # begin again with the newer half: now and then, not for every token
            self.tree = SuffixTree(self._config.max_match)
            self.tree.extend(token_ids[-(limit // 2) :])
        else:
            self.tree.extend(new)
        self.cursor.follow(token_ids, len(new))
        self._num_followed = len(token_ids)


class SuffixSource:
    """Proposes the best-scoring tree of guesses from the request's own tokens, and the one from past outputs.

    The paper takes the better one of the two. A score is what a tree promises, and past outputs promise too much in
    one text and too little in another, so both are corrected by what they have kept, and go into one tree.

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

    def continuations(self, context: DraftContext) -> Sequence[WeightedPath]:
        request = self._requests.get(context.request_id)
        if request is None:
            request = self._requests[context.request_id] = _Request(self._config, self._history.tree)
        request.follow(context.token_ids)
        own = self._best(request.tree, request.tree.places, context, num_pending=1, escape=ESCAPE)
        past = self._best(self._history.tree, request.cursor.places, context, num_pending=0, escape=HISTORY_ESCAPE)
        return [
            *self._own.corrected(context.request_id, own),
            *self._past.corrected(context.request_id, past),
        ]

    def _best(
        self,
        tree: SuffixTree,
        places: tuple[Sequence[Node], Sequence[int]],
        context: DraftContext,
        *,
        num_pending: int,
        escape: float,
    ) -> list[WeightedPath]:
        """The best-scoring tree of guesses below the longest matches with different sets of occurrences.

        Args:
            num_pending: 1 in the request's own tree, for the end of the text itself; see `Place`.
        """
        config = self._config
        nodes, offsets = places
        deepest = config.max_match - config.depth  # so that the tree still knows what follows
        best: GuessTree | None = None
        found = last_count = 0
        for k in range(max(0, len(nodes) - deepest), len(nodes)):
            if nodes[k].count == last_count:
                continue
            last_count = nodes[k].count
            length = len(nodes) - k
            made = speculate(
                Place(tree, nodes[k], offsets[k], length, num_pending, escape),
                max_nodes=min(context.max_nodes, config.max_nodes, int(config.max_spec_factor * length)),
                max_depth=min(context.max_depth, config.depth),
                min_path_prob=context.min_path_prob,
            )
            if best is None or made.score > best.score:
                best = made
            found += 1
            if found == config.num_matches:
                break
        return best.paths() if best else []

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
