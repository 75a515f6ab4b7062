"""Memory for packed weights: aligned, disjoint, and alive as long as what was cut from it."""

from __future__ import annotations

import gc

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
