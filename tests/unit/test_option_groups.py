"""Groups of options: what a command takes, in which order, and what it is given."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.testing import CliRunner

from outrider.cli.option_groups import with_groups
from outrider.cli.options import EngineOptions


@dataclass(frozen=True)
class Place:
    town: Annotated[str, typer.Option("--town", "-t", help="Where.")] = "Ulm"
    street: Annotated[str | None, typer.Option("--street", help="Which.")] = None


@dataclass(frozen=True)
class Time:
    hour: Annotated[int, typer.Option("--hour", min=0, max=23, help="When.")] = 12


given: list[Any] = []


@with_groups
def meet(
    who: Annotated[str, typer.Argument(help="Whom.")],
    *,
    town: Place,  # a group may have the name of one of its fields
    loud: Annotated[bool, typer.Option("--loud", help="Shout.")] = False,
    time: Time,
) -> None:
    """Meet somebody."""
    given.append((who, town, loud, time))


app = typer.Typer()
app.command()(meet)


def run(*arguments: str) -> Any:
    given.clear()
    return CliRunner().invoke(app, [*arguments])


def test_fields_are_options_where_their_group_stands() -> None:
    assert list(inspect.signature(meet).parameters) == ["who", "town", "street", "loud", "hour"]
    page = run("--help").stdout
    assert "Meet somebody." in page
    places = [page.index(word) for word in ("--town", "--street", "--loud", "--hour")]
    assert places == sorted(places)


def test_the_command_is_given_its_groups() -> None:
    assert run("Ada").exit_code == 0
    assert given == [("Ada", Place(), False, Time())]
    assert run("Ada", "-t", "Bern", "--hour", "7", "--loud").exit_code == 0
    assert given == [("Ada", Place("Bern"), True, Time(7))]
    assert run("Ada", "--hour", "24").exit_code == 2
    assert given == []


def test_groups_make_an_engine_together() -> None:
    @dataclass(frozen=True)
    class Model:
        model: str = "a"
        weights: str = "int4"

    assert EngineOptions.of(Model(), threads=3) == EngineOptions(model="a", weights="int4", threads=3)
