"""Run every drafter under every rule with every parameter on every model path, and write what happened.

    python scripts/compatibility.py                                          # all of it, some ten minutes
    python scripts/compatibility.py --drafter ngram suffix --rule coupled    # a part, held against what is written

The whole run writes ``src/outrider/methods.json``, which `outrider methods` prints, and needs the compiled kernels
(for the lean path). A part writes nothing: it says where it differs from that file.

Exit status 1: something came out wrong, or a part differs from the file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.losslessness.compatibility_runs import PATHS, available_paths, measure
from tests.losslessness.engine_harness import DRAFTERS
from transformers.utils import logging

from outrider.losslessness.matrix import SHIPPED, WRONG, Matrix, read_matrix, write_matrix
from outrider.verification.build import RULE_NAMES


def main() -> None:
    wanted = parse_arguments()
    if is_whole(wanted) and available_paths() != PATHS:
        raise SystemExit("no compiled kernels, so no lean path: a matrix without it would not be the whole one")
    logging.disable_progress_bar()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        matrix = measure(
            Path(folder),
            paths=wanted.paths or available_paths(),
            drafters=wanted.drafters or tuple(DRAFTERS),
            rules=wanted.rules or RULE_NAMES,
            advance=lambda what: print(f"{time.monotonic() - start:7.1f} s  {what}", flush=True),
        )
    failed = [f"WRONG: {cell}" for cell in matrix.cells if cell.outcome == WRONG]
    if is_whole(wanted):
        write_matrix(matrix)
        print(f"{len(matrix.cells)} combinations in {time.monotonic() - start:.0f} s -> {SHIPPED}")
    else:
        failed += differences(matrix, read_matrix())
        print(f"{len(matrix.cells)} combinations in {time.monotonic() - start:.0f} s, held against {SHIPPED}")
    print(*failed, sep="\n", end="\n" if failed else "")
    if failed:
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, names in (("drafter", tuple(DRAFTERS)), ("rule", RULE_NAMES), ("path", available_paths())):
        parser.add_argument(
            f"--{option}",
            dest=f"{option}s",
            nargs="+",
            metavar="NAME",
            choices=names,
            help=f"some of: {', '.join(names)}",
        )
    return parser.parse_args()


def is_whole(wanted: argparse.Namespace) -> bool:
    return not (wanted.drafters or wanted.rules or wanted.paths)


def differences(ran: Matrix, written: Matrix) -> list[str]:
    """Combinations of which the file says something else, or nothing."""
    known = {(cell.drafter, cell.rule, cell.place, cell.parameter): cell.outcome for cell in written.cells}
    return [
        f"{cell}, but written: {known.get(key)}"
        for cell in ran.cells
        if known.get(key := (cell.drafter, cell.rule, cell.place, cell.parameter)) != cell.outcome
    ]


if __name__ == "__main__":
    main()
