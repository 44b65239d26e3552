"""``deepseek-train experiment=h100_proxy``, rehearsed on a CPU: its recipe with sizes that are tiny."""

import json
import os
import shutil
from pathlib import Path

import pytest

from deepseek_train.spec import work
from tests.dist.composed import compose_config
from tests.dist.test_command import finish, start, workplace

__all__ = ["workplace"]  # a fixture
TINY = [
    "experiment=h100_proxy",
    "cluster.device=cpu",
    "model.vocab_size=4096",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=4",
    "model.v_head_dim=8",
    "model.dense_ffn_size=48",
    "model.expert_ffn_size=16",
    "model.kv_lora_rank=16",
    "model.q_lora_rank=16",
    "data.sequence_length=16",
    "data.source=text",
    "data.path=shards",
    "data.validation_percent=20",
    "train.total_tokens=256",  # two steps
]


def test_two_steps(workplace: Path) -> None:
    code, out, err = finish(start(workplace, *TINY))
    assert code == 0, err
    assert "1 ranks: PP 1 (1f1b)" in out
    assert "linears in FP8" in out
    assert "TFLOP/s" in out
    assert "MFU" not in out
    folder = workplace / "runs" / "h100_proxy"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = [line for line in lines if line["kind"] == "step"]
    assert last["step"] == 2
    assert last["loss"] < first["loss"]
    flops = work.training(compose_config(TINY).model, 16).total
    assert last["tflops"] == pytest.approx(128 / last["step_seconds"] * flops / 1e12)
    assert last["mfu"] is None
    assert "TFLOP/s a rank" in (folder / "report.md").read_text()


# On a CPU torch writes C++. Where nobody can compile it, what torch has traced and differentiated runs as it is.
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
COMPILED = ("deepseek_train.cli.train",) if COMPILER else ("tests.dist.traced_train",)


def test_compiled_glue_trains_alike(workplace: Path) -> None:
    """The same losses but for the order of a mean's sum, which counts 1e-4 in the gradient; with recomputation, whose
    hooks see what the compiled function saves."""
    overrides = [*TINY, "name=compiled", "train.compile=true", "train.recompute=[norm,mla_up,swiglu]"]
    code, _, err = finish(start(workplace, *overrides, module=COMPILED))
    assert code == 0, err
    lines = [
        [json.loads(line) for line in (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("h100_proxy", "compiled")
    ]
    for eager, compiled in zip(*lines, strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)
        if eager["kind"] == "step":
            assert compiled["balance_loss"] == pytest.approx(eager["balance_loss"], rel=1e-5)
