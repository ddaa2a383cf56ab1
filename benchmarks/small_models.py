"""Small models of every type of the installed transformers that has a head to train, from configurations alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
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
        "lru_width n_embd out_hidden_size output_dim proj_dim projection_dim rnn_hidden_size text_hidden_size vision_embed_dim d_latents "
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
        "num_key_value_heads num_local_experts num_query_tokens num_routed_experts swa_num_attention_heads "
        "swa_num_key_value_heads"
    ),
    8: (
        "attention_head_dim attention_head_size attention_key_size attention_window_size chunk_length "
        "chunk_size conv_dimension d_head d_kv dim_head global_head_dim head_dim hidden_size_per_layer_input "
        "index_head_dim index_topk kv_channels linear_key_head_dim linear_value_head_dim local_attention "
        "mamba_chunk_size mamba_d_head mamba_d_state mamba_head_dim mamba_n_heads mamba_ssm_state_size "
        "num_buckets num_conv_pos_embeddings patch_size qk_nope_head_dim qk_rope_head_dim "
        "rotary_dim sliding_window spatial_patch_size ssm_state_size state_size swa_head_dim v_head_dim "
        "window"
    ),
    16: (
        "feature_size input_feat_per_channel kv_lora_rank mamba_dt_rank num_mel_bins o_lora_rank q_lora_rank "
        "qk_head_dim rank time_step_rank"
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


# Keys whose open value is a size to be given; any other means that a part is absent.
_FILLED = {
    key: value
    for key, value in _VALUES.items()
    if re.search(
        r"^(head_dim|num_(attention|key_value)_heads|moe_intermediate_size|n_group|topk_group)$|experts", key
    )
}
# What fits no rule: values of single types.
_OWN: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "mamba2": {"hidden_size": 16, "num_heads": 4},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 4], "is_decoder": True},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xmod": {"default_language": "en_XX"},
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


def small(config_class: Any, sections: bool = False, fill: bool = False, own: Mapping[str, Any] = {}) -> Any:
    """Return a small configuration of a class, its parts small too.

    Args:
        config_class: of transformers.
        sections: of rotary embeddings in three dimensions.
        fill: give sizes that the class leaves open, and shorten lists of layers.
        own: values of this class's own, by key; those of its parts by `part.key`.
    """
    start = {key: value for key, value in own.items() if "." not in key}
    default = config_class(**start)
    values = {key: value for key, value in default.to_dict().items() if key not in config_class.sub_configs}
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        new = _smaller(key, value, values, fill)
        if new is not None:
            chosen[key] = new
    if sections and isinstance(values.get("rope_parameters"), dict):
        chosen["rope_parameters"] = {**values["rope_parameters"], "mrope_section": [2, 1, 1]}
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            inner = {k.removeprefix(f"{name}."): v for k, v in own.items() if k.startswith(f"{name}.")}
            chosen[name] = small(type(part), sections, fill, inner)
    return config_class(**{**chosen, **start})


def _smaller(key: str, value: Any, values: dict[str, Any], fill: bool) -> Any:
    """Return the value of a key of a small configuration; None: what the class has."""
    if fill and value is None:
        return VOCABULARY if key == "vocab_size" else 0 if key == "pad_token_id" else _FILLED.get(key)
    if fill and isinstance(value, list) and value and isinstance(value[0], str) and "layer" in key:
        return (list(dict.fromkeys(value)) * 2)[:2]
    if isinstance(value, bool):
        return _VALUES.get(key) if isinstance(_VALUES.get(key), bool) else None
    if isinstance(value, float):
        return 0.0 if "drop" in key or key in _VALUES else None
    if key == "image_grid_pinpoints":
        return [[2 * WIDTH, 2 * WIDTH]]
    if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
        rule = _LISTS.get(key)
        return None if rule is None else rule(len(value))
    if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}
    if not isinstance(value, int):
        return None
    if "depths" in values and key in ("hidden_size", "num_layers", "num_hidden_layers"):
        return None
    if key == "image_size" and any(
        name in values for name in ("depths", "depth_multiplier", "neck_hidden_sizes")
    ):
        return 64
    if key == "window_size" and "spatial_merge_size" in values:
        return 32
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
    variants: list[dict[str, bool]] = [
        {},
        {"sections": True},
        {"fill": True},
        {"sections": True, "fill": True},
    ]
    tries = [(name, of, variant) for variant in variants for name, of in heads_of(model_type).items()]
    for name, class_name, variant in tries:
        if head not in (None, name):
            continue
        try:
            torch.manual_seed(seed)
            config = small(CONFIG_MAPPING[model_type], **variant, own=_OWN.get(model_type, {}))
            if getattr(config, "is_encoder_decoder", False):
                for key in ("decoder_start_token_id", "pad_token_id"):
                    if getattr(config, key, None) is None:
                        setattr(config, key, 0)
            model = _class(class_name)(config).train()
            if (size := sum(p.numel() for p in model.parameters())) > 2e7:
                raise ValueError(f"{size:,} parameters")
            return model, _batch(model, name), name
        except Exception as error:
            said = str(error).strip() or " "
            problems.append(f"{name}: {type(error).__name__}: {said.splitlines()[0][:110]}")
    raise ValueError("; ".join(dict.fromkeys(problems)) or "no such head")


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _setting(config: Any, *names: str) -> Any:
    """Return the first value of one of these names in a configuration or its parts."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        for name in names:
            if part is not None and getattr(part, name, None) is not None:
                return getattr(part, name)
    return None


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
            for c in (getattr(config, n, None) for n in ("vision_config", "backbone_config", "encoder"))
            if c is not None
        ),
        config,
    )
    size, channels = getattr(vision, "image_size", None) or 64, getattr(vision, "num_channels", 3)
    size = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.randn(rows, channels, *size, generator=random)
    clip = torch.randn(rows, 4, channels, *size, generator=random)
    sound = torch.randn(rows, 800, generator=random)
    mels = _setting(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "mel_bins") or 16
    frames = _setting(config, "max_length") or 32
    features = torch.randn(rows, 32, mels, generator=random)
    text = {"input_ids": ids, "attention_mask": mask}
    words = torch.randint(3, 80, (rows, 3), generator=random)
    positions = {"start_positions": classes, "end_positions": classes + 2}
    wants = inspect.signature(model.forward).parameters
    if "bbox" in wants:
        text["bbox"] = (
            torch.randint(0, 20, (rows, tokens, 1), generator=random).expand(-1, -1, 4).contiguous()
        )
    tell = {"input_ids": ids, "labels": ids}
    inputs: dict[str, list[dict[str, Tensor]]] = {
        "causal_lm": [{**text, "labels": ids}, tell],
        "masked_lm": [{**text, "labels": ids}, tell, {"inputs": ids, "attention_mask": mask, "labels": ids}],
        "multimodal": [
            *({**text, **seen, "labels": ids} for seen in _pictures(wants, vision, pixels, random)),
            {"pixel_values": pixels, "labels": ids},
            {**text, "labels": ids},
        ],
        "seq2seq": [{**text, "labels": ids}],
        "sequence": [{**text, "labels": classes}, {"inputs": ids, "attention_mask": mask, "labels": classes}],
        "question": [{**text, **positions}],
        "image": [
            {"pixel_values": pixels, "labels": classes},
            {"input_ids": ids, "labels": classes},
            *({**seen, "labels": classes} for seen in _pictures(wants, vision, pixels, random)),
        ],
        "segmentation": [{"pixel_values": pixels, "labels": torch.zeros(rows, *size, dtype=torch.long)}],
        "depth": [{"pixel_values": pixels, "labels": torch.ones(rows, *size)}],
        "video": [
            {"pixel_values": clip, "labels": classes},
            {"pixel_values_videos": clip, "labels": classes},
        ],
    }
    for name, labels in (("ctc", words), ("audio", classes), ("speech", ids[:, :6].contiguous())):
        spoken = [
            {"input_values": sound},
            {"input_features": features},
            {"input_features": features.mT.contiguous()},
            {"input_features": torch.randn(rows, mels, 128, generator=random)},
            {"input_values": torch.randn(rows, frames, mels, generator=random)},
        ]
        inputs[name] = [{**of, "labels": labels} for of in spoken]
        inputs[name] += [{**text, **of, "labels": ids} for of in spoken]
    problems: list[str] = []
    for batch in inputs[head]:
        try:
            batch = _with_places(model, batch)
            loss = model(**batch).loss
            if loss is not None and loss.requires_grad and bool(loss.isfinite()):
                loss.backward()
                model.zero_grad()
                return batch
            problems.append(f"a loss of {loss}")
        except Exception as error:
            problems.append(f"{type(error).__name__}: {str(error).strip()[:100]}".splitlines()[0])
    raise ValueError(", ".join(dict.fromkeys(problems)))


def _pictures(
    wants: Mapping[str, Any], vision: Any, pixels: Tensor, random: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Yield pictures in the forms that models take: whole, several per row, or as patches with their grid."""
    rows, channels, *size = pixels.shape
    patch = getattr(vision, "patch_size", None) or getattr(vision, "spatial_patch_size", None) or 8
    patch = patch if isinstance(patch, int) else patch[0]
    grid = torch.tensor([[1, 4, 4]]).expand(rows, 3).contiguous()
    width = channels * patch * patch
    more: dict[str, Any] = {}
    if "image_merge_sizes" in wants:
        more["image_merge_sizes"] = torch.ones(rows, dtype=torch.long)
    more |= {key: None for key in ("token_type_ids", "mm_token_type_ids") if key in wants}
    if "qformer_input_ids" in wants:
        more["qformer_input_ids"] = torch.randint(3, 80, (rows, 8), generator=random)
    if "image_grid_thw" in wants:
        for of in (width * (getattr(vision, "temporal_patch_size", None) or 1), width):
            flat = torch.randn(rows * 16, of, generator=random)
            yield {"pixel_values": flat, "image_grid_thw": grid, **more}
        yield {"pixel_values": flat.view(1, -1, channels, patch, patch), "image_grid_thw": grid, **more}
    if "spatial_shapes" in wants or "flattened_patches" in wants:
        flat = torch.randn(rows, 16, width, generator=random)
        yield {
            "pixel_values": flat,
            "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.long),
            "spatial_shapes": grid[:, 1:],
            **more,
        }
        yield {"flattened_patches": torch.randn(rows, 16, width + 2, generator=random).abs()}
    if "pixel_values" in wants:
        yield {"pixel_values": pixels, **more}
        yield {"pixel_values": pixels[:, None], **more}
        if "image_sizes" in wants:
            more["image_sizes"] = torch.tensor([size]).expand(rows, 2).contiguous()
            yield {"pixel_values": pixels, **more}
            yield {"pixel_values": pixels[:, None].expand(-1, 5, -1, -1, -1).contiguous(), **more}


def _with_places(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with as many places for pictures or sound in each row of its text as the model says that it wants."""
    place = next(
        (
            found
            for name in ("image", "audio")
            for key in (f"{name}_token_id", f"{name}_token_index")
            if isinstance(found := getattr(model.config, key, None), int)
        ),
        None,
    )
    ids: Tensor | None = batch.get("input_ids")
    if ids is None or place is None or len(batch) < 4:
        return batch
    batch["input_ids"] = torch.where(ids == place, 81, ids)
    wanted = _refused(model, batch) // len(ids)
    # Some count the elements of their features, not the rows.
    for count in (wanted, wanted // WIDTH) if wanted else ():
        front = ids.new_full((len(ids), count), place)
        longer = {
            "input_ids": torch.cat([front, batch["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones_like(front), batch["attention_mask"]], 1),
            "labels": torch.cat([torch.full_like(front, -100), batch["labels"]], 1),
        }
        if not _refused(model, batch | longer):
            batch |= longer
            break
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in batch:
            batch[key] = (batch["input_ids"] == place).long()
    return batch


def _refused(model: nn.Module, batch: dict[str, Any]) -> int:
    """Return how many features a model wants to put into places that a batch does not have; 0: it has no such complaint."""
    try:
        model(**{key: value for key, value in batch.items() if value is not None})
    except Exception as error:
        said = re.search(r"features:? ?(\d+)", str(error))
        return int(said[1]) if said else 0
    return 0
