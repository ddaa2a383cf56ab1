"""How a run can end other than by finishing; each with the exit code of its process.

0  finished, or stopped on request with a checkpoint       3  another rank was lost or failed
1  an error of this rank (with its traceback)              4  the loss or the gradients are not finite
2  the recipe is wrong (`ConfigError`)                     5  a checkpoint could not be written
"""

from __future__ import annotations

__all__ = ["LostRankError", "NotFiniteError", "RunEnding", "RunStopped", "SaveError"]


class RunEnding(Exception):
    """A known end of a run; its text is all that the user has to read."""

    exit_code = 1
    everywhere = True
    """Whether all ranks end this way together, so that one of them can speak for all."""


class RunStopped(RunEnding):
    """Somebody asked the run to stop; a checkpoint was saved."""

    exit_code = 0


class LostRankError(RunEnding):
    """Another rank died, fell silent or failed."""

    exit_code = 3
    everywhere = False


class NotFiniteError(RunEnding):
    """The loss or the gradients are NaN or infinite, and the recipe says to stop."""

    exit_code = 4


class SaveError(RunEnding):
    """A checkpoint could not be written; the last whole one is still there."""

    exit_code = 5
