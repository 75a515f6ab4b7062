"""Settings of the drafters that run a second model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outrider.config.checks import Weights, check_int, check_tree_limits, check_weights, require


@dataclass(frozen=True)
class DraftModelConfig:
    """A second, smaller model with the same vocabulary.

    Attributes:
        model: folder or hub id; None is the bundled draft (for the bundled target).
        revision: of a hub id.
        depth: forwards of the draft per step, and the longest path of the tree.
        width: children drawn below each expanded node; 1 is a chain.
        max_expanded: nodes expanded per depth, the most probable paths first.
        min_path_prob: paths that the draft itself finds less probable are not drafted further.
        max_nodes: the most draft tokens in a tree.
        dtype: of the draft's activations and cache; "auto" is the checkpoint's.
        weights, group_size: of the draft's linear layers, as in `EngineConfig`.
    """

    method: Literal["draft_model"] = "draft_model"
    model: str | None = None
    revision: str | None = None
    depth: int = 10
    width: int = 1
    max_expanded: int = 1
    min_path_prob: float = 0.1
    max_nodes: int = 12
    dtype: str = "auto"
    weights: Weights = "auto"
    group_size: int = 64

    def __post_init__(self) -> None:
        check_tree_limits("draft_model", self.depth, self.max_nodes)
        check_int("draft_model.width", self.width, 1, 64)
        check_int("draft_model.max_expanded", self.max_expanded, 1, 64)
        valid = isinstance(self.min_path_prob, int | float) and 0 <= self.min_path_prob < 1
        require(valid, "draft_model.min_path_prob", self.min_path_prob, "a number in [0, 1)")
        check_weights("draft_model.", self.weights, self.group_size)
