"""The catalogue of growths: the one place that knows them by name."""

from __future__ import annotations

from dataclasses import replace

from outrider.config import DraftModelConfig
from outrider.drafting.drafter import DraftStyle
from outrider.drafting.growth.best_first import Greedy, MostProbable, Threshold
from outrider.drafting.growth.levels import Beam, Branching, ExpandedChain, Planned, SparseByState, Static
from outrider.drafting.growth.policy import Growth
from outrider.drafting.growth.shape_planner import ShapePlanner
from outrider.drafting.growth.stochastic_beam import StochasticBeam
from outrider.drafting.growth.tree import Draws, GrowthLimits
from outrider.drafting.sequoia import sequoia_shape
from outrider.drafting.tree_shape import TreeShape


def build_growth(config: DraftModelConfig, style: DraftStyle) -> Growth:
    """The growth that a configuration asks for, as the verification rule wants trees drawn.

    A rule that verifies chains alone gets a chain, whatever is asked for.
    """
    limits = GrowthLimits(config.max_nodes, config.depth, config.min_path_prob)
    draws = Draws(style.noise, style.sibling_draws)
    if style.chains_only or (config.growth == "beam" and config.width == 1):
        return Beam(replace(limits, num_nodes=min(limits.num_nodes, limits.depth)), draws)
    match config.growth:
        case "specexec":
            return MostProbable(limits, replace(draws, siblings=None), config.max_expanded)
        case "opt_tree":
            return MostProbable(limits, replace(draws, siblings=None), None, config.min_gain)
        case "rsd_c" | "rsd_s" | "dyspec" | "dyspec_threshold":  # the rule reads from the tree how it was drawn
            return _distinct(config, limits, replace(draws, siblings="without_replacement"))
        case _:
            return _as_the_rule_asks(config, limits, draws)


def _distinct(config: DraftModelConfig, limits: GrowthLimits, draws: Draws) -> Growth:
    """Growths whose siblings are distinct by definition."""
    match config.growth:
        case "rsd_c":
            return Branching(limits, draws, tuple(config.branching))
        case "rsd_s":
            return StochasticBeam(limits, draws, config.width)
        case "dyspec":
            return Greedy(limits, draws, config.max_expanded)
        case _:
            return Threshold(limits, draws, config.min_path_prob)


def _as_the_rule_asks(config: DraftModelConfig, limits: GrowthLimits, draws: Draws) -> Growth:
    match config.growth:
        case "mcsd":
            return Branching(limits, draws, tuple(config.branching))
        case "mcsd_improved":
            # The target's own candidates come first in that the root is one: of those after the accepted path the
            # target has chosen it already. What is left of the method: chains side by side that end where the draft
            # is no longer confident.
            return Branching(limits, draws, (config.width, *[1] * (config.depth - 1)))
        case "cape":
            return ExpandedChain(limits, draws)
        case "static" | "ppd":
            return _shaped(config, limits, draws)
        case _:
            return Beam(limits, draws, config.width, config.max_expanded)


def _shaped(config: DraftModelConfig, limits: GrowthLimits, draws: Draws) -> Growth:
    """Growths whose shapes are there before any token is drawn."""
    acceptance = config.rank_probs
    if config.plans_shapes:
        planner = ShapePlanner(
            limits,
            None if isinstance(acceptance, str) else acceptance,
            None if isinstance(config.draft_cost, str) else config.draft_cost,
        )
        return SparseByState(limits, draws, planner) if config.growth == "ppd" else Planned(limits, draws, planner)
    if config.rank_paths is not None:
        return Static(limits, draws, TreeShape.from_paths(config.rank_paths))
    assert not isinstance(acceptance, str), "a shape that is planned while decoding"
    return Static(limits, draws, sequoia_shape(config.max_nodes, config.depth, acceptance))
