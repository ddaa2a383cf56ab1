"""Every layer trains a fixed part of its input columns at each step: `freezing.columns` splits them off.

That a fixed, structured part of every weight suffices is the finding of S2FT (Yang et al., arXiv 2412.06289) and SMT (He et
al., arXiv 2405.15525). There it is channels or blocks that are chosen for their weight or gradient; here evenly spaced input
columns of every linear layer, which bounds the inputs that are kept as well.
"""

from __future__ import annotations

import dataclasses

from slimfit_ds.schedule.policies.none import NONE

__all__ = ["COLUMNS"]

# What is left of a model after the split trains as a whole.
COLUMNS = dataclasses.replace(NONE, splits_columns=True)
