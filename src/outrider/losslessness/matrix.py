"""Which drafter goes with which rule, parameter and model path: the recorded matrix, read and written.

The file ``methods.json`` is made by running every combination (`outrider.losslessness.compatibility`,
``scripts/compatibility.py``), never by hand. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outrider.config.descriptions import DRAFTER_DESCRIPTIONS
from outrider.errors import ConfigError
from outrider.verification.descriptions import RULE_DESCRIPTIONS

SHIPPED = Path(__file__).resolve().parent.parent / "methods.json"
EVERYWHERE = "everywhere"

WORKS = "works"
WORKS_IN_DISTRIBUTION = "works, exact in distribution"
TO_CHAINS = "falls back to chains"
TO_CHAINS_IN_DISTRIBUTION = "falls back to chains, exact in distribution"
TO_PLAIN = "falls back to plain decoding"
REFUSED = "refused: "
WRONG = "WRONG"

_CODES = {WORKS: "=", WORKS_IN_DISTRIBUTION: "d", TO_CHAINS: "c", TO_CHAINS_IN_DISTRIBUTION: "C", TO_PLAIN: "p"}
_CODES_OF_THE_REST = "0123456789abefghijklmnoqrstuvwxyz"


@dataclass(frozen=True)
class Cell:
    """One combination and what came of it.

    Attributes:
        drafter: as the catalogue of the runs names it: a method, or a method with settings.
        place: model path and situation, such as "lean bitwise, batch 1".
        outcome: WORKS, one of the fall-backs, REFUSED with the error, or WRONG.
    """

    drafter: str
    rule: str
    place: str
    parameter: str
    outcome: str


@dataclass(frozen=True)
class Matrix:
    """All combinations that were run.

    Attributes:
        drafters: ``name -> {"method": ..., settings that are not the default}``.
        places: every model path in every situation, in the order run.
        parameters: in the order run.
        by_name: ``method -> outcome`` of asking for it by its name alone, without what it may need.
    """

    drafters: Mapping[str, Mapping[str, Any]]
    places: tuple[str, ...]
    parameters: tuple[str, ...]
    cells: tuple[Cell, ...]
    by_name: Mapping[str, str]

    @property
    def rules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.rule for cell in self.cells))

    def select(self, drafter: str | None = None, rule: str | None = None) -> Matrix:
        """The part of one method (or one of its variants) and of one rule.

        Raises:
            ConfigError: nothing of that name was run.
        """
        names = [name for name, of in self.drafters.items() if drafter in (None, name, of["method"])]
        if not names:
            raise ConfigError("drafter", got=repr(drafter), expected=f"one of {', '.join(self.drafters)}")
        if rule is not None and rule not in self.rules:
            raise ConfigError("verification rule", got=repr(rule), expected=f"one of {', '.join(self.rules)}")
        cells = (cell for cell in self.cells if cell.drafter in names and rule in (None, cell.rule))
        drafters = {name: self.drafters[name] for name in names}
        by_name = {of["method"]: self.by_name[of["method"]] for of in drafters.values()}
        return Matrix(drafters, self.places, self.parameters, tuple(cells), by_name)

    def record(self) -> dict[str, Any]:
        """As a JSON object: ``matrix[drafter][rule][parameter]`` is ``{outcome: places}``, or one outcome for all."""
        nested: dict[str, dict[str, dict[str, Any]]] = {}
        for (drafter, rule, parameter), outcomes in self.by_parameter().items():
            of_rule = nested.setdefault(drafter, {}).setdefault(rule, {})
            of_rule[parameter] = next(iter(outcomes)) if len(outcomes) == 1 else outcomes
        return {
            "drafters": dict(self.drafters),
            "places": list(self.places),
            "parameters": list(self.parameters),
            "matrix": nested,
        }

    def by_parameter(self) -> dict[tuple[str, str, str], dict[str, list[str]]]:
        """``(drafter, rule, parameter) -> {outcome: places where it came out}``."""
        found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
        for cell in self.cells:
            outcomes = found.setdefault((cell.drafter, cell.rule, cell.parameter), {})
            outcomes.setdefault(cell.outcome, []).append(cell.place)
        return found


def merge_matrices(parts: Sequence[Matrix]) -> Matrix:
    """One matrix from those of some drafters each, run over the same places and parameters."""
    return Matrix(
        {name: of for part in parts for name, of in part.drafters.items()},
        parts[0].places,
        parts[0].parameters,
        tuple(cell for part in parts for cell in part.cells),
        {method: outcome for part in parts for method, outcome in part.by_name.items()},
    )


def write_matrix(matrix: Matrix, path: Path = SHIPPED) -> None:
    """Write the compact form: a letter a parameter, once where every place agrees."""
    codes = _codes(cell.outcome for cell in matrix.cells)
    letters: dict[str, dict[str, dict[str, str]]] = {}
    for cell in matrix.cells:
        places = letters.setdefault(cell.drafter, {}).setdefault(cell.rule, {})
        places[cell.place] = places.get(cell.place, "") + codes[cell.outcome]
    for rules in letters.values():
        for rule, places in rules.items():
            if len(set(places.values())) == 1:
                rules[rule] = {EVERYWHERE: next(iter(places.values()))}
    record = {
        "outcomes": {code: outcome for outcome, code in codes.items()},
        "parameters": list(matrix.parameters),
        "places": list(matrix.places),
        "drafters": {name: dict(of) for name, of in matrix.drafters.items()},
        "by_name": dict(matrix.by_name),
        "matrix": letters,
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_matrix(path: Path = SHIPPED) -> Matrix:
    """Read what `write_matrix` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    outcomes, parameters, places = record["outcomes"], record["parameters"], record["places"]
    cells = [
        Cell(drafter, rule, place, parameter, outcomes[letter])
        for drafter, rules in record["matrix"].items()
        for rule, letters in rules.items()
        for place in places
        for parameter, letter in zip(parameters, letters.get(place) or letters[EVERYWHERE], strict=True)
    ]
    return Matrix(record["drafters"], tuple(places), tuple(parameters), tuple(cells), record["by_name"])


def describe_methods(matrix: Matrix, rule: str | None = None) -> dict[str, Any]:
    """What `outrider methods` prints: drafters, rules and their matrix, as one JSON object.

    Args:
        matrix: all of it, or the part that is asked for.
        rule: the only one to describe; None describes all.
    """
    ran = {of["method"] for of in matrix.drafters.values()}
    methods = [name for name in DRAFTER_DESCRIPTIONS if name in ran]
    rules = {name: of for name, of in RULE_DESCRIPTIONS.items() if rule in (None, name)}
    exactness = {name: of.exactness for name, of in rules.items()}
    return {
        "drafters": {
            name: {**asdict(DRAFTER_DESCRIPTIONS[name]), "exactness": exactness, "by_name": matrix.by_name[name]}
            for name in methods
        },
        "rules": {name: asdict(of) for name, of in rules.items()},
        "compatibility": matrix.record(),
    }


def _codes(outcomes: Iterable[str]) -> dict[str, str]:
    """A letter for each outcome; those of errors in the order met."""
    found = dict.fromkeys(outcomes)
    rest = iter(_CODES_OF_THE_REST)
    return {outcome: _CODES.get(outcome) or next(rest) for outcome in found}
