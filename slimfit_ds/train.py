"""Fine-tune as a recipe says; `slimfit-ds train`, and `launch/train.py` for launchers that want a script.

    slimfit-ds train --config recipes/digits_vit.yaml
    python launch/train.py --config recipes/minilm_cola.yaml --data_dir ../shared/data/cola --max_steps 60
    deepspeed --num_accelerators 2 launch/train.py --config recipes/digits_vit.yaml slimfit.freeze.rate=0.95
    torchrun --nproc_per_node 2 launch/train.py --config recipes/digits_vit.yaml --slimfit null

The same under `mpirun` and `srun`. A recipe is YAML in the field names of `TrainingArguments` (TRL's `SFTConfig` or
`DPOConfig` for language models), plus `task`, `model`, `data` and `slimfit`; see slimfit_ds/tasks/recipe.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimfit_ds.errors import ConfigError
from slimfit_ds.integrations.ranks import set_rank_variables

__all__ = ["leave_process_group", "main", "train"]


def main(argv: Sequence[str]) -> int:
    """Train one recipe; the exit code: 0, also if stopped on request; 2 wrong recipe; 4 NaN or infinite loss."""
    try:
        set_rank_variables(single=False)
        return train(argv)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            count = f"{len(error.problems)} problem" + "s" * (len(error.problems) != 1)
            print(
                "\n".join([f"{count}:", *(f"  - {line}" for line in error.problems)]),
                file=sys.stderr,
            )
        return 2
    except FloatingPointError:  # `name_last_checkpoint` has told it
        return 4


def train(argv: Sequence[str]) -> int:
    """From a recipe to a trained model and its numbers."""
    # 1. The recipe, and everything that can be wrong with it.
    from slimfit_ds.integrations.output_folder import claim_output, is_finished, write_recipe
    from slimfit_ds.tasks.recipe import read_recipe
    from slimfit_ds.tasks.setup import inspect, make_arguments, weight_dtype

    problems: list[str] = []
    recipe, task = read_recipe(argv, problems)
    inputs = inspect(recipe, task, problems)
    values = recipe.model_dump(mode="json", exclude_unset=True) | {"slimfit": inputs.slimfit}
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    checkpoint = claim_output(values, world_size)
    output = Path(values["output_dir"]).expanduser()
    if is_finished(output):
        show(output)
        return 0

    # 2. The Trainer's arguments. From here on there is a process group.
    from transformers import set_seed

    measure = None
    if recipe.measure is not None:
        from slimfit_ds.integrations.measure import MeasureSteps

        # Before the process group: DeepSpeed looks the collectives up that are to be counted.
        measure = MeasureSteps(recipe.measure.warmup, recipe.measure.tracked)
    if inputs.deepspeed is not None:
        from slimfit_ds.engine.processes import start_processes

        set_rank_variables(single=True)
        # By DeepSpeed's own call, or ZeRO 3 counts one rank only when a model is made on the CPU.
        start_processes()
    args = make_arguments(recipe, task, inputs)

    # 3. SlimFit: behind DeepSpeed as its engine, without DeepSpeed as a callback. And what keeps the work of a run.
    from slimfit_ds.integrations import SlimFitCallback, enable_deepspeed, survival
    from slimfit_ds.integrations.run_log import RunLog

    stop = survival.StopTogether()
    callbacks: list[Any] = [survival.NonFiniteSteps(recipe.on_nonfinite, recipe.max_nonfinite)]
    if inputs.deepspeed is not None:
        enable_deepspeed()
    if inputs.slimfit is not None and inputs.deepspeed is None:
        callbacks.append(SlimFitCallback(inputs.slimfit))  # writes the history itself
    else:
        callbacks.append(RunLog(lambda: getattr(trainer.deepspeed, "schedule", None)))
    if measure is not None:
        callbacks.append(measure)
    callbacks += [stop, survival.WholeCheckpoints()]  # last: it marks what the others have written

    # 4. Model and data.
    from slimfit_ds.deltas.reference import ReferenceModel
    from slimfit_ds.tasks.models import build_model

    def new_model() -> Any:
        set_seed(args.seed)
        return build_model(
            inputs.source, inputs.config, task, weight_dtype(args), recipe.lora, recipe.attn_implementation
        )

    model, parts = new_model(), task.trainer_parts(inputs.splits)
    if recipe.lora is None and not getattr(args, "precompute_ref_log_probs", True):
        stage = (inputs.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
        if inputs.slimfit is not None and stage < 3:
            parts["ref_model"] = ReferenceModel(model)
        else:
            # TRL would load it by a hub id or folder, which a GGUF file and a model from `config` have not.
            parts["ref_model"] = new_model()

    # 5. Train.
    trainer = task.trainer_class()(model=model, args=args, callbacks=callbacks, **parts)
    check_loop(trainer, inputs.deepspeed)
    task.check_trainer(trainer)
    if measure is not None:
        measure.trainer = trainer
    if not task.loss_counts_tokens:
        # Many models take keyword arguments and leave `num_items_in_batch` aside: transformers would then multiply
        # their loss by the number of ranks and micro-batches.
        trainer.model_accepts_loss_kwargs = False
    survival.skip_finished_loop(trainer)
    if trainer.is_world_process_zero():
        write_recipe(values, world_size)
    with survival.name_last_checkpoint(output):
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.reason is not None:
            if trainer.is_world_process_zero():
                print(f"{stop.reason}. {survival.how_to_go_on(output)}", file=sys.stderr)
            return 0

        # 6. Evaluate, and write model and numbers.
        metrics = {**result.metrics, **trainer.evaluate()}
        if recipe.export:
            trainer.save_model(str(output / "model"))
        if measure is not None:
            measure.write(output)
        write_metrics(trainer, task.finish(metrics))
    return 0


def check_loop(trainer: Any, deepspeed: dict[str, Any] | None) -> None:
    """accelerate leaves DeepSpeed out without a word where its environment asks for the CPU."""
    if deepspeed is not None and not trainer.is_deepspeed_enabled:
        raise ConfigError(
            [
                "deepspeed: accelerate has left DeepSpeed out, because ACCELERATE_USE_CPU is set; unset it "
                "(use_cpu=true and DS_ACCELERATOR=cpu are enough), or set deepspeed=null"
            ]
        )


def write_metrics(trainer: Any, metrics: dict[str, float]) -> None:
    """Write `metrics.json`: the last evaluation, speed, and the most memory that a rank has held."""
    import torch

    from slimfit_ds.environment import hardware, peak_memory, versions
    from slimfit_ds.files import write_atomically

    device = trainer.args.device
    peak = torch.tensor(float(peak_memory(device)), dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    engine = trainer.deepspeed
    seconds = metrics.get("train_runtime") or 0.0
    tokens = trainer.state.num_input_tokens_seen
    content = {
        "metrics": {
            key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")
        },
        "training": {
            key.removeprefix("train_"): value for key, value in metrics.items() if key.startswith("train_")
        },
        "steps": trainer.state.global_step,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "peak_bytes": int(peak.item()),
        "memory": engine.memory_report() if hasattr(engine, "memory_report") else None,
        "engine": type(engine).__name__ if engine is not None else "Trainer",
        "world_size": trainer.args.world_size,
        "seed": trainer.args.seed,
        "versions": versions(),
        "hardware": hardware(device),
    }
    if trainer.is_world_process_zero():
        write_atomically(Path(trainer.args.output_dir, "metrics.json"), json.dumps(content, indent=2) + "\n")
        show(Path(trainer.args.output_dir))


def show(output: Path) -> None:
    """Print the numbers of a finished run, once."""
    if os.environ.get("RANK", "0") == "0":
        content = json.loads((output / "metrics.json").read_text())
        numbers = {**content["metrics"], "steps": content["steps"], "peak_bytes": content["peak_bytes"]}
        print(f"{json.dumps(numbers, indent=2)}\nresults in {output}")


def leave_process_group() -> None:
    """torch complains of processes that just end."""
    if (torch := sys.modules.get("torch")) is None:
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    leave_process_group()
    sys.exit(code)
