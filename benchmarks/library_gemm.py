"""Our linear layers beside torch's (oneDNN) on the layers of a 0.5B Llama, taking turns in one process.

For prompts a library's GEMM could be the faster one. It is not row-invariant: only the numerical mode could use it.

    OMP_NUM_THREADS=2 python benchmarks/library_gemm.py --output benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from outrider.bench.report import environment
from outrider.kernels import native
from outrider.kernels.packed import pack_bf16, pack_fp32, pack_int8

SHAPES = ((1280, 1280), (8192, 1280), (1280, 4096))  # outputs, inputs: attention, gate and up, down
ROWS = (16, 64, 256, 512)
REPEATS = 15


def measure(num_outputs: int, num_inputs: int, num_rows: int) -> dict[str, object]:
    weight = torch.randn(num_outputs, num_inputs) / num_inputs**0.5
    x = torch.randn(num_rows, num_inputs)
    narrow_x, narrow_weight = x.bfloat16(), weight.bfloat16()
    scales = weight.abs().amax(1) / 127
    ours = {
        "fp32": native.Linear(pack_fp32(weight), None),
        "bf16": native.Linear(pack_bf16(narrow_weight), None),
        "int8": native.Linear(pack_int8((weight / scales[:, None]).round().to(torch.int8), scales), None),
    }
    contenders = {f"outrider {name}": lambda layer=layer: layer(x) for name, layer in ours.items()}
    contenders |= {"torch fp32": lambda: F.linear(x, weight), "torch bf16": lambda: F.linear(narrow_x, narrow_weight)}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repeat in range(REPEATS + 2):  # two to warm up
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            time.sleep(0.005)  # torch's threads spin after their work
            start = time.perf_counter()
            contenders[name]()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    times = {
        name: {"ms": 1e3 * median(s), "ms_min": 1e3 * min(s), "ms_max": 1e3 * max(s)} for name, s in seconds.items()
    }
    return {"num_outputs": num_outputs, "num_inputs": num_inputs, "num_rows": num_rows, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.manual_seed(0)
    records = []
    for num_outputs, num_inputs in SHAPES:
        for num_rows in ROWS:
            record = measure(num_outputs, num_inputs, num_rows)
            records.append(record)
            cells = (
                f"{name} {t['ms']:.2f} ({t['ms_min']:.2f}-{t['ms_max']:.2f})" for name, t in record["times"].items()
            )
            print(f"{num_inputs} -> {num_outputs}, {num_rows} rows: " + ", ".join(cells), flush=True)
    if args.output:
        record = {"command": "python benchmarks/library_gemm.py", **environment(), "results": records}
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
