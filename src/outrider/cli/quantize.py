"""`outrider quantize`: a model with int8 or int4 weights in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli.console import note, progress_bar, stderr_console, stdout_console
from outrider.cli.options import MODEL, EngineOptions, option
from outrider.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from outrider.kernels.packed import PackedWeight
    from outrider.quantization.convert import QuantizationReport, QuantizationSettings
    from outrider.quantization.linears import LinearLayer
    from outrider.quantization.output_folder import OutputFolder

CALIBRATION = "Calibration"
DEFAULT_CALIBRATION_TOKENS = 32768


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model (safetensors).")],
    out: Annotated[Path, typer.Argument(help="New folder for the quantised model.")],
    *,
    weights: Annotated[str, option("--weights", "-w", help="int8 or int4.", panel=MODEL)] = "int4",
    group_size: Annotated[
        int, option("--group-size", help="Of int4: inputs that share a scale; 32, 64 or 128.", panel=MODEL)
    ] = 64,
    lm_head: Annotated[
        str | None, option("--lm-head", help="Of the output layer: int8 (default), int4 or bf16.", panel=MODEL)
    ] = None,
    revision: opt.Revision = None,
    calibrate: Annotated[
        Path | None, option("--calibrate", help="Text like the model's work, for GPTQ (int4).", panel=CALIBRATION)
    ] = None,
    calibration_tokens: Annotated[
        int, option("--calibration-tokens", help="Most tokens of it to use.", panel=CALIBRATION)
    ] = DEFAULT_CALIBRATION_TOKENS,
    method: Annotated[
        str | None,
        option("--method", help="rtn (nearest) or gptq; default: gptq with --calibrate.", panel=CALIBRATION),
    ] = None,
    threads: opt.Threads = None,
    json_out: opt.JsonOut = False,
) -> None:
    """Round a model's weights to int8 or int4, once, for a quick start and less memory.

    Interrupted calibration goes on where it was when the same command is given again.
    """
    from outrider.quantization.convert import QuantizationSettings

    method = method or ("rtn" if calibrate is None else "gptq")
    settings = QuantizationSettings(weights, group_size, method, lm_head)  # pyright: ignore[reportArgumentType]
    sample = _read_sample(calibrate, calibration_tokens, method)
    EngineOptions(threads=threads).set_threads()
    start = time.perf_counter()
    report = _quantize(model, revision, out, settings, sample)
    record = {
        "model": model,
        "out": str(out),
        **settings.to_config(),
        **({} if sample is None else {"calibration_tokens": sample.num_tokens}),
        **report.to_dict(),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if json_out:
        print(json.dumps(record))
    else:
        _print_summary(record)


@dataclass(frozen=True)
class _Sample:
    """What to calibrate with."""

    text: str
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return {"sha256": hashlib.sha256(self.text.encode()).hexdigest(), "num_tokens": self.num_tokens}


def _read_sample(path: Path | None, num_tokens: int, method: str) -> _Sample | None:
    if (path is None) == (method == "gptq"):
        got = "no --calibrate" if path is None else "--calibrate"
        raise ConfigError("--method", got=f"{method} with {got}", expected="gptq with --calibrate, or rtn without")
    if num_tokens < 1:
        raise ConfigError("--calibration-tokens", got=num_tokens, expected="1 or more")
    if path is None:
        return None
    try:
        return _Sample(path.read_text(encoding="utf-8"), num_tokens)
    except UnicodeDecodeError as error:
        raise ConfigError("--calibrate", got=f"{path}: {error}", expected="a text in UTF-8") from error


def _quantize(
    model: str, revision: str | None, out: Path, settings: QuantizationSettings, sample: _Sample | None
) -> QuantizationReport:
    from outrider.models.loader import folder_of, quiet_transformers, read_config
    from outrider.quantization.convert import check_quantizable, write_quantized
    from outrider.quantization.linears import find_linears
    from outrider.quantization.output_folder import OutputFolder
    from outrider.quantization.weights import open_weights

    with stderr_console().status("reading the model"), quiet_transformers():
        folder = folder_of(model, revision)
        config = read_config(folder)
        source = open_weights(folder)
        layers = find_linears(config, source)
        check_quantizable(source, layers)
    run = {
        "model": str(folder.resolve()),
        "tensors": {name: list(source.shape(name)) for name in source.names},
        "calibration": None if sample is None else sample.to_dict(),
        **settings.to_config(),
    }
    output = OutputFolder(out, run)
    with progress_bar() as progress:
        calibrated = {}
        if sample is not None:
            calibrated = _Calibrator(folder, config, layers, settings).run(sample, output, progress)
        task = progress.add_task("writing", total=len(layers))
        report = write_quantized(
            source,
            layers,
            settings,
            output.weights_file,
            calibrated=calibrated,
            on_layer=lambda: progress.advance(task),
        )
    output.finish(folder, settings.to_config())
    return report


@dataclass(frozen=True)
class _Calibrator:
    folder: Path
    config: Any
    layers: list[LinearLayer]
    settings: QuantizationSettings

    def run(self, sample: _Sample, output: OutputFolder, progress: Progress) -> dict[str, PackedWeight]:
        """The int4 layers by their names in the module; each part of them is saved when it is done."""
        import torch

        from outrider.models.loader import load_tokenizer, quiet_transformers, read_module
        from outrider.models.model_config import context_length_of
        from outrider.quantization.calibrate import Calibration, calibration_ids

        tokenizer = load_tokenizer(self.folder)
        token_ids = calibration_ids(tokenizer, sample.text, sample.num_tokens, context_length_of(self.config))
        dtype = torch.bfloat16 if self.config.dtype == torch.bfloat16 else torch.float32
        with quiet_transformers():
            module = read_module(self.folder, self.config, dtype).eval().requires_grad_(False)
        names = [layer.module_name for layer in self.layers if self.settings.format_of(layer) == "int4"]
        calibration = Calibration(module, names, token_ids, self.settings.group_size)
        finished = output.finished_parts()
        if finished:
            note(f"going on after {len(finished)} of {len(calibration.parts)} parts")
        task = progress.add_task("calibrating", total=len(calibration.parts))
        packed = {name: weight for part in finished.values() for name, weight in part.items()}
        for part, done in calibration.run(finished, lambda: progress.advance(task)):
            output.save_part(part, done)
            packed.update(done)
        return packed


def _print_summary(record: dict[str, Any]) -> None:
    from rich.table import Table

    before, after = record["bytes_before"], record["bytes_after"]
    groups = f" in groups of {record['group_size']}" if "group_size" in record else ""
    table = Table(title=f"{record['model']} -> {record['out']}", show_header=False, title_justify="left")
    table.add_row("weights", f"{record['weights']}{groups}, {record['method']}, lm_head {record['lm_head']}")
    table.add_row("linear layers", str(record["num_linears"]))
    table.add_row("size", f"{before / 2**20:,.1f} MiB -> {after / 2**20:,.1f} MiB ({after / before:.0%})")
    table.add_row("weight error", f"{record['weight_error']:.2%} (relative, Frobenius)")
    table.add_row("time", f"{record['seconds']:.1f} s")
    stdout_console().print(table)
