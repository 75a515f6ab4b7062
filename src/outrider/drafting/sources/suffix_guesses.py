"""What most often followed the longest matches in a suffix tree: the speculation of SuffixDecoding.

Compiled with the tree (`suffix_index.py`), where that is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

from outrider.drafting.sources.guess_tree import ESCAPE, GuessTree, grow
from outrider.drafting.sources.suffix_index import Node, PythonCursor, PythonTree, SuffixCursor, SuffixTree
from outrider.drafting.tree_merge import WeightedPath


@dataclass(frozen=True)
class SuffixSearch:
    """How guesses are looked for in one tree.

    Attributes:
        num_pending: of the suffixes that have entered a match's edge, those that nothing follows yet: 1 in the tree
            that the text itself stands in, for its end.
        escape: weight of what never followed, for a match of one token.
        deepest: the longest match that is looked at.
        num_matches: the most matches that are, each with a set of occurrences of its own.
        max_spec_factor: the most draft tokens for each token that matches.
    """

    num_pending: int
    escape: float
    deepest: int
    num_matches: int
    max_spec_factor: float


@dataclass(frozen=True)
class SuffixLimits:
    """Attributes:
    max_nodes: MAX_SPEC.
    max_depth: of the tree of guesses.
    min_path_prob: nodes with a smaller product are left out.
    """

    max_nodes: int
    max_depth: int
    min_path_prob: float = 0.0


def best_guesses(
    suffixes: SuffixTree | SuffixCursor, search: SuffixSearch, limits: SuffixLimits
) -> list[WeightedPath]:
    """The best-scoring tree of guesses below the longest matches with different sets of occurrences, as paths.

    Args:
        suffixes: of the current sequence of a tree, or of another text in it.
    """
    if isinstance(suffixes, PythonTree):
        return _best_guesses(suffixes, suffixes.places, search, limits)
    if isinstance(suffixes, PythonCursor):
        return _best_guesses(suffixes.tree, suffixes.places, search, limits)
    of_module: Any = suffixes
    found = of_module.guesses(
        search.num_pending,
        search.escape,
        (search.deepest, search.num_matches),
        search.max_spec_factor,
        limits.max_nodes,
        limits.max_depth,
        limits.min_path_prob,
    )
    return list(starmap(WeightedPath, found))


def _best_guesses(
    tree: PythonTree, places: tuple[Sequence[Node], Sequence[int]], search: SuffixSearch, limits: SuffixLimits
) -> list[WeightedPath]:
    nodes, offsets = places
    best: GuessTree | None = None
    found = last_count = 0
    for k in range(max(0, len(nodes) - search.deepest), len(nodes)):
        if nodes[k].count == last_count:
            continue
        last_count = nodes[k].count
        length = len(nodes) - k
        made = speculate(
            Place(tree, nodes[k], offsets[k], length, search.num_pending, search.escape),
            max_nodes=min(limits.max_nodes, int(search.max_spec_factor * length)),
            max_depth=limits.max_depth,
            min_path_prob=limits.min_path_prob,
        )
        if best is None or made.score > best.score:
            best = made
        found += 1
        if found == search.num_matches:
            break
    return best.paths() if best else []


@dataclass(frozen=True)
class Place:
    """A match: a point on an edge.

    Attributes:
        length: tokens that match.
        num_pending: of the suffixes that have entered the edge, those that nothing follows yet.
        escape: weight of what never followed, for a match of one token.
    """

    tree: PythonTree
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
