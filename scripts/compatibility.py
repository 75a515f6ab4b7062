"""Run every drafter under every rule with every parameter on every model path, and write what happened.

    python scripts/compatibility.py

writes ``src/outrider/methods.json``, which `outrider methods` prints. Needs the compiled kernels (for the lean path).
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.losslessness.compatibility_runs import PATHS, available_paths, measure
from transformers.utils import logging

from outrider.losslessness.matrix import SHIPPED, WRONG, write_matrix


def main() -> None:
    if available_paths() != PATHS:
        raise SystemExit("no compiled kernels, so no lean path: a matrix without it would not be the whole one")
    logging.disable_progress_bar()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        matrix = measure(Path(folder), advance=lambda what: print(f"{time.monotonic() - start:7.1f} s  {what}"))
    write_matrix(matrix)
    print(f"{len(matrix.cells)} combinations in {time.monotonic() - start:.0f} s -> {SHIPPED}")
    wrong = [cell for cell in matrix.cells if cell.outcome == WRONG]
    for cell in wrong:
        print(f"WRONG: {cell}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
