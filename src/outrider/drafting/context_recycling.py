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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from outrider.config import RecyclingConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
from outrider.drafting.sources.guess_tree import GuessTree, grow
from outrider.sampling.noise import Purpose, gumbel_noise
from outrider.token_tree import TokenTree

LENGTHS = (1, 2, 3, 4, 8, 16, 32, 64)  # of contexts, as far as they are allowed
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

Context = tuple[int, ...]
Row = NDArray[np.float32]


class Candidates:
    """What may follow a context, the likeliest or latest first.

    Attributes:
        token_row, logits: ``[len(tokens)]`` the tokens again, and the target's logits; None if the tokens were only
            seen to follow.
    """

    __slots__ = ("logits", "token_row", "tokens")

    def __init__(
        self, tokens: Sequence[int], token_row: NDArray[np.int64] | None = None, logits: Row | None = None
    ) -> None:
        self.tokens = tokens
        self.token_row = token_row
        self.logits = logits

    def with_noise(self, noise: Row, temperature: float, count: int) -> list[int]:
        """The first `count` tokens as the target would rank them with this noise, ``[vocab]``."""
        assert self.token_row is not None, "what was only seen has no logits"
        assert self.logits is not None, "what was only seen has no logits"
        keys = noise[self.token_row]
        keys *= -temperature
        keys -= self.logits
        return self.token_row[keys.argsort(kind="stable")[:count]].tolist()


class ContextTable:
    """The latest candidates after each context.

    Those of single tokens are kept for good. Longer contexts are kept in two halves: when the newer is full, the
    older is forgotten and takes its place.

    Args:
        max_context: the longest context, in tokens.
        num_candidates: the most tokens kept of those that were only seen to follow a context.
        capacity: the most contexts of more than one token.

    Attributes:
        lengths: of contexts, from 1 on.
    """

    def __init__(self, max_context: int, num_candidates: int, capacity: int) -> None:
        self.lengths = tuple(length for length in LENGTHS if length <= max_context)
        self._num_candidates = num_candidates
        self._half = capacity // 2
        self._single: dict[Context, Candidates] = {}
        self._newer: dict[Context, Candidates] = {}
        self._older: dict[Context, Candidates] = {}

    def __len__(self) -> int:
        """Contexts of more than one token; one that stands in both halves counts twice."""
        return len(self._newer) + len(self._older)

    def contexts_at(self, place: Context) -> list[Context]:
        """What ends at a place, from one token on."""
        size = len(place)
        return [place[size - length :] for length in self.lengths if length <= size]

    def known(self, contexts: Sequence[Context]) -> list[Candidates]:
        """The candidates after contexts that end at one place, up to the longest that is known.

        Whoever learns a context learns all that it ends with, so behind the first unknown one there is nothing.
        """
        found: list[Candidates] = []
        newer, older = self._newer, self._older
        for context in contexts:
            candidates = newer.get(context) or older.get(context) or self._single.get(context)
            if candidates is None:
                break
            found.append(candidates)
        return found

    def learn_chosen(self, contexts: Sequence[Context], candidates: Candidates) -> None:
        """The target's candidates after the contexts that end at one place, from one token on."""
        self._make_room(len(contexts))
        self._single[contexts[0]] = candidates
        newer = self._newer
        for context in contexts[1:]:
            newer[context] = candidates

    def learn_seen(self, tokens: Sequence[int], start: int) -> None:
        """A text's tokens from `start` on, each as what follows the contexts before it."""
        longest = self.lengths[-1]
        for position in range(max(start, 1), len(tokens)):
            self._make_room(len(self.lengths))
            token = tokens[position]
            alone = Candidates((token,))
            contexts = self.contexts_at(tuple(tokens[max(0, position - longest) : position]))
            known = self.known(contexts)
            for index, context in enumerate(contexts):
                made = alone
                if index < len(known):
                    before = known[index].tokens
                    if before[0] == token:
                        continue
                    others = [other for other in before if other != token]
                    made = Candidates([token, *others][: self._num_candidates])
                (self._newer if index else self._single)[context] = made

    def _make_room(self, num_contexts: int) -> None:
        if len(self._newer) + num_contexts > self._half:
            self._older, self._newer = self._newer, {}


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


class RateTable:
    """Rates by where candidates are from and by the length of the context, for greedy or for sampled requests."""

    def __init__(
        self, chosen: Mapping[int, float], seen: Mapping[int, float], lengths: Sequence[int], num_ranks: int
    ) -> None:
        self._own_chosen, self._own_seen, self._shared = (
            {length: Rates(_prior(first, length)[:num_ranks]) for length in lengths}
            for first in (chosen, seen, chosen)
        )

    def of(self, candidates: Candidates, length: int, *, shared: bool) -> Rates:
        if shared:
            return self._shared[length]
        return (self._own_seen if candidates.logits is None else self._own_chosen)[length]


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
    predictions: those made for the last tree, by their depth and place.
    """

    table: ContextTable
    num_kept: int
    num_known: int = 0
    tail: Context = ()
    predictions: dict[tuple[int, Context], Prediction] = field(default_factory=dict)


class ContextRecyclingDrafter:
    name = "recycling"
    returns_probs = False
    reads_logits = True

    def __init__(self, config: RecyclingConfig, style: DraftStyle, vocab_size: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._num_candidates = 1 if style.chains_only else min(config.num_candidates, vocab_size)
        self._shares_noise = style.noise == "shared"
        self.max_nodes = min(config.max_nodes, config.depth) if style.chains_only else config.max_nodes
        self.table = self._new_table()
        lengths = self.table.lengths
        self._longest = lengths[-1]
        self._greedy = RateTable(GREEDY_CHOSEN, GREEDY_SEEN, lengths, self._num_candidates)
        self._sampled = RateTable(SAMPLED_CHOSEN, SAMPLED_SEEN, lengths, self._num_candidates)
        self._requests: dict[str, _Request] = {}

    def _new_table(self) -> ContextTable:
        return ContextTable(self._config.max_context, self._num_candidates, self._config.capacity)

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        tokens = context.token_ids
        request = self._requests.get(context.request_id)
        if request is None:
            noisy = self._shares_noise and not context.params.greedy
            num_kept = min(self._num_candidates * (SAMPLED_FACTOR if noisy else 1), self._vocab_size)
            request = self._requests[context.request_id] = _Request(self._new_table(), num_kept)
        request.table.learn_seen(tokens, request.num_known)
        request.num_known = len(tokens)
        request.tail = tuple(tokens[-self._longest :])
        request.predictions = {}
        longest = self._longest

        def successors(
            _: GuessTree, __: int, depth: int, state: tuple[Context, int]
        ) -> Iterable[tuple[int, float, tuple[Context, int]]]:
            above, token = state
            place = (*above, token)[-longest:] if depth else above
            prediction = request.predictions[depth, place] = self._predict(context, request, place, depth)
            likeliest = _by_probability(prediction)[: self._num_candidates]
            return [(token, prob, (place, token)) for prob, token in likeliest]

        made = grow(
            (request.tail, tokens[-1]),
            successors,
            max_nodes=min(self.max_nodes, context.max_nodes),
            max_depth=min(self._config.depth, context.max_depth),
            min_path_prob=max(MIN_PATH_PROB, context.min_path_prob),
        )
        return TokenTree(
            (tokens[-1], *made.tokens),
            (-1, *[parent + 1 for parent in made.parents]),
            confidences=(1.0, *made.probs),
        )

    def _predict(self, context: DraftContext, request: _Request, place: Context, depth: int) -> Prediction:
        """What may follow a place `depth` tokens behind the root."""
        count = self._num_candidates
        rate_table, noise = self._greedy, None
        if not context.params.greedy:
            rate_table = self._sampled
            if self._shares_noise:
                position = len(context.token_ids) + depth
                noise = gumbel_noise(context.seed, position, Purpose.TARGET, self._vocab_size)
        contexts = self.table.contexts_at(place)
        known = request.table.known(contexts)
        num_own = len(known)
        if num_own < len(contexts):
            known += self.table.known(contexts)[num_own:]
        found: Prediction = []
        proposed: set[int] = set()
        last: Candidates | None = None
        for index in range(len(known) - 1, -1, -1):
            candidates = known[index]
            if candidates is last:
                continue
            last = candidates
            if noise is None or candidates.logits is None:
                tokens = candidates.tokens
            else:
                tokens = candidates.with_noise(noise, context.params.temperature, count)
            new = [token for token in tokens if token not in proposed][:count]
            if new:
                found.append((rate_table.of(candidates, len(contexts[index]), shared=index >= num_own), new))
                proposed.update(new)
                if len(proposed) >= count:
                    break
        return found

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            assert outcome.target_logits is not None, "a drafter that reads logits got none"
            request, tree = self._requests.get(outcome.request_id), outcome.tree
            top = outcome.target_logits.topk(request.num_kept if request else self._num_candidates, dim=-1)
            token_rows, logits = top.indices.cpu().numpy(), top.values.float().cpu().numpy()
            candidates = list(map(Candidates, token_rows.tolist(), token_rows, logits))
            # Of a request whose last steps were not shown here the root is all that is known.
            in_step = request is not None and request.tail[-1:] == tree.tokens[:1]
            places = [request.tail if request is not None and in_step else tree.tokens[:1]]
            for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
                places.append((*places[parent], token)[-self._longest :])
            tables = (self.table,) if request is None else (self.table, request.table)
            for place, of_place in zip(places, candidates, strict=True):
                contexts = self.table.contexts_at(place)
                for table in tables:
                    table.learn_chosen(contexts, of_place)
            if request is not None and in_step:
                self._take_in(request, outcome.new_tokens)

    def _take_in(self, request: _Request, new_tokens: Sequence[int]) -> None:
        """Judge the predictions along the tokens that came, which need not be learnt again."""
        for depth, token in enumerate(new_tokens):
            for rates, proposed in request.predictions.get((depth, request.tail), ()):
                for rank, candidate in enumerate(proposed):
                    rates.count(rank, right=candidate == token)
                if token in proposed:
                    break
            request.tail = (*request.tail, token)[-self._longest :]
        request.predictions = {}
        request.num_known += len(new_tokens)

    def release(self, request_id: str) -> None:
        self._requests.pop(request_id, None)  # the shared table outlives requests: that is the point


def _by_probability(prediction: Prediction) -> list[tuple[float, int]]:
    """Probabilities and tokens, the most likely first: what a context's rates leave is for the shorter ones."""
    found: list[tuple[float, int]] = []
    left = 1.0
    for rates, tokens in prediction:
        of_rank = rates.by_rank[: len(tokens)]
        found += [(left * rate, token) for rate, token in zip(of_rank, tokens, strict=True)]
        left *= max(0.0, 1.0 - sum(of_rank))
        if left < MIN_PATH_PROB:
            break
    found.sort(key=_negative_probability)
    return found


def _negative_probability(of: tuple[float, int]) -> float:
    return -of[0]
