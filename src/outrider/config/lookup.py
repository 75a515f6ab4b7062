"""Settings of the drafters that look continuations up instead of computing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outrider.config.checks import check_int, check_number, check_path, check_tree_limits


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
    """

    method: Literal["recycling"] = "recycling"
    num_candidates: int = 8
    depth: int = 5
    max_nodes: int = 16

    def __post_init__(self) -> None:
        check_tree_limits("recycling", self.depth, self.max_nodes)
        check_int("recycling.num_candidates", self.num_candidates, 1, 8)


@dataclass(frozen=True)
class SuffixConfig:
    """SuffixDecoding: what most often followed the longest match in the request or in past outputs.

    Attributes:
        max_match: longest substring that the suffix trees tell apart: a match and what follows it.
        max_spec_factor: the most draft tokens for each token that matches (alpha of MAX_SPEC).
        num_matches: how many lengths of match are tried in each of the two trees.
        depth: longest path of the tree.
        max_nodes: the most draft tokens in a tree.
        request_tokens: of a longer request only this many of the newest tokens are searched; about 230 bytes each.
        history_tokens: the most tokens of past outputs that are kept, about 230 bytes each; 0 keeps none.
        history_file: where past outputs are kept between runs; None forgets them.
    """

    method: Literal["suffix"] = "suffix"
    max_match: int = 64
    max_spec_factor: float = 8.0
    num_matches: int = 3
    depth: int = 16
    max_nodes: int = 16
    request_tokens: int = 65536
    history_tokens: int = 131072
    history_file: str | None = None

    def __post_init__(self) -> None:
        check_tree_limits("suffix", self.depth, self.max_nodes)
        check_int("suffix.max_match", self.max_match, self.depth + 1, 1024)
        check_number("suffix.max_spec_factor", self.max_spec_factor, 1.0, 1024.0)
        check_int("suffix.num_matches", self.num_matches, 1, 64)
        check_int("suffix.request_tokens", self.request_tokens, 2 * self.max_match, 2**24)
        check_int("suffix.history_tokens", self.history_tokens, 0, 2**28)
        check_path("suffix.history_file", self.history_file)


@dataclass(frozen=True)
class DatastoreConfig:
    """REST: what followed the longest suffix of the context in a corpus on disk.

    Attributes:
        path: of what `outrider datastore build` wrote; without one no such drafter can be built.
        max_match: longest suffix to look for.
        num_lengths: lengths of suffix to look at: the longest that occurs, then shorter ones with more matches.
        num_samples: matches looked at for each length; of more, some at equal distances in the order of what follows.
        depth: longest path of the tree.
        max_nodes: the most draft tokens in a tree.
    """

    method: Literal["datastore"] = "datastore"
    path: str | None = None
    max_match: int = 16
    num_lengths: int = 2
    num_samples: int = 32
    depth: int = 10
    max_nodes: int = 16

    def __post_init__(self) -> None:
        check_path("datastore.path", self.path)
        check_int("datastore.max_match", self.max_match, 1, 32)
        check_int("datastore.num_lengths", self.num_lengths, 1, 32)
        check_int("datastore.num_samples", self.num_samples, 1, 4096)
        check_tree_limits("datastore", self.depth, self.max_nodes)
