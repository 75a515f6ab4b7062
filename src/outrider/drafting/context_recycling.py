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

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.config import RecyclingConfig
from outrider.drafting.context_table import PlaceNoise, learn_chosen, new_table
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.recycled_text import RecycledText, new_rates, new_text
from outrider.drafting.top_tokens import top_tokens
from outrider.token_tree import TokenTree

MIN_PATH_PROB = 0.01  # less likely nodes are not worth looking for
SAMPLED_FACTOR = 4  # candidates kept of sampled requests, over those of greedy ones

# Where measuring begins: how often the first candidate is right after a context of each length when no longer one is
# known, for the target's candidates and for tokens that were only seen to follow. Counted on held-out code with the
# bundled model, greedy and at temperatures 0.8 and 1.
GREEDY_CHOSEN = {1: 0.29, 2: 0.4, 3: 0.51, 4: 0.7, 8: 0.86, 16: 0.97}
GREEDY_SEEN = {1: 0.15, 2: 0.34, 3: 0.44, 4: 0.69, 8: 0.85, 16: 0.91}
SAMPLED_CHOSEN = {1: 0.15, 2: 0.21, 3: 0.32, 4: 0.45, 8: 0.7, 16: 0.7}
SAMPLED_SEEN = {1: 0.1, 2: 0.2, 3: 0.28, 4: 0.5, 8: 0.6, 16: 0.6}


@dataclass(frozen=True, eq=False, slots=True)
class _Request:
    """Attributes:
    num_kept: candidates kept of what the target says.
    noisy: whether candidates are ranked with the noise that the target will choose with, or by logits alone.
    """

    text: RecycledText
    num_kept: int
    noisy: bool


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
        self._table = new_table(config.max_context, self._num_candidates, config.capacity)
        self._greedy = new_rates(GREEDY_CHOSEN, GREEDY_SEEN, self._table.lengths, self._num_candidates)
        self._sampled = new_rates(SAMPLED_CHOSEN, SAMPLED_SEEN, self._table.lengths, self._num_candidates)
        self._requests: dict[str, _Request] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        request = self._requests.get(context.request_id)
        if request is None:
            request = self._requests[context.request_id] = self._new_request(context)
        tokens, noise = context.token_ids, None
        if request.noisy:
            noise = PlaceNoise(context.seed, len(tokens), context.params.temperature, self._vocab_size)
        made, parents, confidences = request.text.grow(
            tokens,
            min(self.max_nodes, context.max_nodes),
            min(self._config.depth, context.max_depth),
            max(MIN_PATH_PROB, context.min_path_prob),
            noise,
        )
        return TokenTree(made, parents, confidences=confidences)

    def _new_request(self, context: DraftContext) -> _Request:
        config, greedy = self._config, context.params.greedy
        noisy = self._shares_noise and not greedy
        rates = self._greedy if greedy else self._sampled
        text = new_text(self._table, rates, config.max_context, self._num_candidates, config.capacity)
        num_kept = min(self._num_candidates * (SAMPLED_FACTOR if noisy else 1), self._vocab_size)
        return _Request(text, num_kept, noisy)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            assert outcome.target_logits is not None, "a drafter that reads logits got none"
            request, tree = self._requests.get(outcome.request_id), outcome.tree
            num_kept = request.num_kept if request else self._num_candidates
            token_rows, logits = top_tokens(outcome.target_logits, num_kept, outcome.logit_maxima)
            if request is None:
                learn_chosen((self._table,), tree.tokens[:1], tree, token_rows, logits)
            else:
                request.text.observe(tree, token_rows, logits, outcome.new_tokens)

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._requests.pop(request_id, None)  # the shared table outlives requests: that is the point
