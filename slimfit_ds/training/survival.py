"""Keeps a run from hanging or from losing its work: requests to stop, and ranks that are gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from slimfit_ds.training.checkpoints import last_checkpoint
from slimfit_ds.training.distributed import Ranks
from slimfit_ds.training.endings import RunEnding, RunStopped
from slimfit_ds.training.launcher import Launcher, find_launcher
from slimfit_ds.training.liveness import Liveness
from slimfit_ds.training.output import resume_overrides
from slimfit_ds.training.recipe import Recipe
from slimfit_ds.training.stop_signals import StopSignals, ignore_stop_signals

__all__ = ["survival"]


@contextmanager
def survival(recipe: Recipe, folder: Path, ranks: Ranks) -> Iterator[StopSignals]:
    """Watch over the body, which is the whole work of a run after the process group is there.

    Args:
        recipe: of the run.
        folder: its output folder.
        ranks: this process among all.

    Yields:
        requests to stop; the body starts to listen when it has work that can be saved.

    Raises:
        LostRankError: an error of the body comes from another rank that is gone.
        RunStopped: with the command that goes on, as the body stopped on request.
    """
    launcher = find_launcher()
    signals = StopSignals(launcher)
    liveness = Liveness(ranks, recipe.rank_timeout, lambda: _how_to_go_on(recipe, folder, launcher))
    liveness.start()
    try:
        yield signals
        # Nobody leaves before all are done: a rank that is gone looks lost.
        torch.distributed.barrier()
    except RunStopped as stopped:
        # What comes now comes from a launcher that is in a hurry; there is nothing left to save.
        signals.stop()
        ignore_stop_signals()
        with suppress(RuntimeError):
            torch.distributed.barrier()
        raise RunStopped(f"{stopped}. {_how_to_go_on(recipe, folder, launcher)}") from None
    except RunEnding:
        raise
    except Exception as error:
        if (lost := liveness.explain(error)) is not None:
            raise lost from error
        raise
    finally:
        liveness.stop()
        signals.stop()


def _how_to_go_on(recipe: Recipe, folder: Path, launcher: Launcher) -> str:
    last = last_checkpoint(folder)
    place = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return f"{place}; to go on: {launcher.again(resume_overrides(recipe, folder))}"
