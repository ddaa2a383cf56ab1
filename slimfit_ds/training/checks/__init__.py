"""Everything that can be wrong with a run, found before a process group or a model is made."""

# Importing a module registers its checks, in the order in which they run.
from slimfit_ds.training.checks import settings, place, inputs, space  # noqa: F401, I001
from slimfit_ds.training.checks.registry import Inspection, inspect

__all__ = ["Inspection", "inspect"]
