"""The target's own text: continuations of prefixes of the training corpus, on which the draft learns.

A draft is used on text that the target writes, which is not distributed like the corpus. Batch n of the
rows is a pure function of (seed, n, target), kept as one file, so that a stopped run goes on there.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bundled.common import CHUNK, log, write_json
from bundled.corpus import ChunkStream
from bundled.loop import stop_requests


@dataclass(frozen=True)
class GenerateConfig:
    """How much of the target's own text, and of which kind."""

    rows: int = 2048
    row_length: int = 512  # prefix and continuation together
    min_prefix: int = 16
    max_prefix: int = 320
    rows_per_batch: int = 128  # of one prefix length
    greedy_share: float = 0.6
    temperatures: tuple[float, float] = (0.8, 1.0)  # of the other rows, uniform
    seed: int = 0


def weights_digest(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of transformers with a fast path for one new position over whole caches.

    There the CPU kernel of scaled_dot_product_attention takes three times the rest of the model.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads, _, size = query.shape
    groups = batch * key.shape[1]
    q = query.reshape(groups, -1, size) * options["scaling"]  # the heads that share a key
    weights = torch.bmm(q, key.reshape(groups, -1, size).transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, value.reshape(groups, -1, size)).reshape(batch, 1, heads, size), None


def generator_of(target: Any) -> Any:
    """A bf16 copy of the target that decodes fast."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    model = copy.deepcopy(target).to(torch.bfloat16).eval()
    model.set_attn_implementation("grouped")
    return model


@torch.inference_mode()
def continue_rows(model: Any, prefix: Tensor, length: int, temperature: Tensor, random: torch.Generator) -> Tensor:
    """[B, length]: each row's prefix and its continuation at its temperature; 0 is greedy."""
    from transformers import DynamicCache

    rows = torch.empty(len(prefix), length, dtype=torch.long)
    start = prefix.shape[1]
    rows[:, :start] = prefix
    cache = DynamicCache(config=model.config)
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, temperature)[:, None]
    step = prefix
    for position in range(start, length):
        logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        logits = logits[:, -1].float()  # [B, V]
        noise = torch.empty_like(logits).exponential_(generator=random).log_()  # Gumbel-max sampling
        choice = torch.where(greedy, logits.argmax(-1), (logits / scale - noise).argmax(-1))
        rows[:, position] = choice
        step = choice[:, None]
    return rows


def generate_batch(model: Any, stream: ChunkStream, n: int, config: GenerateConfig) -> np.ndarray:
    """Batch n: [rows_per_batch, row_length] tokens."""
    random = np.random.default_rng([config.seed, n])
    size = config.rows_per_batch
    length = int(random.integers(config.min_prefix, config.max_prefix + 1))
    chunks = random.integers(stream.chunks_per_epoch, size=size)
    starts = random.integers(CHUNK - length, size=size)
    prefix = np.stack([stream.chunk(c)[s : s + length] for c, s in zip(chunks.tolist(), starts, strict=True)])
    num_greedy = round(config.greedy_share * size)
    temperature = random.uniform(*config.temperatures, size=size)
    temperature[:num_greedy] = 0
    rows = continue_rows(
        model,
        torch.from_numpy(prefix.astype(np.int64)),
        config.row_length,
        torch.from_numpy(temperature.astype(np.float32)),
        torch.Generator().manual_seed(int(random.integers(2**62))),
    )
    return rows.numpy().astype(np.uint16)


def generate(target: Any, stream: ChunkStream, folder: Path, config: GenerateConfig) -> np.ndarray | None:
    """All rows, [rows, row_length]; what `folder` holds already of them is used. None: asked to stop."""
    source = {"target": weights_digest(target), **asdict(config)}
    source = json.loads(json.dumps({k: v for k, v in source.items() if k != "rows"}))
    about = folder / "source.json"
    if folder.exists() and not (about.exists() and json.loads(about.read_text()) == source):
        log(f"{folder} holds rows of another target or of other settings; starting anew")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(about, source)
    model = generator_of(target)
    batches: list[np.ndarray] = []
    count = -(-config.rows // config.rows_per_batch)
    last = time.perf_counter()
    with stop_requests() as stop:
        for n in range(count):
            path = folder / f"{n:05d}.npy"
            if not path.exists():
                partial = path.with_name(f"partial-{path.name}")
                np.save(partial, generate_batch(model, stream, n, config))
                partial.rename(path)
            batches.append(np.load(path))
            if stop:
                log(f"stopped with {n + 1} of {count} batches of the target's continuations")
                return None
            if time.perf_counter() - last > 30 or n + 1 == count:
                log(f"{n + 1}/{count} batches of the target's continuations")
                last = time.perf_counter()
    return np.concatenate(batches)[: config.rows]
