"""`outrider advise`: which drafter, tree and length to use, measured here or predicted for another machine."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from outrider.bench.hardware import KNOWN, THIS, hardware_of
from outrider.cli import options as opt
from outrider.cli.console import check_writable, report_json, stdout_console
from outrider.cli.options import MEASURING, option
from outrider.config import EngineConfig
from outrider.errors import ConfigError

if TYPE_CHECKING:
    from outrider.bench.roofline import ModelFigures

MAX_CONTEXT = 1 << 24
PREDICTION = "Prediction"


def advise(
    *,
    model: opt.Model = None,
    revision: opt.Revision = None,
    weights: opt.WeightFormat = EngineConfig.weights,
    group_size: opt.GroupSize = EngineConfig.group_size,
    draft: Annotated[
        list[str] | None,
        option(
            "--draft",
            help="Draft model to try (repeatable): folder or hub id; for a prediction also a size such as 0.5B.",
            panel=opt.DRAFTING,
        ),
    ] = None,
    hardware: Annotated[
        str,
        option("--hardware", help=f"{THIS}: measure; {', '.join(KNOWN)}, or a JSON file: predict.", panel=MEASURING),
    ] = THIS,
    context: Annotated[
        int, option("--context", help="Positions before the new ones, of predicted speeds.", panel=PREDICTION)
    ] = 512,
    acceptance: Annotated[
        str | None,
        option(
            "--acceptance",
            help="How often a draft token is right, or a list by depth. Default: what the bundled pair measured.",
            panel=PREDICTION,
            metavar="P,...",
        ),
    ] = None,
    json_out: opt.JsonOut = False,
    output: opt.OutputFile = None,
) -> None:
    """Say which drafter, tree and length to use, what it brings, and from which batch on plain decoding is as good.

    On this machine by measuring; on another one by its published figures, from the model's config.json alone.
    """
    if not 0 <= context <= MAX_CONTEXT:
        raise ConfigError("--context", got=context, expected=f"0 to {MAX_CONTEXT}")
    EngineConfig(model=model, weights=weights, group_size=group_size)  # type: ignore[arg-type]
    check_writable(output)
    record = _prediction(hardware, model, revision, draft or [], weights, group_size, acceptance, context)
    report_json(record, to_stdout=json_out, path=output)
    if not json_out:
        from outrider.cli.advise_report import print_prediction

        print_prediction(stdout_console(), record)


def _prediction(
    hardware: str,
    model: str | None,
    revision: str | None,
    drafts: list[str],
    weights: str,
    group_size: int,
    acceptance: str | None,
    context: int,
) -> dict[str, Any]:
    machine = hardware_of(hardware)

    from outrider.bench import predict as p
    from outrider.engine.bundled import BUNDLED_DRAFT, BUNDLED_TARGET

    rates = p.parse_acceptance(acceptance)
    target = _figures(model or str(BUNDLED_TARGET), revision, weights, group_size)
    names = drafts or ([str(BUNDLED_DRAFT)] if model is None else [])
    figures = [_draft_figures(name, target) for name in names]
    predictions = [p.predict(target, machine, of, context=context) for of in p.draftings(figures, rates)]
    best = max(predictions, key=lambda of: of.speedup)
    return {
        "advice": "prediction",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["outrider", *sys.argv[1:]],
        "hardware": asdict(machine),
        "model": asdict(target),
        "model_path": model,
        "weights": weights,
        "context": context,
        "assumptions": p.assumptions(target, machine, context=context, rates_given=rates is not None),
        "plain_tokens_per_s": p.plain_tokens_per_s(target, machine, 1, context),
        "recommended": best.drafting.name if best.pays else "none",
        "drafter": best.spec() if best.pays else {"method": "none"},
        "predictions": [of.record() for of in predictions],
    }


def _figures(path: str, revision: str | None, weights: str, group_size: int) -> ModelFigures:
    """Of a model by its config.json; nothing else is read or downloaded."""
    from outrider.bench.roofline import model_figures
    from outrider.models.loader import folder_of, quiet_transformers, read_config

    with quiet_transformers():
        config = read_config(folder_of(path, revision, files=["config.json"]))
        return model_figures(config, name=Path(path).name, weights=weights, group_size=group_size)  # type: ignore[arg-type]


def _draft_figures(name: str, target: ModelFigures) -> tuple[ModelFigures, str | None]:
    """A draft by its config.json, or by its size alone: then in the target's format, and without keys and values."""
    from outrider.bench.roofline import ModelFigures
    from outrider.bench.synthetic import parse_params

    if name[:1].isdigit() and not Path(name).expanduser().exists():
        size = parse_params(name)
        return ModelFigures(f"a {name} draft", size, weights=target.weights, weight_bytes=target.weight_bytes), None
    return _figures(name, None, "auto", 64), name
