"""The catalogue of growths: the one place that knows them by name."""

from __future__ import annotations

from outrider.config import DraftModelConfig
from outrider.drafting.drafter import DraftStyle
from outrider.drafting.growth.levels import Beam
from outrider.drafting.growth.policy import Growth
from outrider.drafting.growth.tree import Draws, GrowthLimits


def build_growth(config: DraftModelConfig, style: DraftStyle) -> Growth:
    """The growth that a configuration asks for, as the verification rule wants trees drawn."""
    width = 1 if style.chains_only else config.width
    num_nodes = min(config.max_nodes, config.depth) if width == 1 else config.max_nodes
    limits = GrowthLimits(num_nodes, config.depth, config.min_path_prob)
    draws = Draws(style.noise, style.sibling_draws)
    return Beam(limits, draws, width, config.max_expanded)
