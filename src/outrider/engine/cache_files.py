"""Small files that a later start may use: what was measured, what was learnt."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path


def cache_file(kind: str, identity: dict[str, Any]) -> Path:
    """Where what depends on `identity`, values as JSON, is kept."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return user_cache_path("outrider") / kind / f"{digest[:32]}.json"


def write_cache_file(path: Path, text: str) -> None:
    """All or nothing: another process may read it at the same time.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
