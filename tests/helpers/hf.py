"""Our weights under their published names, and transformers' DeepseekV3 model that reads them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging

from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec.weights import all_weights


def published(tensors: Mapping[str, Tensor], m: ModelConfig) -> dict[str, Tensor]:
    """Tensors by table name (weights, or their gradients) -> the same by published name, cut as ``HfSlice``
    says."""
    found: dict[str, Tensor] = {}
    for spec in all_weights(m):
        if spec.name not in tensors:
            continue
        tensor = tensors[spec.name]
        for piece in spec.hf:
            rows = slice(piece.start, piece.stop)
            if spec.expert:
                for expert in range(spec.shape[0]):
                    found[piece.name.format(expert=expert)] = tensor[expert, rows].clone()
            else:
                found[piece.name] = tensor[rows].clone()
    return found


def hf_config(m: ModelConfig, **kind: Any) -> DeepseekV3Config:
    """The same architecture as a transformers configuration. MTP modules are not part of it."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.rope_theta}
    if m.yarn.factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": m.yarn.factor,
            "original_max_position_embeddings": m.yarn.original_length,
            "beta_fast": m.yarn.beta_fast,
            "beta_slow": m.yarn.beta_slow,
            "mscale": m.yarn.mscale,
            "mscale_all_dim": m.yarn.mscale_all_dim,
        }
    return DeepseekV3Config(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.dense_ffn_size,
        moe_intermediate_size=m.expert_ffn_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads,
        num_key_value_heads=m.num_heads,
        n_shared_experts=m.num_shared_experts,
        n_routed_experts=m.num_routed_experts,
        routed_scaling_factor=m.routed_scale,
        kv_lora_rank=m.kv_lora_rank,
        q_lora_rank=m.q_lora_rank,
        qk_rope_head_dim=m.qk_rope_head_dim,
        v_head_dim=m.v_head_dim,
        qk_nope_head_dim=m.qk_nope_head_dim,
        n_group=m.num_expert_groups,
        topk_group=m.expert_groups_per_token,
        num_experts_per_tok=m.experts_per_token,
        first_k_dense_replace=m.num_dense_layers,
        max_position_embeddings=int(m.yarn.original_length * m.yarn.factor),
        rms_norm_eps=m.norm_eps,
        rope_parameters=rope,
        num_mtp_layers=0,
        tie_word_embeddings=m.tie_embeddings,
        use_cache=False,
        **kind,
    )


def hf_model(
    m: ModelConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    attention: str = "eager",
    experts: str = "eager",
) -> DeepseekV3ForCausalLM:
    """transformers' model with the published weights ``state``. The MTP modules' blocks are further layers of
    it, to be called by hand; what else belongs to MTP stays out. Raises where a weight is missing or has
    another shape."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    all_layers = replace(m, num_layers=m.num_layers + m.mtp_depth)
    loaded: Any = DeepseekV3ForCausalLM.from_pretrained(
        None,
        config=hf_config(all_layers),
        state_dict={name: tensor.clone() for name, tensor in state.items()},  # it keeps what it is given
        dtype=dtype,
        attn_implementation=attention,
        experts_implementation=experts,
        output_loading_info=True,
    )
    model, report = loaded
    mtp_only = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    strays = [name for name in report["unexpected_keys"] if not name.endswith(mtp_only)]
    if strays or report["missing_keys"] or report["mismatched_keys"]:
        raise AssertionError(f"transformers: not loaded {strays}, without value {report}")
    return model
