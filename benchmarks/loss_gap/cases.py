"""What is trained: one small model and its optimizer's curves, and the runs that are compared."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from deepseek_train.config.parse import parse
from deepseek_train.config.schema import (
    CurveConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    Segment,
    TilesConfig,
)

_PRECISIONS = Path(__file__).parents[2] / "configs" / "precision"

# A DeepSeek-V3 in miniature. Every contraction but one is of 128 elements at least, that of the dense network's second
# product 1024, those of weight gradients the tokens of a step.
MODEL = ModelConfig(
    name="loss_gap",
    vocab_size=4096,
    hidden_size=256,
    num_layers=3,
    num_dense_layers=1,
    num_heads=4,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=64,
    q_lora_rank=128,
    kv_lora_rank=128,
    dense_ffn_size=1024,
    num_routed_experts=8,
    num_shared_experts=1,
    expert_ffn_size=128,
    experts_per_token=2,
    num_expert_groups=2,
    expert_groups_per_token=1,
    routed_scale=2.5,
    init_std=0.03,
    embed_init_std=1.0,
)


@dataclass(frozen=True)
class Size:
    """The model and a step's batch, which is one micro-batch."""

    model: ModelConfig
    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length


SMALL = Size(MODEL, sequences=8, length=128)


@dataclass(frozen=True)
class Case:
    """One run. The same seeds give the same numbers; ``seed`` is of the initial weights, batches are the same in all
    runs."""

    name: str
    precision: PrecisionConfig
    steps: int
    seed: int = 0


def precision(name: str) -> PrecisionConfig:
    """The shipped ``precision=name``."""
    return parse(PrecisionConfig, yaml.safe_load((_PRECISIONS / f"{name}.yaml").read_text()))


def _fp8(**changes: Any) -> PrecisionConfig:
    shipped = precision("fp8")
    assert shipped.fp8 is not None
    return replace(shipped, fp8=replace(shipped.fp8, **changes))


def _tensors() -> dict[str, TilesConfig]:
    whole = TilesConfig("tensor")
    names = "activations", "gradients", "weights", "weight_gradients", "expert_inputs", "expert_gradients"
    return dict.fromkeys(names, whole)


_BLOCKS = TilesConfig("128x128")
BF16 = precision("bf16")
FP8 = _fp8(accumulate="hopper")
ABLATIONS = {
    "unpromoted": _fp8(accumulate="unpromoted"),
    "per tensor": _fp8(accumulate="hopper", **_tensors()),
    "block gradients": _fp8(accumulate="hopper", gradients=_BLOCKS, expert_gradients=_BLOCKS),
}


def optim_of(tokens: int) -> OptimConfig:
    """Curves that end with the run."""
    return OptimConfig(
        lr=CurveConfig(
            0.0,
            (
                Segment(tokens // 20, 3e-3, "linear"),
                Segment(tokens * 2 // 5),
                Segment(tokens, 1e-4, "cosine"),
            ),
        ),
        batch_size=CurveConfig(0.0),
        balance_speed=CurveConfig(1e-2, (Segment(tokens * 7 // 10), Segment(tokens, 1e-3, "linear"))),
        mtp_weight=CurveConfig(0.0),
    )
