"""Settings of the drafters that look continuations up instead of computing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from outrider.config.checks import check_int, check_tree_limits, require

RecyclingShape = Literal["best_first", "sequoia"]


@dataclass(frozen=True)
class NgramConfig:
    """Prompt lookup: copy what followed the longest matching suffix before.

    Attributes:
        max_ngram, min_ngram: lengths of suffix to look for, the longest first.
        num_candidates: how many earlier occurrences become branches of the tree.
        depth: tokens copied from each occurrence.
        max_nodes: the most draft tokens in a tree.
    """

    method: Literal["ngram"] = "ngram"
    max_ngram: int = 4
    min_ngram: int = 1
    num_candidates: int = 3
    depth: int = 8
    max_nodes: int = 12

    def __post_init__(self) -> None:
        check_int("ngram.max_ngram", self.max_ngram, 1, 64)
        check_int("ngram.min_ngram", self.min_ngram, 1, self.max_ngram)
        check_tree_limits("ngram", self.depth, self.max_nodes)
        check_int("ngram.num_candidates", self.num_candidates, 1, 64)


@dataclass(frozen=True)
class RecyclingConfig:
    """Token Recycling: a tree of the candidates that followed each token when it was last verified.

    Attributes:
        num_candidates: candidates kept per token (columns of the adjacency matrix).
        depth: longest path of the tree.
        max_nodes: draft tokens in a tree.
        shape: of the tree: "best_first" (acceptance by rank) or "sequoia" (by rank and depth, which makes it deeper).
    """

    method: Literal["recycling"] = "recycling"
    num_candidates: int = 8
    depth: int = 5
    max_nodes: int = 16
    shape: RecyclingShape = "best_first"

    def __post_init__(self) -> None:
        check_tree_limits("recycling", self.depth, self.max_nodes)
        check_int("recycling.num_candidates", self.num_candidates, 1, 8)
        shapes = get_args(RecyclingShape)
        require(self.shape in shapes, "recycling.shape", self.shape, f"one of {', '.join(shapes)}")
