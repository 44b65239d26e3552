"""A training step as the command runs it: losses on any layout, loads, balance biases, evaluation, skipped steps."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deepseek_train.config.schema import RunConfig
from deepseek_train.monitor.metrics import EvalMetrics, StepMetrics
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.check import check
from deepseek_train.schedule.dataflow import actions_of
from deepseek_train.schedule.measured import durations_from_json, durations_to_json
from deepseek_train.schedule.simulate import Durations
from deepseek_train.schedule.text import from_text, to_text
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.train.build import Job, build
from deepseek_train.train.fallbacks import resolve_layout
from deepseek_train.train.preflight import preflight
from deepseek_train.train.sample import continuation
from deepseek_train.train.schedule_store import told_by_rank_0
from deepseek_train.train.state import Progress
from deepseek_train.train.step import evaluate, train_step
from tests.dist.small_run import BATCH, LENGTH, small_configs
from tests.harness import run_ranks

WORLD, STEPS, EVALUATED = 4, 3, 16
LAYOUTS = {  # all of four ranks
    "pp2 dp2 ep2": ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "train.eval_microbatches=4"],
    "dp4 ep4": [
        "parallel.pp=1",
        "parallel.dp=4",
        "parallel.ep=4",
        "train.eval_microbatches=2",
        "schedule=1f1b",
    ],
    "pp2 dp2 ep4": [
        "parallel.pp=2",
        "parallel.dp=2",
        "parallel.ep=4",
        "parallel.ep_across_mirrors=true",
        "train.eval_microbatches=4",
    ],
    "pp4": ["parallel.pp=4", "parallel.dp=1", "parallel.ep=1", "train.eval_microbatches=8"],
}


@dataclass(frozen=True)
class Run:
    """What one rank saw of three steps and two evaluations."""

    steps: list[StepMetrics]
    progress: Progress
    evaluations: list[EvalMetrics]
    sampled: list[int]
    biases: dict[int, torch.Tensor]  # by layer
    pp_rank: int


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """The layouts over one prepared text."""
    return small_configs(tmp_path_factory.mktemp("train_step"), WORLD, LAYOUTS)


def job_of(config: RunConfig, rank: int) -> Job:
    place = Place(rank, WORLD, rank, WORLD, torch.device("cpu"))
    return build(config, resolve_layout(config, WORLD), place)


def train_three_steps(rank: int, _world_size: int, config: RunConfig) -> Run:
    job, progress, steps = job_of(config, rank), Progress(), []
    for number in range(STEPS):
        progress, metrics = train_step(job, progress, traced=number == 1)
        steps.append(metrics)
    evaluations = [evaluate(job, progress) for _ in range(2)]
    sampled = continuation(job, [5, 4, 3, 2, 1], 6, temperature=1.0, stop=-1)
    biases = {layer: bias.clone() for layer, bias in job.router_biases()}
    return Run(steps, progress, evaluations, sampled, biases, job.mesh.pp_rank)


@pytest.fixture(scope="module")
def runs(configs: dict[str, RunConfig]) -> dict[str, list[Run]]:
    return {name: run_ranks(train_three_steps, WORLD, config) for name, config in configs.items()}


def but_times(metrics: StepMetrics) -> StepMetrics:
    """What all ranks agree on."""
    return replace(metrics, step_seconds=0.0, tokens_per_second=0.0, tflops=None, timeline=None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_report_the_same(layout: str, runs: dict[str, list[Run]]) -> None:
    first, *others = runs[layout]
    for other in others:
        assert [but_times(m) for m in other.steps] == [but_times(m) for m in first.steps]
        assert other.evaluations == first.evaluations
        assert replace(other.progress, wall_seconds=0.0) == replace(first.progress, wall_seconds=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_progress_counts_what_was_consumed(layout: str, runs: dict[str, list[Run]]) -> None:
    run = runs[layout][0]
    assert run.progress.step == STEPS
    assert run.progress.cursor.consumed_sequences == STEPS * BATCH
    assert run.progress.tokens == STEPS * BATCH * LENGTH
    assert [m.tokens for m in run.steps] == [(n + 1) * BATCH * LENGTH for n in range(STEPS)]
    assert not any(m.skipped for m in run.steps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expert_loads_count_every_token_of_every_moe_layer(
    layout: str, runs: dict[str, list[Run]], configs: dict[str, RunConfig]
) -> None:
    m = configs[layout].model
    moe_layers = set(range(m.num_dense_layers, m.num_layers + m.mtp_depth))
    for metrics in runs[layout][0].steps:
        assert metrics.expert_load.keys() == moe_layers
        for load_E in metrics.expert_load.values():
            assert len(load_E) == m.num_routed_experts
            assert sum(load_E) == BATCH * LENGTH * m.experts_per_token


@pytest.mark.parametrize("layout", LAYOUTS)
def test_router_biases_agree_wherever_they_are_held(
    layout: str, runs: dict[str, list[Run]], configs: dict[str, RunConfig]
) -> None:
    """Bit for bit: on mirrored pipeline ranks, on data-parallel ranks, and with the sign rule applied by hand."""
    config, run = configs[layout], runs[layout][0]
    seen = set()
    for rank in runs[layout]:
        for layer, bias_E in rank.biases.items():
            wanted_E = torch.zeros_like(bias_E)
            for metrics in run.steps:
                load_E = torch.tensor(metrics.expert_load[layer], dtype=torch.float32)
                wanted_E += config.optim.balance_speed.start * torch.sign(load_E.mean() - load_E)
            assert torch.equal(bias_E, wanted_E)
            assert bias_E.any()
            seen.add(layer)
    assert seen == run.steps[0].expert_load.keys()


def test_evaluation_repeats_on_any_layout(runs: dict[str, list[Run]]) -> None:
    """Bit for bit on one layout; the layouts read the same sequences, too."""
    first = next(iter(runs.values()))[0].evaluations[0]
    assert first.num_tokens == EVALUATED * LENGTH
    for ranks in runs.values():
        once, again = ranks[0].evaluations
        assert once == again
        assert once.num_tokens == first.num_tokens
        assert once.loss == pytest.approx(first.loss, rel=1e-6)
        assert once.mtp_loss == pytest.approx(first.mtp_loss, rel=1e-6)


def test_losses_and_samples_are_the_same_on_any_layout(runs: dict[str, list[Run]]) -> None:
    """Whoever holds the experts: samples are drawn from the same logits, but for their last digits."""
    first = next(iter(runs.values()))[0]
    for ranks in runs.values():
        for run in ranks:
            assert run.sampled == first.sampled
            for found, expected in zip(run.steps, first.steps, strict=True):
                assert found.loss == pytest.approx(expected.loss, rel=1e-6)
                assert found.mtp_loss == pytest.approx(expected.mtp_loss, rel=1e-6)
                assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert len(set(first.sampled)) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_traced_step_has_the_schedules_timeline(
    layout: str, runs: dict[str, list[Run]], configs: dict[str, RunConfig]
) -> None:
    config = configs[layout]
    grid = resolve_layout(config, WORLD)
    schedule = make_schedule(config.schedule.name, grid.pp, BATCH // (2 * grid.dp))
    for run in runs[layout]:
        assert [m.timeline is not None for m in run.steps] == [False, True, False]
        timeline = run.steps[1].timeline
        assert timeline is not None
        assert timeline.num_ranks == grid.pp
        for pp_rank, steps in enumerate(schedule.steps_R):
            done = [(s.stage, s.kind, s.microbatch) for s in timeline.spans if s.rank == pp_rank]
            assert done == [(a.stage, a.kind, a.microbatch) for step in steps for a in actions_of(step)]


def skip_a_step(rank: int, _world_size: int, config: RunConfig) -> None:
    job = job_of(config, rank)
    progress, first = train_step(job, Progress(), traced=False)
    assert not first.skipped
    biases = {layer: bias.clone() for layer, bias in job.router_biases()}
    weights = {one.spec.name: one.weight.detach().clone() for one in job.weights}
    if rank == 2:
        job.weights[0].weight.main_grad.view(-1)[0] = float("nan")  # gradients are added to this
    progress, second = train_step(job, progress, traced=False)
    assert second.skipped
    assert second.grad_norm == float("inf")
    assert torch.isfinite(torch.tensor(second.loss))
    assert progress.step == 2  # its data are consumed all the same
    assert progress.cursor.consumed_sequences == 2 * BATCH
    for layer, bias in job.router_biases():
        assert torch.equal(bias, biases[layer])
    for one in job.weights:
        assert torch.equal(one.weight, weights[one.spec.name]), one.spec.name
    progress, third = train_step(job, progress, traced=False)
    assert not third.skipped
    assert any(not torch.equal(bias, biases[layer]) for layer, bias in job.router_biases())


@pytest.mark.parametrize("layout", ["pp2 dp2 ep2"])
def test_a_skipped_step_moves_neither_weights_nor_biases(layout: str, configs: dict[str, RunConfig]) -> None:
    run_ranks(skip_a_step, WORLD, configs[layout])


def train_on_two(rank: int, world_size: int, config: RunConfig) -> tuple[list[float], list[str]]:
    """Losses of three steps, and the schedules that rank 0 told meanwhile."""
    place = Place(rank, world_size, rank, world_size, torch.device("cpu"))
    job, progress, losses, told = build(config, resolve_layout(config, world_size), place), Progress(), [], []
    broadcast = dist.broadcast_object_list

    def listen(found: list[str], src: int) -> None:
        broadcast(found, src=src)
        told.append(found[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast_object_list", listen)
        for _ in range(STEPS):
            progress, metrics = train_step(job, progress, traced=False)
            losses.append(metrics.loss)
    return losses, told


def test_a_searched_schedule_trains_as_dualpipe_does(configs: dict[str, RunConfig], tmp_path: Path) -> None:
    """Rank 0 alone knows the times: both run what it found, told once for one number of micro-batches."""
    plain = replace(configs["pp4"], parallel=replace(configs["pp4"].parallel, pp=2))
    times = tmp_path / "durations.json"
    times.write_text(durations_to_json(Durations((1.0, 1.4), (1.0, 1.4), (1.0, 1.4), (2.7, 3.8))))
    schedule = replace(plain.schedule, name="auto", durations=str(times))
    auto = replace(plain, schedule=schedule)
    assert preflight(auto, 2) == []
    (wanted, nothing), _ = run_ranks(train_on_two, 2, plain)
    (found, told), other = run_ranks(train_on_two, 2, auto)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert other == (found, told)
    assert (len(nothing), len(told)) == (0, 1)
    assert told[0] != to_text(make_schedule("dualpipe", 2, BATCH // 2)).replace("dualpipe", "auto", 1)
    check(from_text(told[0]))


def read_times(rank: int, _world_size: int, path: Path) -> str:
    """Rank 1 never looks: it would find nothing."""
    with pytest.raises((ValueError, OSError)) as raised:
        told_by_rank_0(
            lambda: durations_from_json(path.read_text()) if rank == 0 else pytest.fail("not mine")
        )
    return str(raised.value)


@pytest.mark.parametrize("text", ["[1]", None])
def test_what_rank_0_cannot_read_every_rank_says(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "durations.json"
    if text is not None:
        path.write_text(text)
    first, second = run_ranks(read_times, 2, path)
    assert first == second
    assert ("one JSON object" if text else "No such file") in first


def test_the_layouts_are_what_they_are_called(configs: dict[str, RunConfig]) -> None:
    grids = [resolve_layout(config, WORLD) for config in configs.values()]
    plain = [ParallelLayout(2, 2, 2), ParallelLayout(1, 4, 4), ParallelLayout(4, 1, 1)]
    assert grids == [*plain[:2], ParallelLayout(2, 2, 4, mirrored=True), plain[2]]
