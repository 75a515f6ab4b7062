"""The shipped compatibility matrix is what running every combination gives, and running notices what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.config import DRAFTER_CONFIGS, NgramConfig
from outrider.drafting.source import SourceDrafter
from outrider.errors import ConfigError
from outrider.losslessness.compatibility import PathRuns, settings_of
from outrider.losslessness.matrix import (
    REFUSED,
    TO_CHAINS,
    TO_PLAIN,
    WORKS,
    WORKS_IN_DISTRIBUTION,
    WRONG,
    Cell,
    Matrix,
    read_matrix,
    write_matrix,
)
from outrider.token_tree import TokenTree, VerifiedPath
from outrider.verification.build import RULE_NAMES
from outrider.verification.coupled import CoupledRule
from outrider.verification.rejection import RejectionRule
from tests.losslessness.compatibility_runs import (
    PATHS,
    SETTINGS,
    available_paths,
    make_models,
    measure,
    on_path,
    path_runs,
)
from tests.losslessness.engine_harness import CATALOGUE

REGENERATE = "run scripts/compatibility.py"
PATH = available_paths()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Iterator[PathRuns]:
    return path_runs(folder, PATH)


def outcomes(cells) -> set[str]:
    return {cell.outcome for cell in cells}


# --- the shipped matrix


def test_every_drafter_is_in_the_catalogue_that_the_matrix_is_made_from() -> None:
    assert {config.method for config in CATALOGUE.values()} == set(DRAFTER_CONFIGS)


def test_the_shipped_matrix_is_of_all_drafters_rules_parameters_and_paths() -> None:
    shipped = read_matrix()
    assert shipped.drafters == {name: settings_of(config) for name, config in CATALOGUE.items()}, REGENERATE
    assert shipped.rules == RULE_NAMES, REGENERATE
    assert shipped.parameters == tuple(SETTINGS), REGENERATE
    assert [place.split(",")[0] for place in shipped.places[::3]] == list(PATHS), REGENERATE
    assert shipped.by_name.keys() == {config.method for config in CATALOGUE.values()}, REGENERATE
    assert len(shipped.cells) == len(CATALOGUE) * len(RULE_NAMES) * len(PATHS) * 3 * len(SETTINGS), REGENERATE
    assert WRONG not in outcomes(shipped.cells)


@pytest.mark.parametrize("drafter", CATALOGUE)
def test_a_part_of_the_shipped_matrix_is_what_running_it_gives(drafter: str, folder: Path, runs: PathRuns) -> None:
    config = on_path(CATALOGUE[drafter], folder, PATH)
    ran = [cell for rule in ("coupled", "rejection") for cell in runs.run(drafter, config, rule)]
    shipped = [
        cell
        for cell in read_matrix().cells
        if cell.drafter == drafter and cell.rule in ("coupled", "rejection") and cell.place in runs.places
    ]
    assert ran == shipped, REGENERATE


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_shipped_matrix_is_what_running_it_gives(folder: Path) -> None:
    ran = measure(folder, [path_runs(folder, path) for path in available_paths()])
    shipped = read_matrix()
    assert ran.by_name == shipped.by_name, REGENERATE
    assert list(ran.cells) == [cell for cell in shipped.cells if cell.place in ran.places], REGENERATE


def test_a_matrix_whose_places_differ_is_read_as_written(tmp_path: Path) -> None:
    cells = [
        Cell("ngram", rule, place, parameter, outcome)
        for rule, by_place in {
            "coupled": {"a": (WORKS, f"{REFUSED}ConfigError: x"), "b": (f"{REFUSED}CacheError: y", WORKS)},
            "rejection": {"a": (WORKS, TO_PLAIN), "b": (WORKS, TO_PLAIN)},
        }.items()
        for place, of in by_place.items()
        for parameter, outcome in zip(("top_k", "n"), of, strict=True)
    ]
    matrix = Matrix({"ngram": {"method": "ngram"}}, ("a", "b"), ("top_k", "n"), tuple(cells), {"ngram": WORKS})
    path = tmp_path / "methods.json"
    write_matrix(matrix, path)
    assert read_matrix(path) == matrix
    nested = matrix.record()["matrix"]["ngram"]
    assert nested["rejection"] == {"top_k": WORKS, "n": TO_PLAIN}
    assert nested["coupled"]["n"] == {f"{REFUSED}ConfigError: x": ["a"], WORKS: ["b"]}


# --- what running notices


@pytest.mark.parametrize("parameter", [name for name in SETTINGS if name != "seed"])
def test_every_parameter_changes_plain_decoding(parameter: str, runs: PathRuns) -> None:
    """A parameter that did nothing on these models would pass as working under any drafter."""
    params = SETTINGS[parameter]
    without = dataclasses.replace(SETTINGS["seed"], seed=params.seed)
    changed = False
    for prompt, output in zip(runs.prompts, runs.plain_outputs(parameter), strict=True):
        (base,) = runs.llm.generate(prompt, without)
        changed |= [dataclasses.asdict(sample) | {"metrics": None} for sample in output.outputs] != [
            dataclasses.asdict(sample) | {"metrics": None} for sample in base.outputs
        ]
    assert changed


def test_a_rule_that_accepts_everything_is_wrong(runs: PathRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    right = CoupledRule.verify

    def verify(self, trees, target_log_probs, decisions):
        result = right(self, trees, target_log_probs, decisions)
        paths = tuple(
            VerifiedPath((1,), choices[1]) if tree.num_nodes > 1 and choices else path
            for tree, path, choices in zip(trees.trees, result.paths, result.choices, strict=True)
        )
        return dataclasses.replace(result, paths=paths)

    monkeypatch.setattr(CoupledRule, "verify", verify)
    found = {cell.parameter: cell.outcome for cell in runs.run("ngram", NgramConfig(), "coupled")}
    assert found["temperature"] == found["top_k"] == found["n"] == WRONG


def test_a_rule_that_takes_what_the_parameters_exclude_is_wrong(
    runs: PathRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = RejectionRule.verify

    def verify(self, trees, target_log_probs, decisions):
        return right(self, trees, target_log_probs.clamp_min(-1.0), decisions)  # nothing is impossible any more

    monkeypatch.setattr(RejectionRule, "verify", verify)
    found = {cell.parameter: cell.outcome for cell in runs.run("unbounded", NgramConfig(), "rejection")}
    assert found["top_k"] == found["top_p"] == found["min_p"] == WRONG
    assert found["temperature 0"] == WORKS


def test_no_drafts_is_a_fall_back_and_an_error_a_refusal(runs: PathRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self, contexts):
        return [TokenTree.root_only(context.token_ids[-1]) for context in contexts]

    with monkeypatch.context() as patch:
        patch.setattr(SourceDrafter, "propose", nothing)
        assert outcomes(runs.run("ngram", NgramConfig(), "coupled")) == {TO_PLAIN}

    def refuse(self, contexts):
        if any(context.params.top_k for context in contexts):
            raise ConfigError("top_k with this drafter", got=4)
        return nothing(self, contexts)

    monkeypatch.setattr(SourceDrafter, "propose", refuse)
    found = {cell.parameter: cell.outcome for cell in runs.run("ngram", NgramConfig(), "coupled")}
    assert found.pop("top_k") == f"{REFUSED}ConfigError: top_k with this drafter, got 4"
    assert set(found.values()) == {TO_PLAIN}


def test_chains_where_the_rule_takes_no_trees(runs: PathRuns) -> None:
    assert outcomes(runs.run("ngram", NgramConfig(), "coupled")) == {WORKS}
    found = {cell.parameter: cell.outcome for cell in runs.run("ngram", NgramConfig(), "rejection")}
    assert found["temperature 0"] == TO_CHAINS
    single = NgramConfig(num_candidates=1)
    assert outcomes(runs.run("single", single, "coupled")) == {WORKS}
    assert outcomes(runs.run("single", single, "rejection")) == {WORKS, WORKS_IN_DISTRIBUTION}
