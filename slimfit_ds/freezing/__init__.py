"""Which layers of a model train at each step: discovery, statistics, policies and the schedule."""

from slimfit_ds.freezing.layers import Layer, ParameterRoles, discover
from slimfit_ds.freezing.schedule import FreezeSchedule

__all__ = ["FreezeSchedule", "Layer", "ParameterRoles", "discover"]
