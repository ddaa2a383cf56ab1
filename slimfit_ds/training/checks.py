"""Everything that can be wrong with a run, found before a process group or a model is made.

Each check names the recipe keys it relies on, and runs only while these are sound, so that one mistake is reported
once and hides no other one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.config import ConfigError, SlimFitConfig
from slimfit_ds.monitoring.backends import BACKENDS, monitor_blocks
from slimfit_ds.training.deepspeed_config import deepspeed_config, load_base
from slimfit_ds.training.distributed import Ranks
from slimfit_ds.training.output import OutputPlan, plan_output
from slimfit_ds.training.recipe import Draft, ModelFromConfig, Recipe
from slimfit_ds.training.tasks import Preprocessing, Splits, Task, make_task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Inspection", "inspect"]


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


@needs("max_steps", "epochs")
def length(found: Inspection) -> None:
    if found.recipe.max_steps is None and found.recipe.epochs is None:
        raise ConfigError(["max_steps: say how long to train, by max_steps or by epochs"])


@needs("warmup_steps", "max_steps")
def warm_up(found: Inspection) -> None:
    recipe = found.recipe
    if (
        recipe.warmup_steps is not None
        and recipe.max_steps is not None
        and recipe.warmup_steps >= recipe.max_steps
    ):
        raise ConfigError(
            [f"warmup_steps must be below max_steps ({recipe.max_steps}), got {recipe.warmup_steps}"]
        )


@needs("train_batch_size", "micro_batch_size")
def batch_sizes(found: Inspection) -> None:
    recipe, world = found.recipe, found.ranks.world_size
    each = world * (recipe.micro_batch_size or 1)
    if recipe.train_batch_size % each == 0:
        return
    divisor = (
        f"{world} ranks"
        if recipe.micro_batch_size is None
        else f"{world} ranks x micro_batch_size {recipe.micro_batch_size}"
    )
    below = recipe.train_batch_size // each * each
    choices = f"{below} or {below + each}" if below else f"{each}"
    raise ConfigError(
        [f"train_batch_size must divide by {divisor}, got {recipe.train_batch_size}; {choices} would do"]
    )


@needs("deepspeed")
def deepspeed_file(found: Inspection) -> None:
    found.base = load_base(found.recipe, found.draft.folder)


@needs(
    "deepspeed", "train_batch_size", "micro_batch_size", "gradient_clipping", "dtype", "lr", "betas", "eps",
    "weight_decay", after=("deepspeed_file", "batch_sizes"),
)  # fmt: skip
def deepspeed_values(found: Inspection) -> None:
    found.deepspeed = deepspeed_config(found.recipe, found.base, found.ranks.world_size)


@needs("slimfit", "deepspeed", "gradient_checkpointing", "lora", after=("deepspeed_file",))
def slimfit_values(found: Inspection) -> None:
    from slimfit_ds.engine.compatibility import config_problems
    from slimfit_ds.freezing.policies import POLICIES
    from slimfit_ds.freezing.statistics import STATISTICS
    from slimfit_ds.training.deepspeed_config import slimfit_block

    block = slimfit_block(found.recipe, found.base)
    if block is None:
        return
    if not isinstance(block, dict):
        raise ConfigError([f"deepspeed.slimfit must be a mapping, got {block!r}"])
    slimfit = SlimFitConfig.parse(block)
    problems = [
        f"slimfit.freeze.{key} {value!r} is not known; choose one of {', '.join(sorted(known))}"
        for key, value, known in (
            ("policy", slimfit.freeze.policy, POLICIES),
            ("statistic", slimfit.freeze.statistic, STATISTICS),
        )
        if value not in known
    ]
    if found.deepspeed:
        problems += [
            problem if problem.startswith("slimfit.") else f"deepspeed.{problem}"
            for problem in config_problems(found.deepspeed, slimfit, None)
        ]
    if found.recipe.gradient_checkpointing and slimfit.activations != ActivationsConfig():
        problems.append(
            "gradient_checkpointing and slimfit.activations both decide what is kept for the backward pass; "
            "set gradient_checkpointing=false, or slimfit.activations=exact"
        )
    if found.recipe.lora is not None:
        problems.append("lora: adapters and per-step freezing are rivals; set lora=null or slimfit=null")
    if problems:
        raise ConfigError(problems)


@needs("dtype", "deepspeed", "slimfit", after=("deepspeed_file",))
def precision_and_stage(found: Inspection) -> None:
    from slimfit_ds.training.deepspeed_config import slimfit_block

    recipe = found.recipe
    zero = found.base.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if not isinstance(zero, dict) or stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError([f"deepspeed.zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}"])
    problems = []
    if recipe.dtype == "fp16" and not _has_fp16():
        problems.append("dtype 'fp16' needs a GPU, and none is in use here; use bf16 or fp32")
    if recipe.dtype == "fp16" and stage == 0 and slimfit_block(recipe, found.base) is None:
        problems.append(
            "dtype 'fp16' with deepspeed.zero_optimization.stage 0 trains with unscaled gradients in plain DeepSpeed "
            "(DeepSpeed#8393); use stage 1, or bf16"
        )
    for what, least in (("offload_optimizer", 1), ("offload_param", 3)):
        block = zero.get(what)
        device = block.get("device", "none") if isinstance(block, dict) else block
        if device not in (None, "none") and stage < least:
            problems.append(
                f"deepspeed.zero_optimization.{what} needs stage {least} or higher, got stage {stage}"
            )
    if problems:
        raise ConfigError(problems)


@needs("output_dir", "resume")
def output(found: Inspection) -> None:
    found.output = plan_output(found.draft)


@needs("report_to", after=("deepspeed_values", "output"))
def monitors(found: Inspection) -> None:
    found.monitors = monitor_blocks(found.recipe.report_to, found.base, found.output.folder)
    # They are opened when the run's folder may be written to, not when the engine is made.
    for backend in BACKENDS.values():
        found.deepspeed.pop(backend.block, None)


@needs("task")
def task(found: Inspection) -> None:
    found.task = make_task(found.recipe.task)


@needs("model")
def model_place(found: Inspection) -> None:
    from slimfit_ds.training.models import read_model_config, resolve_source

    model = found.recipe.model
    found.source = None if isinstance(model, ModelFromConfig) else resolve_source(model)
    found.model_config = read_model_config(found.recipe, found.source)


@needs(after=("model_place", "task"))
def model_head(found: Inspection) -> None:
    from slimfit_ds.training.models import head_problems

    if problems := head_problems(found.model_config, found.task):
        raise ConfigError(problems)


@needs(
    "data", "data_dir", "data_name", "train_split", "eval_split", "holdout", "seed", "max_train_examples",
    "max_eval_examples",
)  # fmt: skip
def data(found: Inspection) -> None:
    from slimfit_ds.training.data import open_splits

    found.splits = open_splits(found.recipe)


@needs(after=("task", "data"))
def columns(found: Inspection) -> None:
    found.splits = found.task.study(found.splits)


@needs("train_batch_size", after=("task", "data"))
def enough_examples(found: Inspection) -> None:
    examples = len(found.splits.train)
    if found.task.rows_are_examples and examples < found.recipe.train_batch_size:
        raise ConfigError(
            [
                f"train_batch_size must be at most the {examples} training examples, got {found.recipe.train_batch_size}"
            ]
        )


@needs("best_metric", after=("columns",))
def best_metric(found: Inspection) -> None:
    wanted, names = found.recipe.best_metric, found.task.metric_names()
    if wanted is not None and wanted not in names:
        raise ConfigError(
            [f"best_metric {wanted!r} is not a metric of this task; choose one of {', '.join(names)}"]
        )


@needs(after=("columns", "model_head"))
def model(found: Inspection) -> None:
    from slimfit_ds.training.models import fit_model_config

    fit_model_config(found.model_config, found.recipe, found.task)


@needs("gradient_checkpointing", after=("model",))
def checkpointing(found: Inspection) -> None:
    import transformers

    if not found.recipe.gradient_checkpointing:
        return
    model_class = getattr(transformers, found.task.model_class)._model_mapping[type(found.model_config)]
    if not getattr(model_class, "supports_gradient_checkpointing", False):
        raise ConfigError(
            [f"gradient_checkpointing: {model_class.__name__} does not support it; set it to false"]
        )


@needs("tokenizer", after=("model",))
def preprocessing(found: Inspection) -> None:
    from slimfit_ds.training.models import resolve_source

    named = found.recipe.tokenizer
    source = found.source if named is None else resolve_source(named, "tokenizer")
    found.task.load_preprocessing(Preprocessing(source), found.model_config)


def _has_fp16() -> bool:
    import os

    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
