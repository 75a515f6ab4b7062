"""Token Recycling over contexts of several lengths: our extension of arXiv 2408.08696.

The paper keeps the target's latest candidates for each token (`recycling.py`). One token cannot tell the places of a
text apart, so in copied and repeated text its tree falls behind prompt lookup. Here candidates are kept for the last
1, 2, 3, 4, 8, ... tokens, and

- a prompt's own next tokens are candidates too, though the target's logits there are not known;
- the longest known context speaks first, shorter ones for the probability that it leaves;
- how much each is believed is measured: how often a candidate of that rank, after a context of that length, was the
  target's choice. Best-first growth then makes deep chains of long contexts and wide trees of short ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from outrider.config import RecyclingConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
from outrider.drafting.sources.guess_tree import GuessTree, grow
from outrider.token_tree import TokenTree

LENGTHS = (1, 2, 3, 4, 8, 16, 32, 64)  # of contexts, as far as they are allowed
MIN_PATH_PROB = 0.01  # less likely nodes are not worth looking for
NUM_BELIEVED = 20  # observations that a first rate counts for
MAX_OBSERVED = 400  # of a rate; then all of its observations count half

Context = tuple[int, ...]
# Of candidates that the target was seen to find likely, and of tokens that were only seen to follow, by length of
# context and rank; longer contexts as the last. Counted on held-out code with the bundled model; where to begin.
CHOSEN_RATES = {
    1: (0.45, 0.13, 0.07, 0.05, 0.035, 0.025, 0.02, 0.015),
    2: (0.6, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01),
    3: (0.7, 0.1, 0.04, 0.03, 0.02, 0.015, 0.01, 0.01),
    4: (0.8, 0.06, 0.03, 0.02, 0.015, 0.01, 0.01, 0.005),
    8: (0.9, 0.03, 0.015, 0.01, 0.005, 0.005, 0.005, 0.005),
    16: (0.95, 0.015, 0.01, 0.005, 0.005, 0.0, 0.0, 0.0),
}
SEEN_RATES = {
    1: (0.3, 0.1, 0.07, 0.05, 0.04, 0.03, 0.02, 0.02),
    2: (0.5, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01),
    3: (0.6, 0.1, 0.04, 0.03, 0.02, 0.015, 0.01, 0.01),
    4: (0.7, 0.06, 0.03, 0.02, 0.015, 0.01, 0.01, 0.005),
    8: (0.85, 0.03, 0.015, 0.01, 0.005, 0.005, 0.005, 0.005),
    16: (0.95, 0.015, 0.01, 0.005, 0.005, 0.0, 0.0, 0.0),
}


class Candidates:
    """What may follow a context, the likeliest or latest first.

    Attributes:
        chosen: whether they are the target's candidates, not only seen to follow.
    """

    __slots__ = ("chosen", "tokens")

    def __init__(self, tokens: Sequence[int], *, chosen: bool) -> None:
        self.tokens = tokens
        self.chosen = chosen


class ContextTable:
    """The latest candidates after each context, shared by all requests.

    Those of single tokens are kept for good. Longer contexts are kept in two halves: when the newer is full, the
    older is forgotten and takes its place.

    Args:
        max_context: the longest context, in tokens.
        num_candidates: the most candidates of a context.
        capacity: the most contexts of more than one token.
    """

    def __init__(self, max_context: int, num_candidates: int, capacity: int) -> None:
        # The longest first, as they are asked.
        self.lengths = tuple(length for length in reversed(LENGTHS) if length <= max_context)
        self._num_candidates = num_candidates
        self._half = capacity // 2
        self._single: dict[Context, Candidates] = {}
        self._newer: dict[Context, Candidates] = {}
        self._older: dict[Context, Candidates] = {}

    def __len__(self) -> int:
        """Contexts of more than one token, those twice that stand in both halves."""
        return len(self._newer) + len(self._older)

    def find(self, context: Context) -> Candidates | None:
        if len(context) == 1:
            return self._single.get(context)
        return self._newer.get(context) or self._older.get(context)

    def learn_chosen(self, context: Context, tokens: Sequence[int]) -> None:
        """The target's candidates after a context and after all that it ends with."""
        made, size = Candidates(tokens, chosen=True), len(context)
        for length in self.lengths:
            if length <= size:
                self._put(context[size - length :], made)

    def learn_seen(self, tokens: Sequence[int], start: int) -> None:
        """A text's tokens from `start` on, each as what follows the contexts before it."""
        for position in range(max(start, 1), len(tokens)):
            token = tokens[position]
            new = Candidates((token,), chosen=False)
            for length in self.lengths:
                if length > position:
                    continue
                context = tuple(tokens[position - length : position])
                known = self.find(context)
                if known is None:
                    self._put(context, new)
                elif known.tokens[0] != token:
                    others = [other for other in known.tokens if other != token]
                    self._put(context, Candidates([token, *others][: self._num_candidates], chosen=False))

    def _put(self, context: Context, candidates: Candidates) -> None:
        if len(context) == 1:
            self._single[context] = candidates
            return
        if len(self._newer) >= self._half:
            self._older, self._newer = self._newer, {}
        self._newer[context] = candidates


class Rates:
    """How often candidates of each rank were the target's choice: counted, the old for less and less.

    Args:
        prior: by rank; what is believed at first.
    """

    __slots__ = ("_right", "_seen", "by_rank")

    def __init__(self, prior: Sequence[float]) -> None:
        self.by_rank = list(prior)
        self._right = [rate * NUM_BELIEVED for rate in prior]
        self._seen = [float(NUM_BELIEVED)] * len(prior)

    def count(self, rank: int, *, right: bool) -> None:
        self._right[rank] += right
        self._seen[rank] += 1.0
        if self._seen[rank] > MAX_OBSERVED:
            self._right[rank] /= 2
            self._seen[rank] /= 2
        self.by_rank[rank] = self._right[rank] / self._seen[rank]


# What the contexts of one place propose, the longest first; each without what longer ones have proposed.
Prediction = list[tuple[Rates, Sequence[int]]]


@dataclass(eq=False)
class _Request:
    """Attributes:
    num_known: tokens of the request that have been learnt.
    tail: its last tokens, the root included.
    predictions: those made for the last tree, by context.
    """

    num_known: int = 0
    tail: Context = ()
    predictions: dict[Context, Prediction] = field(default_factory=dict)


class ContextRecyclingDrafter:
    name = "recycling"
    returns_probs = False
    reads_logits = True

    def __init__(self, config: RecyclingConfig, style: DraftStyle, vocab_size: int) -> None:
        self._num_candidates = 1 if style.chains_only else min(config.num_candidates, vocab_size)
        self._depth = config.depth
        self.max_nodes = min(config.max_nodes, config.depth) if style.chains_only else config.max_nodes
        self.table = ContextTable(config.max_context, self._num_candidates, config.capacity)
        self._longest = self.table.lengths[0]
        self._rates = {
            (chosen, length): Rates(_rates_of(table, length)[: self._num_candidates])
            for chosen, table in ((True, CHOSEN_RATES), (False, SEEN_RATES))
            for length in self.table.lengths
        }
        self._requests: dict[str, _Request] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        tokens = context.token_ids
        request = self._requests.get(context.request_id)
        if request is None:
            request = self._requests[context.request_id] = _Request()
        self.table.learn_seen(tokens, request.num_known)
        request.num_known = len(tokens)
        request.tail = tuple(tokens[-self._longest :])
        predictions: dict[Context, Prediction] = {}
        request.predictions = predictions
        longest, limit = self._longest, self._num_candidates

        def successors(
            _made: GuessTree, _guess: int, _depth: int, state: tuple[Context, int]
        ) -> Iterable[tuple[int, float, tuple[Context, int]]]:
            above, token = state
            place = above if token < 0 else (*above, token)[-longest:]
            prediction = predictions[place] = self._predict(place)
            return [(token, prob, (place, token)) for prob, token in _by_probability(prediction)[:limit]]

        made = grow(
            (request.tail, -1),
            successors,
            max_nodes=min(self.max_nodes, context.max_nodes),
            max_depth=min(self._depth, context.max_depth),
            min_path_prob=max(MIN_PATH_PROB, context.min_path_prob),
        )
        return TokenTree(
            (tokens[-1], *made.tokens),
            (-1, *[parent + 1 for parent in made.parents]),
            confidences=(1.0, *made.probs),
        )

    def _predict(self, place: Context) -> Prediction:
        found: Prediction = []
        proposed: set[int] = set()
        last: Candidates | None = None
        size = len(place)
        for length in self.table.lengths:
            if length > size:
                continue
            candidates = self.table.find(place[size - length :])
            if candidates is None or candidates is last:
                continue
            last = candidates
            new = [token for token in candidates.tokens if token not in proposed]
            if new:
                found.append((self._rates[candidates.chosen, length], new))
                proposed.update(new)
                if len(proposed) >= self._num_candidates:
                    break
        return found

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        longest = self._longest
        for outcome in outcomes:
            assert outcome.target_logits is not None, "a drafter that reads logits got none"
            top = outcome.target_logits.topk(self._num_candidates, dim=-1).indices.tolist()
            tree = outcome.tree
            request = self._requests.get(outcome.request_id)
            places: list[Context] = [self._place_of_root(request, tree.tokens[0])]
            for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
                places.append((*places[parent], token)[-longest:])
            for place, candidates in zip(places, top, strict=True):
                self.table.learn_chosen(place, candidates)
            if request is not None:
                self._take_in(request, places[0], outcome.new_tokens)

    def _place_of_root(self, request: _Request | None, root: int) -> Context:
        """Tokens up to the root; of a request whose steps were not all shown here the root alone."""
        return request.tail if request is not None and request.tail[-1:] == (root,) else (root,)

    def _take_in(self, request: _Request, place: Context, new_tokens: Sequence[int]) -> None:
        """Judge the predictions along the tokens that came, which need not be learnt again."""
        for token in new_tokens:
            for rates, proposed in request.predictions.get(place, ()):
                for rank, candidate in enumerate(proposed):
                    rates.count(rank, right=candidate == token)
                if token in proposed:
                    break
            place = (*place, token)[-self._longest :]
        request.predictions = {}
        request.tail = place
        request.num_known += len(new_tokens)

    def release(self, request_id: str) -> None:
        self._requests.pop(request_id, None)  # the table outlives requests: that is the point


def _rates_of(table: Mapping[int, Sequence[float]], length: int) -> Sequence[float]:
    return table[min(length, max(table))]


def _by_probability(prediction: Prediction) -> list[tuple[float, int]]:
    """Probabilities and tokens, the most likely first: what a context's rates leave is for the shorter ones."""
    found: list[tuple[float, int]] = []
    left = 1.0
    for rates, tokens in prediction:
        of_rank = rates.by_rank
        found += [(left * of_rank[rank], token) for rank, token in enumerate(tokens)]
        left *= max(0.0, 1.0 - sum(of_rank[: len(tokens)]))
        if left < MIN_PATH_PROB:
            break
    found.sort(key=_negative_probability)
    return found


def _negative_probability(of: tuple[float, int]) -> float:
    return -of[0]
