"""Settings of the drafters that run a second model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from outrider.config.checks import Weights, check_int, check_tree_limits, check_weights, require
from outrider.errors import ConfigError

GrowthName = Literal[
    "beam",
    "mcsd",
    "mcsd_improved",
    "rsd_c",
    "rsd_s",
    "cape",
    "dyspec",
    "dyspec_threshold",
    "specexec",
    "opt_tree",
    "static",
    "ppd",
]


DEFAULT_RANK_PROBS = (0.6, 0.12, 0.05, 0.03)


@dataclass(frozen=True)
class DraftModelConfig:
    """A second, smaller model with the same vocabulary.

    Attributes:
        model: folder or hub id; None is the bundled draft (for the bundled target).
        revision: of a hub id.
        growth: how the tree grows; the settings after `max_nodes` that it reads stand behind it. Under a rule that
            verifies chains alone every growth is a chain.
            "beam": the `max_expanded` most probable paths of each depth get `width` children; a chain at `width` 1;
            "mcsd": every node of a depth gets as many children, drawn as the rule asks (`branching`);
            "mcsd_improved": `width` chains, each as long as the draft is confident;
            "rsd_c": as "mcsd", siblings always distinct (`branching`);
            "rsd_s": stochastic beam search (`width` paths per depth);
            "cape": a chain, and more candidates where the draft is not sure;
            "dyspec": the place most likely to be reached is next (`max_expanded` nodes read per forward);
            "dyspec_threshold": all places likelier than `min_path_prob`, depth by depth;
            "specexec": the most probable paths, `max_expanded` nodes read per forward;
            "opt_tree": the same, a layer per forward, until a layer is worth less than `min_gain`;
            "static": the shape of `rank_paths`, or the best one for `rank_probs`, by Sequoia's dynamic programme;
            "ppd": a chain as long as the draft is confident, and its guesses of each depth in the tree that is best
            for so many, by `rank_probs` and as large as pays on this machine.
        depth: the longest path of the tree.
        width: children drawn below an expanded node, or paths side by side; 1 is a chain.
        max_expanded: nodes expanded per depth or forward, the most probable paths first.
        min_path_prob: paths that the draft itself finds less probable are not drafted further.
        max_nodes: the most draft tokens in a tree; no more than fit into `scheduler.max_batch_tokens` and the caches.
        branching: children of each node of depth 0, 1, ...
        min_gain: least gain in expected accepted tokens for which a further layer is read.
        rank_probs: how likely the child of each rank is accepted once its parent is: ``[rank]``, or
            ``[depth][rank]``, which ends the tree at the last depth. "measured" counts it while decoding, plans anew
            every so often, and makes trees no larger nor deeper than pays on this machine.
        draft_cost: time of a forward of the draft, in forwards of the target, for "static" with "measured"; it is
            measured, once, unless it is given.
        rank_paths: the nodes of a published table, each by the ranks that lead to it: ``[[0], [1], [0, 0]]``. It must
            fit into `max_nodes` and `depth`.
        dtype: of the draft's activations and cache; "auto" is the checkpoint's.
        weights, group_size: of the draft's linear layers, as in `EngineConfig`.
    """

    method: Literal["draft_model", "self_draft", "universal_draft", "staged", "sorted_draft"] = "draft_model"
    model: str | None = None
    revision: str | None = None
    growth: GrowthName = "beam"
    depth: int = 10
    width: int = 1
    max_expanded: int = 1
    min_path_prob: float = 0.1
    max_nodes: int = 12
    branching: Sequence[int] = (3, 1, 1, 1)
    min_gain: float = 0.1
    rank_probs: Sequence[float] | Sequence[Sequence[float]] | Literal["measured"] = DEFAULT_RANK_PROBS
    draft_cost: float | Literal["measured"] = "measured"
    rank_paths: Sequence[Sequence[int]] | None = None
    dtype: str = "auto"
    weights: Weights = "auto"
    group_size: int = 64

    def __post_init__(self) -> None:
        names = get_args(GrowthName)
        require(self.growth in names, "draft_model.growth", self.growth, f"one of {', '.join(names)}")
        check_tree_limits("draft_model", self.depth, self.max_nodes)
        check_int("draft_model.width", self.width, 1, 64)
        check_int("draft_model.max_expanded", self.max_expanded, 1, 64)
        _check_fraction("min_path_prob", self.min_path_prob)
        if self.growth == "dyspec_threshold":
            require(self.min_path_prob > 0, "draft_model.min_path_prob", self.min_path_prob, "above 0: the threshold")
        _check_list("branching", self.branching, 128)
        for factor in self.branching:
            check_int("draft_model.branching", factor, 1, 64)
        valid = isinstance(self.min_gain, int | float) and 0 <= self.min_gain < 128
        require(valid, "draft_model.min_gain", self.min_gain, "a number in [0, 128)")
        self._check_rank_probs()
        if self.draft_cost != "measured":
            valid = isinstance(self.draft_cost, int | float) and 0 <= self.draft_cost <= 100
            require(valid, "draft_model.draft_cost", self.draft_cost, "a number in [0, 100], or 'measured'")
        if self.rank_paths is not None:
            self._check_rank_paths(self.rank_paths)
        check_weights("draft_model.", self.weights, self.group_size)

    @property
    def plans_shapes(self) -> bool:
        """Whether shapes are planned while decoding, for what the target's forwards cost."""
        return self.growth == "ppd" or (self.growth == "static" and self.rank_probs == "measured")

    @property
    def plans_by_draft_cost(self) -> bool:
        """Whether that depends on what the draft's forwards cost, and they are to be timed."""
        return self.growth == "static" and self.rank_probs == "measured" and self.draft_cost == "measured"

    def _check_rank_probs(self) -> None:
        name, rank_probs = "draft_model.rank_probs", self.rank_probs
        if self.growth == "static" and rank_probs == "measured":
            for setting, value, most in (("max_nodes", self.max_nodes, 128), ("depth", self.depth, 32)):
                expected = f"at most {most} with rank_probs 'measured'"
                require(value <= most, f"draft_model.{setting}", value, expected)
        if rank_probs == "measured":
            return
        valid = isinstance(rank_probs, list | tuple) and 1 <= len(rank_probs) <= 64
        require(valid, name, rank_probs, "a list of 1 to 64 numbers, or 'measured'")
        by_depth = [list(row) for row in rank_probs if isinstance(row, list | tuple)]
        require(len(by_depth) in (0, len(rank_probs)), name, rank_probs, "numbers, or lists of them")
        rows: list[list[Any]] = by_depth or [list(rank_probs)]
        for row in rows:
            _check_list("rank_probs", row, 64)
            for probability in row:
                _check_fraction("rank_probs", probability)
            require(row == sorted(row, reverse=True), name, rank_probs, "falling probabilities")

    def _check_rank_paths(self, rank_paths: Sequence[Sequence[int]]) -> None:
        name = "draft_model.rank_paths"
        if self.growth != "static" or self.rank_probs != DEFAULT_RANK_PROBS:
            got = f"growth={self.growth!r}, rank_probs={self.rank_probs!r} beside it"
            raise ConfigError(
                name, got=got, expected="growth 'static' and no rank_probs", remedy="leave one of them out"
            )
        require(isinstance(rank_paths, list | tuple) and len(rank_paths) > 0, name, rank_paths, "a list of paths")
        chosen: set[tuple[int, ...]] = set()
        for path in rank_paths:
            valid = isinstance(path, list | tuple) and len(path) > 0
            require(valid, name, path, "a list of ranks from 0, at least one")
            for rank in path:
                check_int(name, rank, 0, 63)
            require(tuple(path) not in chosen, name, list(path), "every node once")
            chosen.add(tuple(path))
        for *above, rank in chosen:  # a draft's siblings come in the order of their ranks, from the first on
            for needed, what in ((above, "parent"), ([*above, rank - 1], "sibling before it")):
                if needed and needed[-1] >= 0 and tuple(needed) not in chosen:
                    raise ConfigError(name, got=f"node {[*above, rank]}", expected=f"its {what} {needed} too")
        for setting, limit, size in (
            ("max_nodes", self.max_nodes, len(chosen)),
            ("depth", self.depth, max(map(len, chosen))),
        ):
            if size > limit:
                expected, remedy = f"at least the {size} of rank_paths", f"set {setting} to {size}"
                raise ConfigError(f"draft_model.{setting}", got=limit, expected=expected, remedy=remedy)


def _check_fraction(name: str, value: object) -> None:
    valid = isinstance(value, int | float) and 0 <= value < 1
    require(valid, f"draft_model.{name}", value, "a number in [0, 1)")


def _check_list(name: str, values: object, most: int) -> None:
    valid = isinstance(values, list | tuple) and 1 <= len(values) <= most
    require(valid, f"draft_model.{name}", values, f"a list of 1 to {most} numbers")


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


Alignment = Literal["auto", "vocabulary", "text"]


@dataclass(frozen=True)
class UniversalDraftConfig(DraftModelConfig):
    """A draft model with any tokenizer; all settings of a draft model.

    Attributes:
        alignment: "vocabulary" drafts with the tokens that both models have, "text" reads the draft's text with the
            target's tokenizer; "auto" is "vocabulary" if both share enough tokens.
        min_overlap: which part of the target's tokens "auto" asks to be shared.
    """

    method: Literal["universal_draft"] = "universal_draft"
    alignment: Alignment = "auto"
    min_overlap: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        known = get_args(Alignment)
        require(self.alignment in known, "universal_draft.alignment", self.alignment, f"one of {', '.join(known)}")
        require_fraction("universal_draft.min_overlap", self.min_overlap)


@dataclass(frozen=True)
class StagedConfig(DraftModelConfig):
    """A draft model with a drafter of its own; all settings of a draft model.

    Attributes:
        drafter: any drafter's name, or a mapping with key ``method``, for what the draft model will say.
    """

    method: Literal["staged"] = "staged"
    drafter: str | Mapping[str, Any] | Any = "ngram"


@dataclass(frozen=True)
class SortedDraftConfig(DraftModelConfig):
    """A draft model whose first layers are draft models too; all settings of a draft model.

    LLMs that name the same draft in the same form share its weights.

    Attributes:
        layers: of the sub-models, ascending; None is half of the draft's layers and all of them.
        min_confidence: probability of the likeliest token from which on a sub-model's word counts.
    """

    method: Literal["sorted_draft"] = "sorted_draft"
    layers: Sequence[int] | None = None
    min_confidence: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            valid = (
                isinstance(self.layers, list | tuple)
                and len(self.layers) > 0
                and all(isinstance(n, int) and n > 0 for n in self.layers)
                and list(self.layers) == sorted(set(self.layers))
            )
            require(valid, "sorted_draft.layers", self.layers, "ascending numbers of layers")
        require_fraction("sorted_draft.min_confidence", self.min_confidence)


def require_fraction(name: str, value: object) -> None:
    require(isinstance(value, int | float) and 0 <= value <= 1, name, value, "a number in [0, 1]")
