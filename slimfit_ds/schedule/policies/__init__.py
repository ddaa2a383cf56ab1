"""The freeze policies by name. A new policy is one file and one line here."""

from slimfit_ds.schedule.policies.badam import BADAM
from slimfit_ds.schedule.policies.base import Policy, Selection, State
from slimfit_ds.schedule.policies.bsr import BSR
from slimfit_ds.schedule.policies.columns import COLUMNS
from slimfit_ds.schedule.policies.far import FAR
from slimfit_ds.schedule.policies.ils import ILS
from slimfit_ds.schedule.policies.ils_per_cost import ILS_PER_COST
from slimfit_ds.schedule.policies.lisa import LISA
from slimfit_ds.schedule.policies.none import NONE
from slimfit_ds.schedule.policies.progressive import PROGRESSIVE
from slimfit_ds.schedule.policies.random_choice import RANDOM
from slimfit_ds.schedule.policies.top_gradient import TOP_GRADIENT

__all__ = ["POLICIES", "Policy", "Selection", "State"]

POLICIES: dict[str, Policy] = {
    "ils": ILS,
    "ils_per_cost": ILS_PER_COST,
    "top_gradient": TOP_GRADIENT,
    "random": RANDOM,
    "lisa": LISA,
    "badam": BADAM,
    "progressive": PROGRESSIVE,
    "far": FAR,
    "bsr": BSR,
    "columns": COLUMNS,
    "none": NONE,
}
