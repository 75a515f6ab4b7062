"""Building a datastore in bounded memory: chunk by chunk, under another name until it is whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from outrider.drafting.sources.datastore_file import HEADER_BYTES, SORTED_TOKENS, DatastoreHeader
from outrider.errors import ConfigError

SORT_BYTES_PER_TOKEN = 48  # of memory: ranks, keys, their order, and what sorting needs itself
MIN_CHUNK_TOKENS = 1024
MAX_CHUNK_TOKENS = 2**31


class DatastoreWriter:
    """Takes documents as tokens and leaves a datastore, or, after any exception, what was there before.

    Args:
        vocab_size: token ids are smaller.
        fingerprint: of the vocabulary.
        max_memory_bytes: most memory for buffering and sorting; what does not fit makes another chunk, and every
            chunk is searched in each lookup.

    Raises:
        ConfigError: too little memory for a chunk of 1,024 tokens.
        OSError: the folder cannot be written to.
    """

    def __init__(self, path: Path, *, vocab_size: int, fingerprint: bytes, max_memory_bytes: int) -> None:
        chunk_tokens = min(max_memory_bytes // SORT_BYTES_PER_TOKEN, MAX_CHUNK_TOKENS)
        if chunk_tokens < MIN_CHUNK_TOKENS:
            least = MIN_CHUNK_TOKENS * SORT_BYTES_PER_TOKEN
            raise ConfigError("memory to build with", got=f"{max_memory_bytes} bytes", expected=f"at least {least}")
        self._path = path
        self._vocab_size, self._fingerprint, self._chunk_tokens = vocab_size, fingerprint, chunk_tokens
        self._dtype = np.dtype(">u2" if vocab_size < 2**16 else ">u4")
        self._parts: list[np.ndarray] = []  # of the chunk that is being filled
        self._num_buffered = self._num_tokens = self._num_documents = 0
        self._digest = hashlib.sha256()
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._file = self._partial.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def __enter__(self) -> DatastoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    @property
    def header(self) -> DatastoreHeader:
        """Of what has been written so far."""
        return DatastoreHeader(
            self._vocab_size,
            self._fingerprint,
            self._num_documents,
            self._num_tokens,
            self._chunk_tokens,
            self._digest.digest(),
        )

    def add(self, token_ids: Sequence[int]) -> None:
        """Append to the current document."""
        tokens = np.asarray(token_ids, dtype=np.int64)
        assert not tokens.size or int(tokens.max()) < self._vocab_size, "a token outside of the vocabulary"
        self._append(tokens.astype(self._dtype))

    def end_document(self) -> None:
        """What follows has nothing to do with what was added before."""
        self._append(np.array([self._vocab_size], dtype=self._dtype))
        self._num_documents += 1

    def _append(self, tokens: np.ndarray) -> None:
        while tokens.size:
            taken = tokens[: self._chunk_tokens - self._num_buffered]
            self._parts.append(taken)
            self._num_buffered += taken.size
            tokens = tokens[taken.size :]
            if self._num_buffered == self._chunk_tokens:
                self._write_chunk()

    def _write_chunk(self) -> None:
        tokens = np.concatenate(self._parts, dtype=self._dtype)  # without it NumPy changes the byte order
        self._parts.clear()
        self._num_tokens += tokens.size
        self._num_buffered = 0
        self._write(tokens.tobytes() + bytes(-tokens.nbytes % 8))
        self._write(sorted_suffixes(tokens).astype("<u4").tobytes())

    def _write(self, content: bytes) -> None:
        self._digest.update(content)
        self._file.write(content)

    def _finish(self) -> None:
        if self._num_buffered:
            self._write_chunk()
        if self._num_tokens == 0:
            raise ConfigError("datastore", got="no text", expected="at least one token")
        self._file.seek(0)
        self._file.write(self.header.pack())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._partial.replace(self._path)


def sorted_suffixes(tokens: np.ndarray) -> np.ndarray:
    """Positions in the order of the `SORTED_TOKENS` tokens that stand there; of equals the first comes first.

    Prefix doubling (Manber and Myers 1993), ended early: ranks by 1, 2, 4, ... tokens, each from two of the last.
    A suffix that ends comes before those that go on.

    Args:
        tokens: ``[n]`` unsigned integers.

    Returns:
        ``[n]`` int64.
    """
    ranks = tokens.astype(np.int64)
    order = np.argsort(ranks, kind="stable")
    length = 1
    while length < SORTED_TOKENS:
        keys = (ranks + 1) << 32
        keys[:-length] |= ranks[length:] + 1
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        changes = np.empty(len(keys), dtype=bool)
        changes[0] = False
        np.not_equal(keys[1:], keys[:-1], out=changes[1:])
        del keys
        new_ranks = np.cumsum(changes)
        if new_ranks[-1] == len(order) - 1:
            break
        ranks[order] = new_ranks
        length *= 2
    return order
