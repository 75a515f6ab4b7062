"""What the commands say beside their results: progress and summaries, on stderr and only to a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

REPORT_WIDTH = 160


def stderr_console() -> Console:
    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """For reports; wide where stdout is no terminal, so that tables in files keep their lines."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else REPORT_WIDTH)


def progress_bar(*, enabled: bool = True) -> Progress:
    """A progress bar that shows nothing unless stderr is a terminal."""
    console = stderr_console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
        transient=True,
    )


def note(text: str) -> None:
    """One line for whoever watches; nothing where stderr is not a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def check_writable(path: str | None) -> None:
    """Find out before a long run, not after it, that its report cannot be written.

    Raises:
        OSError: it cannot.
    """
    if path is not None:
        with Path(path).open("a"):
            pass


def report_json(record: dict[str, Any], *, to_stdout: bool, path: str | None) -> None:
    """Print a report, write it to a file, or both.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False)
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    if to_stdout:
        print(text)
