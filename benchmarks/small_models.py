"""Small models of every type of the installed transformers that has a head to train, from configurations alone."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HEADS", "build", "heads_of", "types"]

# The heads, in the order in which a model type is asked for them.
HEADS = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "question": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "video": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "depth": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
}
VOCABULARY, WIDTH = 128, 32

_NAMES: dict[Any, str] = {
    WIDTH: (
        "attention_hidden_size audio_channel classifier_proj_size codebook_size conv_dim_out "
        "cross_attention_hidden_size d_model decoder_embed_dim decoder_hidden_size dim emb_dim embed_dim "
        "embedding_size encoder_embed_dim encoder_hidden_size hidden_size image_size img_size input_size "
        "lru_width n_embd out_hidden_size output_dim proj_dim projection_dim rnn_hidden_size vision_embed_dim "
        "word_embed_proj_dim"
    ),
    2 * WIDTH: (
        "d_ff d_inner d_inner_size decoder_ffn_dim dense_intermediate_size dim_feedforward encoder_ffn_dim "
        "encoder_intermediate_size expert_ffn_hidden_size expert_intermediate_size ffn_dim ffn_hidden_size "
        "ffn_intermediate_size hidden_dim intermediate_size intermediate_size_mlp max_source_positions "
        "max_target_positions mlp_dim moe_intermediate_size moe_shared_expert_intermediate_size n_inner "
        "shared_expert_intermediate_size shared_intermediate_size"
    ),
    2: (
        "decoder_layers decoder_num_hidden_layers decoder_num_layers depth encoder_layers "
        "encoder_num_hidden_layers encoder_num_layers experts_per_token moe_k moe_topk n_encoder_layers "
        "n_layer n_layers num_block_layers num_blocks num_decoder_layers num_encoder_layers "
        "num_experts_per_tok num_experts_per_token num_feat_extract_layers num_hidden_layers "
        "num_hidden_layers_encoder num_layers num_layers_encoder qformer_layers speech_encoder_layers "
        "text_decoder_layers text_encoder_layers top_k_experts transformer_layers tubelet_size window_size"
    ),
    4: (
        "decoder_attention_heads decoder_num_attention_heads decoder_num_key_value_heads "
        "encoder_attention_heads encoder_num_attention_heads encoder_num_key_value_heads expert_num "
        "index_n_heads linear_num_key_heads linear_num_value_heads moe_num_experts n_experts n_head n_heads "
        "n_kv_heads n_routed_experts num_attention_heads num_conv_pos_embedding_groups "
        "num_decoder_attention_heads num_encoder_attention_heads num_experts num_frames num_heads "
        "num_key_value_heads num_local_experts num_query_tokens num_routed_experts"
    ),
    8: (
        "attention_head_dim attention_head_size attention_key_size attention_window_size chunk_length "
        "chunk_size conv_dimension d_head d_kv dim_head global_head_dim head_dim hidden_size_per_layer_input "
        "index_head_dim index_topk kv_channels linear_key_head_dim linear_value_head_dim local_attention "
        "mamba_chunk_size mamba_d_head mamba_d_state mamba_head_dim mamba_n_heads mamba_ssm_state_size "
        "num_buckets num_conv_pos_embeddings patch_size qk_head_dim qk_nope_head_dim qk_rope_head_dim "
        "rotary_dim sliding_window spatial_patch_size ssm_state_size state_size swa_head_dim v_head_dim "
        "window"
    ),
    16: (
        "feature_size input_feat_per_channel kv_lora_rank mamba_dt_rank num_mel_bins o_lora_rank q_lora_rank "
        "rank time_step_rank"
    ),
    1: (
        "fc_layers first_k_dense_replace mamba_n_groups n_group n_groups n_shared_experts num_dense_layers "
        "num_shared_experts topk_group"
    ),
    3: "num_labels",
    0: "lsh_num_chunks_before num_kv_shared_layers num_nextn_predict_layers",
    120: "image_token_index",
    VOCABULARY: "vocab_size_per_layer_input",
}
"""A value of small configurations -> the keys that have it."""
_VALUES: dict[str, Any] = {
    **{key: value for value, keys in _NAMES.items() for key in keys.split()},
    "mask_feature_prob": 0.0,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
    "use_cache": False,
}
_LISTS: dict[str, Any] = {
    "depths": lambda n: [1] * n,
    "layers": lambda n: [1] * n,
    "num_heads": lambda n: [2] * n,
    "num_attention_heads": lambda n: [2] * n,
    "num_hidden_layers": lambda n: [1] * n,
    "hidden_sizes": lambda n: [16 * (i + 1) for i in range(n)],
    "neck_hidden_sizes": lambda n: [16] * n,
    "embed_dims": lambda n: [16 * (i + 1) for i in range(n)],
    "embed_dim": lambda n: [16 * (i + 1) for i in range(n)],
    "encoder_hidden_sizes": lambda n: [16 * (i + 1) for i in range(n)],
    "conv_dim": lambda n: [16, 16],
    "conv_stride": lambda n: [4, 2],
    "conv_kernel": lambda n: [8, 4],
    "attention_window": lambda n: [4, 4],
    "image_size": lambda n: [32, 32],
    "patch_size": lambda n: [8, 8],
}


def types() -> list[str]:
    """Return the model types that have one of the heads, in alphabetical order."""
    from transformers.models.auto import modeling_auto

    return sorted({name for table in HEADS.values() for name in getattr(modeling_auto, table)})


def heads_of(model_type: str) -> dict[str, str]:
    """Return the heads of a model type and the names of their classes."""
    from transformers.models.auto import modeling_auto

    found = {head: getattr(modeling_auto, table).get(model_type) for head, table in HEADS.items()}
    return {
        head: name if isinstance(name, str) else name[0] for head, name in found.items() if name is not None
    }


def small(config_class: Any, sections: bool = False) -> Any:
    """Return a small configuration of a class, its parts small too; `sections`: of rotary embeddings in three dimensions."""
    default = config_class()
    values = {key: value for key, value in default.to_dict().items() if key not in config_class.sub_configs}
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        new = _smaller(key, value, values)
        if new is not None:
            chosen[key] = new
    if sections and isinstance(values.get("rope_parameters"), dict):
        chosen["rope_parameters"] = {**values["rope_parameters"], "mrope_section": [2, 1, 1]}
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            chosen[name] = small(type(part), sections)
    return config_class(**chosen)


def _smaller(key: str, value: Any, values: dict[str, Any]) -> Any:
    """Return the value of a key of a small configuration; None: what the class has."""
    if isinstance(value, bool):
        return _VALUES.get(key) if isinstance(_VALUES.get(key), bool) else None
    if isinstance(value, float):
        return 0.0 if "drop" in key or key in _VALUES else None
    if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
        rule = _LISTS.get(key)
        return None if rule is None else rule(len(value))
    if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}
    if not isinstance(value, int):
        return None
    if "depths" in values and key in ("hidden_size", "num_layers", "num_hidden_layers"):
        return None
    if "depths" in values and "window_size" in values and key == "image_size":
        return 64
    if (
        re.search(r"token_id$|token_index$|^(pad|bos|eos|sep|mask|unk|cls|image|video)_", key)
        and "size" not in key
    ):
        return None if value < VOCABULARY else 90 + sum(map(ord, key)) % 30
    if re.search(r"(^|_)vocab_size", key):
        return VOCABULARY
    if re.search(r"max_.*position|n_positions|max_seq|max_length|context_length", key):
        return min(value, 64)
    new = _VALUES.get(key)
    return min(new, value) if isinstance(new, int) and key not in ("index_topk",) else new


def build(
    model_type: str, head: str | None = None, seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor], str]:
    """Return a small model in training mode without dropout, a batch with labels, and its head.

    Args:
        model_type: of transformers.
        head: one of `HEADS`; None: the first one that computes a loss.

    Raises:
        ValueError: none can be built, or none gives a loss that can be differentiated; says why.
    """
    from transformers import CONFIG_MAPPING

    problems = []
    tries = [(name, of, sections) for sections in (False, True) for name, of in heads_of(model_type).items()]
    for name, class_name, sections in tries:
        if head not in (None, name):
            continue
        try:
            torch.manual_seed(seed)
            config = small(CONFIG_MAPPING[model_type], sections)
            if (
                getattr(config, "is_encoder_decoder", False)
                and getattr(config, "decoder_start_token_id", None) is None
            ):
                config.decoder_start_token_id = 0
            model = _class(class_name)(config).train()
            if sum(p.numel() for p in model.parameters()) > 2e7:
                raise ValueError(f"{sum(p.numel() for p in model.parameters()):,} parameters")
            return model, _batch(model, name), name
        except Exception as error:
            problems.append(
                f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:110] if str(error) else ''}"
            )
    raise ValueError("; ".join(problems) or "no such head")


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _batch(model: nn.Module, head: str, rows: int = 4, tokens: int = 16) -> dict[str, Tensor]:
    """Return the first batch with which the model computes a loss."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (rows, tokens), generator=random)
    mask = torch.ones_like(ids)
    mask[0, tokens - 4 :] = 0
    classes = torch.arange(rows) % 2
    config: Any = model.config
    vision = next(
        (
            c
            for c in (getattr(config, n, None) for n in ("vision_config", "backbone_config"))
            if c is not None
        ),
        config,
    )
    size, channels = getattr(vision, "image_size", None) or 32, getattr(vision, "num_channels", 3)
    size = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.randn(rows, channels, *size, generator=random)
    sound = torch.randn(rows, 800, generator=random)
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 16
    features = torch.randn(rows, 32, mels, generator=random)
    text = {"input_ids": ids, "attention_mask": mask}
    words = torch.randint(3, 80, (rows, 3), generator=random)
    positions = {"start_positions": classes, "end_positions": classes + 2}
    inputs: dict[str, list[dict[str, Tensor]]] = {
        "causal_lm": [{**text, "labels": ids}, {"input_ids": ids, "labels": ids}],
        "masked_lm": [{**text, "labels": ids}, {"input_ids": ids, "labels": ids}],
        "multimodal": [{**text, "labels": ids}],
        "seq2seq": [{**text, "labels": ids}],
        "sequence": [{**text, "labels": classes}],
        "question": [{**text, **positions}],
        "image": [{"pixel_values": pixels, "labels": classes}],
        "segmentation": [{"pixel_values": pixels, "labels": torch.zeros(rows, *size, dtype=torch.long)}],
        "depth": [{"pixel_values": pixels, "labels": torch.ones(rows, *size)}],
        "video": [
            {"pixel_values": torch.randn(rows, 4, channels, *size, generator=random), "labels": classes}
        ],
    }
    for name, labels in (("ctc", words), ("audio", classes), ("speech", ids[:, :6])):
        inputs[name] = [
            {"input_values": sound, "labels": labels},
            {"input_features": features, "labels": labels},
            {"input_features": features.mT.contiguous(), "labels": labels},
            {"input_features": torch.randn(rows, mels, 128, generator=random), "labels": labels},
        ]
    problem: Exception = ValueError("no batch")
    for batch in inputs[head]:
        try:
            loss = model(**batch).loss
            if loss is not None and loss.requires_grad and bool(loss.isfinite()):
                loss.backward()
                model.zero_grad()
                return batch
            problem = ValueError(f"a loss of {loss}")
        except Exception as error:
            problem = error
    raise problem
