"""Keyed randomness: every random number is a pure function of (seed, position, purpose, trial).

The stream is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a
published counter-based generator, so that a GPU kernel can give the same numbers:

    key     = [seed, purpose]
    counter = [block, 0, position, trial]     block = 1, 2, 3, ...; four 64-bit words a block

Token i's Gumbel noise comes from half i of the words, the low 32 bits of a word before the high ones:
``u = (half + 0.5) * 2**-32`` and ``g = -log(-log(u))``, in float64, then rounded to float32. It does not
depend on the vocabulary's size, so that a drafter of a shorter vocabulary sees the same noise.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from enum import IntEnum
from threading import Lock, local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider.kernels.drafting import compiled

MEMO_BYTES = 32 * 2**20


class Purpose(IntEnum):
    """What a random number is for; numbers of different purposes are independent.

    TARGET: the target's own choice, shared by the drafters of the coupled rule.
    DRAFT: draft tokens that must be independent of everything else.
    ACCEPT: the uniform of an acceptance test.
    RESIDUAL: the token after a rejection, and the bonus token, of rejection rules.
    SEED: seeds of the samples of one request.
    """

    TARGET = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    SEED = 4


class _RowMemo:
    """The last used rows, up to a number of bytes: drafter, verifier and the next step ask for the same."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._rows: OrderedDict[tuple[int, ...], NDArray[Any]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[int, ...]) -> NDArray[Any] | None:
        with self._lock:
            row = self._rows.get(key)
            if row is not None:
                self._rows.move_to_end(key)
            return row

    def put(self, key: tuple[int, ...], row: NDArray[Any]) -> None:
        with self._lock:
            if key in self._rows or row.nbytes > self._max_bytes:
                return
            self._rows[key] = row
            self._num_bytes += row.nbytes
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= self._rows.popitem(last=False)[1].nbytes


_memo = _RowMemo(MEMO_BYTES)
_of_thread = local()


def gumbel_noise(seed: int, position: int, purpose: Purpose, vocab_size: int, trial: int = 0) -> NDArray[np.float32]:
    """Standard Gumbel noise ``[vocab_size]`` float32 for the token at `position`; read only, perhaps shared.

    ``argmax(log p + noise)`` is a sample of p (Gumbel-max). Uniforms of 32 bits bound it to (-3.2, 22.9).
    """
    key = (seed, position, int(purpose), vocab_size, trial)
    row = _memo.get(key)
    if row is None:
        words = _philox(seed, position, purpose, trial, num_words=(vocab_size + 1) // 2)
        row = _gumbel(words.astype("<u8", copy=False).view("<u4")[:vocab_size])
        row.setflags(write=False)
        _memo.put(key, row)
    return row


def rank_with_noise(
    tokens: NDArray[np.int64],
    logits: NDArray[np.float32],
    count: int,
    *,
    temperature: float,
    seed: int,
    position: int,
    purpose: Purpose,
    vocab_size: int,
) -> list[int]:
    """The first `count` of some tokens as whoever chooses with this noise would rank them, of equals the first.

    Compiled code draws the noise of these tokens alone, and leaves what the rounding of a logarithm could decide to
    NumPy, so the ranks are those of the row that `gumbel_noise` gives.

    Args:
        tokens, logits: ``[num_tokens]``, contiguous.
    """
    module = compiled()
    if module is not None:
        ranked = module.rank_with_noise(seed, position, int(purpose), tokens, logits, temperature, count)
        if ranked:
            return ranked
    keys = gumbel_noise(seed, position, purpose, vocab_size).take(tokens)
    keys *= -temperature
    keys -= logits
    return tokens.take(keys.argsort(kind="stable")[:count]).tolist()


def _gumbel(halves: NDArray[np.uint32]) -> NDArray[np.float32]:
    uniforms = halves + 0.5
    uniforms *= 2.0**-32
    np.negative(np.log(uniforms, out=uniforms), out=uniforms)
    np.negative(np.log(uniforms, out=uniforms), out=uniforms)
    return uniforms.astype(np.float32)


def uniform(seed: int, position: int, purpose: Purpose, trial: int) -> float:
    """A uniform number strictly between 0 and 1: the first word's upper 52 bits, plus a half."""
    # 52 bits, not 53: with one more, the largest value plus a half would round to 1.
    return ((int(_philox(seed, position, purpose, trial, num_words=1)[0]) >> 12) + 0.5) * 2.0**-52


def child_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request with several; sample 0 is the one that the seed alone gives."""
    return seed if index == 0 else int(_philox(seed, index, Purpose.SEED, 0, num_words=1)[0])


def fresh_seed() -> int:
    """A seed of 63 bits from the operating system, for requests that name none."""
    return secrets.randbits(63)


def _philox(seed: int, position: int, purpose: int, trial: int, *, num_words: int) -> NDArray[np.uint64]:
    """The first words of a stream."""
    generator = getattr(_of_thread, "generator", None)
    if generator is None:  # a new one asks the operating system for a seed: eight microseconds
        generator = _of_thread.generator = np.random.Philox()
    # NumPy counts blocks in the low word, one up before each block; the high words tell streams apart.
    state: Any = {
        "bit_generator": "Philox",
        "state": {"counter": (0, 0, position, trial), "key": (seed, purpose)},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,  # all of it is used
        "has_uint32": 0,
        "uinteger": 0,
    }
    generator.state = state
    return generator.random_raw(num_words)
