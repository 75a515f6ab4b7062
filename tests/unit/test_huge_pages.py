"""Memory for packed weights: aligned, disjoint, and alive as long as what was cut from it."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from outrider.kernels import huge_pages
from outrider.kernels.available_memory import available_bytes
from outrider.kernels.huge_pages import allocate, copy_of, has_room_for

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


def test_a_copy_is_made_where_there_are_large_pages_and_twice_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("a system without large pages")
    setting = tmp_path / "enabled"
    monkeypatch.setattr(huge_pages, "_SETTING", setting)
    monkeypatch.setattr(huge_pages, "available_bytes", lambda: 1000)
    assert not has_room_for(1)  # nobody says
    setting.write_text("always madvise [never]\n")
    assert not has_room_for(1)
    for given in ("[always] madvise never\n", "always [madvise] never\n"):
        setting.write_text(given)
        assert has_room_for(500)
        assert not has_room_for(501)
    monkeypatch.setattr(huge_pages, "available_bytes", lambda: None)
    assert not has_room_for(1)


@pytest.mark.parametrize("shape", [(3, 5), (3000, 77)])
def test_a_copy_has_memory_of_its_own(shape: tuple[int, int]) -> None:
    tensor = torch.randn(shape).T
    copy = copy_of(tensor)
    assert torch.equal(copy, tensor)
    assert copy.is_contiguous()
    assert copy.data_ptr() != tensor.data_ptr()


def test_available_memory_is_the_least_that_the_system_says(tmp_path: Path) -> None:
    info, limit = tmp_path / "meminfo", tmp_path / "limit"
    info.write_text("MemTotal: 9000 kB\nMemAvailable:    2048 kB\n")
    assert available_bytes(info, limit) == 2 << 20
    limit.write_text("max\n")
    assert available_bytes(info, limit) == 2 << 20
    limit.write_text("4096\n")
    assert available_bytes(info, limit) == 4096
    assert (available_bytes(limit, info) or 0) > 1 << 20  # neither file says: all that the machine has
