"""Trees that change with what the last step left (parallel prompt decoding, PPD, arXiv 2405.18628).

In PPD *prompt tokens* behind a draft token make the same forward guess the positions after it: k of them give the
next step candidates down to depth k. They are rows like any other, so a step divides its rows between candidates,
which may be accepted now, and prompt tokens, which feed the next step. What is dynamic is the *state*: the number of
prompt tokens behind the last accepted token, which limits the depth of the next tree. Each state has a tree of its
own, and the trees are judged by their mean over the states' steady probabilities; how many rows pay is up to the
machine.

The paper takes prompt tokens away one by one where the next step's expectation loses least. Here that expectation is
the relative value of the states in the long run, found by value iteration, and the root may have prompt tokens too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outrider.drafting.sequoia import LatencyTable, OptimalTrees, best_lengths
from outrider.drafting.tree_shape import TreeShape, acceptance_rows, best_first_shape, node_probs

Floats = NDArray[np.float64]
MAX_ITERATIONS = 200
TOLERANCE = 1e-6  # tokens


@dataclass(frozen=True)
class PromptedTree:
    """Candidates, and the prompt tokens behind each.

    Attributes:
        prompt_tokens: ``[1 + num_nodes]``, the root's first.
    """

    shape: TreeShape
    prompt_tokens: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return len(self.prompt_tokens) + sum(self.prompt_tokens)


@dataclass(frozen=True)
class DynamicTrees:
    """A tree for each state.

    Attributes:
        trees: ``[1 + max_depth]`` by the number of prompt tokens behind the last accepted token.
        tokens_per_step: expected over the states' steady probabilities, the token after the accepted ones included.
    """

    trees: tuple[PromptedTree, ...]
    tokens_per_step: float


class DynamicTreePlanner:
    """Finds dynamic trees for given numbers of rows.

    Args:
        acceptance: ``[depth][rank]`` probability that a candidate is the target's choice once its parent is on the
            path; the number of depths is the most prompt tokens behind one token.
        max_rows: the most that will be asked for.

    Raises:
        ConfigError: see `acceptance_rows`.
    """

    def __init__(self, acceptance: Sequence[Sequence[float]], max_rows: int) -> None:
        self._rows = acceptance_rows(acceptance, len(acceptance))
        self._shapes: list[list[TreeShape]] = []  # [state][number of candidates]
        self._ends: list[list[Floats]] = []  # probability that each node, the root first, is the last accepted
        self._lengths: list[list[float]] = []  # expected accepted candidates
        for state in range(len(self._rows) + 1):
            trees = OptimalTrees(max_rows - 1, state, self._rows)
            shapes = [trees.shape(size) for size in range(max_rows if state else 1)]
            probs = [node_probs(shape, self._rows) for shape in shapes]
            self._shapes.append(shapes)
            self._ends.append([_end_probs(shape, p) for shape, p in zip(shapes, probs, strict=True)])
            self._lengths.append([sum(p) - 1.0 for p in probs])

    def plan(self, max_rows: int) -> DynamicTrees:
        """Trees of at most `max_rows` rows each, the root's included, by relative value iteration."""
        # To begin with a state is worth what its largest tree yields at once.
        values = np.array([lengths[:max_rows][-1] for lengths in self._lengths])
        found: list[tuple[float, PromptedTree]] = []
        for _ in range(MAX_ITERATIONS):
            found = [self._best_tree(state, max_rows, values) for state in range(len(values))]
            worth = np.array([worth for worth, _ in found])
            # Half a step at a time: states may follow each other in turns, and the iteration must not.
            refined = (values + worth - worth[0]) / 2
            change, values = np.abs(refined - values).max(), refined
            if change < TOLERANCE:
                break
        trees = tuple(tree for _, tree in found)
        return DynamicTrees(trees, mean_tokens(trees, self._rows))

    def plan_for(self, target: LatencyTable, *, max_rows: int) -> DynamicTrees:
        """The number of rows with the most tokens per time on a machine.

        Args:
            max_rows: no more than the table was measured for are considered.
        """
        plans = [(rows, self.plan(rows)) for rows in range(1, min(max_rows, target.max_rows) + 1)]
        return max(plans, key=lambda plan: plan[1].tokens_per_step / target.ms_of(plan[0]))[1]

    def _best_tree(self, state: int, max_rows: int, values: Floats) -> tuple[float, PromptedTree]:
        """The division of rows with the most tokens now and the greatest value of the state after them, and both."""
        # A prompt token counts for no more than the one before it, without which it is not there.
        gains = np.maximum(np.minimum.accumulate(np.diff(values)), 0.0)
        best_worth, best_size, best_counts = -np.inf, 0, np.zeros(1, dtype=np.int64)
        for size in range(min(max_rows, len(self._shapes[state]))):
            ends = self._ends[state][size]
            by_token = np.outer(ends, gains).ravel()
            spent = np.argsort(-by_token, kind="stable")[: max_rows - len(ends)]
            spent = spent[by_token[spent] > 0.0]
            counts = np.bincount(spent // len(gains), minlength=len(ends))
            worth = 1.0 + self._lengths[state][size] + float(ends @ values[counts])
            if worth > best_worth + 1e-12:  # of equals the fewest candidates
                best_worth, best_size, best_counts = worth, size, counts
        return best_worth, PromptedTree(self._shapes[state][best_size], tuple(best_counts.tolist()))


def candidate_tree(
    state: int, acceptance: Sequence[Sequence[float]], target: LatencyTable | None, *, max_nodes: int
) -> PromptedTree:
    """The tree for a state of a drafter that makes its guesses itself, without prompt tokens.

    The next state is no matter of this step's rows then, so that a state's tree is the one with the most tokens per
    time by itself.

    Args:
        state: how many depths there are guesses for.
        target: None takes a tree of `max_nodes`.

    Raises:
        ConfigError: see `acceptance_rows`.
    """
    size = max_nodes
    if target is not None:
        largest = min(max_nodes, target.max_rows - 1)
        step_ms = np.array([target.ms_of(1 + size) for size in range(1 + largest)])
        size = int(np.argmax((1.0 + best_lengths(largest, state, acceptance)[-1]) / step_ms))
    shape = best_first_shape(size, state, acceptance)
    return PromptedTree(shape, (0,) * (1 + len(shape.parents)))


def mean_tokens(trees: Sequence[PromptedTree], acceptance: Sequence[Sequence[float]]) -> float:
    """Expected tokens per step in the long run, from state 0: mean over the steady probabilities of the states.

    Solves ``p = p P`` with P the transitions of the states, which follow from where paths end.
    """
    num_states = len(trees)
    transitions, tokens = np.zeros((num_states, num_states)), np.zeros(num_states)
    for state, tree in enumerate(trees):
        probs = node_probs(tree.shape, acceptance)
        tokens[state] = sum(probs)  # the root's 1 stands for the token after the accepted ones
        np.add.at(transitions[state], list(tree.prompt_tokens), _end_probs(tree.shape, probs))
    # Half a step at a time has the same steady probabilities and no cycles; its power is their limit from each state.
    lazy = (np.eye(num_states) + transitions) / 2
    return float(np.linalg.matrix_power(lazy, 2**16)[0] @ tokens)


def _end_probs(shape: TreeShape, probs: Sequence[float]) -> Floats:
    """Probability that each node, the root first, is the last one accepted: on the path, and none of its children."""
    ends = np.asarray(probs, dtype=np.float64).copy()
    for node, parent in enumerate(shape.parents, 1):
        ends[parent] -= probs[node]
    return np.maximum(ends, 0.0)
