"""A rank dies, freezes, hangs or lags behind: the others name it and end in time; a laggard is only named."""

from pathlib import Path

import pytest

from deepseek_train.config.exit_codes import ExitCode
from tests.dist.commands import SMALL, run, write_text

HANG = 2.0
WATCHED = [*SMALL, f"cluster.watchdog.hang_seconds={HANG}"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    write_text(folder)
    return folder


@pytest.mark.parametrize(("where", "said"), [("forward", "forward and backward"), ("optimizer", "optimizer")])
def test_a_rank_that_is_killed_is_named_with_its_step(workplace: Path, where: str, said: str) -> None:
    done = run(workplace, *SMALL, f"name=kill-{where}", FAULT=f"kill {where} 1 3")
    assert done.code == 128 + 9, done.err
    told = [line for line in done.err.splitlines() if line.startswith("rank 1 lost at step 3, " + said)]
    assert len(told) == 1, done.err  # by the survivor; the launcher says it once more, last
    last = done.err.rstrip().splitlines()[-1]
    assert last.startswith(f"[rank 1] died of SIGKILL: rank 1 lost at step 3, {said}"), last
    assert "Traceback" not in done.err
    assert not (workplace / "runs" / f"kill-{where}.lock").exists()


@pytest.mark.parametrize(
    ("fault", "condition"),
    [
        ("stop forward 1 3", "is frozen"),
        ("hog optimizer 0 3", "is frozen"),
        ("sleep forward 1 3", "is stuck, and waits for no transfer"),
        ("sleep save 0 4", "is stuck, and waits for no transfer"),
    ],
)
def test_a_hang_is_named_by_rank_and_phase_and_ends(workplace: Path, fault: str, condition: str) -> None:
    what, where, culprit, step = fault.split()
    name = f"{what}-{where}"
    long = ["cluster.timeout_seconds=4"] if where == "save" else []  # that much is saving given
    done = run(workplace, *WATCHED, *long, f"name={name}", FAULT=fault)
    assert done.code == ExitCode.HUNG, done.err
    (cause,) = {line for line in done.err.splitlines() if line.startswith("The cause: ")}
    phase = {"forward": "forward and backward", "optimizer": "optimizer", "save": "saving"}[where]
    assert f"The cause: rank {culprit} (pid " in cause
    assert f") {condition}" in cause
    assert f"at step {step}, {phase}" in cause
    reports = sorted((workplace / "runs" / name / "hangs").iterdir())
    silent = {int(culprit)} if condition == "is frozen" else set()
    assert {int(path.name.split("-")[1]) for path in reports} == {0, 1} - silent
    for path in reports:
        text = path.read_text()
        assert path.name.endswith(f"step-{int(step):08}.txt")
        assert cause.split(";")[0] in text  # the same cause; the silence may be a little longer
        assert 'train/loop.py", line' in text  # the main thread's stack
    if what == "hog":
        assert 'faulty_train.py", line' in done.err  # its own stack, on request
    if what == "sleep":
        assert any("in sleep" in path.read_text() for path in reports)


def test_a_slow_rank_is_named_and_the_run_goes_on(workplace: Path) -> None:
    done = run(workplace, *SMALL, "name=slow", "cluster.watchdog.straggler_every=4", FAULT="slow forward 1 2")
    assert done.code == 0, done.err
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: rank 1 took ")]
    assert [line.split("compute step ")[1][0] for line in warnings] == ["4", "8"]


def test_a_rank_with_other_code_is_named_before_anything_is_built(workplace: Path) -> None:
    done = run(workplace, *SMALL, "name=odd", "parallel.dp=2", ODD="2")
    assert done.code == ExitCode.USER_ERROR, done.err
    assert "code of deepseek_train: rank 2 has yesterdays, most have " in done.err
    assert not (workplace / "runs" / "odd").exists()
