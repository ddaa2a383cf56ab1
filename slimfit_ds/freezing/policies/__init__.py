"""The freeze policies by name. A new policy is one file and one line here."""

from slimfit_ds.freezing.policies.base import Policy, Selection, State
from slimfit_ds.freezing.policies.ils import ILS
from slimfit_ds.freezing.policies.none import NONE
from slimfit_ds.freezing.policies.random_choice import RANDOM

__all__ = ["POLICIES", "Policy", "Selection", "State"]

POLICIES: dict[str, Policy] = {
    "ils": ILS,
    "random": RANDOM,
    "none": NONE,
}
