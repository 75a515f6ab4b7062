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
    "auto": DrafterDescription(
        proposes="in every step the proposal of the drafter that pays most, or nothing",
        source="-",
        needs="nothing",
    ),
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
    "anpd": DrafterDescription(
        proposes="a tree predicted token by token from counted n-grams of several lengths, learnt from the request",
        source="ANPD, arXiv 2404.08698",
        needs="nothing",
    ),
    "aded": DrafterDescription(
        proposes="a tree from tri-gram statistics that are shared by all requests and kept up to date",
        source="ADED, arXiv 2407.12021",
        needs="nothing",
    ),
    "copy": DrafterDescription(
        proposes="the block that follows where the last tokens stand in given references or in the text itself",
        source="LLMA, arXiv 2304.04487; CopySpec, arXiv 2502.08923",
        needs="nothing",
    ),
    "edit": DrafterDescription(
        proposes="the rest of the input where the output is aligned with it, and changes made before",
        source="aggressive decoding, arXiv 2205.10350; arXiv 2106.04970",
        needs="nothing",
    ),
    "history": DrafterDescription(
        proposes="what followed the same tokens in what the model generated before, in any request",
        source="hierarchy drafting, arXiv 2502.05609",
        needs="nothing",
    ),
    "merge": DrafterDescription(
        proposes="one tree of the continuations of several sources, the likeliest first",
        source="-",
        needs="nothing",
    ),
    "hierarchy": DrafterDescription(
        proposes="the continuations of several databases, the nearest in time first, until the tree is full",
        source="hierarchy drafting, arXiv 2502.05609",
        needs="nothing",
    ),
    "recycling": DrafterDescription(
        proposes="a tree of what the target found likely after the last tokens, the longest known context first",
        source="Token Recycling, arXiv 2408.08696",
        needs="the target's logits",
    ),
    "jacobi": DrafterDescription(
        proposes="a chain of guesses, replaced in each step by the target's choices after them",
        source="arXiv 2002.03629; arXiv 2305.10427",
        needs="nothing",
    ),
    "lookahead": DrafterDescription(
        proposes="a window of Jacobi trajectories, and the n-grams from it that begin with the last token",
        source="lookahead decoding, arXiv 2402.02057",
        needs="nothing",
    ),
    "draft_model": DrafterDescription(
        proposes="a chain or tree that a smaller model draws",
        source="arXiv 2211.17192; arXiv 2302.01318; siblings arXiv 1903.06059",
        needs="a second model with the same vocabulary (--draft-model)",
    ),
    "self_draft": DrafterDescription(
        proposes="what the target itself says with its linear layers in fewer bits, as a chain or tree",
        source="QuantSpec, arXiv 2502.10424 (its weights, not its cache)",
        needs="nothing",
    ),
    "universal_draft": DrafterDescription(
        proposes="what a smaller model with another tokenizer says, by shared tokens or by its text",
        source="arXiv 2502.05202, algorithms 2 and 4",
        needs="a second model with any tokenizer (model)",
    ),
    "staged": DrafterDescription(
        proposes="the trees of a draft model in fewer forwards of it: another drafter guesses what it will say",
        source="arXiv 2308.04623",
        needs="a second model with the same vocabulary (model)",
    ),
    "sorted_draft": DrafterDescription(
        proposes="each token by the smallest of a draft model's first layers that is confident",
        source="S2D, arXiv 2407.01955",
        needs="a second model with the same vocabulary (model)",
    ),
    "suffix": DrafterDescription(
        proposes="the best-scored trees among the longest matches in suffix trees of the request and of past outputs",
        source="SuffixDecoding, arXiv 2411.04975",
        needs="nothing",
    ),
    "datastore": DrafterDescription(
        proposes="a tree of what followed the longest suffix of the context in a corpus on disk",
        source="REST, arXiv 2311.08252",
        needs="a file by `outrider datastore build` (path)",
    ),
}
