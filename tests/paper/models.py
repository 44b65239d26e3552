"""Model configurations for tests on paper: the shipped files, and small random ones."""

from pathlib import Path

import yaml
from hypothesis import strategies as st

from deepseek_train.config.parse import parse
from deepseek_train.config.schema import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def shipped(name: str) -> ModelConfig:
    return parse(ModelConfig, yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text()))


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Any number of layers, dense ones and MTP modules; sizes that can be told apart."""
    num_layers = draw(st.integers(1, 12))
    return ModelConfig(
        name="drawn",
        vocab_size=23,
        hidden_size=8,
        num_layers=num_layers,
        num_dense_layers=draw(st.integers(0, num_layers)),
        num_heads=2,
        qk_nope_head_dim=6,
        qk_rope_head_dim=2,
        v_head_dim=5,
        q_lora_rank=draw(st.sampled_from([None, 3])),
        kv_lora_rank=4,
        dense_ffn_size=11,
        num_routed_experts=4,
        num_shared_experts=draw(st.integers(0, 2)),
        expert_ffn_size=7,
        experts_per_token=2,
        num_expert_groups=2,
        expert_groups_per_token=1,
        routed_scale=1.0,
        mtp_depth=draw(st.integers(0, 3)),
        tie_embeddings=draw(st.booleans()),
    )
