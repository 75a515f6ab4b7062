"""Memory for packed weights in large pages, where the system has them.

A forward streams through all weights; with pages of 4 KB it also streams through the page tables, which costs a
noticeable part of it when other programs have pushed them out of the caches.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from outrider.kernels.available_memory import available_bytes

_CHUNK_BYTES = 64 << 20
_PAGE_BYTES = 2 << 20
_ALIGNMENT = 64
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_lock = Lock()
_chunk: Tensor | None = None  # what is left of the newest mapping; tensors cut from it keep it alive
_SMALLEST = 64 << 10  # less is not worth a place in it


def allocate(num_bytes: int) -> Tensor:
    """Uninitialised uint8 ``[num_bytes]`` on the CPU, 64-byte aligned."""
    global _chunk  # noqa: PLW0603 - the unused rest of a mapping serves the next weights
    if num_bytes < _SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    needed = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    with _lock:
        if _chunk is None or len(_chunk) < needed:
            _chunk = _map(max(needed, _CHUNK_BYTES))
        tensor, _chunk = _chunk[:num_bytes], _chunk[needed:]
    return tensor


def has_room_for(num_bytes: int) -> bool:
    """Whether there are large pages, and memory for a copy of so many bytes of a file beside the file's own pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    setting = "[never]"
    with suppress(OSError):
        setting = _SETTING.read_text()
    available = available_bytes()
    return "[never]" not in setting and available is not None and 2 * num_bytes <= available


def copy_of(tensor: Tensor) -> Tensor:
    """The same values in memory of our own, contiguous."""
    copy = allocate(tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _map(num_bytes: int) -> Tensor:
    """A mapping of its own, aligned to large pages and advised to use them."""
    mapping = mmap.mmap(-1, num_bytes + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % _PAGE_BYTES
    return whole[start : start + num_bytes]
