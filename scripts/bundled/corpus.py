"""The corpus: which files, which are held out, and the endless stream of training chunks."""

from __future__ import annotations

import hashlib
import platform
import re
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bundled.common import CHUNK, log, write_json
from bundled.tokenizer import train_tokenizer

# Modules that neither model nor the tokenizer ever sees, relative to the standard library. An entry
# stands for `entry.py` and for everything in the package `entry/`.
HELD_OUT_MODULES: tuple[str, ...] = (
    *("argparse", "ast", "calendar", "cmd", "colorsys", "csv", "difflib", "fractions", "graphlib"),
    *("heapq", "http/client", "json", "queue", "sched", "shelve", "shlex", "statistics", "textwrap"),
    *("test/test_argparse", "test/test_ast", "test/test_calendar", "test/test_cmd"),
    *("test/test_colorsys", "test/test_csv", "test/test_difflib", "test/test_fractions"),
    *("test/test_graphlib", "test/test_heapq", "test/test_httplib", "test/test_json"),
    *("test/test_queue", "test/test_sched", "test/test_shelve", "test/test_shlex"),
    *("test/test_statistics", "test/test_textwrap"),
)

# Third-party code, generated tables and data that happens to end in .py.
EXCLUDED_PREFIXES: tuple[str, ...] = (
    *("site-packages/", "dist-packages/", "encodings/", "pydoc_data/", "lib2to3/tests/data/"),
    *("test/encoded_modules/", "test/test_lib2to3/data/", "msilib/", "_sysconfigdata", "config-"),
    *("html/entities.py", "stringprep.py", "keyword.py", "token.py"),
)


def is_held_out(path: str) -> bool:
    """Whether a path relative to the standard library belongs to a held-out module."""
    return any(path == f"{module}.py" or path.startswith(f"{module}/") for module in HELD_OUT_MODULES)


def is_data(text: str) -> bool:
    """Whether a file is mostly escaped data or long lines rather than code."""
    lines = text.splitlines()
    if not lines:
        return True
    escaped = sum(1 for line in lines if re.search(r"\\[xuU][0-9a-fA-F]", line))
    return escaped > 0.15 * len(lines) or len(text) / len(lines) > 120


def read_source(path: Path) -> str | None:
    """The file as text with its own line endings, or None where it is not valid UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def collect_corpus(stdlib: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(training files, held-out files) as {relative path: text}, without exact duplicates."""
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    seen: set[str] = set()
    paths = sorted((p.relative_to(stdlib).as_posix(), p) for p in stdlib.rglob("*.py"))
    for held_out_first in (True, False):  # so that a held-out file's duplicate is never trained on
        for name, path in paths:
            if is_held_out(name) != held_out_first or "__pycache__" in name:
                continue
            if name.startswith(EXCLUDED_PREFIXES) or "/site-packages/" in name:
                continue
            text = read_source(path)
            if text is None or is_data(text):
                continue
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest in seen:
                continue
            seen.add(digest)
            (held_out if held_out_first else train)[name] = text
    return train, held_out


def write_held_out(path: Path, held_out: dict[str, str]) -> None:
    """Tell benchmarks which files of any Python's standard library the models never saw."""
    record = {
        "note": "Paths relative to sysconfig.get_path('stdlib'); not seen in training. A module "
        "stands for module.py and for everything under module/, in any Python version.",
        "modules": list(HELD_OUT_MODULES),
        "python": platform.python_version(),
        "files": sorted(held_out),
    }
    write_json(path, record)


def prepare(work: Path, out: Path, vocab: int) -> None:
    """Stages corpus and tokenizer: writes tokens, document offsets and counts into the work folder."""
    if (work / "corpus.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    train, held_out = collect_corpus(Path(sysconfig.get_path("stdlib")))
    log(f"corpus: {len(train)} files for training, {len(held_out)} held out")
    tokenizer = train_tokenizer(list(train.values()), vocab)
    tokenizer.save_pretrained(work / "tokenizer")
    encoded = tokenizer.backend_tokenizer.encode_batch(list(train.values()), add_special_tokens=False)
    documents = [[*e.ids, tokenizer.eos_token_id] for e in encoded]
    np.save(work / "tokens.npy", np.concatenate([np.asarray(d, dtype=np.uint16) for d in documents]))
    np.save(work / "offsets.npy", np.cumsum([0, *map(len, documents)]))
    write_held_out(out / "held_out.json", held_out)
    counts = {
        "python": platform.python_version(),
        "files": len(train),
        "bytes": sum(len(t.encode()) for t in train.values()),
        "tokens": sum(map(len, documents)),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(t.encode()) for t in held_out.values()),
    }
    log(f"corpus: {counts}")
    write_json(work / "corpus.json", counts)


class ChunkStream:
    """The endless training stream: per epoch, shuffled documents cut into shuffled chunks.

    Chunk n is a pure function of (seed, n). Chunk c of an epoch covers tokens
    [phase + c * CHUNK, phase + (c + 1) * CHUNK] of its stream: one more than CHUNK, for the labels.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, seed: int) -> None:
        self.tokens, self.offsets, self.seed = tokens, offsets, seed
        self.chunks_per_epoch = (len(tokens) - 1) // CHUNK - 1
        if self.chunks_per_epoch < 1:
            raise ValueError(f"corpus has {len(tokens)} tokens; expected more than {2 * CHUNK}")
        self._epoch = -1

    def _load_epoch(self, epoch: int) -> None:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.offsets) - 1)
        parts = [self.tokens[self.offsets[d] : self.offsets[d + 1]] for d in order]
        self._stream = np.concatenate(parts)[int(random.integers(CHUNK)) :]
        self._order = random.permutation(self.chunks_per_epoch)
        self._epoch = epoch

    def chunk(self, n: int) -> np.ndarray:  # [CHUNK + 1]
        epoch, position = divmod(n, self.chunks_per_epoch)
        if epoch != self._epoch:
            self._load_epoch(epoch)
        start = int(self._order[position]) * CHUNK
        return self._stream[start : start + CHUNK + 1]

    def batch(self, first: int, num_chunks: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, each [B, T] with B * T == num_chunks * CHUNK and T == length."""
        rows = np.stack([self.chunk(n) for n in range(first, first + num_chunks)]).astype(np.int64)
        inputs, labels = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
        return inputs.reshape(-1, length), labels.reshape(-1, length)
