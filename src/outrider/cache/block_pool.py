"""Reference-counted cache blocks, with least-recently-freed eviction of blocks that the prefix index still names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from outrider.errors import CacheError


class BlockPool:
    """Hands out block ids ``0 .. num_blocks - 1``.

    A block is *used* (reference count >= 1), *cached* (count 0, its content is in the prefix index and may be
    used again) or *free* (count 0, no content). `evict` is called with a cached block that is given away.
    """

    def __init__(self, num_blocks: int, evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._evict = evict
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # popped from the end: low ids first
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that an allocation can have: free ones, and cached ones by eviction."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def allocate(self) -> int:
        """A block with reference count 1.

        Raises:
            CacheError: none is available (callers check `num_available` first).
        """
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._evict(block)
        else:
            raise CacheError("KV cache", got="no free block", expected="at least one", remedy="preempt a request")
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Take another reference on a used or cached block."""
        self._cached.pop(block, None)
        self._ref_counts[block] += 1

    def release(self, block: int, *, indexed: bool) -> None:
        """Drop a reference; at zero the block is cached if the prefix index names it, else free."""
        assert self._ref_counts[block] > 0, f"block {block} released more often than taken"
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            if indexed:
                self._cached[block] = None
            else:
                self._free.append(block)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def check_integrity(self) -> None:
        """Free and cached blocks have no references, are disjoint, and with the used ones make up the pool."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, f"free and cached at once: {free & cached}"
        for block, count in enumerate(self._ref_counts):
            assert count >= 0
            assert (count == 0) == (block in free or block in cached), (
                f"block {block} with {count} references is lost"
            )
