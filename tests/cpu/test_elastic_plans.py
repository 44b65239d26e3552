"""Layouts to fall back on, ranks that differ, ranks that are slow: what is decided about them, without starting any."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_train.config.check import check
from deepseek_train.config.fallbacks import variants
from deepseek_train.config.schema import FallbackConfig, RunConfig
from deepseek_train.train.agreement import differences
from deepseek_train.train.fallbacks import fits, fitting, resolve_layout
from deepseek_train.train.preflight import preflight
from deepseek_train.train.straggler import SLOW, stragglers
from tests.dist.composed import compose_config
from tests.dist.small_run import SMALL

PLANS = (
    FallbackConfig(pp=2, dp=2, ep=2, schedule="1f1b"),
    FallbackConfig(pp=2, dp=1, ep=2, ep_across_mirrors=True),
    FallbackConfig(pp=1, dp=1, ep=1, schedule="gpipe"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("plans")
    grid = ["parallel.pp=4", "parallel.dp=2", "parallel.ep=2", "train.microbatch_size=1"]
    overrides = [*grid, f"run_dir={folder}/run", f"data.path={folder}/none"]
    config = compose_config([*SMALL, *overrides])
    return replace(config, parallel=replace(config.parallel, fallbacks=PLANS))


def test_the_first_layout_for_as_many_ranks_is_taken(run: RunConfig) -> None:
    for world, pp, dp, mirrored, schedule in (
        (8, 4, 2, False, "dualpipe"),
        (4, 2, 2, False, "1f1b"),
        (2, 2, 1, True, "dualpipe"),
        (1, 1, 1, False, "gpipe"),
    ):
        chosen = fitting(run, world)
        layout = resolve_layout(chosen, world)
        assert (layout.pp, layout.dp, layout.mirrored, chosen.schedule.name) == (pp, dp, mirrored, schedule)
        assert chosen.parallel.fallbacks == PLANS  # for the next time
        assert preflight(run, world) == []


def test_our_own_ranks_are_those_that_were_asked_for(run: RunConfig) -> None:
    assert fitting(run, None) is run


def test_a_number_of_ranks_that_nobody_planned_is_refused(run: RunConfig) -> None:
    assert fitting(run, 6) is run
    (problem,) = preflight(run, 6)
    assert problem.where == "parallel"
    assert "6 ranks were started" in problem.what
    assert "parallel.fallbacks" in problem.mend


def test_a_free_dp_takes_what_its_experts_divide_into(run: RunConfig) -> None:
    free = replace(run, parallel=replace(run.parallel, pp=2, dp=None, ep=4))
    assert fits(free, 8)
    assert not fits(free, 4)
    assert fitting(free, 4).parallel.ep == 2


def test_every_fallback_is_checked_before_it_is_needed(run: RunConfig) -> None:
    bad = (
        FallbackConfig(pp=2, dp=3, ep=2),
        PLANS[0],
        FallbackConfig(pp=3, dp=1, ep=1),  # DualPipe wants an even number
    )
    config = replace(run, parallel=replace(run.parallel, fallbacks=bad))
    (problem,) = check(config)
    assert problem.where == "parallel.fallbacks[0]"
    assert "expert-parallel size 2 does not divide" in problem.what
    config = replace(config, parallel=replace(config.parallel, fallbacks=bad[1:]))
    assert check(config) == []
    assert {problem.where for problem in preflight(config, 8)} == {"parallel.fallbacks[1]"}


def test_fallbacks_can_be_written_on_the_command_line() -> None:
    config = compose_config([*SMALL, "parallel.fallbacks=[{pp: 2, dp: 2, ep: 2, schedule: 1f1b}]"])
    assert config.parallel.fallbacks == PLANS[:1]
    assert variants(config)[1].schedule.name == "1f1b"


def test_resume_never_and_restarts_do_not_go_together(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    (problem,) = preflight(replace(run, resume="never"), 8)
    assert problem.where == "resume"
    assert preflight(run, 8) == []


@pytest.mark.parametrize(
    ("cluster", "key"), [("hang_seconds=600", "hang_seconds"), ("hang_seconds=0", "hang_seconds")]
)
def test_a_watchdog_speaks_before_collectives_give_up(cluster: str, key: str) -> None:
    (problem,) = check(compose_config([*SMALL, f"cluster.watchdog.{cluster}"]))
    assert problem.where == f"cluster.watchdog.{key}"
    assert (
        check(compose_config([*SMALL, f"cluster.watchdog.{cluster}", "cluster.watchdog.enabled=false"])) == []
    )


@given(st.integers(2, 40), st.data())
def test_the_odd_ranks_are_named(world: int, data: st.DataObject) -> None:
    odd = data.draw(st.sets(st.integers(0, world - 1), max_size=(world - 1) // 2))
    told = [{"torch": "2.12" if rank in odd else "2.13", "code": "abc"} for rank in range(world)]
    named = ", ".join(str(rank) for rank in sorted(odd)[:8]) + (", ..." if len(odd) > 8 else "")
    assert differences(told) == ([f"torch: rank {named} has 2.12, most have 2.13"] if odd else [])


@given(st.integers(1, 12), st.data())
def test_slow_ranks_are_held_against_their_like(world: int, data: st.DataObject) -> None:
    stages = data.draw(st.lists(st.integers(0, 2), min_size=world, max_size=world))
    work = [1.0, 10.0, 100.0]  # uneven stages are no fault of a rank's
    alike = [sum(other == own for other in stages) for own in stages]
    candidates = [rank for rank in range(world) if alike[rank] >= 3]
    slow = data.draw(st.sampled_from(candidates)) if candidates else None
    seconds = [work[stage] * (3.0 if rank == slow else 1.0) for rank, stage in enumerate(stages)]
    found = stragglers(seconds, [(stage,) for stage in stages])
    with_like = [(rank, times) for rank, times in found if alike[rank] > 1]
    assert with_like == ([] if slow is None else [(slow, pytest.approx(3.0))])


def test_a_rank_without_its_like_is_held_against_all() -> None:
    assert stragglers([1.0, 1.1, SLOW * 1.3], [(0,), (1,), (2,)]) == [(2, pytest.approx(SLOW * 1.3 / 1.05))]
    assert stragglers([1.0], [(0,)]) == []
