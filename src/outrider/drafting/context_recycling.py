"""Token Recycling over contexts of several lengths: our extension of arXiv 2408.08696.

The paper keeps the target's latest candidates for each token (`recycling.py`). One token cannot tell the places of a
text apart, so in copied and repeated text its tree falls behind prompt lookup. Here candidates are kept for the last
1, 2, 3, 4, 8, ... tokens, and

- beside the shared table each request has one of its own, which is asked first: requests that run together would
  overwrite each other's latest. In it a prompt's own next tokens are candidates too, though the target's logits
  there are not known;
- the longest known context speaks first, shorter ones for the probability that it leaves;
- how much each is believed is measured: how often a candidate of that rank, after a context of that length, was the
  target's choice. Best-first growth then makes deep chains of long contexts and wide trees of short ones;
- of a sampled request candidates are ranked by their logits plus the noise that the target will choose with, where
  the rule shares it (see `growth/tree.py`); more candidates are kept, since any of them may come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from outrider.config import RecyclingConfig
from outrider.drafting.context_table import Context, ContextTable, Origin, PlaceNoise, learn_chosen, new_table
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.sources.guess_tree import GuessTree, grow
from outrider.drafting.top_tokens import top_tokens
from outrider.token_tree import TokenTree

MIN_PATH_PROB = 0.01  # less likely nodes are not worth looking for
NUM_BELIEVED = 20  # observations that a first rate counts for
MAX_OBSERVED = 400  # of a rate; then all of its observations count half
SAMPLED_FACTOR = 4  # candidates kept of sampled requests, over those of greedy ones

# Where measuring begins: how often the first candidate is right after a context of each length when no longer one is
# known, for the target's candidates and for tokens that were only seen to follow; of what it leaves, the share of
# each further rank. Counted on held-out code with the bundled model, greedy and at temperatures 0.8 and 1.
GREEDY_CHOSEN = {1: 0.29, 2: 0.4, 3: 0.51, 4: 0.7, 8: 0.86, 16: 0.97}
GREEDY_SEEN = {1: 0.15, 2: 0.34, 3: 0.44, 4: 0.69, 8: 0.85, 16: 0.91}
SAMPLED_CHOSEN = {1: 0.15, 2: 0.21, 3: 0.32, 4: 0.45, 8: 0.7, 16: 0.7}
SAMPLED_SEEN = {1: 0.1, 2: 0.2, 3: 0.28, 4: 0.5, 8: 0.6, 16: 0.6}
FURTHER_RANKS = (0.2, 0.08, 0.06, 0.04, 0.03, 0.03, 0.02)

NOT_THERE = -2  # a node of no tree; -1 is the root


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

    def count(self, proposed: Sequence[int], chosen: int) -> None:
        """Candidates were proposed, by rank; one of them or another one was chosen."""
        by_rank, right, seen = self.by_rank, self._right, self._seen
        for rank, token in enumerate(proposed):
            if token == chosen:
                right[rank] += 1.0
            num_seen = seen[rank] + 1.0
            if num_seen > MAX_OBSERVED:
                right[rank] /= 2
                num_seen /= 2
            seen[rank] = num_seen
            by_rank[rank] = right[rank] / num_seen


class RateTable:
    """Rates by where candidates are from and by the length of the context, for greedy or for sampled requests.

    Attributes:
        by_origin: lists by the index of the context's length.
    """

    def __init__(
        self, chosen: Mapping[int, float], seen: Mapping[int, float], lengths: Sequence[int], num_ranks: int
    ) -> None:
        first_of = {Origin.OWN_CHOSEN: chosen, Origin.OWN_SEEN: seen, Origin.SHARED: chosen}
        self.by_origin = [
            [Rates(_prior(first_of[origin], length)[:num_ranks]) for length in lengths] for origin in Origin
        ]


def _prior(first: Mapping[int, float], length: int) -> list[float]:
    right = first[min(length, max(first))]
    return [right, *[(1.0 - right) * share for share in FURTHER_RANKS]]


# What the contexts of one place propose, the longest first; each without what longer ones have proposed.
Prediction = list[tuple[Rates, Sequence[int]]]


@dataclass(eq=False)
class _Request:
    """Attributes:
    table: of its own text.
    num_kept: candidates kept of what the target says.
    num_known: tokens of the text that have been learnt.
    tail: the last of them, up to the root.
    made: the last tree, and what was predicted below its nodes; -1 is the root.
    """

    table: ContextTable
    num_kept: int
    num_known: int = 0
    tail: Context = ()
    made: GuessTree = field(default_factory=GuessTree)
    predictions: dict[int, Prediction] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Step:
    """What predictions of one step depend on.

    Attributes:
        noisy: whether candidates are ranked with the noise that the target will choose with, or by logits alone.
    """

    context: DraftContext
    request: _Request
    rates: RateTable
    noisy: bool


# A place before the last token, the token, the product of probabilities up to it, and how many lengths of context
# may be known there.
_State = tuple[Context, int, float, int]


class ContextRecyclingDrafter:
    name = "recycling"
    returns_probs = False
    num_without_room = 0
    reads_logits = True

    def __init__(self, config: RecyclingConfig, style: DraftStyle, vocab_size: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._num_candidates = 1 if style.chains_only else min(config.num_candidates, vocab_size)
        self._shares_noise = style.noise == "shared"
        self.max_nodes = min(config.max_nodes, config.depth) if style.chains_only else config.max_nodes
        self.table = self._new_table()
        lengths = self.table.lengths
        self._num_lengths, self._longest = len(lengths), lengths[-1]
        self._greedy = RateTable(GREEDY_CHOSEN, GREEDY_SEEN, lengths, self._num_candidates)
        self._sampled = RateTable(SAMPLED_CHOSEN, SAMPLED_SEEN, lengths, self._num_candidates)
        self._requests: dict[str, _Request] = {}

    def _new_table(self) -> ContextTable:
        return new_table(self._config.max_context, self._num_candidates, self._config.capacity)

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        tokens, longest = context.token_ids, self._longest
        noisy = self._shares_noise and not context.params.greedy
        request = self._requests.get(context.request_id)
        if request is None:
            num_kept = min(self._num_candidates * (SAMPLED_FACTOR if noisy else 1), self._vocab_size)
            request = self._requests[context.request_id] = _Request(self._new_table(), num_kept)
        request.table.learn_seen(tokens, request.num_known)
        request.num_known = len(tokens)
        request.tail = tuple(tokens[-longest:])
        rates = self._greedy if context.params.greedy else self._sampled
        step = _Step(context, request, rates, noisy)
        predictions: dict[int, Prediction] = {}
        least = max(MIN_PATH_PROB, context.min_path_prob)

        def successors(_: GuessTree, node: int, depth: int, state: _State) -> list[tuple[int, float, _State]]:
            above, token, product, num_lengths = state
            place = (*above, token)[-longest:] if depth else above
            predictions[node], num_lengths = self._predict(step, place, depth, num_lengths)
            return [
                (token, prob, (place, token, product * prob, num_lengths))
                for prob, token in _likeliest(predictions[node], least / product)[: self._num_candidates]
            ]

        made = grow(
            (request.tail, tokens[-1], 1.0, self._num_lengths),
            successors,
            max_nodes=min(self.max_nodes, context.max_nodes),
            max_depth=min(self._config.depth, context.max_depth),
            min_path_prob=least,
        )
        request.made, request.predictions = made, predictions
        return TokenTree(
            (tokens[-1], *made.tokens),
            (-1, *[parent + 1 for parent in made.parents]),
            confidences=(1.0, *made.probs),
        )

    def _predict(self, step: _Step, place: Context, depth: int, num_lengths: int) -> tuple[Prediction, int]:
        """What may follow a place `depth` tokens behind the root.

        Args:
            num_lengths: how many lengths of context may be known there.

        Returns:
            The prediction, and how many lengths may be known one token later.
        """
        context, noise = step.context, None
        if step.noisy:
            position = len(context.token_ids) + depth
            noise = PlaceNoise(context.seed, position, context.params.temperature, self._vocab_size)
        own, by_origin = step.request.table, step.rates.by_origin
        proposals, num_lengths = own.predict(self.table, place, num_lengths, self._num_candidates, noise)
        return [(by_origin[origin][index], tokens) for origin, index, tokens in proposals], num_lengths

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            assert outcome.target_logits is not None, "a drafter that reads logits got none"
            request, tree = self._requests.get(outcome.request_id), outcome.tree
            num_kept = request.num_kept if request else self._num_candidates
            token_rows, logits = top_tokens(outcome.target_logits, num_kept)
            # Of a request whose last steps were not shown here the root is all that is known.
            in_step = request is not None and request.tail[-1:] == tree.tokens[:1]
            tail = request.tail if request is not None and in_step else tree.tokens[:1]
            tables = (self.table,) if request is None else (self.table, request.table)
            learn_chosen(tables, tail, tree, token_rows, logits)
            if request is not None and in_step:
                self._take_in(request, outcome.new_tokens)

    def _take_in(self, request: _Request, new_tokens: Sequence[int]) -> None:
        """Judge the predictions along the tokens that came, which need not be learnt again."""
        made, node = request.made, -1
        for token in new_tokens:
            for rates, proposed in request.predictions.get(node, ()):
                rates.count(proposed, token)
                if token in proposed:
                    break
            below = zip(made.parents, made.tokens, strict=True)
            node = next((n for n, child in enumerate(below) if child == (node, token)), NOT_THERE)
        request.tail = (*request.tail, *new_tokens)[-self._longest :]
        request.predictions = {}
        request.num_known += len(new_tokens)

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._requests.pop(request_id, None)  # the shared table outlives requests: that is the point


def _likeliest(prediction: Prediction, least: float) -> list[tuple[float, int]]:
    """Probabilities and tokens, the most likely first: what a context's rates leave is for the shorter ones.

    Args:
        least: less likely tokens are left out.
    """
    found: list[tuple[float, int]] = []
    left = 1.0
    for rates, tokens in prediction:
        taken = 0.0
        for rate, token in zip(rates.by_rank, tokens, strict=False):  # there may be fewer tokens than ranks
            taken += rate
            if left * rate >= least:
                found.append((left * rate, token))
        left *= 1.0 - taken
        if left < least:
            break
    found.sort(key=itemgetter(0), reverse=True)
    return found
