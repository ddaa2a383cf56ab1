"""Names of torch, DeepSpeed, transformers, datasets and torchao that are used without being public: one table, checked at start-up.

A library may rename or change them in any release. `check` compares those that a run will use with the installed libraries,
by name and by signature, so that a new version is an error at the start instead of a layer that silently does not freeze.
`python -m slimfit_ds.private_names` prints the table.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from slimfit_ds.errors import ConfigError

__all__ = ["SUPPORTED", "TABLE", "ChangedNames", "Name", "changed_names", "check"]

SUPPORTED = {
    "torch": ">=2.11,<2.14",
    "deepspeed": "==0.19.*",
    "transformers": ">=5.17,<5.24",
    "torchao": ">=0.14,<0.19",
    "datasets": ">=4.0,<6",
}
"""The versions that pyproject.toml allows."""


class ChangedNames(ConfigError, RuntimeError):
    """An installed library is another one than this package was written for."""


@dataclass(frozen=True)
class Name:
    """A private name of a library.

    Args:
        owner: `module` or `module:Class` that has it.
        name: the attribute, method or function.
        rooms: folders and modules of this package that use it.
        breaks: what would go wrong, in silence or not, without it.
        parameters: of a function, those relied on, in order; more may follow if they have defaults. None: not compared
            (no function, or one of C++).
        in_source: instances get it when they are made, so it is looked for in the source of the module.
    """

    owner: str
    name: str
    rooms: tuple[str, ...]
    breaks: str
    parameters: tuple[str, ...] | None = None
    in_source: bool = False

    @property
    def library(self) -> str:
        return self.owner.partition(".")[0].partition(":")[0]

    def problem(self, load: bool = False) -> str | None:
        """Return what has changed, or None.

        Args:
            load: import the module of the owner; otherwise one that nobody has imported is not in use, and all is well.
        """
        module_name, _, path = self.owner.partition(":")
        if not load and module_name not in sys.modules:
            return None
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            return f"{module_name} cannot be imported ({error})"
        owner: Any = module
        for part in filter(None, path.split(".")):
            if not hasattr(owner, part):
                return f"{module_name} has no {part}"
            owner = getattr(owner, part)
        if self.in_source:
            return self._problem_of_source(module)
        if not hasattr(owner, self.name):
            return f"{self.owner} has no {self.name}"
        return self._problem_of_signature(getattr(owner, self.name)) if self.parameters is not None else None

    def _problem_of_source(self, module: Any) -> str | None:
        try:
            source = inspect.getsource(module)
        except OSError:
            # Without sources nothing can be said.
            return None
        found = re.search(rf"(?<!\w){re.escape(self.name)}(?!\w)", source)
        return None if found else f"{self.owner} no longer knows {self.name}"

    def _problem_of_signature(self, function: Any) -> str | None:
        assert self.parameters is not None
        found = inspect.signature(_inner(function)).parameters
        count = len(self.parameters)
        optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [
            p.name for p in list(found.values())[count:] if p.default is p.empty and p.kind not in optional
        ]
        if tuple(found)[:count] == self.parameters and not needed:
            return None
        return f"{self.owner}.{self.name} takes ({', '.join(found)}), not ({', '.join(self.parameters)})"


def _inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """Look through DeepSpeed's decorators, which hide the signature in a closure."""
    while tuple(inspect.signature(function).parameters) == ("args", "kwargs"):
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        inner = next((content for content in cells if inspect.isfunction(content)), None)
        if inner is None:
            return function
        function = inner
    return function


def _names(owner: str, rooms: str, breaks: str, *texts: str) -> Iterator[Name]:
    """Yield rows: `name`, `name(parameters, relied, on)`, or `.name` of what is set on instances."""
    for text in texts:
        name, call, parameters = text.removeprefix(".").rstrip(")").partition("(")
        relied_on = tuple(parameters.replace(",", "").split()) if call else None
        yield Name(owner, name, tuple(rooms.split()), breaks, relied_on, in_source=text.startswith("."))


TABLE: tuple[Name, ...] = (
    # deepspeed
    *_names(
        "deepspeed.runtime.engine:DeepSpeedEngine",
        "engine",
        "a method that is overridden and never called: frozen layers move, or the norm is wrong",
        "_configure_basic_optimizer(self, model_parameters)",
        "_configure_zero_optimizer(self, optimizer)",
        "_do_optimizer_sanity_check(self, basic_optimizer)",
        "_scheduler_from_config(self, optimizer)",
        "_broadcast_model(self)",
        "_take_model_step(self, lr_kwargs)",
        "allreduce_gradients(self, bucket_size)",
        "clip_fp32_gradients(self)",
        "zero_force_ds_cpu_optimizer(self)",
        "zero_grad(self)",
    ),
    *_names(
        "deepspeed.runtime.engine:DeepSpeedEngine",
        "engine",
        "the linear function of ZeRO 3 is not in force when blocks are recomputed: more memory, or an error",
        "_backward_prologue(self)",
        "_backward_epilogue(self)",
        "backward(self, loss)",
        "forward(self, inputs, kwargs)",
    ),
    *_names(
        "deepspeed.runtime.engine:DeepSpeedEngine",
        "engine",
        "checkpoints in DeepSpeed's format, or weights without their trained columns",
        "_zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters)",
        "save_checkpoint(self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters)",
        "load_checkpoint(self, load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only, custom_load_fn)",
    ),
    *_names(
        "deepspeed.runtime.engine:DeepSpeedEngine",
        "engine",
        "an AttributeError while the engine is made",
        "._config",
        ".basic_optimizer",
        ".seq_data_parallel_group",
        ".gradient_average",
        ".communication_data_type",
    ),
    *_names("deepspeed", "engine", "the engine is a stock one: nothing freezes", "DeepSpeedEngine"),
    *_names("deepspeed", "integrations", "the Trainer makes a stock engine: nothing freezes", "initialize"),
    *_names("deepspeed.runtime.engine", "engine", "an ImportError", "ZERO_OPTIMIZATION"),
    *_names(
        "deepspeed.runtime.fp16.loss_scaler",
        "engine",
        "fp16 trains with a wrong loss scale",
        "CreateLossScaler(dtype, static_loss_scale, dynamic_scaling, dynamic_loss_args)",
    ),
    *_names(
        "deepspeed.runtime.fp16.loss_scaler",
        "engine",
        "a resumed fp16 run starts with another loss scale",
        ".cur_scale",
        ".cur_iter",
        ".last_overflow_iter",
        ".cur_hysteresis",
    ),
    *_names(
        "deepspeed.runtime.tensor_parallel.init_utils",
        "engine",
        "configurations as hjson or base64 are not read",
        "load_ds_config(config)",
    ),
    *_names("deepspeed.ops", "engine", "half a minute of compiling at the first start", "__compatible_ops__"),
    *_names("deepspeed.runtime.zero.stage3", "engine", "a stock optimizer", "DeepSpeedZeroOptimizer_Stage3"),
    *_names("deepspeed.runtime.zero.stage3", "engine", "gradients have no bucket", "IPGBucketZ3"),
    *_names("deepspeed.runtime.torch_autocast", "engine", "an ImportError", "sort_dtypes(dtypes)"),
    *_names(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        "engine",
        "a method that is overridden and never called: frozen layers move, or memory of all layers is held",
        "_setup_for_real_optimizer(self)",
        "get_param_comm_dtype(self, param)",
        "independent_gradient_partition_epilogue(self)",
        "partition_grads(self, params_to_release, grad_partitions)",
        "reduce_ready_partitions_and_remove_grads(self, param)",
        "step(self, closure)",
        "zero_grad(self, set_to_none)",
    ),
    *_names(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        "engine",
        "an AttributeError in the first step",
        "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(self, communication_data_type)",
        "_partition_all_parameters(self)",
        "_post_step(self, timer_names)",
        "_pre_step(self)",
    ),
    *_names(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        "engine",
        "gradients of the last bucket are lost, or memory is counted wrongly",
        "._epilogue_ran_this_backward",
        ".ipg_buckets",
        ".offload_optimizer",
        ".reduce_and_partition_stream",
        ".fp32_partitioned_groups_flat",
        ".grad_partitions_flat_buffer",
        ".averaged_gradients",
    ),
    *_names(
        "deepspeed.utils.tensor_fragment",
        "engine",
        "`deepspeed.utils.safe_get_full_*` give nothing, `safe_set_full_*` change nothing",
        "._hp_mapping",
        ".get_full_hp_param",
        ".get_full_hp_grad",
        ".set_full_hp_param",
        ".set_full_hp_grad",
    ),
    *_names(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        "engine",
        "`deepspeed.utils.safe_get_*` and `safe_set_*` raise errors under ZeRO 3",
        "get_full_hp_param(self, param, optim_state_key)",
        "set_full_hp_param(self, value, param, optim_state_key)",
        "get_fp32_grad_for_param(self, param)",
        "get_fp32_grad_partitions(self)",
        "set_fp32_grad_for_param(self, value, param)",
        "get_local_fp32_grad_for_param(self, param)",
        "set_local_grad_for_param(self, value, param)",
        "get_local_fp32_param(self, param, optim_state_key)",
        "set_local_hp_param(self, value, param, optim_state_key)",
        "get_hp_param_device(self, param, optim_state_key)",
        "update_fp32_grad_for_param_vectorized(self, update_func, param_list)",
        "refresh_fp32_params(self)",
    ),
    *_names(
        "deepspeed.runtime.zero.stage_1_and_2",
        "engine",
        "an error of the memory report of a stock engine",
        ".single_partition_of_fp32_groups",
        ".param_buffer_of_bit16_for_cpu_offload_groups",
        ".temp_grad_buffer_for_cpu_offload",
        ".accumulated_grads_in_cpu",
        ".cpu_offload",
    ),
    *_names(
        "deepspeed.runtime.fp16.fused_optimizer",
        "engine",
        "an error of the memory report of a stock engine",
        ".fp32_groups_flat",
    ),
    *_names(
        "deepspeed.runtime.fp16.unfused_optimizer",
        "engine",
        "an error of the memory report of a stock engine",
        ".fp32_groups",
    ),
    *_names(
        "deepspeed.runtime.bf16_optimizer",
        "engine",
        "an error of the memory report of a stock engine",
        ".fp32_groups_flat_partition",
        ".fp32_groups_gradients",
    ),
    *_names(
        "deepspeed.runtime.zero.partition_parameters",
        "engine",
        "a weight that ZeRO 3 has cut is taken for a whole one of no elements",
        ".ds_id",
        ".ds_tensor",
        ".ds_numel",
        ".ds_status",
        ".ds_process_group",
        ".partition_numel",
    ),
    *_names(
        "deepspeed.runtime.zero.partition_parameters",
        "trainable",
        "a cut weight is taken for a vector: it is not frozen",
        ".ds_shape",
    ),
    *_names(
        "deepspeed.runtime.zero.linear",
        "engine",
        "an ImportError, or DeepSpeed's linear function, which keeps the input of frozen layers",
        "zero3_linear_wrap(input, weight, bias)",
    ),
    *_names(
        "deepspeed.runtime.zero.partitioned_param_coordinator",
        "planner",
        "an error of `plan` under ZeRO 3",
        "assert_ints_same_as_other_ranks",
    ),
    # torch
    *_names("torch._C._nn", "engine", "an ImportError", "linear"),
    *_names(
        "torch._C._autograd", "activations", "compressed blocks do not find their graph", "_get_sequence_nr"
    ),
    *_names(
        "torch._C._autograd",
        "activations streaming",
        "hooks of others are lost",
        "_top_saved_tensors_default_hooks",
    ),
    *_names(
        "torch._C:_FunctionBase", "activations", "compressed blocks do not find their graph", "_sequence_nr"
    ),
    *_names(
        "torch._C._autograd",
        "activations",
        "inputs on the host are given back while a second backward pass needs them",
        "_get_current_graph_task_keep_graph",
    ),
    *_names(
        "torch._C",
        "memory streaming",
        "phases of a step are told apart wrongly, streamed blocks come in the wrong order",
        "_current_graph_task_id",
    ),
    *_names(
        "torch:Tensor",
        "activations streaming trainable",
        "a changed tensor is taken for the kept one",
        "_version",
    ),
    *_names("torch:Tensor", "memory", "views are counted twice", "_base"),
    *_names(
        "torch.nn.modules.module",
        "activations",
        "router logits that leave a recomputed block are an error in the backward pass",
        "._forward_hooks",
        "._forward_hooks_always_called",
    ),
    *_names(
        "torch:Tensor", "activations", "hooks on inputs of recomputed blocks are lost", "_backward_hooks"
    ),
    *_names(
        "torch:UntypedStorage",
        "activations memory streaming",
        "one storage is kept or counted twice",
        "_cdata",
    ),
    *_names(
        "torch.autograd:Variable", "integrations", "DDP ranks do not average gradients", "_execution_engine"
    ),
    *_names(
        "torch",
        "optim",
        "an AttributeError in the first step",
        "_foreach_add_",
        "_foreach_addcmul_",
        "_foreach_copy_",
        "_foreach_div_",
        "_foreach_lerp_",
        "_foreach_mul",
        "_foreach_mul_",
        "_foreach_sqrt",
    ),
    *_names("torch", "engine", "an AttributeError in the first step", "_foreach_norm"),
    *_names(
        "torch",
        "schedule",
        "an AttributeError in the first step",
        "_foreach_abs",
        "_foreach_clamp_min_",
        "_foreach_maximum_",
        "_foreach_sub_",
    ),
    *_names(
        "torch.optim.lr_scheduler", "engine", "a warning of torch's schedulers at each start", "._opt_called"
    ),
    *_names("torch.nn.modules.module", "activations", "compiled blocks keep stale weights", "._parameters"),
    *_names("torch.nn.modules.module", "activations", "an ImportError", "_has_any_global_hook()"),
    *_names("torch.nn:Module", "planner", "`plan` allocates real memory", "_apply(self, fn, recurse)"),
    *_names("torch.nn:Module", "streaming", "`model.to` moves streamed weights", "_apply(self, fn, recurse)"),
    *_names("torch.nn.modules.conv", "trainable", "an AttributeError", "_ConvNd"),
    *_names("torch.nn.modules.dropout", "activations", "an ImportError", "_DropoutNd"),
    *_names(
        "torch.nn.parallel.distributed",
        "integrations",
        "DDP sends gradients of frozen layers, or waits for them for ever",
        "._ddp_params_and_buffers_to_ignore",
    ),
    *_names(
        "torch.distributed.distributed_c10d",
        "integrations",
        "a hung rank is noticed after half an hour",
        "_set_pg_timeout(timeout, group)",
        "_world",
    ),
    *_names(
        "torch.distributed",
        "memory",
        "traffic of a collective is not counted",
        "_all_gather_base",
        "_reduce_scatter_base",
    ),
    *_names("torch._subclasses.fake_tensor", "activations planner trainable", "an ImportError", "FakeTensor"),
    *_names("torch._subclasses.fake_tensor", "planner", "an ImportError", "FakeTensorMode"),
    *_names("torch.utils._python_dispatch", "memory planner", "an ImportError", "TorchDispatchMode"),
    *_names("torch.utils._python_dispatch", "activations", "an ImportError", "_disable_current_modes()"),
    *_names("torch.utils._python_dispatch", "activations", "an ImportError", "is_in_torch_dispatch_mode"),
    *_names("torch.utils._python_dispatch", "memory", "an ImportError", "is_traceable_wrapper_subclass(t)"),
    *_names("torch.utils._pytree", "memory engine planner", "an ImportError", "tree_iter(tree)"),
    *_names("torch.testing._internal.distributed.fake_pg", "planner", "an ImportError", "FakeStore"),
    *_names(
        "torch.cuda.memory",
        "memory",
        "no allocation history of a step",
        "_record_memory_history",
        "_dump_snapshot",
    ),
    # transformers
    *_names(
        "transformers.modeling_utils:PreTrainedModel",
        "activations planner",
        "blocks are not recomputed, or by torch's function after a trainer has switched checkpointing off and on",
        "_set_gradient_checkpointing(self, enable, gradient_checkpointing_func)",
    ),
    *_names(
        "transformers.modeling_layers",
        "activations",
        "blocks are not recomputed: more memory than planned",
        "._gradient_checkpointing_func",
    ),
    *_names(
        "transformers.utils.output_capturing",
        "activations",
        "router logits that leave a recomputed block are an error in the backward pass",
        "_active_collector",
        ".output_capturing_hook",
    ),
    *_names(
        "transformers.configuration_utils",
        "activations",
        "attention keeps all that it kept before",
        "._attn_implementation",
    ),
    *_names(
        "transformers.modeling_utils",
        "activations planner",
        "the loss is not made in chunks",
        "._loss_function",
    ),
    *_names(
        "transformers.integrations.deepspeed:HfTrainerDeepSpeedConfig",
        "integrations",
        "problems of the slimfit block come one by one, and late",
        "trainer_config_finalize(self, args, model, num_training_steps)",
    ),
    *_names(
        "transformers.trainer:Trainer",
        "integrations",
        "a finished run that resumes takes a step more",
        "_run_epoch",
    ),
    *_names(
        "transformers.models.auto.auto_factory:_BaseAutoModelClass",
        "tasks",
        "a task cannot tell whether a model fits it",
        "_model_mapping",
    ),
    # datasets
    *_names(
        "datasets.arrow_dataset:Dataset",
        "tasks",
        "an AttributeError where a data set is tokenised",
        "._fingerprint",
    ),
    # torchao
    *_names(
        "torchao.optim.quant_utils",
        "optim",
        "no 8-bit states",
        "create_dynamic_map(signed)",
        "scale_tensor(input, block_size)",
        "quantize_8bit_with_qmap(input, qmap)",
        "dequant_with_qmap(codes, qmap, scale)",
    ),
)


def changed_names(load: bool = False) -> list[str]:
    """Return a line for each name of the table that the installed libraries do not have as expected.

    Args:
        load: import all of the modules; otherwise only those that are in use already are looked at.
    """
    return [problem for name in TABLE if (problem := name.problem(load)) is not None]


def check() -> None:
    """Compare the private names of all libraries that are imported by now; at most once for each set of them.

    Raises:
        ChangedNames: names all that has changed, and the versions that work.
    """
    _check(frozenset(name.owner for name in TABLE if name.owner.partition(":")[0] in sys.modules))


@functools.cache
def _check(_owners: frozenset[str]) -> None:
    problems = changed_names()
    if not problems:
        return
    libraries = sorted({name.library for name in TABLE if name.problem() is not None})
    versions = ", ".join(
        f"{library}{SUPPORTED[library]} (found {importlib.import_module(library).__version__})"
        for library in libraries
    )
    raise ChangedNames(
        [f"private names that slimfit_ds relies on have changed; install {versions}:", *problems]
    )


def _page() -> str:
    """Return the table as Markdown."""
    lines = [
        "# Private names in use",
        "",
        "Names of other libraries that are not public, or are replaced for the length of a call. `slimfit_ds.initialize` and",
        "`slimfit_ds.slim` compare those that a run uses by name and signature before anything is built; the error lists all",
        "that has changed and the versions that work.",
        "",
        "Versions: " + ", ".join(f"`{library}{bounds}`" for library, bounds in SUPPORTED.items()) + ".",
        "",
        "| owner | name | parameters relied on | used in | without it |",
        "|---|---|---|---|---|",
    ]
    for row in TABLE:
        parameters = "" if row.parameters is None else f"`({', '.join(row.parameters)})`"
        name = f"`{row.name}`" + (" (set on instances)" if row.in_source else "")
        lines.append(f"| `{row.owner}` | {name} | {parameters} | {', '.join(row.rooms)} | {row.breaks} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(_page(), end="")
