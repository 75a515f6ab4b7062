"""Memory for packed weights: aligned, disjoint, and alive as long as what was cut from it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from outrider.kernels.huge_pages import allocate

SIZES = [1, 63, 64, 100_000, 3 << 20, 100_001, 70 << 20, 65_536]


def test_tensors_are_aligned_disjoint_and_stay() -> None:
    tensors = [allocate(size) for size in SIZES]
    for number, (tensor, size) in enumerate(zip(tensors, SIZES, strict=True)):
        assert (tensor.dtype, tensor.shape) == (torch.uint8, (size,))
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    kept = tensors[3]
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
    del tensors, tensor
    gc.collect()
    allocate(100_000).fill_(99)
    assert bool((kept == 3).all())


def test_large_pages_are_asked_for_where_the_system_gives_them() -> None:
    """Of memory of one's own: shared memory has them only where a second setting allows it."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("no /proc/self/smaps")
    tensor = allocate(4 << 20)
    flags: set[str] = set()
    is_inside = False
    for line in smaps.read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            low, high = (int(address, 16) for address in first.split("-"))
            is_inside = low <= tensor.data_ptr() < high
        elif is_inside and first == "VmFlags:":
            flags = set(rest)
    if "hg" not in flags and not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without large pages")
    assert "hg" in flags
    assert "sh" not in flags
