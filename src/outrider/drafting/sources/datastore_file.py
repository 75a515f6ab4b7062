"""The file of a datastore: a tokenised corpus in chunks, each with its suffix array, mapped into memory.

    header      4,096 bytes: `HEADER`, its SHA-256, zeros
    chunk 0     tokens, big endian, so that comparing bytes compares tokens; zeros up to a multiple of 8 bytes;
                suffix array: every position of the chunk, uint32, little endian, in the order of what stands there
    chunk 1 ... the same; all chunks but the last have `chunk_tokens` tokens

After each document stands the separator: the first number that is no token id.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outrider.errors import LookupFileError, VocabularyMismatchError

MAGIC = b"outrider-corpus\0"
VERSION = 1
# magic, version, vocabulary size, its fingerprint, documents, tokens, tokens in a chunk, SHA-256 of all chunks
HEADER = struct.Struct("<16sII32sQQQ32s")
HEADER_BYTES = 4096  # a page: the chunks begin aligned
DIGEST_BYTES = 32
SORTED_TOKENS = 32  # suffixes are in order of this many tokens; longer matches are not looked for


@dataclass(frozen=True)
class DatastoreHeader:
    """What stands in a datastore.

    Attributes:
        vocab_size: token ids are smaller; the separator is this number.
        fingerprint: `Tokenizer.fingerprint` of the tokenizer that made the tokens.
        num_tokens: separators included.
        chunk_tokens: tokens that share a suffix array.
        body_digest: SHA-256 of everything behind the header.
    """

    vocab_size: int
    fingerprint: bytes
    num_documents: int
    num_tokens: int
    chunk_tokens: int
    body_digest: bytes

    @property
    def token_bytes(self) -> int:
        return 2 if self.vocab_size < 2**16 else 4

    @property
    def chunk_lengths(self) -> list[int]:
        """Tokens in each chunk."""
        whole, rest = divmod(self.num_tokens, self.chunk_tokens)
        return [self.chunk_tokens] * whole + [rest] * (rest > 0)

    def chunk_bytes(self, length: int) -> tuple[int, int]:
        """Bytes of a chunk's tokens, padding included, and of its suffix array."""
        return -(-length * self.token_bytes // 8) * 8, 4 * length

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + sum(sum(self.chunk_bytes(length)) for length in self.chunk_lengths)

    def pack(self) -> bytes:
        packed = HEADER.pack(
            MAGIC,
            VERSION,
            self.vocab_size,
            self.fingerprint,
            self.num_documents,
            self.num_tokens,
            self.chunk_tokens,
            self.body_digest,
        )
        return (packed + hashlib.sha256(packed).digest()).ljust(HEADER_BYTES, b"\0")


@dataclass(frozen=True, eq=False)
class Chunk:
    """A part of the corpus, and the order of its suffixes.

    Attributes:
        content: the mapped file; token i of the chunk stands at ``start + i * token_bytes``, big endian.
        suffix_array: ``[length]`` positions.
    """

    content: mmap.mmap
    start: int
    token_bytes: int
    length: int
    suffix_array: memoryview

    def reader(self, length: int) -> Callable[[int], bytes]:
        """What gives the `length` tokens at a position as they are stored; fewer at the end of the chunk."""
        content, start, width = self.content, self.start, self.token_bytes
        num_bytes, end = length * width, self.start + self.length * width

        def read(position: int) -> bytes:
            first = start + position * width
            return content[first : min(first + num_bytes, end)]

        return read


@dataclass(frozen=True, eq=False)
class Datastore:
    header: DatastoreHeader
    chunks: tuple[Chunk, ...]


def read_header(path: Path) -> DatastoreHeader:
    """The header of a datastore whose size is what the header says.

    Raises:
        LookupFileError: it is damaged, cut off, or something else.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
        file_bytes = file.seek(0, 2)
    if not start.startswith(MAGIC):
        raise _refused(path, "another kind of file")
    packed, digest = start[: HEADER.size], start[HEADER.size : HEADER.size + DIGEST_BYTES]
    if len(start) == HEADER_BYTES and HEADER.unpack(packed)[1] != VERSION:
        raise _refused(path, f"version {HEADER.unpack(packed)[1]}", f"version {VERSION}")
    if len(start) < HEADER_BYTES or hashlib.sha256(packed).digest() != digest or any(start[HEADER.size + 32 :]):
        raise _refused(path, "a damaged header")
    header = DatastoreHeader(*HEADER.unpack(packed)[2:])
    if header.chunk_tokens < 1 or header.file_bytes != file_bytes:
        raise _refused(path, f"{file_bytes} bytes", f"{header.file_bytes} as its header says")
    return header


def check_body(path: Path, header: DatastoreHeader) -> None:
    """Read the whole file and compare it with its checksum.

    Raises:
        LookupFileError: it differs.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.digest() != header.body_digest:
        raise _refused(path, "damaged chunks")


def open_datastore(path: Path, *, fingerprint: bytes) -> Datastore:
    """Map a datastore into memory.

    Args:
        fingerprint: of the vocabulary that it must have.

    Raises:
        LookupFileError: it is damaged, cut off, or something else.
        VocabularyMismatchError: it was built with another tokenizer.
        OSError: it cannot be read.
    """
    header = read_header(path)
    if header.fingerprint != fingerprint:
        raise VocabularyMismatchError(
            f"datastore {path}",
            got="the tokens of another tokenizer",
            expected="the target's",
            remedy="build one with `outrider datastore build FILES --model MODEL --output PATH`",
        )
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Datastore(header, tuple(_chunks(header, content)))


def _chunks(header: DatastoreHeader, content: mmap.mmap) -> Iterator[Chunk]:
    start = HEADER_BYTES
    for length in header.chunk_lengths:
        token_bytes, suffix_bytes = header.chunk_bytes(length)
        suffix_array = np.frombuffer(content, dtype="<u4", count=length, offset=start + token_bytes)
        yield Chunk(content, start, header.token_bytes, length, suffix_array.data)
        start += token_bytes + suffix_bytes


def _refused(path: Path, got: str, expected: str = "a datastore") -> LookupFileError:
    return LookupFileError(
        f"datastore {path}", got=got, expected=expected, remedy="build it again with `outrider datastore build`"
    )
