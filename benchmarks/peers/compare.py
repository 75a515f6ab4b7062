"""outrider and the peers in one run: forwards of M new tokens after 64, taking turns, between bandwidth probes.

Runs in outrider's environment and starts each peer (`measure_peers.py --serve`) in the peers' own:

    python benchmarks/peers/compare.py --model MODEL --models PEERS --peers-python ~/peers-venv/bin/python

A sample counts only if the read bandwidth before and after it agree within 15% (`outrider.bench.forward.measure`).
A machine whose memory flips between two bandwidths gets a table for each, of the samples within 15% of it: else one
engine in one of them would be compared with another in the other. The JSON has all samples.
`--quantized FOLDER`, what `outrider quantize` made of the model, measures that too: the peers' Q4_0 has an output
layer of 4 bits, and outrider's int4 has one of 8 unless it is made with `--lm-head int4`.
outrider's times include its Python; a peer's are those that it measures itself, without putting its context back.
Both run once right before they are timed.
Threads: OMP_NUM_THREADS for outrider, the same number for the peers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from outrider.bench.forward import (
    BandwidthProbe,
    ForwardRuns,
    Measurement,
    Sample,
    Workload,
    measure,
    probe_bytes,
    probes_agree,
)
from outrider.bench.report import environment
from outrider.bench.target import open_target

CONTEXT = 64
PREFILL = 512
OWN = "outrider"
MODE_SHARE = 0.1  # of the samples; fewer are no mode of the memory, but disturbed
SETTLE_S = 0.1  # the engine before may still spin (ONNX Runtime does for 30 ms) and share the memory with a probe
# For OpenVINO the group of activations that is fastest; its default, 32, is slower.
GROUP_128 = "DYNAMIC_QUANTIZATION_GROUP_SIZE=128"
PEERS: dict[str, list[tuple[str, ...]]] = {
    "bf16": [("llama.cpp", "bf16"), ("openvino", "bf16")],
    "int8": [("llama.cpp", "q8_0"), ("openvino", "int8", GROUP_128), ("onnxruntime", "int8")],
    "int4": [
        ("llama.cpp", "q4_0"),
        ("openvino", "int4"),
        ("openvino", "int4_g128", GROUP_128),
        ("onnxruntime", "int4"),
    ],
}


class Peer:
    """One engine with one weight format, loaded in a process of its own."""

    def __init__(self, spec: tuple[str, ...], args: argparse.Namespace) -> None:
        self.name, self.weights, *options = spec
        script = Path(__file__).resolve().parent / "measure_peers.py"
        command = [args.peers_python, str(script), "--models", args.models, "--peer", self.name]
        command += ["--weights", self.weights, *(part for option in options for part in ("--option", option))]
        command += ["--threads", str(torch.get_num_threads()), "--serve"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = self._read()

    def run(self, command: dict[str, int]) -> float:
        """Seconds of one forward, as the engine's own process measures it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**command, "repeats": 1, "warmup": 0}) + "\n")
        self._process.stdin.flush()
        return self._read()["ms"] / 1e3

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} {self.weights} ended; run measure_peers.py by hand to see why")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"{self.name} {self.weights}: {answer['error']}")
        return answer


def own_workloads(args: argparse.Namespace, rows: list[int]) -> dict[str, list[Workload]]:
    targets = [open_target(args.model, None, args.weights.split(","), args.group_size)]
    targets += [open_target(folder, None, None, args.group_size) for folder in args.quantized]
    found = {}
    for target in targets:
        lm_head = (getattr(target.config, "quantization_config", None) or {}).get("lm_head")
        for format in target.formats:
            runs = ForwardRuns(
                format, target.model(format), context=CONTEXT, num_positions=CONTEXT + max(*rows, PREFILL)
            )
            workloads = [runs.workload(m, target.num_params) for m in rows]
            name = f"{OWN} {format}" + (f", lm_head {lm_head}" if lm_head else "")
            found[name] = [*workloads, runs.prefill(PREFILL, target.num_params)]
    return found


def peer_workloads(peer: Peer, format: Any, rows: list[int]) -> list[Workload]:
    commands = [{"m": m} for m in rows]
    workloads = [
        Workload("forward", format, m, 0, 0, lambda command=command: peer.run(command))
        for m, command in zip(rows, commands, strict=True)
    ]
    return [*workloads, Workload("prefill", format, PREFILL, 0, 0, lambda: peer.run({"prefill": PREFILL}))]


def bandwidth_modes(bandwidths: list[float]) -> list[float]:
    """Bandwidths that the memory flips between, each the one that most of the samples left agree with."""
    left, modes = bandwidths, []
    while len(left) > MODE_SHARE * len(bandwidths):
        modes.append(max(left, key=lambda center: sum(probes_agree(center, other) for other in left)))
        left = [bandwidth for bandwidth in left if not probes_agree(bandwidth, modes[-1])]
    return modes


def milliseconds(name: str, sample: Sample) -> float:
    """Of a forward; outrider's with its Python."""
    return 1e3 * (sample.seconds if name.startswith(OWN) else sample.kernel_seconds or 0.0)


def summary(name: str, workloads: list[Workload], measurement: Measurement, bandwidth: float) -> dict[str, Any]:
    """Median and range in milliseconds by number of rows; of outrider also the share of the bandwidth."""
    records = []
    for workload in workloads:
        samples = [s for s in measurement.samples[workload] if probes_agree(s.bandwidth, bandwidth)]
        times = [milliseconds(name, sample) for sample in samples]
        record: dict[str, Any] = {"kind": workload.kind, "m": workload.num_rows, "num_samples": len(times)}
        if times:
            record |= {"ms": median(times), "ms_min": min(times), "ms_max": max(times)}
        if times and name.startswith(OWN):
            shares = [workload.num_bytes / sample.seconds / sample.bandwidth for sample in samples]
            record["share"] = median(shares)
            record["kernel_ms"] = median(1e3 * (sample.kernel_seconds or 0.0) for sample in samples)
        records.append(record)
    return {"name": name, "weights": workloads[0].weights, "rows": records}


def print_tables(summaries: list[dict[str, Any]], rows: list[int]) -> None:
    """Milliseconds, and how many times as long the fastest peer of each format takes."""
    heads = [*(f"M={m}" for m in rows), f"prompt of {PREFILL}"]
    print(f"| ms, median (range) | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for entry in summaries:
        cells = [
            f"{record['ms']:.1f} ({record['ms_min']:.1f}-{record['ms_max']:.1f})" if "ms" in record else "-"
            for record in entry["rows"]
        ]
        print(f"| {entry['name']} | {' | '.join(cells)} |")
    print(f"\n| fastest peer / outrider | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    times = {entry["name"]: [record.get("ms") for record in entry["rows"]] for entry in summaries}
    for entry in summaries:
        if not entry["name"].startswith(OWN):
            continue
        peers = PEERS[entry["weights"]]
        cells = []
        for i, ms in enumerate(times[entry["name"]]):
            found = [(times[f"{peer} {weights}"][i], peer) for peer, weights, *_ in peers]
            found = [(theirs, peer) for theirs, peer in found if theirs is not None]
            if ms is None or not found:
                cells.append("-")
                continue
            fastest, peer = min(found)
            missing = "" if len(found) == len(peers) else f", {len(found)} of {len(peers)}"
            cells.append(f"{fastest / ms:.2f} ({peer}{missing})")
        print(f"| {entry['name'].removeprefix(OWN).strip()} | {' | '.join(cells)} |")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of a Llama")
    parser.add_argument("--models", required=True, help="folder that convert.py filled from it")
    parser.add_argument("--peers-python", required=True, help="python of the peers' environment")
    parser.add_argument("--weights", default="bf16,int8,int4")
    parser.add_argument("--quantized", action="append", default=[], help="a folder that `outrider quantize` made")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", help="write the JSON here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    rows = [int(part) for part in args.rows.split(",")]
    named = own_workloads(args, rows)
    peers = [Peer(spec, args) for format in args.weights.split(",") for spec in PEERS[format]]
    formats = [format for format in args.weights.split(",") for _ in PEERS[format]]
    for peer, format in zip(peers, formats, strict=True):
        named[f"{peer.name} {peer.weights}"] = peer_workloads(peer, format, rows)
    measurement = Measurement()
    everything = [workload for workloads in named.values() for workload in workloads]
    try:
        read_bandwidth = BandwidthProbe(probe_bytes())

        def probe() -> float:
            time.sleep(SETTLE_S)
            return read_bandwidth()

        measure(everything, args.repeats, measurement, probe=probe)
    except KeyboardInterrupt:
        print("interrupted: what there is", file=sys.stderr)
    finally:
        for peer in peers:
            peer.close()
    everywhere = [sample.bandwidth for samples in measurement.samples.values() for sample in samples]
    modes = []
    for bandwidth in bandwidth_modes(everywhere):
        summaries = [summary(name, workloads, measurement, bandwidth) for name, workloads in named.items()]
        modes.append({"gbps": bandwidth / 1e9, "results": summaries})
        print(f"\nMemory at {bandwidth / 1e9:.1f} GB/s\n")
        print_tables(summaries, rows)
    if args.output:
        probes = [bandwidth / 1e9 for bandwidth in measurement.probes]
        record = {
            "command": "python benchmarks/peers/compare.py " + " ".join(sys.argv[1:]),
            **environment(),
            "versions": {f"{peer.name} {peer.weights}": peer.version for peer in peers},
            "probe_gbps": {"median": median(probes), "min": min(probes), "max": max(probes), "num": len(probes)},
            "modes": modes,
            "samples": [
                {
                    "name": name,
                    "kind": workload.kind,
                    "m": workload.num_rows,
                    "gbps": sample.bandwidth / 1e9,
                    "ms": milliseconds(name, sample),
                }
                for name, workloads in named.items()
                for workload in workloads
                for sample in measurement.samples[workload]
            ],
        }
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
