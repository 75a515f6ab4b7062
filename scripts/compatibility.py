"""Run every drafter under every rule with every parameter on every model path, and write what happened.

    python scripts/compatibility.py                                          # all of it, some ten minutes
    python scripts/compatibility.py --drafter ngram suffix --rule coupled    # a part, held against what is written

The whole run writes ``src/outrider/methods.json``, which `outrider methods` prints, and needs the compiled kernels
(for the lean path). It keeps each drafter that is done in ``build/compatibility``: interrupted, it goes on where it
was, unless the code has changed. A part writes nothing: it says where it differs from that file.

Exit status 1: something came out wrong, or a part differs from the file.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tests.losslessness.compatibility_runs import PATHS, available_paths, make_models, measure, path_runs
from tests.losslessness.engine_harness import CATALOGUE
from transformers.utils import logging

from outrider.losslessness.matrix import SHIPPED, WRONG, Matrix, merge_matrices, read_matrix, write_matrix
from outrider.verification.build import RULE_NAMES

REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = REPOSITORY / "build" / "compatibility"


def main() -> None:
    wanted = parse_arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # of models so small, threads wait for each other more than they work
    start = time.monotonic()

    def advance(what: str) -> None:
        print(f"{time.monotonic() - start:7.1f} s  {what}", flush=True)

    if wanted.drafters or wanted.rules or wanted.paths:
        matrix = run_part(wanted, advance)
        failed = differences(matrix, read_matrix())
        done = f"held against {SHIPPED}"
    else:
        matrix, failed = run_whole(advance), []
        write_matrix(matrix)
        shutil.rmtree(PARTS)
        done = f"-> {SHIPPED}"
    failed += [f"WRONG: {cell}" for cell in matrix.cells if cell.outcome == WRONG]
    print(f"{len(matrix.cells)} combinations in {time.monotonic() - start:.0f} s, {done}")
    print(*failed, sep="\n", end="\n" if failed else "")
    if failed:
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, names in (("drafter", tuple(CATALOGUE)), ("rule", RULE_NAMES), ("path", available_paths())):
        parser.add_argument(
            f"--{option}",
            dest=f"{option}s",
            nargs="+",
            metavar="NAME",
            choices=names,
            help=f"some of: {', '.join(names)}",
        )
    return parser.parse_args()


def run_part(wanted: argparse.Namespace, advance: Callable[[str], None]) -> Matrix:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        return measure(
            folder,
            [path_runs(folder, path) for path in wanted.paths or available_paths()],
            drafters=wanted.drafters or tuple(CATALOGUE),
            rules=wanted.rules or RULE_NAMES,
            advance=advance,
        )


def run_whole(advance: Callable[[str], None]) -> Matrix:
    """Drafter by drafter, each kept as soon as it is done; those that an earlier run of this code kept are read."""
    if available_paths() != PATHS:
        raise SystemExit("no compiled kernels, so no lean path: a matrix without it would not be the whole one")
    folder = PARTS / digest_of_the_code()
    if not folder.exists():
        shutil.rmtree(PARTS, ignore_errors=True)  # of other code
        folder.mkdir(parents=True)
    left = [name for name in CATALOGUE if not part_file(folder, name).exists()]
    advance(f"{len(CATALOGUE) - len(left)} of {len(CATALOGUE)} drafters were done before")
    if left:
        with tempfile.TemporaryDirectory() as models:
            make_models(Path(models))
            runs = [path_runs(Path(models), path) for path in PATHS]
            for name in left:
                partial = folder / "partial"
                write_matrix(measure(Path(models), runs, drafters=[name], advance=advance), partial)
                partial.rename(part_file(folder, name))
    return merge_matrices([read_matrix(part_file(folder, name)) for name in CATALOGUE])


def part_file(folder: Path, drafter: str) -> Path:
    return folder / f"{drafter}.json"


def digest_of_the_code() -> str:
    """Of all that outcomes depend on."""
    digest = hashlib.sha256()
    for root in (REPOSITORY / "src", REPOSITORY / "tests"):
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


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
