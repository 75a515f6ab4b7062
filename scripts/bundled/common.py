"""What the stages share: logging, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CHUNK = 1024  # tokens; the context length, and the unit in which the corpus is shuffled and counted


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def quiet_transformers() -> None:
    """Our own progress is enough; its bars would fill a log file."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def write_text_atomic(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, record: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(record, indent=2) + "\n")


def save_state(state: dict[str, Any], path: Path) -> None:
    """torch.save, so that a run killed on the way leaves the previous checkpoint."""
    import torch

    temporary = path.with_name(path.name + ".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def check_same_settings(path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """A resumed run may change its total and nothing else."""
    names = sorted((ours.keys() | theirs.keys()) - {"tokens"})
    changed = {n: (ours.get(n), theirs.get(n)) for n in names if ours.get(n) != theirs.get(n)}
    if changed:
        raise ValueError(
            f"checkpoint {path} was made with other settings (ours, its): {changed}; "
            "only --tokens may change on resume; choose another --work folder"
        )
