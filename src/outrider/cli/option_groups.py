"""Options that several commands take together: a dataclass a group, whose fields are options of the command.

    @with_groups
    def verify(*, model: ModelOptions, ..., report: ReportOptions) -> None: ...

has `--model`, `--revision` and so on, where the group stands among the parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from outrider.bench.workloads import Workload
from outrider.cli import options as opt
from outrider.cli.console import check_writable, report_json
from outrider.cli.prompts import chosen_workload
from outrider.config import CacheConfig, EngineConfig


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters of a group's type are options, one for each of its fields."""
    signature = inspect.signature(command, eval_str=True)
    groups = {of.name: of.annotation for of in signature.parameters.values() if _is_group(of.annotation)}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name in groups:
            group = groups[parameter.name]
            types = get_type_hints(group, include_extras=True)
            parameters += [_option_of(field, types[field.name]) for field in fields(group)]
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def flat(*arguments: Any, **values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(*arguments, **values)

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and is_dataclass(annotation)


def _option_of(field: Field[Any], annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


@dataclass(frozen=True)
class ModelOptions:
    """The target: which one, and in which form."""

    model: opt.Model = None
    revision: opt.Revision = None
    dtype: opt.Dtype = EngineConfig.dtype
    weights: opt.WeightFormat = EngineConfig.weights
    group_size: opt.GroupSize = EngineConfig.group_size
    device: opt.Device = EngineConfig.device


@dataclass(frozen=True)
class DraftOptions:
    """What goes with the names of drafters."""

    draft_model: opt.DraftModel = None
    drafter_settings: opt.DrafterSettings = None


@dataclass(frozen=True)
class CacheOptions:
    """Exactness, and the cache of keys and values."""

    exactness: opt.ExactnessMode = EngineConfig.exactness
    cache_gb: opt.CacheGb = CacheConfig.memory_gb
    cache_dtype: opt.CacheDtype = CacheConfig.dtype


@dataclass(frozen=True)
class WorkloadOptions:
    """Prompts to measure on."""

    workload: opt.WorkloadName = None
    prompts: opt.Prompts = None
    data: opt.DataFile = None

    def chosen(self, num_prompts: int) -> Workload:
        """See `chosen_workload`."""
        return chosen_workload(self.workload, self.prompts, self.data, num_prompts)


@dataclass(frozen=True)
class ReportOptions:
    """Where a report goes."""

    json_out: opt.JsonOut = False
    output: opt.OutputFile = None

    def check(self) -> None:
        """See `check_writable`."""
        check_writable(self.output)

    def write(self, record: dict[str, Any]) -> None:
        """See `report_json`."""
        report_json(record, to_stdout=self.json_out, path=self.output)
