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
VOCABULARY, WIDTH, HEADS_OF_ATTENTION, LAYERS = 128, 32, 4, 2

_EXACT: dict[str, Any] = {
    **dict.fromkeys(
        "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim encoder_hidden_size projection_dim word_embed_proj_dim"
        " hidden_dim_encoder audio_channel output_dim proj_dim cross_attention_hidden_size out_hidden_size conv_dim_out"
        " attention_hidden_size lru_width rnn_hidden_size decoder_hidden_size block_size_width vision_embed_dim"
        " encoder_embed_dim decoder_embed_dim classifier_proj_size embed_size".split(),
        WIDTH,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim d_ff d_inner n_inner dim_feedforward encoder_ffn_dim decoder_ffn_dim ffn_hidden_size hidden_dim"
        " moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size d_inner_size ffn_intermediate_size"
        " intermediate_size_mlp mlp_dim shared_intermediate_size moe_shared_expert_intermediate_size"
        " dense_intermediate_size expert_intermediate_size encoder_intermediate_size".split(),
        2 * WIDTH,
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth"
        " num_hidden_layers_encoder num_layers_encoder encoder_num_layers decoder_num_layers num_blocks n_encoder_layers"
        " encoder_num_hidden_layers decoder_num_hidden_layers transformer_layers speech_encoder_layers text_encoder_layers"
        " text_decoder_layers num_block_layers".split(),
        LAYERS,
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_encoder_attention_heads"
        " num_decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads"
        " num_key_value_heads n_kv_heads encoder_num_key_value_heads decoder_num_key_value_heads".split(),
        HEADS_OF_ATTENTION,
    ),
    **dict.fromkeys(
        "head_dim d_kv attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim attention_head_size d_head"
        " qk_head_dim global_head_dim swa_head_dim attention_key_size kv_channels index_head_dim"
        " linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_d_head dim_head".split(),
        WIDTH // HEADS_OF_ATTENTION,
    ),
    **dict.fromkeys("kv_lora_rank q_lora_rank time_step_rank mamba_dt_rank o_lora_rank rank".split(), 16),
    **dict.fromkeys(
        "n_routed_experts num_experts num_local_experts num_routed_experts moe_num_experts n_experts expert_num".split(),
        4,
    ),
    **dict.fromkeys(
        "num_experts_per_tok moe_topk moe_k num_experts_per_token experts_per_token top_k_experts".split(), 2
    ),
    **dict.fromkeys(
        "n_group topk_group n_groups n_shared_experts mamba_n_groups num_shared_experts".split(), 1
    ),
    **dict.fromkeys("state_size mamba_d_state ssm_state_size conv_dimension mamba_ssm_state_size".split(), 8),
    **dict.fromkeys("first_k_dense_replace num_dense_layers".split(), 1),
    **dict.fromkeys("linear_num_key_heads linear_num_value_heads index_n_heads".split(), 4),
    **dict.fromkeys("chunk_size mamba_chunk_size chunk_length".split(), 8),
    **dict.fromkeys("mamba_n_heads".split(), 8),
    **dict.fromkeys("index_topk".split(), 8),
    **dict.fromkeys("image_size input_size img_size".split(), 32),
    **dict.fromkeys("patch_size spatial_patch_size".split(), 8),
    **dict.fromkeys("num_frames".split(), 4),
    **dict.fromkeys("num_mel_bins feature_size input_feat_per_channel".split(), 16),
    **dict.fromkeys("num_labels".split(), 3),
    **dict.fromkeys("sliding_window attention_window_size local_attention window".split(), 8),
    **dict.fromkeys("max_source_positions max_target_positions".split(), 64),
    "tubelet_size": 2,
    "window_size": 2,
    "rotary_dim": 8,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
    "qformer_layers": 2,
    "num_query_tokens": 4,
    "codebook_size": 32,
    "fc_layers": 1,
    "num_buckets": 8,
    "lsh_num_chunks_before": 0,
    "image_token_index": 120,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "use_cache": False,
    "apply_spec_augment": False,
    "num_nextn_predict_layers": 0,
    "num_kv_shared_layers": 0,
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
        return _EXACT.get(key) if isinstance(_EXACT.get(key), bool) else None
    if isinstance(value, float):
        return 0.0 if "drop" in key or key in _EXACT else None
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
    new = _EXACT.get(key)
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
