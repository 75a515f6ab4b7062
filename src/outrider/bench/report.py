"""A measurement as a table for people and as JSON for the record."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from outrider.bench.runner import PLAIN, Results, Sample, sample_record
from outrider.engine.stats import EngineStats

PACKAGES = ("outrider", "torch", "transformers", "tokenizers", "numpy")
PHASES = ("draft", "target", "verify", "other")


def summarise(name: str, results: Results, comparable: bool) -> dict[str, Any]:
    """One contender's figures over its repeats.

    Args:
        comparable: whether its outputs must be plain decoding's.

    Returns:
        Medians with their range; the speedup is the median over repeats of the ratio to plain decoding in the
        same repeat; times are milliseconds a step and percent of all steps.
    """
    samples = results.samples[name]
    plain = results.samples.get(PLAIN, [])
    ratios = [sample.tokens_per_s / base.tokens_per_s for sample, base in zip(samples, plain, strict=False)]
    num_equal = results.num_equal(name)
    return {
        "name": name,
        "tokens_per_s": _spread([sample.tokens_per_s for sample in samples]),
        "speedup": _spread(ratios) if ratios else None,
        "num_equal": num_equal if comparable else None,
        "num_outputs": len(samples[0].token_ids),
        **_steps(samples),
        "samples": [sample_record(sample) for sample in samples],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _steps(samples: Sequence[Sample]) -> dict[str, Any]:
    """Acceptance and times of an engine of ours; nothing for others."""
    stats = [sample.stats for sample in samples if sample.stats is not None]
    if not stats:
        return {
            "acceptance_length": None,
            "num_cut_rows": None,
            "num_without_room": None,
            "own_ms_per_step": None,
            "outside_kernels_ms_per_step": None,
            "phases": None,
        }
    outside = [of.outside_kernels_ms_per_step for of in stats]
    return {
        "acceptance_length": median(of.acceptance_length for of in stats),  # the planner's differs by run
        "num_cut_rows": median(of.num_cut_rows for of in stats),
        "num_without_room": median(of.num_without_room for of in stats),
        "own_ms_per_step": _spread([of.own_ms_per_step for of in stats]),
        "outside_kernels_ms_per_step": None if None in outside else _spread([ms for ms in outside if ms is not None]),
        "phases": {phase: _phase(phase, stats) for phase in (*PHASES, "kernel")},
    }


def _phase(phase: str, stats: Sequence[EngineStats]) -> dict[str, float]:
    seconds = [getattr(of, f"{phase}_s") for of in stats]
    return {
        "ms_per_step": median(1e3 * s / max(1, of.num_steps) for s, of in zip(seconds, stats, strict=True)),
        "percent": median(100 * s / of.step_s for s, of in zip(seconds, stats, strict=True)),
    }


def speed_table(summaries: Sequence[dict[str, Any]], title: str) -> Table:
    """Speeds, acceptance and equality of outputs, a row for each summary."""
    headings = ("tokens/s", "range", "speedup", "tokens a step", "identical")
    return _table(title, headings, [(summary, _speed_cells(summary)) for summary in summaries])


def step_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Where the time of a step goes, for engines of ours."""
    headings = (*PHASES, "all but draft and target", "all but draft and kernels")
    rows = [(summary, _step_cells(summary)) for summary in summaries if summary["phases"] is not None]
    return _table("milliseconds a step (percent)", headings, rows)


def _table(title: str, headings: Sequence[str], rows: Sequence[tuple[dict[str, Any], Sequence[str]]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for summary, cells in rows:
        table.add_row(summary["name"], *cells)
    return table


def _speed_cells(summary: dict[str, Any]) -> list[str]:
    speed, speedup, length = summary["tokens_per_s"], summary["speedup"], summary["acceptance_length"]
    equal, total = summary["num_equal"], summary["num_outputs"]
    identical = "-" if equal is None else f"{equal}/{total}"
    return [
        f"{speed['median']:.1f}",
        f"{speed['min']:.0f}-{speed['max']:.0f}",
        "-" if speedup is None else f"{speedup['median']:.2f}x",
        "-" if length is None else f"{length:.2f}",
        identical if equal in (None, total) else f"[yellow]{identical}[/]",
    ]


def _step_cells(summary: dict[str, Any]) -> list[str]:
    phases = [summary["phases"][phase] for phase in PHASES]
    outside = [summary["own_ms_per_step"], summary["outside_kernels_ms_per_step"]]
    return [
        *(f"{of['ms_per_step']:.2f} ({of['percent']:.0f})" for of in phases),
        *("-" if of is None else f"{of['median']:.2f}" for of in outside),
    ]


def environment() -> dict[str, Any]:
    """Versions, machine and commit that a figure depends on."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": _memory_gib(),
            "torch_threads": torch.get_num_threads(),
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a plus if it has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        # An installed package may lie in somebody else's checkout.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError, AttributeError):
        return None
