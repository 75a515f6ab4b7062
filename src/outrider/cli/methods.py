"""`outrider methods`: every drafter and rule, and what goes with what, as measured by running all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli.console import report_json, stdout_console
from outrider.losslessness.matrix import (
    REFUSED,
    TO_CHAINS,
    TO_PLAIN,
    WORKS,
    WRONG,
    Matrix,
    describe_methods,
    read_matrix,
)

if TYPE_CHECKING:
    from rich.table import Table

_KINDS = {WORKS: "green", TO_CHAINS: "yellow", TO_PLAIN: "yellow", REFUSED: "red", WRONG: "red"}


def methods(
    drafter: Annotated[str | None, typer.Option("--decoding", "-d", help="Show this one alone, in full.")] = None,
    rule: Annotated[str | None, typer.Option("--rule", "-r", help="Show this verification rule alone.")] = None,
    json_out: opt.JsonOut = False,
) -> None:
    """Print every drafter and verification rule, what it needs, and what works with what.

    The matrix comes from running every combination on small models: a combination works, falls back, or is refused
    with an error; each is listed.
    """
    matrix = read_matrix().select(drafter, rule)
    described = describe_methods(matrix, rule)
    if json_out:
        report_json(described, to_stdout=True, path=None)
        return
    console = stdout_console()
    console.print(_drafter_table(described["drafters"]), _rule_table(described["rules"]))
    if drafter is None:
        console.print(_overview(matrix))
        console.print("--decoding NAME shows each parameter; --json has everything.")
    else:
        for name in matrix.drafters:
            console.print(_parameter_table(name, matrix))
    for line in _notes(matrix, described["drafters"]):
        console.print(line, markup=False)


def _table(title: str, *headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, no_wrap=index == 0)
    return table


def _drafter_table(drafters: dict[str, Any]) -> Table:
    table = _table("drafters (--decoding)", "", "proposes", "needs", "exactness", "source")
    for name, of in drafters.items():
        table.add_row(name, of["proposes"], of["needs"], "the rule's", of["source"])
    return table


def _rule_table(rules: dict[str, Any]) -> Table:
    table = _table("verification rules (--verification)", "", "accepts", "exactness", "trees", "source")
    for name, of in rules.items():
        table.add_row(name, of["accepts"], of["exactness"], of["trees"], of["source"])
    return table


def _overview(matrix: Matrix) -> Table:
    """A row a drafter, a column a rule; all parameters and places in one cell."""
    title = f"compatibility over {len(matrix.parameters)} sampling parameters and {len(matrix.places)} places"
    table = _table(title, "drafter", *matrix.rules)
    kinds: dict[tuple[str, str], dict[str, int]] = {}
    for cell in matrix.cells:
        counts = kinds.setdefault((cell.drafter, cell.rule), {})
        counts[_kind(cell.outcome)] = counts.get(_kind(cell.outcome), 0) + 1
    for name in matrix.drafters:
        table.add_row(name, *(_counts(kinds[name, rule]) for rule in matrix.rules))
    return table


def _counts(kinds: dict[str, int]) -> str:
    if len(kinds) == 1:
        (kind,) = kinds
        return _coloured(kind.removesuffix(": "), kind)
    total = sum(kinds.values())
    return ", ".join(_coloured(f"{kind.removesuffix(': ')} {n}/{total}", kind) for kind, n in kinds.items())


def _parameter_table(name: str, matrix: Matrix) -> Table:
    """A row a parameter, a column a rule; places are named where they differ."""
    settings = ", ".join(f"{key} {value}" for key, value in matrix.drafters[name].items() if key != "method")
    table = _table(f"{name} ({settings or 'its defaults'})", "parameter", *matrix.rules)
    found = matrix.by_parameter()
    for parameter in matrix.parameters:
        cells = (found[name, rule, parameter] for rule in matrix.rules)
        table.add_row(parameter, *(_outcomes(outcomes) for outcomes in cells))
    return table


def _outcomes(outcomes: dict[str, list[str]]) -> str:
    texts = {outcome: _coloured(outcome, _kind(outcome)) for outcome in outcomes}
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{texts[outcome]} ({', '.join(places)})" for outcome, places in outcomes.items())


def _coloured(text: str, kind: str) -> str:
    from rich.markup import escape

    return f"[{_KINDS[kind]}]{escape(text)}[/]"


def _kind(outcome: str) -> str:
    return next(kind for kind in _KINDS if outcome.startswith(kind))


def _notes(matrix: Matrix, drafters: dict[str, Any]) -> list[str]:
    """Each way in which something did not simply work, in words."""
    lines = [
        "works: drafts were verified and the output is plain decoding's; exact in distribution: under this rule the "
        "output follows the same distribution, but is another sample.",
        f"places: {'; '.join(matrix.places)}.",
    ]
    kinds = {_kind(cell.outcome) for cell in matrix.cells}
    if TO_CHAINS in kinds:
        lines.append(f"{TO_CHAINS}: the rule takes no branches, so the drafter proposes only its best path.")
    if TO_PLAIN in kinds:
        lines.append(f"{TO_PLAIN}: the output is right, but no drafts were proposed.")
    if any(of["method"] == "auto" for of in matrix.drafters.values()):
        lines.append(
            "auto works wherever its outputs are right: whether it drafts depends on what pays on the machine."
        )
    lines += dict.fromkeys(
        f"{cell.drafter} with {cell.rule}: {cell.outcome}" for cell in matrix.cells if _kind(cell.outcome) == REFUSED
    )
    lines += [
        f"--decoding {name} without {of['needs']}: {of['by_name']}"
        for name, of in drafters.items()
        if of["by_name"] != WORKS
    ]
    return lines
