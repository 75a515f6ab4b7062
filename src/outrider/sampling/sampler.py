"""From log-weights to tokens, with keyed noise: the target's choices and the drafters' draws."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from outrider.sampling.noise import Purpose, gumbel_noise, uniform
from outrider.token_tree import DraftNoise, SiblingDraws, TokenTreeBatch


class KeyedDecisions:
    """The engine's `Decisions`, each determined by the request's seed and the position of the token.

    Args:
        trees: the proposals of the step.
        seeds: ``[num_trees]``.
        positions: ``[num_trees]`` position in its sequence of each root's successor.
        greedy: ``[num_trees]`` whether the request takes the most probable token.
    """

    def __init__(
        self, trees: TokenTreeBatch, seeds: Sequence[int], positions: Sequence[int], greedy: Sequence[bool]
    ) -> None:
        self._trees = trees
        self._seeds = seeds
        self._positions = positions
        self._greedy = greedy
        self._all_greedy = all(greedy)

    def greedy(self, node: int) -> bool:
        """Whether batch-flat `node` belongs to a greedy request."""
        return self._all_greedy or self._greedy[self._tree_of(node)]

    def sample(self, log_weights: Tensor, nodes: Sequence[int], purpose: Purpose) -> list[int]:
        """One token per row of ``[num_rows, vocab]``: Gumbel-max, or argmax if greedy (ties: lowest id)."""
        if log_weights.dtype not in (torch.float32, torch.float64):
            log_weights = log_weights.float()
        if self._all_greedy or not nodes:
            return _argmax(log_weights)
        noise = np.zeros((len(nodes), log_weights.shape[1]), dtype=np.float32)
        for row, node in enumerate(nodes):
            tree = self._tree_of(node)
            if not self._greedy[tree]:
                position = self._node_positions[node]
                noise[row] = gumbel_noise(self._seeds[tree], position, purpose, noise.shape[1])
        return _argmax(log_weights + torch.from_numpy(noise).to(log_weights.device))

    def accept(self, probability: float, node: int, trial: int) -> bool:
        """True with `probability`; surely so at 1, never at 0."""
        seed = self._seeds[self._tree_of(node)]
        return uniform(seed, self._node_positions[node], Purpose.ACCEPT, trial) < probability

    def _tree_of(self, node: int) -> int:
        return bisect_right(self._trees.cu_nodes, node) - 1

    @cached_property
    def _node_positions(self) -> list[int]:
        """Position of each batch-flat node's successor, which names its noise whatever the tree's shape."""
        return [
            position + depth
            for tree, position in zip(self._trees.trees, self._positions, strict=True)
            for depth in tree.depths
        ]


def check_finite(logits: Tensor) -> Tensor:
    """Which rows of ``[num_rows, vocab]`` a token may be chosen from, ``[num_rows]`` bool.

    False for a row with NaN or +inf, or with no token that is not -inf: its maximum shows all three.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:  # torch would wake its threads for this
        return torch.from_numpy(np.isfinite(logits.numpy().max(axis=-1)))
    return logits.amax(-1).isfinite()


def draw_children(
    log_probs: Tensor,
    *,
    seed: int,
    position: int,
    num_children: int,
    noise: DraftNoise,
    draws: SiblingDraws,
    greedy: bool,
) -> tuple[list[int], list[float]]:
    """Draw the children of one node from the drafter's distribution q.

    Without replacement this is Gumbel-top-k (Kool et al., arXiv 1903.06059): successive draws, each from q
    without the tokens before. Nodes of one depth share their noise, which is harmless, since only one of them
    lies on the accepted path. A greedy request's children are the most probable tokens.

    Args:
        log_probs: ``[vocab]`` log q, up to a constant.
        position: in the sequence, of the children.
        noise: "shared" draws with the target's own noise, "independent" with noise that nothing else uses.

    Returns:
        Tokens in the order drawn, and their log q. Fewer than `num_children` where q has fewer tokens (none
        if it is NaN); with replacement tokens may repeat, and each copy is to become a node of its own.
    """
    log_probs = log_probs.float()
    vocab_size = log_probs.shape[-1]
    purpose = Purpose.TARGET if noise == "shared" else Purpose.DRAFT

    def perturbed(trial: int) -> Tensor:
        row = gumbel_noise(seed, position, purpose, vocab_size, trial)
        return log_probs + torch.tensor(row, device=log_probs.device)

    if greedy:
        tokens = _top(log_probs, num_children)
    elif draws == "without_replacement":
        tokens = _top(perturbed(0), num_children)
    else:
        tokens = [_argmax(perturbed(trial)[None])[0] for trial in range(num_children)]
    scores = log_probs.log_softmax(-1)[tokens].tolist()
    drawn = [(token, score) for token, score in zip(tokens, scores, strict=True) if score > -math.inf]
    return [token for token, _ in drawn], [score for _, score in drawn]


def _top(row: Tensor, count: int) -> list[int]:
    return _argmax(row[None]) if count == 1 else row.topk(min(count, row.shape[0])).indices.tolist()


def _argmax(rows: Tensor) -> list[int]:
    """Argmax of each row, the lowest id of equals."""
    if rows.device.type == "cpu":  # NumPy's is ten times faster here than torch's, and takes the first too
        return rows.numpy().argmax(axis=-1).tolist()
    return rows.argmax(-1).tolist()
