"""Small files that a later start may use: what was measured, what was learnt.

Each is written whole and replaced in one step, and read by whoever needs it: several processes may do so at the same
time. Of a kind those that were used last are kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

from platformdirs import user_cache_path

MAX_FILES = 64  # of a kind: models, formats and drafters that one machine may be used with

T = TypeVar("T")


def cache_file(kind: str, identity: dict[str, Any]) -> Path:
    """Where what depends on `identity`, values as JSON, is kept."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return user_cache_path("outrider") / kind / f"{digest[:32]}.json"


def recall(path: Path, take: Callable[[Any], T]) -> T | None:
    """What `take` makes of the values kept at `path`; None if there are none, or none to be believed, which is said.

    Args:
        take: raises a `ConfigError` for values that it did not give.
    """
    try:
        taken = take(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        # As text: the error itself would keep what `take` holds alive in whatever keeps log records.
        reason = " ".join(str(error).split())[:200]
        _say_once(f"cache file {path}: got {reason}; expected what an earlier start kept; it is ignored; delete it")
        return None
    with suppress(OSError):
        os.utime(path)  # it was used
    return taken


def keep(path: Path, values: Any) -> None:
    """Write values, as JSON, for a later start, and forget the files of this kind that were not used for longest."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(values))
        _forget_unused(path.parent)
    except OSError as error:
        _say_once(
            f"cache folder {path.parent}: got {error.strerror or error}, expected to write there; the next start "
            "measures and learns anew; make it writable, or set XDG_CACHE_HOME to a folder that is"
        )


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _forget_unused(folder: Path) -> None:
    """Temporary files of processes that were killed count too: nobody uses them."""
    last_used: list[tuple[float, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process forgets at the same time
            last_used.append((path.stat().st_mtime, path))
    for _, path in sorted(last_used, reverse=True)[MAX_FILES:]:
        path.unlink(missing_ok=True)


@functools.cache
def _say_once(message: str) -> None:
    getLogger("outrider").warning("%s", message)
