"""What is trained: a model (by hub id, path or configuration), a task and a batch, without its weights."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimfit_ds.environment import hub_is_reachable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["DTYPES", "KNOWN_MODELS", "TASKS", "ModelNotFound", "Workload", "load_config"]

TASKS = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "image_classification": "AutoModelForImageClassification",
    "causal_lm": "AutoModelForCausalLM",
}
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bf16_autocast": torch.float32,
}


# Published shapes of common models, to plan for them without a network or a gated licence: the values of their
# config.json; what is not named is transformers' default.
_LLAMA3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
}
_LLAMA3 |= {"rope_theta": 500000.0, "num_key_value_heads": 8, "max_position_embeddings": 8192}
_QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}
_QWEN3 |= {"num_key_value_heads": 8, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6}
_VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"model_type": "bert", "vocab_size": 30522},
    "bert-large-uncased": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    "distilbert-base-uncased": {"model_type": "distilbert"},
    "gpt2": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    "google/vit-base-patch16-224": {**_VIT, "image_size": 224},
    "google/vit-base-patch16-384": {**_VIT, "image_size": 384},
    "google/vit-large-patch16-224": {
        **_VIT,
        "image_size": 224,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "meta-llama/Meta-Llama-3-8B": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "meta-llama/Meta-Llama-3-70B": {
        **_LLAMA3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "meta-llama/Llama-3.2-1B": {
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
    "Qwen/Qwen3-0.6B": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-1.7B": {
        **_QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
}

_ALIASES = {
    "google-bert/bert-base-uncased": "bert-base-uncased",
    "google-bert/bert-large-uncased": "bert-large-uncased",
    "FacebookAI/roberta-base": "roberta-base",
    "openai-community/gpt2": "gpt2",
    "meta-llama/Meta-Llama-3-8B-Instruct": "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Llama-3.1-8B": "meta-llama/Meta-Llama-3-8B",
}


class ModelNotFound(ValueError):
    """No configuration could be found under a name; the message says where it was looked for."""


@dataclass(frozen=True)
class Workload:
    """A model and the batch that one rank sees between two optimizer steps.

    Args:
        model: hub id, directory, path of a `config.json`, or the configuration as a dict with `model_type`.
        batch: samples per rank and optimizer step.
        seq: tokens per sample; ignored for images.
        task: one of `TASKS`; `auto` takes it from the configuration.
        dtype: `fp32`, `bf16`, `fp16` (weights in that dtype) or `bf16_autocast` (fp32 weights).
        attention: transformers' attention implementation.
        padding: whether batches carry a padding mask that matters (a mask then reaches the attention).
        image_size: pixels per side instead of the configuration's.
        labels: classes of a classification head.
    """

    model: str | dict[str, Any]
    batch: int = 1
    seq: int = 512
    task: str = "auto"
    dtype: str = "bf16"
    attention: str = "sdpa"
    padding: bool = False
    image_size: int | None = None
    labels: int = 2
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if self.batch < 1:
            problems.append(f"batch must be at least 1, got {self.batch}")
        if self.seq < 1:
            problems.append(f"seq must be at least 1, got {self.seq}")
        if self.task not in {*TASKS, "auto"}:
            problems.append(f"task must be auto or one of {', '.join(TASKS)}, got {self.task!r}")
        if self.dtype not in DTYPES:
            problems.append(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if problems:
            raise ValueError("; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def config(self) -> PretrainedConfig:
        """The model's configuration with this workload's image size, labels and overrides."""
        config = load_config(self.model)
        if self.image_size is not None:
            config.image_size = self.image_size
        if self.resolved_task(config) not in ("causal_lm", "question_answering"):
            config.num_labels = self.labels
        for key, value in self.overrides.items():
            setattr(config, key, value)
        return config

    def resolved_task(self, config: PretrainedConfig) -> str:
        """The task, guessed from the configuration when it is `auto`."""
        if self.task != "auto":
            return self.task
        architecture = next(iter(config.architectures or []), "")
        if "CausalLM" in architecture or "LMHead" in architecture:
            return "causal_lm"
        if "QuestionAnswering" in architecture:
            return "question_answering"
        return "image_classification" if hasattr(config, "image_size") else "sequence_classification"

    def build(self) -> PreTrainedModel:
        """The model in its dtype, in training mode (under a fake tensor mode: without memory)."""
        import transformers

        config = self.config()
        auto = getattr(transformers, TASKS[self.resolved_task(config)])
        if hasattr(config, "use_cache"):
            config.use_cache = False
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[self.dtype])
        try:
            model = auto.from_config(config, attn_implementation=self.attention, dtype=DTYPES[self.dtype])
        finally:
            torch.set_default_dtype(default)
        return model.train()

    def inputs(self, samples: int) -> dict[str, torch.Tensor]:
        """A batch of `samples`, with labels, in the dtypes that the model takes."""
        config = self.config()
        task = self.resolved_task(config)
        if task == "image_classification":
            size = config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            pixels = torch.rand(
                samples, getattr(config, "num_channels", 3), height, width, dtype=DTYPES[self.dtype]
            )
            return {"pixel_values": pixels, "labels": torch.zeros(samples, dtype=torch.long)}
        ids = torch.zeros(samples, self.seq, dtype=torch.long)
        batch = {"input_ids": ids}
        if self.padding:
            mask = torch.ones(samples, self.seq, dtype=torch.long)
            mask[0, -1] = 0
            batch["attention_mask"] = mask
        if task == "causal_lm":
            batch["labels"] = torch.zeros_like(ids)
        elif task == "question_answering":
            batch["start_positions"] = torch.zeros(samples, dtype=torch.long)
            batch["end_positions"] = torch.zeros(samples, dtype=torch.long)
        else:
            batch["labels"] = torch.zeros(samples, dtype=torch.long)
        return batch


def load_config(model: str | dict[str, Any]) -> PretrainedConfig:
    """The configuration of a model given by dict, file, directory, known name or hub id.

    Raises:
        ModelNotFound: nothing of this name, or a file that is no model configuration.
    """
    from transformers import AutoConfig

    if isinstance(model, dict):
        return _from_dict(model, "the given configuration")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"model: the directory {model!r} has no config.json")
        path = path / "config.json"
    if path.is_file():
        try:
            return _from_dict(json.loads(path.read_text()), str(path))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelNotFound(f"model: {str(path)!r} is not a JSON configuration ({error})") from None
    looks_like_path = model.startswith((".", "/", "~")) or model.endswith(".json") or model.count("/") > 1
    if looks_like_path:
        raise ModelNotFound(f"model: the path {model!r} does not exist")
    known = KNOWN_MODELS.get(_ALIASES.get(model, model))
    if known is not None:
        return _from_dict(known, model)
    try:
        # Without a network the hub's client retries for half a minute before it says so.
        return AutoConfig.from_pretrained(model, local_files_only=not hub_is_reachable())
    except Exception as error:
        near = _near_names(model)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(
            f"model: {model!r} is neither a local path, nor a model known offline, nor found on the hub{hint} "
            f"({type(error).__name__}: {reason})"
        ) from None


def _from_dict(values: dict[str, Any], where: str) -> PretrainedConfig:
    from transformers import AutoConfig

    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ModelNotFound(f"model: {where} has no 'model_type', so it is not a transformers configuration")
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise ModelNotFound(f"model: {where}: {str(error).splitlines()[0]}") from None


def _near_names(name: str) -> list[str]:
    """Return known names that look like `name`, the nearest first."""
    names = {candidate.lower(): candidate for candidate in [*KNOWN_MODELS, *_ALIASES]}
    return [names[match] for match in difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.7)]
