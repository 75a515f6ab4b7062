"""Drafters that are wrong on purpose: planners and readers of draft models, each by one mistake.

Under the coupled rule most of them change no output: they make drafts worse, which only the suites of drafts can see.
Under rejection rules a drafter that looks at what it drew bends the distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest

from outrider.drafting import sorted_runner as sorted_module
from outrider.drafting import text_draft as text_module
from outrider.drafting.auto import AutoDrafter
from outrider.drafting.draft_runner import DraftRunner
from outrider.drafting.growth.tree import Row
from outrider.drafting.guesser import Guesser
from outrider.drafting.sorted_runner import SortedRunner, SubModelRunner
from outrider.drafting.staged_runner import StagedRunner, _Step
from outrider.drafting.translated_runner import TranslatedRunner
from outrider.errors import CacheError
from outrider.token_tree import TokenTree
from tests.losslessness.test_drafts import check_acceptance, check_drafts
from tests.losslessness.test_engine import SETTINGS, plain
from tests.losslessness.test_engine_distribution import chi_square
from tests.losslessness.test_engine_mutants import MIX, check_equality
from tests.unit import test_draft_kinds, test_planner, test_realignment

Patch = pytest.MonkeyPatch


def check_distribution(drafter: str, rule: str) -> None:
    """Raises AssertionError where outputs are not distributed as the target's."""
    assert chi_square(drafter, rule) < 4.5


# The planner


def drops_a_drawn_node(patch: Patch) -> None:
    """The planner leaves out a drawn node, and what is below it, for the token that it is."""
    right = AutoDrafter._allot

    def allot(self, contexts, market):
        kept = []
        for tree in right(self, contexts, market):
            nodes = [0]
            for node in range(1, tree.num_nodes):
                if tree.parents[node] in nodes and tree.tokens[node] % 2:
                    nodes.append(node)
            kept.append(tree.restricted_to(nodes) if tree.draft else tree)
        return kept

    patch.setattr(AutoDrafter, "_allot", allot)


def believes_what_was_drawn(patch: Patch) -> None:
    """A drawn tree is weighed by the confidences of the very tokens that were drawn."""
    right = AutoDrafter._weigh

    def weigh(self, arm, request_id, tree, market):
        return right(self, arm, request_id, replace(tree, draft=None), market)

    patch.setattr(AutoDrafter, "_weigh", weigh)


def another_seed(patch: Patch) -> None:
    """The planner asks with another seed than the request's."""
    right = AutoDrafter._ask

    def ask(self, arm, contexts, market, **options):
        right(self, arm, [replace(context, seed=context.seed + 1) for context in contexts], market, **options)

    patch.setattr(AutoDrafter, "_ask", ask)


def trees_of_others(patch: Patch) -> None:
    """Of two requests of a step each gets the other's tree."""
    right = AutoDrafter._allot
    patch.setattr(AutoDrafter, "_allot", lambda self, contexts, market: right(self, contexts, market)[::-1])


def what_others_got(patch: Patch) -> None:
    """A drawn tree is left out where it begins with a token that another request has got."""
    right_allot, right_learn = AutoDrafter._allot, AutoDrafter._learn
    last = [0]

    def allot(self, contexts, market):
        trees = right_allot(self, contexts, market)
        return [
            TokenTree.root_only(tree.tokens[0]) if tree.draft and last[0] in tree.tokens[1:2] else tree
            for tree in trees
        ]

    def learn(self, outcome, market):
        last[0] = outcome.new_tokens[0]
        right_learn(self, outcome, market)

    patch.setattr(AutoDrafter, "_allot", allot)
    patch.setattr(AutoDrafter, "_learn", learn)


def writes_into_the_text(patch: Patch) -> None:
    """The planner's guess of the next token ends up in the request's own tokens."""
    right = AutoDrafter._ask

    def ask(self, arm, contexts, market, **options):
        right(self, arm, contexts, market, **options)
        for context in contexts:
            proposal = self._planned[context.request_id].proposals[-1]
            context.token_ids[-1:] = proposal.tree.tokens[-1:]

    patch.setattr(AutoDrafter, "_ask", ask)


# Staged


def guesses_by_their_last_token(patch: Patch) -> None:
    """What the model said after a guess is taken for any path that ends with the same token."""

    class ByLastToken(dict):
        def __setitem__(self, path, found):
            super().__setitem__(path[-1:], found)

        def get(self, path):
            return super().get(path[-1:])

    right = _Step.__init__

    def init(self, *arguments, **options):
        right(self, *arguments, **options)
        self.ahead = ByLastToken()

    patch.setattr(_Step, "__init__", init)


def guesses_one_row_off(patch: Patch) -> None:
    """A guess that came true is committed from the row before its own."""
    right = StagedRunner._claim

    def claim(self, rows, node, row, log_weights):
        is_guess = log_weights is not None and row > 0 and node > 1
        right(self, rows, node, row - is_guess, log_weights)

    patch.setattr(StagedRunner, "_claim", claim)


def chunk_one_short(patch: Patch) -> None:
    """Of the committed tokens that the model has just read, the last one is not kept."""
    right = StagedRunner.commit

    def commit(self, request_id, rows, token_ids):
        step = self._steps[request_id]
        step.chunk = step.chunk[:-1]
        right(self, request_id, rows, token_ids)

    patch.setattr(StagedRunner, "commit", commit)


def guesses_stay(patch: Patch) -> None:
    """The inner drafter is not told that drafted tokens, behind which it was asked, are not the text's."""
    right = Guesser._inner_context

    def inner_context(self, context, drafted, max_nodes, max_depth):
        inner = right(self, context, drafted, max_nodes, max_depth)
        return replace(inner, request_id=context.request_id)

    patch.setattr(Guesser, "_inner_context", inner_context)


# Sorted


def answers_in_the_order_of_confidence(patch: Patch) -> None:
    """Answers come back in the order in which the sub-models gave them, not in that of the requests."""
    right = SortedRunner.catch_up

    def catch_up(self, contexts) -> list[Row]:
        found = dict(zip((c.request_id for c in contexts), right(self, contexts), strict=True))
        return sorted(found.values(), key=sorted_module._confidence)

    patch.setattr(SortedRunner, "catch_up", catch_up)


def unsure_nodes_backwards(patch: Patch) -> None:
    """The larger sub-model's answers go to the unsure nodes from the last to the first."""
    right = SubModelRunner.read_paths
    patch.setattr(SubModelRunner, "read_paths", lambda self, wanted: right(self, wanted)[::-1])


def all_levels_have_read(patch: Patch) -> None:
    """Every sub-model that has read anything is taken to have read all that was accepted, in its order."""
    patch.setattr(sorted_module, "accepted_rows", lambda rows, token_ids: list(range(len(token_ids))))


def first_level_decides(patch: Patch) -> None:
    """The smallest sub-model has the last word, however unsure it is."""
    patch.setattr(SortedRunner, "_is_unsure", lambda self, number, row: False)


# Another vocabulary


def unknown_tokens_left_out(patch: Patch) -> None:
    """Committed tokens that the draft cannot say are missing from its text."""
    right = TranslatedRunner.__init__

    def init(self, *arguments, translation, **options):
        right(self, *arguments, translation=replace(translation, spell=lambda token: ()), **options)

    patch.setattr(TranslatedRunner, "__init__", init)


def ids_of_the_target(patch: Patch) -> None:
    """The draft's logits are read at the target's ids."""
    right = TranslatedRunner.__init__

    def init(self, *arguments, **options):
        right(self, *arguments, **options)
        self._draft_ids = self._target_ids

    patch.setattr(TranslatedRunner, "__init__", init)


def drafts_read_by_the_targets_ids(patch: Patch) -> None:
    """A drafted token is read by the draft under the target's id of it."""
    patch.setattr(TranslatedRunner, "_sibling_rows", DraftRunner._sibling_rows)


def unknown_tokens_drafted(patch: Patch) -> None:
    """Tokens that the draft does not have get its logits of another."""
    right = TranslatedRunner._forward

    def forward(self, sequences):
        logits = right(self, sequences)
        return logits.masked_fill(logits.isinf(), float(logits.amax()))

    patch.setattr(TranslatedRunner, "_forward", forward)


def one_token_further(patch: Patch) -> None:
    """A text draft takes one token more for agreed than the text has."""
    right = text_module.common_prefix
    patch.setattr(text_module, "common_prefix", lambda ours, theirs: right(ours, theirs) + 1)


def words_begin_anew(patch: Patch) -> None:
    """The text of a draft is read as if nothing stood before it."""
    patch.setattr(text_module, "whole_tail", lambda codec, token_ids: [])


def ends_are_text(patch: Patch) -> None:
    """What a draft says after its end of text is taken for text."""
    right = text_module.TextDrafter.__init__

    def init(self, draft, target_side, draft_side, **options):
        right(self, draft, target_side, replace(draft_side, special_ids=frozenset()), **options)

    patch.setattr(text_module.TextDrafter, "__init__", init)


def equality(drafter: str) -> Callable[[], None]:
    return lambda: check_equality(drafter)


def distribution(drafter: str, rule: str) -> Callable[[], None]:
    return lambda: check_distribution(drafter, rule)


def drafts(drafter: str, rule: str = "coupled") -> Callable[[], None]:
    return lambda: check_drafts(drafter, rule)


def draws_decide_nothing() -> None:
    test_planner.test_a_drawn_tree_is_kept_or_left_out_whatever_was_drawn([2, 3])


def staged_as_alone() -> None:
    shape, style = "tree", test_draft_kinds.REJECTION
    test_draft_kinds.test_staged_trees_are_those_of_the_draft_alone(shape, style, test_draft_kinds.SAMPLED, "ngram")


def exits() -> None:
    test_draft_kinds.test_each_token_exits_at_the_first_confident_sub_model(0.6)


def known_text() -> None:
    for text in test_realignment.TEXTS:
        test_realignment.test_a_draft_that_knows_the_text_is_accepted(text, "bytes-600", "sentencepiece")


def half_known_text() -> None:
    for text, (target, draft) in product(test_realignment.TEXTS, test_realignment.PAIRS):
        test_realignment.test_a_draft_that_errs_keeps_what_is_right(text, target, draft)


CHECKS: dict[str, Callable[[], None]] = {
    "auto: outputs": equality("auto"),
    "auto: distribution": distribution("auto-sparing", "tree_rejection"),
    "auto: draws decide nothing": draws_decide_nothing,
    "auto: acceptance": lambda: check_acceptance("auto"),
    "staged: as the draft alone": staged_as_alone,
    "staged: drafts": drafts("staged"),
    "staged: text": test_draft_kinds.test_inner_drafters_never_take_rejected_tokens_for_the_text,
    "sorted: drafts": drafts("sorted_draft"),
    "sorted: exits": exits,
    "translated: drafts": drafts("universal_draft"),
    "translated: distributions": test_draft_kinds.test_translated_distributions,
    "translated: continuation": test_draft_kinds.test_translated_chain_is_the_drafts_own_continuation,
    "text: drafts": drafts("universal_draft-text"),
    "text: a draft that knows it": known_text,
    "text: a draft that errs": half_known_text,
}

# The mistake, the check that must find it, and how.
MUTANTS: tuple[tuple[Callable[[Patch], None], str, type[Exception]], ...] = (
    (drops_a_drawn_node, "auto: distribution", AssertionError),
    (believes_what_was_drawn, "auto: draws decide nothing", AssertionError),
    (another_seed, "auto: acceptance", AssertionError),
    (trees_of_others, "auto: outputs", CacheError),
    (what_others_got, "auto: distribution", AssertionError),
    (writes_into_the_text, "auto: outputs", AssertionError),
    (guesses_by_their_last_token, "staged: as the draft alone", AssertionError),
    (guesses_one_row_off, "staged: drafts", AssertionError),
    (chunk_one_short, "staged: drafts", AssertionError),
    (guesses_stay, "staged: text", AssertionError),
    (answers_in_the_order_of_confidence, "sorted: drafts", AssertionError),
    (unsure_nodes_backwards, "sorted: drafts", AssertionError),
    (all_levels_have_read, "sorted: drafts", AssertionError),
    (first_level_decides, "sorted: exits", AssertionError),
    (unknown_tokens_left_out, "translated: continuation", AssertionError),
    (ids_of_the_target, "translated: distributions", AssertionError),
    (drafts_read_by_the_targets_ids, "translated: drafts", AssertionError),
    (unknown_tokens_drafted, "translated: distributions", KeyError),
    (one_token_further, "text: a draft that errs", AssertionError),
    (words_begin_anew, "text: a draft that knows it", AssertionError),
    (ends_are_text, "text: a draft that knows it", AssertionError),
)


@pytest.mark.parametrize("check", CHECKS)
def test_the_right_drafters_pass(check: str) -> None:
    CHECKS[check]()


@pytest.mark.parametrize(("mutate", "check", "expected"), MUTANTS, ids=[mutant[0].__name__ for mutant in MUTANTS])
def test_mutants_fail(
    mutate: Callable[[Patch], None], check: str, expected: type[Exception], monkeypatch: Patch
) -> None:
    for name, prompt in MIX:
        plain(name, prompt, SETTINGS[name])  # the reference is computed by the right engine
    mutate(monkeypatch)
    with pytest.raises(expected):
        CHECKS[check]()
