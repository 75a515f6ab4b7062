"""Times one forward of M new tokens in the CPU engines that outrider is compared with.

Needs the environment and the converted weights that README.md beside this file describes; outrider itself is not
imported. One run loads one engine with one weight format and prints one JSON object on stdout:

    python measure_peers.py --models PEERS --peer openvino --weights int4 --rows 1,8 --repeats 5

What is timed: a forward of M token ids after a context of 64 tokens, with the logits of all M tokens read back
(`rows`); a prompt of 512 tokens from an empty cache with the last logits only (`prefill_512_ms`); single tokens one
after another from the same context, without choosing them (`decode_tok_s`). Medians, warm-up before each.

With `--serve` the engine stays loaded and answers one JSON line for each JSON line on stdin, so that another process
can take turns between engines:

    {"m": 8, "repeats": 3}   ->  {"m": 8, "ms": ..., "min_ms": ..., "max_ms": ..., "all_ms": [...]}
    {"prefill": 512}         ->  {"prefill": 512, "ms": ..., ...}
    {"decode": 32}           ->  {"decode": 32, "ms": ... (of all 32), "tok_s": ..., ...}

Every answer has `others_cpu`: how many CPUs' worth of time went to other processes meanwhile. It ought to be near 0;
llama.cpp in particular loses a factor, not a share, when one of its threads has to queue for a core.

`repeats` (default --repeats) and `warmup` (default 1) may be given with each. The first line it prints says that it
is ready. A wrong command is answered with {"error": ...}; end of input ends it.

`--check MODEL` compares the logits with transformers on the Hugging Face folder first, to prove the conversion right.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from peer_engines import ENGINES, LARGEST_CONTEXT, LARGEST_FORWARD, Engine, Logits, Tokens


def cpu_seconds() -> tuple[float, float]:
    """CPU seconds since boot of the whole machine (with time stolen from it), and of this process."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own.user + own.system


class Bench:
    """Times one engine on fixed random token ids."""

    def __init__(self, engine: Engine, context: int, seed: int) -> None:
        self.engine = engine
        ids = np.random.default_rng(seed).integers(0, engine.vocab_size, LARGEST_CONTEXT, dtype=np.int64)
        self.context: Tokens = ids[:context]
        self.following: Tokens = ids[context:]

    def forward_ms(self, rows: int, repeats: int, warmup: int) -> list[float]:
        """Milliseconds of each forward of `rows` tokens on top of the context, all logits wanted."""
        return self._repeat(self.context, self.following[:rows], rows, repeats, warmup)

    def prefill_ms(self, length: int, repeats: int, warmup: int) -> list[float]:
        """Milliseconds of each prompt of `length` tokens from nothing, the last logits wanted."""
        return self._repeat(self.context[:0], self.following[:length], 1, repeats, warmup)

    def decode_ms(self, count: int) -> float:
        """Milliseconds of `count` tokens decoded one after another on top of the context."""
        if not 1 <= count < len(self.following):
            raise ValueError(f"expected 1 to {len(self.following) - 1} tokens to decode, got {count}")
        self.engine.start(self.context)
        self.engine.forward(self.following[:1], 1)
        began = time.perf_counter()
        for step in range(1, count + 1):
            self.engine.forward(self.following[step : step + 1], 1)
        return (time.perf_counter() - began) * 1e3

    def logits(self, rows: int) -> Logits:
        """The logits [rows, vocab] of the tokens after the context."""
        self.engine.start(self.context)
        return self.engine.forward(self.following[:rows], rows).copy()

    def _repeat(self, context: Tokens, new: Tokens, num_logits: int, repeats: int, warmup: int) -> list[float]:
        if not 1 <= len(new) <= LARGEST_FORWARD:
            raise ValueError(f"expected 1 to {LARGEST_FORWARD} new tokens, got {len(new)}")
        taken = []
        for _ in range(warmup + repeats):
            self.engine.start(context)
            began = time.perf_counter()
            self.engine.forward(new, num_logits)
            taken.append((time.perf_counter() - began) * 1e3)
        return taken[warmup:]


def summary(taken: list[float]) -> dict[str, float]:
    """Median and range in milliseconds."""
    return {
        "ms": round(statistics.median(taken), 3),
        "min_ms": round(min(taken), 3),
        "max_ms": round(max(taken), 3),
    }


@contextmanager
def watch_others(report: dict[str, Any]) -> Iterator[None]:
    """Adds `others_cpu` to the report: CPUs that other processes kept busy on average."""
    began, (machine, own) = time.perf_counter(), cpu_seconds()
    yield
    wall, (machine_after, own_after) = time.perf_counter() - began, cpu_seconds()
    report["others_cpu"] = round(max(0.0, machine_after - machine - own_after + own) / wall, 2)


def answer(bench: Bench, command: dict[str, Any], default_repeats: int) -> dict[str, Any]:
    """Carries out one command of --serve."""
    reply = dict(command)
    repeats, warmup = int(command.get("repeats", default_repeats)), int(command.get("warmup", 1))
    with watch_others(reply):
        if "m" in command:
            taken = bench.forward_ms(int(command["m"]), repeats, warmup)
        elif "prefill" in command:
            taken = bench.prefill_ms(int(command["prefill"]), repeats, warmup)
        elif "decode" in command:
            taken = [bench.decode_ms(int(command["decode"])) for _ in range(repeats)]
        else:
            raise ValueError(f"expected 'm', 'prefill' or 'decode' in the command, got {command}")
    reply |= {**summary(taken), "all_ms": [round(ms, 3) for ms in taken]}
    if "decode" in command:
        reply["tok_s"] = round(int(command["decode"]) / reply["ms"] * 1e3, 2)
    return reply


def serve(bench: Bench, head: dict[str, Any], default_repeats: int) -> None:
    """Answers JSON lines on stdin until it ends."""
    print(json.dumps({"ready": True, **head}), flush=True)
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            reply = answer(bench, json.loads(line), default_repeats)
        except (ValueError, TypeError, AttributeError) as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that one run without --serve reports."""
    shared = {"repeats": args.repeats, "warmup": args.warmup}
    bench.forward_ms(8, 1, args.warmup)
    rows = [answer(bench, {"m": m, **shared}, args.repeats) for m in args.rows]
    report: dict[str, Any] = {"rows": [{k: v for k, v in row.items() if k not in shared} for row in rows]}
    if args.prefill:
        prompt = answer(bench, {"prefill": args.prefill, **shared}, args.repeats)
        names = ("ms", "min_ms", "max_ms", "others_cpu")
        report |= {f"prefill_{args.prefill}_{name}": prompt[name] for name in names}
    if args.decode:
        decode = answer(bench, {"decode": args.decode, **shared}, args.repeats)
        slowest, fastest = (round(args.decode / decode[name] * 1e3, 2) for name in ("max_ms", "min_ms"))
        report |= {"decode_tok_s": decode["tok_s"], "decode_tok_s_range": [slowest, fastest]}
        report["decode_others_cpu"] = decode["others_cpu"]
    return report


def check(bench: Bench, model: Path, rows: int = 8) -> dict[str, float]:
    """Compares logits with transformers in float32: cosine, and how often the likeliest token is the same."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = np.concatenate([bench.context, bench.following[:rows]])
    with torch.inference_mode():
        wanted = reference(torch.from_numpy(ids)[None]).logits[0, -rows:].numpy()
    got = bench.logits(rows)
    cosine = (got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)
    return {
        "min_cosine": round(float(cosine.min()), 5),
        "same_argmax": float((got.argmax(1) == wanted.argmax(1)).mean()),
    }


def parse_rows(text: str) -> list[int]:
    return [int(m) for m in text.split(",")]


def parse_args() -> argparse.Namespace:
    known = "; ".join(f"{name}: {', '.join(formats)}" for name, (_, formats) in ENGINES.items())
    epilog = f"""Weights: {known}. Options: llama.cpp: fields of llama_context_params (flash_attn_type=0); openvino:
    properties (DYNAMIC_QUANTIZATION_GROUP_SIZE=128); onnxruntime: session config entries."""
    parser = argparse.ArgumentParser(description="Time a CPU engine's forward passes.", epilog=epilog)
    parser.add_argument("--models", type=Path, required=True, help="folder that convert.py wrote (its --out)")
    parser.add_argument("--peer", choices=list(ENGINES), required=True)
    parser.add_argument("--weights", required=True, help="weight format, see below")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="for the engine, see below"
    )
    parser.add_argument("--rows", type=parse_rows, default="1,2,4,8,16,32,64", help="values of M, comma-separated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="untimed forwards before each measurement")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache before each forward")
    parser.add_argument("--prefill", type=int, default=512, help="prompt length; 0 leaves it out")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the token ids")
    parser.add_argument("--check", type=Path, metavar="MODEL", help="also compare logits with this HF folder")
    parser.add_argument("--serve", action="store_true", help="answer JSON commands on stdin instead")
    args = parser.parse_args()
    if any("=" not in pair for pair in args.option):
        parser.error(f"--option: expected NAME=VALUE, got {args.option}")
    if args.weights not in ENGINES[args.peer][1]:
        parser.error(f"--weights of {args.peer}: expected one of {ENGINES[args.peer][1]}, got {args.weights!r}")
    return args


def main() -> None:
    args = parse_args()
    options = dict(pair.split("=", 1) for pair in args.option)
    began = time.perf_counter()
    engine = ENGINES[args.peer][0](args.models, args.weights, args.threads, options)
    head: dict[str, Any] = {
        "peer": engine.name,
        "version": engine.version,
        "weights": args.weights,
        "options": options,
        "threads": args.threads,
        "context": args.context,
        "load_s": round(time.perf_counter() - began, 2),
        "details": engine.details,
    }
    bench = Bench(engine, args.context, args.seed)
    if args.check:
        head["check"] = check(bench, args.check)
    if args.serve:
        serve(bench, head, args.repeats)
    else:
        print(json.dumps({**head, "repeats": args.repeats, **measure(bench, args)}))


if __name__ == "__main__":
    main()
