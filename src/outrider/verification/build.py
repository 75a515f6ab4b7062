"""The catalogue of verification rules."""

from __future__ import annotations

from outrider.errors import ConfigError
from outrider.verification.coupled import CoupledRule
from outrider.verification.rejection import RejectionRule
from outrider.verification.rule import VerificationRule
from outrider.verification.tree_rejection import TreeRejectionRule

RULE_NAMES = ("coupled", "rejection", "tree_rejection", "multi_candidate")


def build_rule(name: str) -> VerificationRule:
    """The rule that users call `name`.

    Raises:
        ConfigError: there is none.
    """
    match name:
        case "coupled":
            return CoupledRule()
        case "rejection":
            return RejectionRule()
        case "tree_rejection":
            return TreeRejectionRule(name, "without_replacement")
        case "multi_candidate":
            return TreeRejectionRule(name, "with_replacement")
        case _:
            raise ConfigError("unknown verification rule", got=repr(name), expected=f"one of {', '.join(RULE_NAMES)}")
