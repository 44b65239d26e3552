"""Configurations of a small run over a made-up text, for tests that train as the command does."""

import random
from pathlib import Path

from deepseek_train.config.schema import RunConfig
from deepseek_train.data.prepare import prepare
from deepseek_train.train.preflight import preflight
from tests.dist.composed import compose_config

BATCH, LENGTH = 16, 32
SMALL = [
    "model.num_layers=4",
    "model.embed_init_std=null",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=4",
    "model.v_head_dim=8",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=16",
    "model.dense_ffn_size=64",
    "model.num_routed_experts=8",
    "model.expert_ffn_size=16",
    "model.init_std=0.1",
    f"data.sequence_length={LENGTH}",
    "data.validation_percent=20",
    "optim.lr.start=1e-3",
    "optim.lr.segments=[]",
    "optim.balance_speed.segments=[]",
    # Adam divides by sqrt(v) + eps: gradients that are nothing but rounding would move weights by all of lr.
    "optim.eps=1e-6",
    f"optim.batch_size.start={BATCH}",
    "train.microbatch_size=2",
    "parallel.check_splits=true",
    "cluster.device=cpu",
]


def small_configs(folder: Path, world: int, layouts: dict[str, list[str]]) -> dict[str, RunConfig]:
    """``SMALL`` with the overrides of each layout of ``world``; the text is prepared, a launch finds nothing wrong."""
    (folder / "text").mkdir(exist_ok=True)
    dice = random.Random(0)
    for number in range(40):
        lines = (f"value_{dice.randrange(50)} = {dice.randrange(1000)} + {number}" for _ in range(40))
        (folder / "text" / f"{number}.py").write_text("\n".join(lines))
    paths = [f"data.path={folder / 'tokens'}", f"data.source={folder / 'text'}", f"run_dir={folder / 'run'}"]
    found = {name: compose_config([*SMALL, *layout, *paths]) for name, layout in layouts.items()}
    for config in found.values():
        prepare(config.data, config.model.vocab_size)
        assert preflight(config, world) == []
    return found
