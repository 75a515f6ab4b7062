"""The start-up self-test of the bitwise mode: a row's bits must not depend on how the engine batched it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.errors import ExactnessError
from outrider.models.model import Model
from outrider.models.probe import CachedRun

_CHUNKS = (1, 3, 5, 8, 13, 16, 64)  # rows per forward; their sum is the length of the tested sequence
_BEYOND = 3  # positions after the tested sequence that its neighbours and decoys take
_TAIL = 6  # last tokens, which are decoded one by one and looked for in a tree


def check_row_invariance(model: Model) -> None:
    """Compute one sequence in many ways and compare logits and cached keys and values bit for bit.

    The ways differ in rows per forward, in neighbours and row order, in paging and in trees; the reference is
    a prefill at once followed by plain decoding.

    Raises:
        ExactnessError: two ways differ.
    """
    length = min(sum(_CHUNKS), model.context_length - _BEYOND)
    generator = torch.Generator().manual_seed(0)
    tokens, others = torch.randint(model.vocab_size, (2, length), generator=generator).tolist()
    reference = _run(model, block_size=length)
    head = length - _TAIL
    logits = [reference.feed("a", tokens[:head]), *(reference.feed("a", [token]) for token in tokens[head:])]
    expected = [torch.cat(logits), *reference.committed("a")]

    for chunks in (_CHUNKS, _CHUNKS[::-1]):
        run = _run(model, block_size=3)
        logits = [run.feed("a", part) for part in _split(tokens, chunks)]
        _require_equal(model, [torch.cat(logits), *run.committed("a")], expected, f"in chunks of {chunks} rows")

    run = _run(model, block_size=5)
    run.feed("b", others)  # longer than "a", and written to the pages before it
    logits = []
    for step, part in enumerate(_split(tokens, (7, 9, 2, 31, 16, length))):
        rows = {
            "a": _chain(part),
            "b": _chain(others[step : step + _BEYOND]),
            "c": _chain(others[: step + 1]),
        }
        order = ("b", "c", "a") if step % 2 else ("c", "a", "b")
        logits.append(run.step({name: rows[name] for name in order})["a"])
        run.commit({"a": range(len(part)), "b": (), "c": ()})
    _require_equal(model, [torch.cat(logits), *run.committed("a")], expected, "beside other sequences")

    run = _run(model, block_size=3)
    run.feed("a", tokens[:head])
    logits, kept = _in_a_tree(run, tokens[head:], others)
    run.commit({"a": kept})
    found = [torch.cat((expected[0][:head], logits)), *run.committed("a")]
    _require_equal(model, found, expected, "in a tree")


def _in_a_tree(run: CachedRun, path: Sequence[int], decoys: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Step a tree with `path` between decoys; logits ``[len(path), vocab]`` of the path and its rows."""
    tokens, parents, rows = [path[0]], [-1], [0]
    for token, decoy in zip(path[1:], decoys, strict=False):
        tokens += [decoy, token, decoy]
        parents += [rows[-1], rows[-1], len(parents)]  # a sibling before each node and a nephew after it
        rows.append(len(tokens) - 2)
    return run.step({"a": (tokens, parents)})["a"][rows], rows


def _run(model: Model, block_size: int) -> CachedRun:
    room = sum(_CHUNKS) + 3 * _TAIL
    return CachedRun(model, block_size=block_size, num_positions=room, num_sequences=3, row_invariant=True)


def _chain(tokens: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return tokens, range(-1, len(tokens) - 1)


def _split(tokens: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    parts, start = [], 0
    for size in sizes:
        if start < len(tokens):
            parts.append(tokens[start : start + size])
        start += size
    return parts


def _require_equal(model: Model, found: Sequence[Tensor], expected: Sequence[Tensor], way: str) -> None:
    num_layers = len(model.layer_shapes)
    names = ["logits", *(f"{kind} of layer {i}" for kind in ("keys", "values") for i in range(num_layers))]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        if torch.equal(ours, theirs):
            continue
        rows = (ours != theirs).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
        largest = (ours.float() - theirs.float()).abs().max().item()
        raise ExactnessError(
            f"bitwise mode: {model.name} on {model.device} is not row-invariant",
            got=f"{name} that differ by up to {largest:.2g} at {len(rows)} positions (first {rows[0]}) {way}",
            expected="the bits of plain decoding",
            remedy="use exactness='numerical'",
        )
