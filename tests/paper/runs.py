"""A whole run's configuration to change single values in."""

from typing import Any

from deepseek_train.config.parse import parse
from deepseek_train.config.schema import RunConfig


def mapping(**changes: Any) -> dict[str, Any]:
    """A sound run as YAML gives it; ``changes`` by dotted key with ``__`` for the dot."""
    run: dict[str, Any] = {
        "name": "test",
        "model": {
            **{"name": "m", "vocab_size": 64, "hidden_size": 16, "num_layers": 4, "num_dense_layers": 1},
            **{"num_heads": 2, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4},
            **{"q_lora_rank": None, "kv_lora_rank": 4, "dense_ffn_size": 16, "num_routed_experts": 16},
            **{"num_shared_experts": 1, "expert_ffn_size": 8, "experts_per_token": 4},
            **{"num_expert_groups": 4, "expert_groups_per_token": 2, "routed_scale": 2.5},
        },
        "parallel": {},
        "schedule": {},
        "precision": {},
        "data": {"path": "datasets/x"},
        "optim": {
            "lr": {"start": 0.0, "segments": [{"until": 100, "to": 1e-3, "shape": "linear"}]},
            "batch_size": {"start": 8},
            "balance_speed": {"start": 0.001},
            "mtp_weight": {"start": 0.3},
        },
        "train": {"total_tokens": 1000, "guard": {}},
        "checkpoint": {},
        "monitor": {},
        "cluster": {},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        group = run
        for part in path:
            group = group[part]
        group[last] = value
    return run


def run_config(**changes: Any) -> RunConfig:
    return parse(RunConfig, mapping(**changes))
