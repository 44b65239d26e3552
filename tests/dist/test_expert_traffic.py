"""A training step over emulated nodes: the same losses whatever way tokens take; what was sent for them, counted."""

import pytest
import torch

from deepseek_train.config.schema import RunConfig
from deepseek_train.monitor.metrics import StepMetrics
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.train.build import build
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.state import Progress
from deepseek_train.train.step import train_step
from tests.dist.small_run import small_configs
from tests.harness import run_ranks

WORLD, STEPS = 4, 3
EP4 = ["parallel.pp=1", "parallel.dp=4", "parallel.ep=4", "train.eval_microbatches=2", "schedule=1f1b"]
TWO_NODES = [*EP4, "cluster.gpus_per_node=2"]
HALF = ["model.hidden_size=128", "precision.params=bf16", "precision.combine=bf16"]
RUNS = {
    "one node": EP4,
    "two hops": TWO_NODES,
    "flat": [*TWO_NODES, "parallel.dispatcher=flat"],
    "one rank": [
        "parallel.pp=1",
        "parallel.dp=4",
        "parallel.ep=1",
        "train.eval_microbatches=2",
        "schedule=1f1b",
    ],
    "bf16": [*TWO_NODES, *HALF],
    "fp8": [*TWO_NODES, *HALF, "precision.dispatch=fp8"],
}


def train(rank: int, _world_size: int, config: RunConfig) -> list[StepMetrics]:
    place = Place(rank, WORLD, rank, WORLD, torch.device("cpu"))
    job, progress, steps = build(config, resolve_layout(config, WORLD), place), Progress(), []
    for _ in range(STEPS):
        progress, metrics = train_step(job, progress, traced=False)
        steps.append(metrics)
    return steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[StepMetrics]]:
    configs = small_configs(tmp_path_factory.mktemp("traffic"), WORLD, RUNS)
    return {name: run_ranks(train, WORLD, config)[0] for name, config in configs.items()}


def test_the_way_of_tokens_changes_nothing_but_the_last_digits(runs: dict[str, list[StepMetrics]]) -> None:
    for name in ("two hops", "flat", "one rank"):
        for found, expected in zip(runs[name], runs["one node"], strict=True):
            assert found.loss == pytest.approx(expected.loss, rel=1e-6)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_two_hops_cross_as_often_as_must_be(runs: dict[str, list[StepMetrics]]) -> None:
    for metrics, once_a_rank in zip(runs["two hops"], runs["flat"], strict=True):
        sent, flat = metrics.expert_traffic, once_a_rank.expert_traffic
        assert sent is not None
        assert flat is not None
        assert sent.dispatch.cross + sent.combine.cross == sent.least_cross > 0
        assert sent.over_least() == 1.0
        assert (flat.over_least() or 0.0) > 1.0
        assert min(*sent.numbers()) > 0


def test_where_nothing_crosses_nothing_is_counted(runs: dict[str, list[StepMetrics]]) -> None:
    for metrics in runs["one node"]:
        sent = metrics.expert_traffic
        assert sent is not None
        assert sent.dispatch.node > sent.dispatch.cross == sent.combine.cross == sent.least_cross == 0
        assert sent.over_least() is None
    assert all(metrics.expert_traffic is None for metrics in runs["one rank"])


def test_tokens_in_fp8_cost_half_the_bytes_and_little_loss(runs: dict[str, list[StepMetrics]]) -> None:
    """A row of 128 channels and two routing weights: 264 bytes in BF16, 144 in FP8; gradients, without weights, 256 and
    136. Routing in deeper layers differs a little, and so do the numbers of rows."""
    for wide, narrow in zip(runs["bf16"], runs["fp8"], strict=True):
        assert narrow.loss == pytest.approx(wide.loss, rel=0.02)
        assert narrow.loss != wide.loss
        assert wide.expert_traffic is not None
        assert narrow.expert_traffic is not None
        assert wide.expert_traffic.over_least() == narrow.expert_traffic.over_least() == 1.0
        share = narrow.expert_traffic.dispatch.cross / wide.expert_traffic.dispatch.cross
        assert share == pytest.approx((144 + 136) / (264 + 256), rel=0.03)
