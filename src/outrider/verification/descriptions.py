"""What each verification rule is, in words: one entry for every name that `build_rule` knows. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RuleExactness = Literal["sample", "distribution"]


@dataclass(frozen=True)
class RuleDescription:
    """One verification rule.

    Attributes:
        accepts: one phrase: which draft tokens it keeps.
        source: the paper.
        exactness: "sample" gives, token for token, what plain decoding gives with the same seed; "distribution" has
            exactly the target's distribution. At temperature 0 the two are the same.
        trees: which trees it takes.
    """

    accepts: str
    source: str
    exactness: RuleExactness
    trees: str


RULE_DESCRIPTIONS: dict[str, RuleDescription] = {
    "coupled": RuleDescription(
        accepts="the drafts on the path of the target's own choices, drawn with keyed noise",
        source="Gumbel-max with common random numbers, arXiv 2408.07978",
        exactness="sample",
        trees="any",
    ),
    "rejection": RuleDescription(
        accepts="a draft token with probability min(1, p/q), else samples the residual",
        source="speculative sampling, arXiv 2211.17192; arXiv 2302.01318",
        exactness="distribution",
        trees="chains",
    ),
    "tree_rejection": RuleDescription(
        accepts="siblings in turn, each against what p has left, drawn without replacement",
        source="recursive rejection sampling, arXiv 2402.14160; Sequoia, arXiv 2402.12374",
        exactness="distribution",
        trees="any",
    ),
    "multi_candidate": RuleDescription(
        accepts="siblings in turn, each against what p has left, drawn with replacement",
        source="SpecInfer, arXiv 2305.09781; arXiv 2401.06706",
        exactness="distribution",
        trees="any",
    ),
}
