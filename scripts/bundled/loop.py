"""The loop of every training stage: progress, checkpoints, Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bundled.common import log

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stage(Protocol):
    """What the loop runs."""

    loss_names: ClassVar[tuple[str, ...]]
    tokens_seen: int

    @property
    def total_tokens(self) -> int: ...

    @property
    def done(self) -> bool: ...

    @property
    def rate(self) -> float: ...

    def step(self) -> tuple[float, ...]:
        """One optimizer step; its losses."""
        ...

    def save(self, path: Path) -> None: ...


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM asks the block to stop where it can be resumed."""
    stop: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class ProgressReport:
    """A progress bar on a terminal, else a line now and then."""

    def __init__(self, total: int, every_seconds: float = 30.0) -> None:
        self.total, self.every = total, every_seconds
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._last = (time.perf_counter(), -1)
        self._losses: tuple[float, ...] | None = None

    def __enter__(self) -> ProgressReport:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task("training", total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            log(text)

    def update(self, stage: Stage, losses: tuple[float, ...]) -> None:
        old = self._losses or losses
        self._losses = tuple(0.95 * o + 0.05 * n for o, n in zip(old, losses, strict=True))
        text = "  ".join(f"{n} {v:.3f}" for n, v in zip(stage.loss_names, self._losses, strict=True))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=stage.tokens_seen, description=text)
            return
        now, (then, tokens_then) = time.perf_counter(), self._last
        if tokens_then < 0:
            self._last = (now, stage.tokens_seen)
        elif now - then >= self.every:
            speed = (stage.tokens_seen - tokens_then) / (now - then)
            left = (self.total - stage.tokens_seen) / speed / 60
            self.line(
                f"{stage.tokens_seen:,}/{self.total:,} tokens  {text}  lr {stage.rate:.2e}  "
                f"{speed:,.0f} tokens/s  {left:.0f} min left"
            )
            self._last = (now, stage.tokens_seen)


def no_export() -> None:
    """For stages that export nothing on the way."""


def train_loop(
    stage: Stage,
    checkpoint: Path,
    save_every: float,
    export_every: float = 0.0,
    export: Callable[[], None] = no_export,
) -> bool:
    """Train until done (True) or until Ctrl-C or SIGTERM (False); a checkpoint is saved either way."""
    last_save = last_export = time.perf_counter()
    with stop_requests() as stop, ProgressReport(stage.total_tokens) as report:
        while not stage.done and not stop:
            report.update(stage, stage.step())
            now = time.perf_counter()
            if now - last_save >= save_every:
                stage.save(checkpoint)
                last_save = now
            if export_every and now - last_export >= export_every:
                export()
                report.line(f"exported at {stage.tokens_seen:,} tokens")
                last_export = now
        stage.save(checkpoint)
        report.line(f"{'stopped' if stop else 'done'} at {stage.tokens_seen:,} tokens; saved {checkpoint}")
    return not stop
