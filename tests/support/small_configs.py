"""Small models of any architecture of transformers, from its default configuration cut down."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

_MOST = [
    (r".*hidden_size|d_model|n_embd|.*embed_dim|embedding_dim|.*hidden_dim|dim|width", 32),
    (r".*projection_dim|proj_dim|emb_dim|output_dim|mm_hidden|text_dim", 32),
    (r".*intermediate_size.*|.*ffn_dim.*|ffn_hidden_size|d_ff|n_inner|.*mlp_dim", 48),
    (r".*feedforward.*|.*mlp_hidden.*", 48),
    (r"num_.*layers|n_layers?|num_blocks|depth|.*_layers|.*_depth|num_hidden_groups", 2),
    (r".*heads|n_head|.*num_heads.*|.*key_value_heads.*|.*num_kv_heads.*", 4),
    (r"mamba_d_head", 16),
    (r".*head_dim|d_kv|kv_channels|attention_head_size", 8),
    (r".*vocab_size.*", 96),
    (r"max_source_positions|n_positions|max_target_positions|seq_length|.*max_position.*", 64),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"num_experts|n_routed_experts|num_local_experts|.*num_experts|num_routed_experts", 4),
    (r"moe_k|moe_topk|.*experts_per_tok.*|topk|full_attention_interval", 2),
    (r"n_group|topk_group|num_expert_group|first_k_dense_replace", 1),
    (r".*lora_rank", 16),
    (r".*(token_id|token_index|_id)", 90),
]
# One entry for each layer or stage: without them the configuration makes its own.
_BY_LAYER = set(
    "layer_types out_features out_indices per_layer_config mlp_layer_types no_rope_layers "
    "stage_names transformers_version layers_block_type hybrid_override_pattern moe_layer_freq "
    "full_attn_idxs attn_type_list _out_features _out_indices layer_type_list attn_layer_indices "
    "layer_types_list indexer_types activation_sparsity_pattern kv_source_layers "
    "num_attention_heads_per_layer".split()
)
# Lists that go by other sizes.
_LISTS = {
    "intermediate_size": 48,
    "mrope_section": [2, 1, 1],
    "vision_feature_layer": [1, 0],
    "vit_layers": [1, 0],
}


def class_of_family(family: str) -> type[PreTrainedModel] | None:
    """The class that a key of transformers' conversion mapping means, or the main one of a type."""
    if family[0].isupper():
        return getattr(transformers, family, None)
    if family not in CONFIG_MAPPING:
        return None
    config = CONFIG_MAPPING[family]
    for mapping in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_MAPPING,
    ):
        if config in mapping:
            found = mapping[config]
            return found[0] if isinstance(found, tuple) else found
    return None


def small_config(architecture: type[PreTrainedModel]) -> Any:
    """Its default configuration with every size cut down."""
    config: Any = architecture.config_class
    return config(**_cut("", config().to_dict()))


def _without_layers(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _BY_LAYER}


def _cut(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        kept = value if "model_type" not in value else _without_layers(value)
        return {key: _cut(key, one) for key, one in kept.items()}
    if isinstance(value, list):
        return _LISTS.get(name, value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return min(value, *(most for sizes, most in _MOST if re.fullmatch(sizes, str(name))), value)


def parameters(architecture: type[PreTrainedModel], config: Any) -> int:
    """How many a model has, without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in architecture(config).parameters())
