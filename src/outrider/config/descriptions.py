"""What each drafter is, in words: one entry for every entry of `DRAFTER_CONFIGS`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DrafterDescription:
    """One drafter.

    Attributes:
        proposes: one phrase: the shape of its drafts and where they are from.
        source: the paper, or "-" where there is none.
        needs: what a user must have beside the target; "nothing" where that is all.
    """

    proposes: str
    source: str
    needs: str


DRAFTER_DESCRIPTIONS: dict[str, DrafterDescription] = {
    "none": DrafterDescription(
        proposes="nothing: plain decoding",
        source="-",
        needs="nothing",
    ),
    "ngram": DrafterDescription(
        proposes="a tree of what followed the longest suffix matches in prompt and output, the most recent first",
        source="prompt lookup decoding (Saxena 2023); LLMA, arXiv 2304.04487",
        needs="nothing",
    ),
    "recycling": DrafterDescription(
        proposes="a static tree filled from the candidates that followed each token when it was last verified",
        source="Token Recycling, arXiv 2408.08696",
        needs="the target's logits",
    ),
    "draft_model": DrafterDescription(
        proposes="a chain or tree that a smaller model draws",
        source="arXiv 2211.17192; arXiv 2302.01318; siblings arXiv 1903.06059",
        needs="a second model with the same vocabulary (--draft-model)",
    ),
}
