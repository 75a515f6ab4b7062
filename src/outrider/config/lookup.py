"""Settings of the drafters that look continuations up instead of computing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

from outrider.config.checks import check_int, check_number, check_path, check_tree_limits, require

RecyclingShape = Literal["grown", "best_first", "sequoia"]
MAX_REFERENCE_TOKENS = 1 << 20  # of all references of a drafter together; an index takes some 200 bytes each


class ReferenceConfig(Protocol):
    """Settings of a drafter that takes texts to copy from or to learn from.

    Attributes:
        references: texts or token ids.
        reference_files: UTF-8 text files.
        max_reference_tokens: the most tokens of all of them together; more are an error.
    """

    @property
    def method(self) -> str: ...
    @property
    def references(self) -> Sequence[str | Sequence[int]]: ...
    @property
    def reference_files(self) -> Sequence[str]: ...
    @property
    def max_reference_tokens(self) -> int: ...


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
    num_candidates: int = 8
    depth: int = 16
    max_nodes: int = 12

    def __post_init__(self) -> None:
        check_int("ngram.max_ngram", self.max_ngram, 1, 64)
        check_int("ngram.min_ngram", self.min_ngram, 1, self.max_ngram)
        check_tree_limits("ngram", self.depth, self.max_nodes)
        check_int("ngram.num_candidates", self.num_candidates, 1, 64)


@dataclass(frozen=True)
class AnpdConfig:
    """Adaptive n-grams: every draft token predicted by the longest n-gram that the request has shown so far.

    Attributes:
        levels: how many tokens predictions are made from, the longest first.
        num_candidates: the most children of a node.
        depth: the longest path.
        max_nodes: the most draft tokens in a tree.
    """

    method: Literal["anpd"] = "anpd"
    levels: Sequence[int] = (16, 8, 4, 3, 2, 1)
    num_candidates: int = 4
    depth: int = 16
    max_nodes: int = 12

    def __post_init__(self) -> None:
        check_lengths("anpd.levels", self.levels)
        check_tree_limits("anpd", self.depth, self.max_nodes)
        check_int("anpd.num_candidates", self.num_candidates, 1, 64)


@dataclass(frozen=True)
class AdedConfig:
    """Tri-gram statistics over all requests, searched with a bonus for what was visited little.

    Attributes:
        exploration: weight of the bonus; 0 takes the likeliest nodes.
        rate: share of the way that a probability moves at each update; the greater, the more the latest counts.
        num_candidates: the most tokens kept of what follows a pair.
        capacity: the most rows (pairs and single tokens) kept.
        references, reference_files, max_reference_tokens: a corpus that the statistics begin with; see
            `ReferenceConfig`.
        depth: the longest path.
        max_nodes: the most draft tokens in a tree.
    """

    method: Literal["aded"] = "aded"
    exploration: float = 0.1
    rate: float = 0.5
    num_candidates: int = 8
    capacity: int = 1 << 17
    references: Sequence[str | Sequence[int]] = ()
    reference_files: Sequence[str] = ()
    max_reference_tokens: int = MAX_REFERENCE_TOKENS
    depth: int = 16
    max_nodes: int = 12

    def __post_init__(self) -> None:
        check_tree_limits("aded", self.depth, self.max_nodes)
        valid = isinstance(self.exploration, int | float) and 0 <= self.exploration <= 100
        require(valid, "aded.exploration", self.exploration, "a number in [0, 100]")
        valid = isinstance(self.rate, int | float) and 0 < self.rate < 1
        require(valid, "aded.rate", self.rate, "a number in (0, 1)")
        check_int("aded.num_candidates", self.num_candidates, 1, 64)
        check_int("aded.capacity", self.capacity, 2, 1 << 24)
        check_references(self)


@dataclass(frozen=True)
class CopyConfig:
    """Copying what follows the last tokens in given references, or in the request's own history.

    Attributes:
        gammas: how many last tokens are looked for, the longest first.
        history: also copy from the request's own tokens.
        num_candidates: the most places copied from.
        references, reference_files, max_reference_tokens: see `ReferenceConfig`.
        depth: tokens copied from each place.
        max_nodes: the most draft tokens in a tree.
    """

    method: Literal["copy"] = "copy"
    gammas: Sequence[int] = (8, 3, 2, 1)
    history: bool = True
    num_candidates: int = 8
    references: Sequence[str | Sequence[int]] = ()
    reference_files: Sequence[str] = ()
    max_reference_tokens: int = MAX_REFERENCE_TOKENS
    depth: int = 16
    max_nodes: int = 12

    def __post_init__(self) -> None:
        check_lengths("copy.gammas", self.gammas)
        check_tree_limits("copy", self.depth, self.max_nodes)
        check_int("copy.num_candidates", self.num_candidates, 1, 64)
        require(isinstance(self.history, bool), "copy.history", self.history, "true or false")
        check_references(self)


@dataclass(frozen=True)
class EditConfig:
    """Copying the input of an edit from where the output is aligned with it.

    Attributes:
        references, reference_files, max_reference_tokens: the input, see `ReferenceConfig`; without any it is the
            prompt.
        lookup: also propose what prompt lookup finds, which knows the output too.
        depth: tokens copied.
        max_nodes: the most draft tokens in a tree.
    """

    method: Literal["edit"] = "edit"
    references: Sequence[str | Sequence[int]] = ()
    reference_files: Sequence[str] = ()
    max_reference_tokens: int = MAX_REFERENCE_TOKENS
    lookup: bool = True
    depth: int = 32
    max_nodes: int = 16

    def __post_init__(self) -> None:
        check_tree_limits("edit", self.depth, self.max_nodes)
        require(isinstance(self.lookup, bool), "edit.lookup", self.lookup, "true or false")
        check_references(self)


@dataclass(frozen=True)
class HistoryConfig:
    """What was generated before, in any request, proposed again.

    Attributes:
        lengths: how many last tokens are looked for, the longest first.
        capacity: the most tokens kept; the older half is forgotten when they are reached.
        segment: output tokens of a running request that are stored together; the rest when it ends.
        num_candidates: the most places copied from.
        depth: tokens copied from each place.
        max_nodes: the most draft tokens in a tree.
    """

    method: Literal["history"] = "history"
    lengths: Sequence[int] = (6, 3, 2, 1)
    capacity: int = 1 << 17
    segment: int = 64
    num_candidates: int = 8
    depth: int = 16
    max_nodes: int = 12

    def __post_init__(self) -> None:
        check_lengths("history.lengths", self.lengths)
        check_int("history.capacity", self.capacity, 64, 1 << 24)
        check_int("history.segment", self.segment, 1, 4096)
        check_tree_limits("history", self.depth, self.max_nodes)
        check_int("history.num_candidates", self.num_candidates, 1, 64)


def check_lengths(name: str, lengths: object) -> None:
    valid = (
        isinstance(lengths, Sequence)
        and not isinstance(lengths, str)
        and 1 <= len(lengths) <= 16
        and all(isinstance(length, int) and 1 <= length <= 256 for length in lengths)
        and all(longer > shorter for longer, shorter in pairwise(lengths))
    )
    require(valid, name, lengths, "1 to 16 falling integers in [1, 256]")


def check_references(config: ReferenceConfig) -> None:
    name = config.method
    check_int(f"{name}.max_reference_tokens", config.max_reference_tokens, 1, 1 << 26)
    references, files = config.references, config.reference_files
    valid = isinstance(references, Sequence) and not isinstance(references, str)
    require(valid, f"{name}.references", repr(references)[:60], "a list of texts or of lists of token ids")
    for reference in references:
        valid = isinstance(reference, str) or (
            isinstance(reference, Sequence) and all(isinstance(token, int) and token >= 0 for token in reference)
        )
        require(valid, f"{name}.references", repr(reference)[:60], "a text or a list of token ids")
    valid = isinstance(files, Sequence) and not isinstance(files, str) and all(isinstance(f, str) for f in files)
    require(valid, f"{name}.reference_files", repr(files)[:60], "a list of paths")
    num_tokens = sum(len(reference) for reference in references if not isinstance(reference, str))
    require(
        num_tokens <= config.max_reference_tokens,
        f"{name} references",
        f"{num_tokens} tokens",
        f"at most max_reference_tokens={config.max_reference_tokens}",
    )


@dataclass(frozen=True)
class RecyclingConfig:
    """Token Recycling: a tree of what the target found likely after the same tokens when it last verified them.

    Attributes:
        num_candidates: children of a node; of sampled requests four times as many are kept, to be ranked by noise.
        max_context: the longest context that candidates are kept for, in tokens (1, 2, 3, 4, 8, 16, 32 and 64 up to
            it); static shapes take the last token alone.
        capacity: the most contexts of more than one token in a table, 120 to 270 bytes each (200 to 900 without
            compiled code); of more the older half is forgotten. Each request has a table, and all share one.
        depth: longest path of the tree.
        max_nodes: draft tokens in a tree.
        shape: of the tree: "grown" best-first by measured acceptance, over contexts of several lengths; or the
            paper's form, a static tree from an adjacency matrix of tokens: "best_first" (acceptance by rank) or
            "sequoia" (by rank and depth, which makes it deeper).
    """

    method: Literal["recycling"] = "recycling"
    num_candidates: int = 8
    max_context: int = 16
    capacity: int = 1 << 17
    depth: int = 16
    max_nodes: int = 16
    shape: RecyclingShape = "grown"

    def __post_init__(self) -> None:
        check_tree_limits("recycling", self.depth, self.max_nodes)
        check_int("recycling.num_candidates", self.num_candidates, 1, 8)
        check_int("recycling.max_context", self.max_context, 1, 64)
        check_int("recycling.capacity", self.capacity, 64, 1 << 24)
        shapes = get_args(RecyclingShape)
        require(self.shape in shapes, "recycling.shape", self.shape, f"one of {', '.join(shapes)}")


@dataclass(frozen=True)
class SuffixConfig:
    """SuffixDecoding: what most often followed the longest match in the request or in past outputs.

    Attributes:
        max_match: longest substring that the suffix trees tell apart: a match and what follows it.
        max_spec_factor: the most draft tokens for each token that matches (alpha of MAX_SPEC).
        num_matches: how many lengths of match are tried in each of the two trees.
        depth: longest path of the tree.
        max_nodes: the most draft tokens in a tree.
        request_tokens: of a longer request only this many of the newest tokens are searched; 110 to 195 bytes each
            (150 to 235 without compiled code).
        history_tokens: the most tokens of past outputs that are kept, as many bytes each; 0 keeps none.
        history_file: where past outputs are kept between runs; None forgets them.
    """

    method: Literal["suffix"] = "suffix"
    max_match: int = 64
    max_spec_factor: float = 16.0
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
