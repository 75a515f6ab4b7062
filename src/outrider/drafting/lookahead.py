"""Lookahead decoding (Fu et al., arXiv 2402.02057): n-grams of Jacobi trajectories are drafts.

The window holds the last N - 1 iterations, the *levels*, of W neighbouring positions, the *columns*. As a tree
(the paper's mask, section 3.3): level 0 is a chain below the root, which is itself level 0 of column 0, and each
column continues from its level 0 with its own later levels.

    W = 3, N = 4        root ─┬─ a1 ─┬─ a2 ── b2 ── c2      level 0: root a1 a2
                              │      └─ b1 ── c1            level 1: b0 b1 b2
                              └─ b0 ── c0                   level 2: c0 c1 c2

The target's choices d0, d1, d2 after the ends of the columns are the next level. Each column with its choice is an
n-gram of the pool: (root, b0, c0, d0), (a1, b1, c1, d1), ... Then level 0 is forgotten and the window moves on by as
many positions as the text: by one, level 0 becomes b1 b2, level 1 c0 c1 c2 and level 2 d0 d1 d2. Pooled n-grams that
begin with the root's token are verified in the same tree. Equal prefixes share nodes: the target's choice after a
node depends on nothing but its path.

The paper verifies pooled n-grams as chains side by side, and takes wider windows than pay on a CPU (W = G = 15 and
N = 5 for 7 billion parameters on a GPU).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from outrider.config import LookaheadConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.initial_guess import InitialGuess
from outrider.drafting.target_choices import TargetChoices
from outrider.errors import ConfigError
from outrider.token_tree import TokenTree

UNLIMITED = 2**62


class NgramPool:
    """What followed each token, the least recently seen forgotten first.

    Args:
        max_keys: first tokens with continuations; the authors' code does not limit them.
        max_per_key: continuations of each; G in the authors' code too.
    """

    def __init__(self, max_keys: int, max_per_key: int) -> None:
        self._max_keys = max_keys
        self._max_per_key = max_per_key
        self._tails: OrderedDict[int, OrderedDict[tuple[int, ...], None]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._tails.values()))

    def add(self, first: int, tail: tuple[int, ...]) -> None:
        tails = self._tails.setdefault(first, OrderedDict())
        self._tails.move_to_end(first)
        tails[tail] = None
        tails.move_to_end(tail)
        if len(tails) > self._max_per_key:
            tails.popitem(last=False)
        if len(self._tails) > self._max_keys:
            self._tails.popitem(last=False)

    def get(self, first: int) -> list[tuple[int, ...]]:
        """Continuations of a token, the most recently seen first."""
        if first not in self._tails:
            return []
        self._tails.move_to_end(first)
        return list(reversed(self._tails[first]))


class Window:
    """The trajectories of one request, relative to its root.

    Until all its N - 1 levels are there the window is wider, because each new level costs a column.

    Attributes:
        levels: ``levels[0]`` is level 0 without the root, ``[num_columns - 1]``; every other one ``[num_columns]``.
    """

    def __init__(self, width: int, ngram: int) -> None:
        self._width = width
        self._num_levels = ngram - 1
        self.levels: list[list[int]] = [[]]

    @property
    def is_full(self) -> bool:
        """Whether columns are long enough to be n-grams."""
        return len(self.levels) == self._num_levels

    @property
    def num_columns(self) -> int:
        return self._width + self._num_levels - len(self.levels)

    def fill(self, initial: InitialGuess, context: DraftContext) -> None:
        """Guess what stands nowhere yet: all of a new window, else what moving on has laid bare."""
        root = len(context.token_ids) - 1
        for depth, level in enumerate(self.levels):
            is_heads = depth == 0
            num_missing = self.num_columns - is_heads - len(level)
            if num_missing > 0:
                first = root + depth + is_heads + len(level)
                before = level[-1] if level else context.token_ids[-1]
                level.extend(initial.tokens(context, first, num_missing, before))

    def columns(self, max_nodes: int, max_depth: int) -> Iterator[list[int]]:
        """The path below the root of each column that fits, column 0 first."""
        num_levels = len(self.levels)
        num_there = min(len(self.levels[0]) + 1, *map(len, self.levels[1:]), self.num_columns)
        num_fitting = min(num_there, (max_nodes + 1) // num_levels, max_depth - num_levels + 2)
        for column in range(num_fitting):
            yield [*self.levels[0][:column], *(level[column] for level in self.levels[1:])]

    def advance(self, root: int, choices: TargetChoices, num_new: int) -> list[list[int]]:
        """Take the target's choices as the next level.

        Columns that were not verified are forgotten, with those behind them; `fill` makes up for them.

        Args:
            root: the token that the verified tree hung from.
            num_new: committed tokens, by which the window moves on. The authors' code moves it by one, whatever was
                accepted, and by as many as here only if told to (ALWAYS_FWD_ONE=0).

        Returns:
            The n-grams of the columns; none as long as they are too short.
        """
        new: list[int] = []
        for path in self.columns(max_nodes=UNLIMITED, max_depth=UNLIMITED):
            found = choices.along(path)
            if len(found) <= len(path):
                break
            new.append(found[-1])
        if not new:
            return []
        num_columns = len(new)
        heads, *later = self.levels
        levels = [heads[: num_columns - 1], *(level[:num_columns] for level in later), new]
        if not self.is_full:
            self.levels = [level[num_new:] for level in levels]
            return []
        self.levels = [level[num_new - 1 :] for level in (levels[1][1:], *levels[2:])]
        return [list(column) for column in zip([root, *levels[0]], *levels[1:], strict=True)]


class _Request:
    """One request's window and pool, and how much of its text is pooled."""

    def __init__(self, config: LookaheadConfig, vocab_size: int) -> None:
        self.window = Window(config.window, config.ngram)
        self.pool = NgramPool(config.max_keys, config.guesses)
        self.initial = InitialGuess(config.initial, vocab_size)
        self.num_pooled = 0

    def pool_text(self, token_ids: Sequence[int], ngram: int) -> None:
        for end in range(max(self.num_pooled + 1, ngram), len(token_ids) + 1):
            first, *tail = token_ids[end - ngram : end]
            self.pool.add(first, tuple(tail))
        self.num_pooled = len(token_ids)


class LookaheadDrafter:
    """Window and guesses in one tree, without confidences.

    A planner that pruned the window's unlikely nodes would end the trajectories that the pool is fed from. Where rows
    are short, guesses come first, then as many columns as fit.

    Under a rule that takes chains only there is no room for a window: the drafts are single n-grams of the text,
    which must then be pooled. Under rejection rules at a temperature the window advances by the most probable tokens.

    Raises:
        ConfigError: a rule that takes chains only, and no n-grams of the text.
    """

    name = "lookahead"
    returns_probs = False
    num_without_room = 0

    def __init__(self, config: LookaheadConfig, style: DraftStyle, vocab_size: int) -> None:
        if style.chains_only and not config.text_ngrams:
            raise ConfigError(
                "lookahead drafter",
                got="a verification rule that takes chains only, and text_ngrams=False",
                expected="a rule that takes trees, for the window to run",
                remedy="use verification='coupled' or 'tree_rejection', or text_ngrams=True",
            )
        self._config = config
        self._vocab_size = vocab_size
        self._has_window = not style.chains_only
        self._num_guesses = config.guesses if self._has_window else 1
        self.reads_logits = self._has_window and style.noise == "independent"
        num_levels = config.ngram - 1
        guess_nodes = self._num_guesses * num_levels
        self.max_nodes = guess_nodes + (config.window * num_levels - 1 if self._has_window else 0)
        self._requests: dict[str, _Request] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        request = self._requests.get(context.request_id)
        if request is None:
            request = self._requests[context.request_id] = _Request(self._config, self._vocab_size)
        if self._config.text_ngrams:
            request.pool_text(context.token_ids, self._config.ngram)
        root = context.token_ids[-1]
        max_nodes, max_depth = min(context.max_nodes, self.max_nodes), context.max_depth
        if max_nodes < 1 or max_depth < 1:
            return TokenTree.root_only(root)
        paths: list[Sequence[int]] = [tail[:max_depth] for tail in request.pool.get(root)[: self._num_guesses]]
        if self._has_window:
            request.window.fill(request.initial, context)
            num_guess_nodes = TokenTree.from_paths(root, paths, max_nodes + 1).num_nodes - 1
            paths += request.window.columns(max_nodes - num_guess_nodes, max_depth)
        return TokenTree.from_paths(root, paths, max_nodes + 1)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        if not self._has_window:
            return
        for outcome in outcomes:
            request = self._requests.get(outcome.request_id)
            if request is not None:
                choices = TargetChoices(outcome)
                for first, *tail in request.window.advance(outcome.tree.tokens[0], choices, len(outcome.new_tokens)):
                    request.pool.add(first, tuple(tail))

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._requests.pop(request_id, None)
