"""From log-weights to tokens, with keyed noise: the target's choices."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from outrider.sampling.noise import Purpose, gumbel_noise, uniform
from outrider.token_tree import TokenTreeBatch


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


def _argmax(rows: Tensor) -> list[int]:
    """Argmax of each row, the lowest id of equals."""
    if rows.device.type == "cpu":  # NumPy's is ten times faster here than torch's, and takes the first too
        return rows.numpy().argmax(axis=-1).tolist()
    return rows.argmax(-1).tolist()
