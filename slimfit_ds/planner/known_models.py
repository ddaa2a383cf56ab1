"""Published shapes of common models, so that they can be planned for without a network or a gated licence."""

from __future__ import annotations

import difflib
from typing import Any

__all__ = ["KNOWN_MODELS", "known_config", "near_names"]

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

# The values of the config.json that the models are published with; what is not named is transformers' default.
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


def known_config(name: str) -> dict[str, Any] | None:
    """The configuration of a known model, None for others."""
    config = KNOWN_MODELS.get(_ALIASES.get(name, name))
    return None if config is None else dict(config)


def near_names(name: str) -> list[str]:
    """Known names that look like `name`, the nearest first."""
    names = {candidate.lower(): candidate for candidate in [*KNOWN_MODELS, *_ALIASES]}
    return [names[match] for match in difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.7)]
