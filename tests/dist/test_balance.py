"""The load that moves the router biases is that of the global batch: both directions of DualPipe, all replicas.

Held to a count in one process, without pipeline, replicas or collectives. Legend: E experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from deepseek_train.config.schema import RunConfig
from deepseek_train.model.context import ModelContext
from deepseek_train.model.init import init_stage
from deepseek_train.model.stage import Stage
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.phases.phase import fold
from deepseek_train.phases.values import MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.spec.stages import split_layers
from deepseek_train.train.build import build
from deepseek_train.train.data_plan import open_source
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.state import Progress
from deepseek_train.train.step import train_step
from tests.dist.small_run import BATCH, LENGTH, small_configs
from tests.harness import run_ranks

Rule = Literal["sign", "magnitude"]
LAYOUTS = {
    "dualpipe": (2, ["parallel.pp=2", "parallel.dp=1", "parallel.ep=1"]),
    "replicas": (2, ["parallel.pp=1", "parallel.dp=2", "parallel.ep=1", "schedule=1f1b"]),
    "dualpipe and replicas": (4, ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2"]),
}


@dataclass(frozen=True)
class AfterOneStep:
    """What one rank reports, and holds."""

    loads: dict[int, tuple[int, ...]]
    biases: list[tuple[int, Tensor]]  # layer, [E]; a layer may be held twice
    directions: frozenset[
        bool
    ]  # of the micro-batches that entered here at the first stage or left at the last


def one_step(rank: int, world_size: int, config: RunConfig) -> AfterOneStep:
    place = Place(rank, world_size, rank, world_size, torch.device("cpu"))
    job = build(config, resolve_layout(config, world_size), place)
    _, metrics = train_step(job, Progress(), traced=True)
    assert metrics.timeline is not None
    half = BATCH // config.train.microbatch_size // job.layout.dp // 2
    seen = {
        s.microbatch >= half for s in metrics.timeline.spans if s.rank == job.mesh.pp_rank and s.stage == 0
    }
    biases = [(layer, bias_E.clone()) for layer, bias_E in job.router_biases()]
    return AfterOneStep(metrics.expert_load, biases, frozenset(seen))


@torch.no_grad()
def counted_in_one_process(config: RunConfig) -> dict[int, Tensor]:
    """Layer -> tokens of each expert over the whole first batch, one sequence after another."""
    (spec,) = split_layers(config.model, 1)
    stage = Stage(ModelContext(config.model, WeightGradQueue()), spec, LENGTH)
    init_stage(stage, config.model, config.seed)
    source = open_source(config, "train")
    counts: dict[int, Tensor] = {}
    for number in range(BATCH):
        tokens = torch.from_numpy(source.sequences(range(number, number + 1)))
        for load in fold(stage.phases, MicroBatch(tokens)).ledger.loads:
            counts[load.layer] = counts.get(load.layer, 0) + load.tokens_E
    return counts


@pytest.mark.parametrize("rule", ["sign", "magnitude"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_biases_follow_the_load_of_the_whole_global_batch(layout: str, rule: Rule, tmp_path: Path) -> None:
    world = LAYOUTS[layout][0]
    overrides = [*LAYOUTS[layout][1], f"optim.balance_rule={rule}", "train.eval_microbatches=2"]
    config = small_configs(tmp_path, world, {layout: overrides})[layout]
    counts = counted_in_one_process(config)
    assert len(counts) == 4  # three layers and the MTP module
    ranks = run_ranks(one_step, world, config)
    held = set()
    for rank in ranks:
        assert rank.loads == {layer: tuple(load_E.tolist()) for layer, load_E in counts.items()}
        for layer, bias_E in rank.biases:
            off_E = 1.0 - counts[layer] / counts[layer].double().mean()
            step_E = off_E.sign() if rule == "sign" else off_E
            wanted_E = config.optim.balance_speed.start * step_E
            assert wanted_E.any()
            torch.testing.assert_close(bias_E.double(), wanted_E, rtol=1e-5, atol=1e-9)
            held.add(layer)
    assert held == counts.keys()
    if "dualpipe" in layout:  # else the test would not be about two directions
        assert {rank.directions for rank in ranks} == {frozenset({False}), frozenset({True})}
