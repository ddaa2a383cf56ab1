"""Switch off messages of other libraries that say nothing about this run."""

from __future__ import annotations

import logging
import warnings

__all__ = ["silence"]


def silence() -> None:
    """Keep the output of a run to what its user can act on."""
    # torchao tries GPU kernels of other platforms when transformers merely looks whether it is there.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # The engine steps layers itself; torch only knows that its own optimizer was never stepped.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")
    # Names of collectives that DeepSpeed and torch are changing among themselves.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
