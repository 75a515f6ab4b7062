"""What planners have learnt, kept between runs: one small file for each target, drafters and machine."""

from __future__ import annotations

import weakref
from pathlib import Path

from outrider.drafting.auto import AutoDrafter
from outrider.drafting.knowledge import Knowledge
from outrider.engine.cache_files import keep, recall


def remember(planner: AutoDrafter, path: Path) -> None:
    """Let a planner begin with what is kept at `path`, and keep there what it knows when it is gone."""
    recall(path, planner.knowledge.recall)
    weakref.finalize(planner, _save, planner.knowledge, path)


def _save(knowledge: Knowledge, path: Path) -> None:
    if knowledge.has_news:
        keep(path, knowledge.as_mapping())
