"""Tiny mixtures of experts of several families, and which of their names PEFT takes for experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "use_cache": False,
    # Every family ignores the names of the others.
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_ROUTED = {"n_shared_experts": 1, "first_k_dense_replace": 1}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 12,
}
_ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
_LATENT_ATTENTION = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]


@dataclass(frozen=True)
class Family:
    """A family, and what is known of it.

    Attributes:
        name: of its classes.
        options: of its configuration.
        readable: last name parts of the linear layers that PEFT adapts by their names, sorted.
        misread: of the parents of those that it takes for experts.
        linear_target: whether "all-linear" means the linear layers alone.
    """

    name: str
    options: dict[str, Any]
    readable: list[str]
    misread: tuple[str, ...] = ()
    linear_target: bool = False

    @property
    def kind(self) -> str:
        return f"{self.name}ForCausalLM"

    @property
    def excluded(self) -> list[str]:
        """The endings that leave out what is misread, as modules are ordered."""
        parts = ("gate_proj", "up_proj", "down_proj")
        return [f"{parent}.{part}" for parent in self.misread for part in parts]

    def model(self, *, seed: int = 0) -> PreTrainedModel:
        config = getattr(transformers, f"{self.name}Config")
        known = {*config().to_dict(), *config.attribute_map}
        given = {**_SIZES, **self.options}
        torch.manual_seed(seed)
        options = {name: value for name, value in given.items() if name in known}
        return getattr(transformers, self.kind)(config(**options)).eval()


FAMILIES = {
    family.name: family
    for family in (
        Family("Mixtral", {}, _ATTENTION),
        Family("Qwen3Moe", {}, _ATTENTION),
        Family(
            "Qwen3Next",
            _LINEAR_ATTENTION,
            ["in_proj_ba", "in_proj_qkvz", "out_proj", "shared_expert_gate"],
            ("shared_expert",),
        ),
        Family("DeepseekV2", _ROUTED | _LATENT, _LATENT_ATTENTION, ("mlp", "shared_experts")),
        Family("DeepseekV3", _ROUTED | _LATENT, _LATENT_ATTENTION, ("mlp", "shared_experts")),
        Family("Glm4Moe", _ROUTED, _ATTENTION, ("mlp", "shared_experts")),
        Family("Dots1", _ROUTED, _ATTENTION, ("mlp", "shared_experts")),
        Family(
            "Ernie4_5_Moe",
            {"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
            _ATTENTION,
            ("mlp", "shared_experts"),
        ),
        Family("HunYuanMoEV1", {}, [*_ATTENTION, "wg"], ("shared_mlp",)),
        Family("Olmoe", {}, _ATTENTION),
        Family("GptOss", {}, _ATTENTION, linear_target=True),
        Family(
            "Qwen2Moe",
            {"shared_expert_intermediate_size": 12},
            sorted([*_ATTENTION, "down_proj", "gate_proj", "shared_expert_gate", "up_proj"]),
            linear_target=True,
        ),
    )
}
