"""What planners have learnt, kept between runs: one small file for each target, drafters and machine."""

from __future__ import annotations

import json
import weakref
from logging import getLogger
from pathlib import Path

from outrider.drafting.auto import AutoDrafter
from outrider.drafting.knowledge import Knowledge
from outrider.engine.cache_files import write_cache_file


def remember(planner: AutoDrafter, path: Path) -> None:
    """Let a planner begin with what is kept at `path`, and keep there what it knows when it is gone.

    A file that is damaged, or something else, is not believed: a warning says so, and it is written anew.
    """
    try:
        planner.knowledge.recall(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = str(error)  # the error itself would keep the planner alive in whatever keeps log records
        getLogger("outrider").warning("what earlier runs have learnt is ignored: %s: %s", path, reason)
    weakref.finalize(planner, _save, planner.knowledge, path)


def _save(knowledge: Knowledge, path: Path) -> None:
    if not knowledge.has_news:
        return
    try:
        write_cache_file(path, json.dumps(knowledge.as_mapping()))
    except OSError as error:
        getLogger("outrider").debug("what was learnt is not kept: %s", error)
