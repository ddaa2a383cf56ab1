"""Names of torch, DeepSpeed, transformers and torchao that are used without being public: one table, checked at start-up.

A library may rename or change them in any release. `check` compares those that a run will use with the installed libraries,
by name and by signature, so that a new version is an error at the start instead of a layer that silently does not freeze.
`python -m slimfit_ds.private_names` prints the table as docs/private-names.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["SUPPORTED", "TABLE", "Name", "changed_names", "check"]

SUPPORTED = {
    "torch": ">=2.11,<2.14",
    "deepspeed": "==0.19.*",
    "transformers": ">=5.17,<5.24",
    "torchao": ">=0.14,<0.19",
}
"""The versions that pyproject.toml allows."""

ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
STAGE3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
PARTITION = "deepspeed.runtime.zero.partition_parameters"


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


def _overridden(owner: str, room: str, breaks: str, **methods: str) -> list[Name]:
    """Return a row for each method: name -> its parameters after `self`, separated by spaces."""
    return [
        Name(owner, n, (room,), breaks, ("self", *parameters.split())) for n, parameters in methods.items()
    ]


def _fields(owner: str, rooms: tuple[str, ...], breaks: str, *names: str) -> list[Name]:
    return [Name(owner, name, rooms, breaks, in_source=True) for name in names]


TABLE: tuple[Name, ...] = (
    # DeepSpeed: the engine.
    *_overridden(
        ENGINE,
        "engine",
        "a method that is overridden and never called: frozen layers move, or the norm is wrong",
        _configure_basic_optimizer="model_parameters",
        _configure_zero_optimizer="optimizer",
        _do_optimizer_sanity_check="basic_optimizer",
        _scheduler_from_config="optimizer",
        _take_model_step="lr_kwargs",
        allreduce_gradients="bucket_size",
        clip_fp32_gradients="",
        zero_force_ds_cpu_optimizer="",
        zero_grad="",
    ),
    *_overridden(
        ENGINE,
        "engine",
        "the linear function of ZeRO 3 is not in force when blocks are recomputed: more memory, or an error",
        _backward_prologue="",
        _backward_epilogue="",
        backward="loss",
        forward="inputs kwargs",
    ),
    *_overridden(
        ENGINE,
        "engine",
        "checkpoints in DeepSpeed's format, or weights without their trained columns",
        _zero3_consolidated_16bit_state_dict="exclude_frozen_parameters",
        save_checkpoint="save_dir tag client_state save_latest exclude_frozen_parameters",
        load_checkpoint="load_dir tag load_module_strict load_optimizer_states load_lr_scheduler_states "
        "load_module_only custom_load_fn",
    ),
    *_fields(
        "deepspeed.runtime.engine:DeepSpeedEngine",
        ("engine",),
        "an AttributeError while the engine is made",
        "_config",
        "basic_optimizer",
        "seq_data_parallel_group",
        "gradient_average",
        "communication_data_type",
    ),
    Name("deepspeed", "DeepSpeedEngine", ("engine",), "the engine is a stock one: nothing freezes"),
    Name("deepspeed", "initialize", ("integrations",), "the Trainer makes a stock engine: nothing freezes"),
    Name("deepspeed.runtime.engine", "ZERO_OPTIMIZATION", ("engine",), "an ImportError"),
    Name(
        "deepspeed.runtime.fp16.loss_scaler",
        "CreateLossScaler",
        ("engine",),
        "fp16 trains with a wrong loss scale",
        ("dtype", "static_loss_scale", "dynamic_scaling", "dynamic_loss_args"),
    ),
    *_fields(
        "deepspeed.runtime.fp16.loss_scaler",
        ("engine",),
        "a resumed fp16 run starts with another loss scale",
        "cur_scale",
        "cur_iter",
        "last_overflow_iter",
        "cur_hysteresis",
    ),
    Name(
        "deepspeed.runtime.tensor_parallel.init_utils",
        "load_ds_config",
        ("engine",),
        "configurations as hjson or base64 are not read",
        ("config",),
    ),
    Name("deepspeed.ops", "__compatible_ops__", ("engine",), "half a minute of compiling at the first start"),
    # DeepSpeed: the optimizer of ZeRO 3.
    Name("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3", ("engine",), "a stock optimizer"),
    Name("deepspeed.runtime.zero.stage3", "IPGBucketZ3", ("engine",), "gradients have no bucket"),
    Name("deepspeed.runtime.torch_autocast", "sort_dtypes", ("engine",), "an ImportError", ("dtypes",)),
    *_overridden(
        STAGE3,
        "engine",
        "a method that is overridden and never called: frozen layers move, or memory of all layers is held",
        _setup_for_real_optimizer="",
        get_param_comm_dtype="param",
        independent_gradient_partition_epilogue="",
        partition_grads="params_to_release grad_partitions",
        reduce_ready_partitions_and_remove_grads="param",
        step="closure",
        zero_grad="set_to_none",
    ),
    *_overridden(
        STAGE3,
        "engine",
        "an AttributeError in the first step",
        _DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads="communication_data_type",
        _partition_all_parameters="",
        _post_step="timer_names",
        _pre_step="",
    ),
    *_fields(
        STAGE3,
        ("engine",),
        "gradients of the last bucket are lost, or memory is counted wrongly",
        "_epilogue_ran_this_backward",
        "ipg_buckets",
        "offload_optimizer",
        "reduce_and_partition_stream",
        "fp32_partitioned_groups_flat",
        "grad_partitions_flat_buffer",
        "averaged_gradients",
    ),
    *_fields(
        "deepspeed.runtime.zero.stage_1_and_2",
        ("engine",),
        "an error of the memory report of a stock engine",
        "single_partition_of_fp32_groups",
        "param_buffer_of_bit16_for_cpu_offload_groups",
        "temp_grad_buffer_for_cpu_offload",
        "accumulated_grads_in_cpu",
        "cpu_offload",
    ),
    *_fields(
        "deepspeed.runtime.bf16_optimizer",
        ("engine",),
        "an error of the memory report of a stock engine",
        "fp32_groups_flat_partition",
        "fp32_groups_gradients",
    ),
    *_fields(
        PARTITION,
        ("engine",),
        "a weight that ZeRO 3 has cut is taken for a whole one of no elements",
        "ds_id",
        "ds_tensor",
        "ds_numel",
        "ds_status",
        "ds_process_group",
        "partition_numel",
    ),
    *_fields(PARTITION, ("trainable",), "a cut weight is taken for a vector: it is not frozen", "ds_shape"),
    Name(
        "deepspeed.runtime.zero.linear",
        "zero3_linear_wrap",
        ("engine",),
        "an ImportError, or DeepSpeed's linear function, which keeps the input of frozen layers",
        ("input", "weight", "bias"),
    ),
    Name(
        "deepspeed.runtime.zero.partitioned_param_coordinator",
        "assert_ints_same_as_other_ranks",
        ("planner",),
        "an error of `plan` under ZeRO 3",
    ),
    # torch: autograd.
    Name("torch._C._nn", "linear", ("engine",), "an ImportError"),
    Name(
        "torch._C._autograd",
        "_get_sequence_nr",
        ("activations",),
        "compressed blocks do not find their graph",
    ),
    Name(
        "torch._C._autograd", "_top_saved_tensors_default_hooks", ("activations",), "hooks of others are lost"
    ),
    Name(
        "torch._C:_FunctionBase",
        "_sequence_nr",
        ("activations",),
        "compressed blocks do not find their graph",
    ),
    Name(
        "torch._C",
        "_current_graph_task_id",
        ("memory",),
        "phases of a step are told apart wrongly",
    ),
    Name(
        "torch:Tensor", "_version", ("activations", "trainable"), "a changed tensor is taken for the kept one"
    ),
    Name("torch:Tensor", "_base", ("memory",), "views are counted twice"),
    Name(
        "torch:Tensor", "_backward_hooks", ("activations",), "hooks on inputs of recomputed blocks are lost"
    ),
    Name("torch:UntypedStorage", "_cdata", ("activations", "memory"), "one storage is kept or counted twice"),
    Name(
        "torch.autograd:Variable",
        "_execution_engine",
        ("integrations",),
        "DDP ranks do not average gradients",
    ),
    Name("torch", "_softmax_backward_data", ("activations",), "an AttributeError in the backward pass"),
    *(
        Name("torch", f"_foreach_{name}", ("optim",), "an AttributeError in the first step")
        for name in ("add_", "addcmul_", "copy_", "div_", "lerp_", "mul", "mul_", "sqrt")
    ),
    Name("torch", "_foreach_norm", ("engine",), "an AttributeError in the first step"),
    *_fields(
        "torch.optim.lr_scheduler",
        ("engine",),
        "a warning of torch's schedulers at each start",
        "_opt_called",
    ),
    # torch: modules and distributed.
    *_fields(
        "torch.nn.modules.module", ("activations",), "compiled blocks keep stale weights", "_parameters"
    ),
    Name(
        "torch.nn:Module", "_apply", ("planner",), "`plan` allocates real memory", ("self", "fn", "recurse")
    ),
    Name("torch.nn.modules.conv", "_ConvNd", ("trainable",), "an AttributeError"),
    Name("torch.nn.modules.dropout", "_DropoutNd", ("activations",), "an ImportError"),
    *_fields(
        "torch.nn.parallel.distributed",
        ("integrations",),
        "DDP sends gradients of frozen layers, or waits for them for ever",
        "_ddp_params_and_buffers_to_ignore",
    ),
    Name(
        "torch.distributed.distributed_c10d",
        "_set_pg_timeout",
        ("integrations",),
        "a hung rank is noticed after half an hour",
        ("timeout", "group"),
    ),
    Name(
        "torch.distributed.distributed_c10d",
        "_world",
        ("integrations",),
        "a hung rank is noticed after half an hour",
    ),
    Name("torch.distributed", "_all_gather_base", ("memory",), "traffic of a collective is not counted"),
    Name("torch.distributed", "_reduce_scatter_base", ("memory",), "traffic of a collective is not counted"),
    # torch: fake tensors and the planner.
    Name("torch._subclasses.fake_tensor", "FakeTensor", ("activations", "planner"), "an ImportError"),
    Name("torch._subclasses.fake_tensor", "FakeTensorMode", ("planner",), "an ImportError"),
    Name("torch._subclasses.fake_tensor", "unset_fake_temporarily", ("activations",), "an ImportError", ()),
    Name("torch.utils._python_dispatch", "TorchDispatchMode", ("memory", "planner"), "an ImportError"),
    Name("torch.utils._python_dispatch", "_disable_current_modes", ("planner",), "an ImportError", ()),
    Name("torch.utils._python_dispatch", "is_in_torch_dispatch_mode", ("activations",), "an ImportError"),
    Name(
        "torch.utils._python_dispatch", "is_traceable_wrapper_subclass", ("memory",), "an ImportError", ("t",)
    ),
    Name("torch.utils._pytree", "tree_iter", ("memory", "engine", "planner"), "an ImportError", ("tree",)),
    Name("torch.testing._internal.distributed.fake_pg", "FakeStore", ("planner",), "an ImportError"),
    Name("torch.cuda.memory", "_record_memory_history", ("memory",), "no allocation history of a step"),
    Name("torch.cuda.memory", "_dump_snapshot", ("memory",), "no allocation history of a step"),
    # transformers.
    Name(
        "transformers.modeling_utils:PreTrainedModel",
        "_set_gradient_checkpointing",
        ("activations", "planner"),
        "blocks are not recomputed",
        ("self", "enable", "gradient_checkpointing_func"),
    ),
    *_fields(
        "transformers.modeling_layers",
        ("activations",),
        "blocks are not recomputed: more memory than planned",
        "_gradient_checkpointing_func",
    ),
    *_fields(
        "transformers.configuration_utils",
        ("activations",),
        "attention keeps all that it kept before",
        "_attn_implementation_internal",
        "_attn_implementation",
    ),
    *_fields(
        "transformers.modeling_utils",
        ("activations", "planner"),
        "the loss is not made in chunks",
        "_loss_function",
    ),
    Name(
        "transformers.integrations.deepspeed:HfTrainerDeepSpeedConfig",
        "trainer_config_finalize",
        ("integrations",),
        "problems of the slimfit block come one by one, and late",
        ("self", "args", "model", "num_training_steps"),
    ),
    Name(
        "transformers.trainer:Trainer",
        "_run_epoch",
        ("integrations",),
        "a finished run that resumes takes a step more",
    ),
    # torchao.
    Name("torchao.optim.quant_utils", "create_dynamic_map", ("optim",), "no 8-bit states", ("signed",)),
    Name("torchao.optim.quant_utils", "scale_tensor", ("optim",), "no 8-bit states", ("input", "block_size")),
    Name(
        "torchao.optim.quant_utils",
        "quantize_8bit_with_qmap",
        ("optim",),
        "no 8-bit states",
        ("input", "qmap"),
    ),
    Name(
        "torchao.optim.quant_utils",
        "dequant_with_qmap",
        ("optim",),
        "no 8-bit states",
        ("codes", "qmap", "scale"),
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
        RuntimeError: names all that has changed, and the versions that work.
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
    raise RuntimeError(
        f"private names that slimfit_ds relies on have changed; install {versions}:\n" + "\n".join(problems)
    )


def _page() -> str:
    """Return the table as a page of docs/."""
    lines = [
        "# Private names in use",
        "",
        "Names of other libraries that are not public, or are replaced for the length of a call. `slimfit_ds.initialize` and",
        "`slimfit_ds.slim` compare those that a run uses by name and signature before anything is built; the error lists all",
        "that has changed and the versions that work. This page is printed by `python -m slimfit_ds.private_names`.",
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
