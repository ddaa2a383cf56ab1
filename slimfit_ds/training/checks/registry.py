"""The list of checks, and what they find out on the way.

Each check names the recipe keys it relies on, and runs only while these are sound, so that one mistake is reported
once and hides no other one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.distributed import Ranks
from slimfit_ds.training.output import OutputPlan
from slimfit_ds.training.recipe import Draft, Recipe
from slimfit_ds.training.tasks import Splits, Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Inspection", "inspect", "needs"]


@dataclass
class Inspection:
    """A sound recipe and what the checks had to open to know that.

    Args:
        draft: the recipe as read.
        ranks: this process among all.
    """

    draft: Draft
    ranks: Ranks
    base: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    output: OutputPlan = field(default_factory=OutputPlan)
    monitors: dict[str, dict[str, Any]] = field(default_factory=dict)
    task: Task[Any] = None  # type: ignore[assignment]
    splits: Splits = None  # type: ignore[assignment]
    source: str | None = None
    model_config: PretrainedConfig = None  # type: ignore[assignment]

    @property
    def recipe(self) -> Recipe:
        return self.draft.recipe


Check = Callable[[Inspection], None]
_CHECKS: list[tuple[frozenset[str], frozenset[str], Check]] = []


def needs(*keys: str, after: tuple[str, ...] = ()) -> Callable[[Check], Check]:
    """Register a check of these recipe keys that also needs these other checks to have passed."""

    def register(check: Check) -> Check:
        _CHECKS.append((frozenset(keys), frozenset(after), check))
        return check

    return register


def inspect(draft: Draft, ranks: Ranks) -> Inspection:
    """Run every check that can run.

    Args:
        draft: from `read_recipe`.
        ranks: this process among all; the batch must divide by their number.

    Raises:
        ConfigError: all problems, those of reading first.
    """
    found = Inspection(draft, ranks)
    problems = list(draft.problems)
    failed: set[str] = set()
    for keys, after, check in _CHECKS:
        if keys & draft.broken or after & failed:
            failed.add(check.__name__)
            continue
        try:
            check(found)
        except ConfigError as error:
            problems += error.problems
            failed.add(check.__name__)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found
