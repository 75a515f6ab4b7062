"""What rounding a model's weights costs: held-out bits per byte and agreement, by format and method.

    python scripts/quantization_quality.py --output quality.json

Every variant runs in transformers' module with `outrider.kernels.reference_linear` in place of its linear layers, so
that activations are rounded as the kernels round them. Held-out text is that of the bundled model; calibration text
is other files of the standard library.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bundled.common import log, quiet_transformers, write_json
from bundled.corpus import collect_corpus
from bundled.evaluate import evaluate_text
from outrider.kernels.packed import PackedWeight, dequantize
from outrider.kernels.reference_linear import linear
from outrider.quantization.calibrate import Calibration, calibration_ids
from outrider.quantization.weights import pack_linear

BUNDLED = Path(__file__).resolve().parents[1] / "src" / "outrider" / "bundled" / "target"

# name: (format of the layers, method, format of lm_head)
VARIANTS: dict[str, tuple[Any, str, Any]] = {
    "bf16": ("bf16", "rtn", "bf16"),
    "int8": ("int8", "rtn", "int8"),
    "int4 nearest, lm_head int8": ("int4", "rtn", "int8"),
    "int4 nearest, lm_head int4": ("int4", "rtn", "int4"),
    "int4 gptq, lm_head int8": ("int4", "gptq", "int8"),
    "int4 gptq, lm_head int4": ("int4", "gptq", "int4"),
}


def load(model: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def forward_of(packed: PackedWeight, bias: Tensor | None) -> Callable[..., Tensor]:
    def forward(input: Tensor) -> Tensor:
        return linear(input.flatten(0, -2), packed, bias).view(*input.shape[:-1], -1)

    return forward


def with_weights(module: nn.Module, packed: Mapping[str, PackedWeight]) -> nn.Module:
    """The module computing its linear layers as the kernels do."""
    for name, part in linear_layers(module).items():
        part.forward = forward_of(packed[name], part.bias)
    return module


def relative_error(module: nn.Module, packed: Mapping[str, PackedWeight]) -> float:
    """|W - W'| / |W| over all linear layers."""
    error = whole = 0.0
    for name, part in linear_layers(module).items():
        error += float((dequantize(packed[name]) - part.weight).square().sum())
        whole += float(part.weight.square().sum())
    return math.sqrt(error / whole)


def calibrate(model: Path, token_ids: Tensor, group_size: int) -> dict[str, PackedWeight]:
    module = load(model)
    calibration = Calibration(module, list(linear_layers(module)), token_ids, group_size)
    return {name: packed for _, part in calibration.run({}) for name, packed in part.items()}


def calibration_text(train: Mapping[str, str]) -> str:
    """The training files one after the other, in an order that has nothing to do with their names."""
    names = sorted(train)
    random.Random(0).shuffle(names)
    return "\n".join(train[name] for name in names)


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of every variant."""
    train, held_out = collect_corpus(Path(sysconfig.get_path("stdlib")))
    texts = [text for _, text in sorted(held_out.items())]
    if arguments.max_files:
        texts = texts[:: math.ceil(len(texts) / arguments.max_files)]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    reference = load(arguments.model)
    context_length = getattr(reference.config, "max_position_embeddings", 1 << 30)
    token_ids = calibration_ids(tokenizer, calibration_text(train), arguments.calibration_tokens, context_length)
    start = time.perf_counter()
    gptq = calibrate(arguments.model, token_ids, arguments.group_size)
    record: dict[str, Any] = {
        "model": arguments.model.name,
        "group_size": arguments.group_size,
        "calibration_tokens": token_ids.numel(),
        "calibration_seconds": time.perf_counter() - start,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "variants": {},
    }
    log(f"calibrated in {record['calibration_seconds']:.0f} s")
    for variant, (format, method, lm_head) in VARIANTS.items():
        packed = {}
        for name, part in linear_layers(reference).items():
            wanted = lm_head if name == "lm_head" else format
            rounded = pack_linear(part.weight, wanted, arguments.group_size, name)
            packed[name] = gptq[name] if method == "gptq" and wanted == "int4" else rounded
        module = with_weights(load(arguments.model), packed)
        figures = evaluate_text(reference, module, tokenizer, texts)
        record["held_out"] = {name: figures[name] for name in ("files", "bytes", "tokens")}
        record["float32_bits_per_byte"] = figures["target_bits_per_byte"]
        record["variants"][variant] = {
            "bits_per_byte": figures["draft_bits_per_byte"],
            "against_float32": figures["draft_bits_per_byte"] / figures["target_bits_per_byte"] - 1,
            "same_most_likely_token": figures["top1_agreement"],
            "overlap": figures["overlap"],
            "weight_error": relative_error(reference, packed),
        }
        log(f"{variant}: {json.dumps(record['variants'][variant])}")
    return record


def print_table(record: Mapping[str, Any]) -> None:
    print(f"float32: {record['float32_bits_per_byte']:.4f} bits per byte, {record['held_out']['tokens']:.0f} tokens")
    for variant, figures in record["variants"].items():
        print(
            f"{variant:28} {figures['bits_per_byte']:.4f} ({figures['against_float32']:+.2%}), "
            f"same most likely token {figures['same_most_likely_token']:.2%}, "
            f"overlap {figures['overlap']:.4f}, weight error {figures['weight_error']:.2%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--max-files", type=int, default=0, help="held-out files, spread evenly; 0 is all")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    quiet_transformers()
    record = evaluate(arguments)
    print_table(record)
    if arguments.output is not None:
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
