"""A tree while it grows: what the draft model said at each node, and the children drawn from it.

Under the coupled rule the target will choose the token that is largest in *its* log p plus the noise of the position.
The draft knows the noise: its own log q plus the noise ranks the children, and the softmax of the sum says how likely
each is the target's choice. For greedy requests there is no noise, and the same holds of log q alone.

Under rejection rules children are drawn from q with noise that nothing else uses: the next child below a node is a
sample of what q has left there (Gumbel-top-k; Kool et al., arXiv 1903.06059), or of q where siblings are drawn with
replacement, whatever has been drawn before anywhere in the tree. Hence a growth may decide by all that was drawn so
far *where* to draw next; but it drops nothing that it drew, and decides nothing by a token that is not drawn yet
(`tests/losslessness/test_growth.py` proves it by enumeration).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from outrider.drafting.drafter import DraftContext
from outrider.sampling.noise import Purpose, gumbel_noise
from outrider.token_tree import DraftDistribution, DraftNoise, SiblingDraws, TokenTree

Row = NDArray[np.float32]  # [vocab]

# The target's choice is more certain than the softmax of the draft's own keys says. For the bundled pair on held-out
# code the likelihood is greatest at 1.75 times the logits when greedy, 1.6 times at temperature 0.5, 1.35 times at 1.
GREEDY_SHARPNESS = 1.75
SAMPLED_SHARPNESS = 1.35


@dataclass(frozen=True)
class Draws:
    """How the children of a node come about.

    Attributes:
        noise: as in `DraftStyle`.
        siblings: how siblings are drawn under independent noise; None takes the most probable tokens instead, which
            rejection rules then see as point masses.
    """

    noise: DraftNoise
    siblings: SiblingDraws | None


@dataclass(frozen=True)
class GrowthLimits:
    """Attributes:
    num_nodes: the most draft tokens.
    depth: the longest path.
    min_path_prob: paths that the draft finds less likely are not drafted further; their last token stays.
    """

    num_nodes: int
    depth: int
    min_path_prob: float


@dataclass(eq=False)
class _Below:
    """What stands, or may come to stand, below a node that the draft has read.

    Attributes:
        log_probs: ``[vocab]`` log q; up to a constant in a tree that is not sampled.
        keys: ``[vocab]`` the same, or plus noise; children come in falling order of it.
        log_total: log of the sum of exp(sharpness * keys).
        order: the first children, as far as they were asked for.
        rest, squares: sums of q and of its squares over the tokens that are not drawn yet.
        expected: q of the next draw on average, at most what it was for the draw before.
    """

    log_probs: Row
    keys: Row
    log_total: float
    order: list[int] = field(default_factory=list)
    num_drawn: int = 0
    rest: float = 1.0
    squares: float = 1.0
    expected: float = 1.0


class GrowingTree:
    """One request's tree below its root; node 0 is the root.

    Attributes:
        tokens, parents, depths: of each node.
        confidences: the guess that a node is the target's choice once its parent is on the path. Of a node drawn with
            independent noise it was made before its token was known, and never rises from one sibling to the next:
            dropping the least confident nodes, latest first, depends on no token that is dropped.
        scores: log of how likely the draft finds a node's path, its own token included.
        is_sampled: True if children are drawn with independent noise.
    """

    def __init__(self, context: DraftContext, draws: Draws, limits: GrowthLimits) -> None:
        self.context = context
        self.limits = GrowthLimits(
            min(limits.num_nodes, context.max_nodes),
            min(limits.depth, context.max_depth),
            max(limits.min_path_prob, context.min_path_prob),
        )
        self.tokens = [context.token_ids[-1]]
        self.parents = [-1]
        self.depths = [0]
        self.confidences = [1.0]
        self.scores = [0.0]
        self.is_sampled = draws.noise == "independent" and draws.siblings is not None and not context.params.greedy
        self._shares_noise = draws.noise == "shared" and not context.params.greedy
        self._sharpness = _sharpness(context.params.temperature)
        self._siblings: SiblingDraws | None = draws.siblings
        self._min_score = _log(self.limits.min_path_prob)
        self._floor = _log(context.min_path_prob)
        self._below: dict[int, _Below] = {}
        self._kept: Sequence[int] | None = None

    @property
    def num_drafted(self) -> int:
        return len(self.tokens) - 1

    @property
    def room(self) -> int:
        """Draft tokens that may still be added."""
        return self.limits.num_nodes - self.num_drafted

    def is_read(self, node: int) -> bool:
        return node in self._below

    def may_extend(self, node: int) -> bool:
        """Whether a node is likely enough to be drafted further, and there is room; the root's children are free."""
        return self.room > 0 and self.is_promising(node)

    def is_promising(self, node: int) -> bool:
        """As `may_extend`, for a growth that makes room by keeping the best nodes."""
        return self.depths[node] < self.limits.depth and (node == 0 or self.scores[node] >= self._min_score)

    def is_worth(self, score: float) -> bool:
        """Whether the request wants a node of this score."""
        return -math.inf < score and score >= self._floor

    def path_tokens(self, node: int) -> list[int]:
        """Tokens from below the root down to `node`."""
        tokens = []
        while node > 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    def set_log_weights(self, node: int, log_weights: Row) -> None:
        """Say what the draft model gives after `node`: ``[vocab]`` log q up to a constant."""
        if self.is_sampled:
            log_probs = keys = log_weights - _log_sum_exp(log_weights)
            if self._siblings == "without_replacement":
                keys = log_probs + self._noise(node, Purpose.DRAFT, len(log_probs))
            probs = np.exp(log_probs)
            squares = min(1.0, float(probs @ probs))
            self._below[node] = _Below(log_probs, keys, 0.0, squares=squares, expected=squares)
            return
        keys = log_weights
        if self._shares_noise:
            keys = log_weights + self._noise(node, Purpose.TARGET, len(log_weights))
        self._below[node] = _Below(log_weights, keys, _log_sum_exp(keys * self._sharpness))

    def read_as(self, node: int, other: int) -> None:
        """Take what the draft says after `other` for what it says after `node` too."""
        self.set_log_weights(node, self._below[other].log_probs)

    def candidates(self, node: int, count: int) -> list[int]:
        """The tokens that come next below a read node if they are asked for, at most `count` in all, in order."""
        below = self._below[node]
        if len(below.order) < min(count, len(below.keys)):
            below.order = _largest(below.keys, count)
        return below.order[:count]

    def candidate_keys(self, node: int, count: int) -> Row:
        """``[<= count]`` what `candidates` are ordered by; in sampled trees log q plus noise, -inf where q is 0."""
        return self._below[node].keys[self.candidates(node, count)]

    def candidate_scores(self, node: int, count: int) -> list[float]:
        """What `scores` of the candidates would be; not for sampled trees, which may not know before they draw."""
        assert not self.is_sampled, "a token of a sampled tree looked at before it is drawn"
        below = self._below[node]
        keys = below.keys[self.candidates(node, count)]
        log_confidences = np.minimum(keys * self._sharpness - below.log_total, 0.0)  # never above, by rounding
        return (log_confidences + self.scores[node]).tolist()

    def next_score(self, node: int) -> float:
        """How likely the next child of a read node is reached, before its token is known if it is to be sampled.

        With independent noise that is the estimate of DySpec (arXiv 2410.11744v1, section 4.2): the path's
        probability times what the siblings before have left of q.
        """
        below = self._below[node]
        if self.is_sampled:
            return self.scores[node] + _log(below.rest)
        number = below.num_drawn + 1
        scores = self.candidate_scores(node, max(number, len(below.order)))
        return scores[number - 1] if len(scores) >= number else -math.inf

    def draw(self, node: int, count: int) -> list[int]:
        """Draw up to `count` further children of a read node; the new nodes, in order.

        Fewer where there is no room, where q has no token left, or none that is likely enough for the request.
        """
        below, nodes = self._below[node], []
        for _ in range(min(count, self.room)):
            token = self._next_token(node, below.num_drawn)
            if token is None or not below.log_probs[token] > -math.inf:
                break
            score = self.scores[node] + self._log_confidence(below, token)
            if not self.is_sampled and not self.is_worth(score):
                break
            below.num_drawn += 1
            nodes.append(self._append(node, token, score, self._guess(below, node, score)))
            if self.is_sampled and self._siblings == "without_replacement":
                self._take(below, token)
        return nodes

    def add(self, node: int, token: int, score: float) -> int:
        """Add a chosen child; more than there is room for, if `keep` decides in the end."""
        return self._append(node, token, score, math.exp(score - self.scores[node]))

    def keep(self, nodes: Sequence[int]) -> None:
        """Restrict the tree to `nodes`, ascending and closed under parents; only for trees that are not sampled."""
        assert not self.is_sampled, "a drawn token dropped"
        self._kept = nodes

    def forget(self, node: int) -> None:
        """Free the distribution of a node that will have no further children."""
        nothing = np.empty(0, dtype=np.float32)
        self._below[node] = _Below(nothing, nothing, 0.0)

    def finished(self) -> TokenTree:
        """The tree, with the distributions behind its tokens if they were drawn."""
        kept = range(len(self.tokens)) if self._kept is None else [0, *self._kept]
        new_of = {-1: -1} | {node: new for new, node in enumerate(kept)}
        return TokenTree(
            tuple(self.tokens[node] for node in kept),
            tuple(new_of[self.parents[node]] for node in kept),
            self._distribution() if self.is_sampled and self.num_drafted else None,
            tuple(self.confidences[node] for node in kept),
        )

    def _distribution(self) -> DraftDistribution:
        siblings = self._siblings
        assert siblings is not None, "the distribution of tokens that were chosen"
        root = self._below[0].log_probs
        rows = np.zeros((len(self.tokens), len(root)), dtype=root.dtype)  # those of leaves are never read
        for node, below in self._below.items():
            rows[node] = below.log_probs
        return DraftDistribution(torch.from_numpy(rows), siblings)

    def _append(self, parent: int, token: int, score: float, confidence: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.scores.append(score)
        self.confidences.append(confidence)
        return len(self.tokens) - 1

    def _next_token(self, node: int, number: int) -> int | None:
        """Child `number` of a node, None if there are no more."""
        if self.is_sampled and self._siblings == "with_replacement":
            log_probs = self._below[node].log_probs
            return int((log_probs + self._noise(node, Purpose.DRAFT, len(log_probs), number)).argmax())
        tokens = self.candidates(node, number + 1)
        return tokens[number] if len(tokens) > number else None

    def _log_confidence(self, below: _Below, token: int) -> float:
        if self.is_sampled:
            return float(below.log_probs[token])
        return min(0.0, float(below.keys[token]) * self._sharpness - below.log_total)

    def _guess(self, below: _Below, node: int, score: float) -> float:
        if self.is_sampled:
            return below.expected
        return math.exp(score - self.scores[node])

    def _take(self, below: _Below, token: int) -> None:
        prob = math.exp(float(below.log_probs[token]))
        below.rest = max(0.0, below.rest - prob)
        below.squares = max(0.0, below.squares - prob * prob)
        below.expected = min(below.expected, below.squares / below.rest) if below.rest > 0.0 else 0.0

    def _noise(self, node: int, purpose: Purpose, vocab_size: int, number: int = 0) -> Row:
        """Noise of a node's children.

        The target's depends on the position alone. Draws of the draft's own must be fresh in every step, node and
        trial: the shape of a tree may depend on noise that its accepted path never met.
        """
        length = len(self.context.token_ids)
        trial = 0 if purpose is Purpose.TARGET else length << 32 | node << 16 | number
        return gumbel_noise(self.context.seed, length + self.depths[node], purpose, vocab_size, trial)


def _largest(keys: Row, count: int) -> list[int]:
    """Indices of the `count` largest, falling; of equals the lowest first."""
    if count == 1:
        return [int(keys.argmax())]
    if count >= len(keys):
        return np.argsort(-keys, kind="stable").tolist()
    top = np.sort(np.argpartition(-keys, count)[:count])
    return top[np.argsort(-keys[top], kind="stable")].tolist()


def _sharpness(temperature: float) -> float:
    """Factor on the keys of a request; the draft errs in its logits, before the temperature divides them."""
    if temperature == 0.0:
        return GREEDY_SHARPNESS
    sampled = min(1.0, temperature)
    return temperature * (GREEDY_SHARPNESS * (1.0 - sampled) + SAMPLED_SHARPNESS * sampled)


def _log_sum_exp(keys: Row) -> float:
    largest = float(keys.max())
    if not math.isfinite(largest):  # no token, or logits that are NaN: nothing will be drawn
        return math.nan
    return largest + math.log(float(np.exp(keys - largest).sum()))


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0.0 else -math.inf
