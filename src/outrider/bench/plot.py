"""The slack curve as a picture: how much more a forward of many tokens costs than one of a single token."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError

SUFFIXES = (".png", ".svg", ".pdf")
_DPI = 150


def check_can_plot(path: str) -> None:
    """Find out before a long measurement that its picture cannot be drawn.

    Raises:
        ConfigError: an unknown kind of picture, or matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ConfigError("--plot", got=repr(path), expected=f"a name that ends in {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot", got="no matplotlib", expected="it to be installed", remedy="pip install outrider[bench]"
        )


def plot_slack(record: Mapping[str, Any], path: str, title: str) -> None:
    """Draw milliseconds over M, a line for each weight format with its range, and dashed what M = 1 costs.

    Args:
        record: with the "rows" of `summarise`; those without samples are left out.
        path: ends in one of SUFFIXES.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["ms"] is not None]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, weights in enumerate(dict.fromkeys(row["weights"] for row in rows)):
        of_format = sorted((row for row in rows if row["weights"] == weights), key=lambda row: row["m"])
        counts, color = [row["m"] for row in of_format], f"C{index}"
        times, lows, highs = ([row[key] for row in of_format] for key in ("ms", "ms_min", "ms_max"))
        axes.plot(counts, times, "o-", color=color, label=weights)
        axes.vlines(counts, lows, highs, color=color, alpha=0.35, linewidth=2)
        if counts[0] == 1:
            axes.axhline(times[0], color=color, linestyle="--", linewidth=1, alpha=0.7)
    ticks = sorted({row["m"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in a forward")
    axes.set_ylabel("milliseconds a forward")
    axes.set_title(title.replace("; ", "\n"), fontsize="medium")
    axes.grid(alpha=0.25)
    if rows:
        axes.legend(title="weights (dashed: one token)", frameon=False)
    figure.savefig(path, dpi=_DPI)
