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

    method: Literal["draft_model", "self_draft"] = "draft_model"
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


@dataclass(frozen=True)
class SelfDraftConfig(DraftModelConfig):
    """The target itself as its draft, with its linear layers rounded to fewer bits; its vocabulary is the same.

    All settings of a draft model but `model` and `revision`, which are the target's.

    Attributes:
        weights: "int4" or "int8".
    """

    method: Literal["self_draft"] = "self_draft"
    weights: Weights = "int4"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.weights in ("int4", "int8"), "self_draft.weights", self.weights, "int4 or int8")
        own = "nothing: the draft is the target's own checkpoint"
        require(self.model is None, "self_draft.model", self.model, own)
        require(self.revision is None, "self_draft.revision", self.revision, own)
