"""Past outputs of an engine in one suffix tree of bounded size, and in a file between runs."""

from __future__ import annotations

import hashlib
import os
import struct
import weakref
from collections.abc import Callable, Sequence
from logging import getLogger
from pathlib import Path

import numpy as np

from outrider.config import SuffixConfig
from outrider.drafting.sources.suffix_index import SuffixTree, new_tree
from outrider.errors import LookupFileError, VocabularyMismatchError

MAGIC = b"outrider-history"
VERSION = 1
# Magic, version, fingerprint of the vocabulary, outputs, tokens. Then the outputs' lengths and their tokens, all
# uint32, and the SHA-256 of everything before it.
HEADER = struct.Struct("<16sI32sII")
DIGEST_BYTES = 32
SAVES_PER_FILL = 16  # a crash loses at most this part of what the history holds


class PastOutputs:
    """The newest outputs, `history_tokens` tokens at most; with a file, saved now and then and at the end.

    Args:
        vocab_fingerprint: digest of the token ids' meanings, 32 bytes; asked for only with a file.

    Attributes:
        tree: the outputs, each a sequence of its own.

    Raises:
        LookupFileError: the file is damaged or is something else.
        VocabularyMismatchError: it was written with another vocabulary.
        OSError: it cannot be read, or its folder does not exist.
    """

    def __init__(self, config: SuffixConfig, *, vocab_size: int, vocab_fingerprint: Callable[[], bytes]) -> None:
        self.tree = new_tree(config.max_match)
        self._capacity = config.history_tokens
        self._file: _HistoryFile | None = None
        self._num_unsaved = 0
        if config.history_file is not None and self._capacity:
            path, fingerprint = Path(config.history_file), vocab_fingerprint()
            if path.exists():
                for output in read_history(path, vocab_size=vocab_size, fingerprint=fingerprint):
                    self._insert(output)
            elif not path.absolute().parent.is_dir():
                raise FileNotFoundError(2, "no such folder for the history file", str(path.parent))
            self._file = _HistoryFile(path, fingerprint, self.tree)
            weakref.finalize(self, self._file.save)

    def add(self, output: Sequence[int]) -> None:
        """Take in an output; the oldest ones make room."""
        self._insert(output)
        self._num_unsaved += len(output)
        if self._file is not None and self._num_unsaved * SAVES_PER_FILL >= self._capacity:
            self._file.save()
            self._num_unsaved = 0

    def _insert(self, output: Sequence[int]) -> None:
        output = output[-self._capacity :] if self._capacity else ()
        if not output:
            return
        while len(self.tree) + len(output) > self._capacity:
            self.tree.forget_oldest()
        self.tree.extend(output)
        self.tree.end_sequence()


class _HistoryFile:
    def __init__(self, path: Path, fingerprint: bytes, tree: SuffixTree) -> None:
        self._path, self._fingerprint, self._tree = path, fingerprint, tree
        self._saved_version = tree.version

    def save(self) -> None:
        """Write what is new; a history that cannot be written is a pity, not a reason to end a request."""
        if self._tree.version == self._saved_version:
            return
        try:
            write_history(self._path, self._tree.sequences(), fingerprint=self._fingerprint)
        except OSError as error:
            getLogger("outrider").warning("cannot write the history of outputs to %s: %s", self._path, error)
        self._saved_version = self._tree.version


def write_history(path: Path, outputs: Sequence[Sequence[int]], *, fingerprint: bytes) -> None:
    """Replace a history file in one step: whoever reads it, or interrupts this, finds the old one or the new one.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    lengths = np.array([len(output) for output in outputs], dtype="<u4")
    tokens = np.array([token for output in outputs for token in output], dtype="<u4")
    content = HEADER.pack(MAGIC, VERSION, fingerprint, len(lengths), len(tokens))
    content += lengths.tobytes() + tokens.tobytes()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_history(path: Path, *, vocab_size: int, fingerprint: bytes) -> list[list[int]]:
    """The outputs in a history file, the oldest first.

    Raises:
        LookupFileError: it is damaged or is something else.
        VocabularyMismatchError: it was written with another vocabulary.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if len(content) < HEADER.size + DIGEST_BYTES or not content.startswith(MAGIC):
        raise _damaged(path, "another kind of file, or a part of one")
    _, version, written_fingerprint, num_outputs, num_tokens = HEADER.unpack_from(content)
    if version != VERSION:
        raise _damaged(path, f"version {version}", f"version {VERSION}")
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest or len(body) != HEADER.size + 4 * (num_outputs + num_tokens):
        raise _damaged(path, "damaged content")
    if written_fingerprint != fingerprint:
        raise VocabularyMismatchError(
            f"history file {path}",
            got="another vocabulary",
            expected="the target's",
            remedy="give each model a history file of its own",
        )
    numbers = np.frombuffer(body, dtype="<u4", offset=HEADER.size)
    lengths, tokens = numbers[:num_outputs], numbers[num_outputs:]
    if int(lengths.sum()) != num_tokens or (num_tokens and int(tokens.max()) >= vocab_size):
        raise _damaged(path, "numbers that contradict each other")
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])] if num_outputs else []


def _damaged(path: Path, got: str, expected: str = "a history of outputs") -> LookupFileError:
    return LookupFileError(
        f"history file {path}", got=got, expected=expected, remedy="delete it; the history grows again"
    )
