"""A counted suffix tree of bounded depth that grows by the token and forgets its oldest sequence.

An edge's label is a piece of the text. Suffixes that are still unique cost nothing more: their leaf's label grows
with the text. Suffixes that occurred before are followed, each by a place of its own, and those places are just what
a drafter asks for: where the text's own suffixes stand among their earlier occurrences. Compiled where there is a
compiler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

from outrider.kernels.drafting import compiled


class SuffixTree(Protocol):
    """What `PythonTree` is, in Python or compiled; a compiled one also knows the guesses of `suffix_guesses.py`.

    Attributes:
        version: changes whenever a place (a node and an offset) that somebody else holds may have become invalid.
    """

    @property
    def version(self) -> int: ...
    def __len__(self) -> int:
        """Tokens of the text."""
        ...

    def sequences(self) -> Sequence[Sequence[int]]:
        """The ended sequences, the oldest first."""
        ...

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the current sequence."""
        ...

    def end_sequence(self) -> None:
        """Nothing follows the current sequence; the next token begins another one."""
        ...

    def forget_oldest(self) -> None:
        """Take the oldest ended sequence out; only between sequences."""
        ...


class SuffixCursor(Protocol):
    """Where the suffixes of a text that grows outside of a tree stand in the tree's ended sequences."""

    def follow(self, token_ids: Sequence[int], num_new: int) -> None:
        """Take up the last `num_new` tokens of a text, or as many as it takes if the tree has changed."""
        ...


def new_tree(max_depth: int) -> SuffixTree:
    """An empty tree; see `PythonTree`."""
    module = compiled()
    return PythonTree(max_depth) if module is None else module.SuffixTree(max_depth)


def new_cursor(tree: SuffixTree) -> SuffixCursor:
    """A cursor at the beginning of a text."""
    if isinstance(tree, PythonTree):
        return PythonCursor(tree)
    module: Any = compiled()
    return module.SuffixCursor(tree)


class Node:
    """An edge and the node at its end.

    Attributes:
        count: suffixes that have entered the edge.
        start: absolute position of the label; of the newest suffix that went all the way along it.
        length: tokens of the label. A leaf's may reach beyond the text that is known so far.
        children: by their label's first token; `NO_CHILDREN` for a leaf.
    """

    __slots__ = ("children", "count", "length", "start")

    def __init__(self, count: int, start: int, length: int, children: dict[int, Node]) -> None:
        self.count = count
        self.start = start
        self.length = length
        self.children = children


NO_CHILDREN: dict[int, Node] = {}  # of every leaf; never written to


class PythonTree:
    """All substrings of some sequences up to a length, with the number of their occurrences.

    Extending costs time in proportion to the longest suffix that occurred before, at most `max_depth`, whatever the
    length of the text. Memory is at most two nodes a token of the text.

    Args:
        max_depth: the longest substring that is told from others, in tokens; at least 2.
    """

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        self.root = Node(0, 0, 0, {})
        self.version = 0
        self._text: list[int] = []
        self._base = 0  # absolute position of _text[0]
        self._sequence_lengths: deque[int] = deque()  # of the ended ones
        # The suffixes that occurred before, from the longest to the one of length 1: lengths are consecutive.
        self._nodes: list[Node] = []
        self._offsets: list[int] = []

    def __len__(self) -> int:
        """Tokens of the text."""
        return len(self._text)

    def sequences(self) -> list[list[int]]:
        """The ended sequences, the oldest first."""
        ends = list(accumulate(self._sequence_lengths, initial=0))
        return [self._text[start:end] for start, end in pairwise(ends)]

    @property
    def places(self) -> tuple[Sequence[Node], Sequence[int]]:
        """Where the current sequence's suffixes stand that occurred before, from the longest down to one token.

        Returns:
            Nodes, and how many tokens of each one's label belong to the suffix.
        """
        return self._nodes, self._offsets

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the current sequence."""
        for token in token_ids:
            self._append(token)

    def token_at(self, node: Node, offset: int) -> int:
        """A token of a node's label; the offset must lie below its `known_length`."""
        return self._text[node.start - self._base + offset]

    def tokens_at(self, node: Node, offset: int, count: int) -> Sequence[int]:
        """At most `count` tokens of a node's label from an offset on, as far as the text has them."""
        start = node.start - self._base
        return self._text[start + offset : start + min(node.length, offset + max(count, 0))]

    def known_length(self, node: Node) -> int:
        """How much of a node's label the text already has."""
        return min(node.length, self._base + len(self._text) - node.start)

    def _append(self, token: int) -> None:
        text, base, nodes, offsets = self._text, self._base, self._nodes, self._offsets
        position = base + len(text)
        text.append(token)
        num_places = len(nodes)
        first = 0  # the first place that can go on; whatever a suffix is followed by, its own suffixes are too
        while first < num_places:
            node, offset = nodes[first], offsets[first]
            if offset < node.length:
                if text[node.start - base + offset] == token:
                    break
                self._split(first, position)
            elif node.children is NO_CHILDREN:
                node.children = {}
            elif token in node.children:
                break
            node.start = position - offset
            node.children[token] = Node(1, position, self.max_depth - (num_places - first), NO_CHILDREN)
            first += 1
        for k in range(first, num_places):
            node, offset = nodes[k], offsets[k]
            if offset < node.length:
                offsets[k] = offset + 1
            else:
                node.start = position - offset
                child = nodes[k] = node.children[token]
                child.count += 1
                offsets[k] = 1
        del nodes[:first], offsets[:first]
        if len(nodes) == self.max_depth - 1:  # the longest has reached the bottom
            nodes[0].start = position + 1 - offsets[0]
            del nodes[0], offsets[0]
        child = self.root.children.get(token)
        if child is None:
            self.root.children[token] = Node(1, position, self.max_depth, NO_CHILDREN)
        else:
            child.count += 1
            nodes.append(child)
            offsets.append(1)

    def _split(self, index: int, end: int) -> None:
        """Cut the edge of a place right there: longer suffixes have left it, shorter ones stay in its upper part."""
        upper, offset = self._nodes[index], self._offsets[index]
        num_above = sum(node is upper for node in self._nodes[index:])
        below = upper.start + offset
        lower = Node(upper.count - num_above, below, upper.length - offset, upper.children)
        upper.children = {self._text[below - self._base]: lower}
        upper.start, upper.length = end - offset, offset

    def end_sequence(self) -> None:
        """Nothing follows the current sequence; the next token begins another one."""
        end = self._base + len(self._text)
        begin = end - len(self._text) + sum(self._sequence_lengths)
        if begin == end:
            return
        for k, node in enumerate(self._nodes):
            if self._offsets[k] < node.length:
                self._split(k, end)
            else:
                node.start = end - node.length
        for start in range(max(begin, end - self.max_depth + 1), end - len(self._nodes)):
            node, position = self.root, start
            while position < end:
                node = node.children[self._text[position - self._base]]
                position += node.length
            node.length -= position - end  # a leaf that would have grown on
        self._nodes.clear()
        self._offsets.clear()
        self._sequence_lengths.append(end - begin)
        self.version += 1

    def forget_oldest(self) -> None:
        """Take the oldest ended sequence out; only between sequences.

        Labels point to the newest occurrence, so what is left never needs the text that goes.
        """
        assert len(self._text) == sum(self._sequence_lengths), "a sequence has not ended"
        length = self._sequence_lengths.popleft()
        begin, end = self._base, self._base + length
        for start in range(begin, end):
            self._forget_suffix(start, min(start + self.max_depth, end))
        del self._text[:length]
        self._base = end
        self.version += 1

    def _forget_suffix(self, start: int, end: int) -> None:
        parent, node, position = self.root, self.root, start
        while position < end:
            token = self._text[position - self._base]
            child = node.children[token]
            child.count -= 1
            if child.count == 0:  # all that is below belonged to this suffix alone
                del node.children[token]
                self._join(parent, node)
                return
            position += child.length
            if not self._join(parent, node):
                parent = node
            node = child
        self._join(parent, node)

    def _join(self, parent: Node, node: Node) -> bool:
        """Leave out a node at which nothing branches and nothing ends; says whether it did."""
        if node is self.root:
            return False
        if not node.children:
            node.children = NO_CHILDREN
            return False
        child = next(iter(node.children.values()))
        if child.count != node.count:  # of several children none has them all
            return False
        child.start -= node.length
        child.length += node.length
        parent.children[self._text[child.start - self._base]] = child
        return True


class PythonCursor:
    def __init__(self, tree: PythonTree) -> None:
        self.tree = tree
        self._version = tree.version
        self._nodes: list[Node] = []
        self._offsets: list[int] = []

    def follow(self, token_ids: Sequence[int], num_new: int) -> None:
        if self._version != self.tree.version:
            self._version = self.tree.version
            self._nodes, self._offsets = [], []
            num_new = len(token_ids)
        num_new = min(num_new, self.tree.max_depth - 1)
        for token in token_ids[len(token_ids) - num_new :]:
            self._advance(token)

    @property
    def places(self) -> tuple[Sequence[Node], Sequence[int]]:
        """Nodes and offsets of the suffixes that occur in the tree, from the longest down to one token."""
        return self._nodes, self._offsets

    def _advance(self, token: int) -> None:
        nodes: list[Node] = []
        offsets: list[int] = []
        for node, offset in zip(self._nodes, self._offsets, strict=True):
            if offset < node.length:
                if self.tree.token_at(node, offset) == token:
                    nodes.append(node)
                    offsets.append(offset + 1)
            elif (child := node.children.get(token)) is not None:
                nodes.append(child)
                offsets.append(1)
        child = self.tree.root.children.get(token)
        if child is not None:
            nodes.append(child)
            offsets.append(1)
        surplus = max(0, len(nodes) - self.tree.max_depth + 1)
        self._nodes, self._offsets = nodes[surplus:], offsets[surplus:]
