"""Checks of values that users give, and building a config from their keys."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from outrider.errors import ConfigError

Weights = Literal["auto", "fp32", "bf16", "int8", "int4"]
GROUP_SIZES = (32, 64, 128)
T = TypeVar("T")


def from_mapping(config: type[T], values: Mapping[str, Any], name: str) -> T:
    """Build a config dataclass from user-given keys.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} configuration", got=repr(values)[:60], expected="a mapping")
    known = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"unknown {name} key",
                got=repr(key),
                expected=f"one of {', '.join(known)}",
                remedy=f"did you mean {near[0]!r}?" if near else None,
            )
    try:
        return config(**values)
    except TypeError as error:
        raise ConfigError(f"{name} configuration", got=repr(dict(values)), expected=str(error)) from error


def check_int(name: str, value: object, low: int, high: int) -> None:
    valid = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(valid, name, value, f"an integer in [{low}, {high}]")


def check_number(name: str, value: object, low: float, high: float) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    require(valid, name, value, f"a number in [{low:g}, {high:g}]")


def check_path(name: str, value: object) -> None:
    require(value is None or (isinstance(value, str) and value != ""), name, value, "a path, or none")


def require(condition: bool, name: str, got: object, expected: str) -> None:
    if not condition:
        raise ConfigError(name, got=repr(got), expected=expected)


def check_weights(prefix: str, weights: object, group_size: object) -> None:
    formats = get_args(Weights)
    require(weights in formats, f"{prefix}weights", weights, f"one of {', '.join(formats)}")
    require(group_size in GROUP_SIZES, f"{prefix}group_size", group_size, "32, 64 or 128")


def check_tree_limits(method: str, depth: int, max_nodes: int) -> None:
    check_int(f"{method}.depth", depth, 1, 128)
    check_int(f"{method}.max_nodes", max_nodes, 1, 1024)
