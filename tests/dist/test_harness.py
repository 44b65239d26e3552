"""The harness itself: results by rank, failures with their cause first, hangs with their stack, all in seconds."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness import RanksFailed, run_ranks


def summed(rank: int, world_size: int, factor: float) -> tuple[int, torch.Tensor]:
    x = torch.full((3,), factor * (rank + 1))
    dist.all_reduce(x)
    return rank, x


@pytest.mark.parametrize("world_size", [1, 4, 8])
def test_all_reduce_and_results_in_rank_order(world_size: int) -> None:
    results = run_ranks(summed, world_size, 2.0)
    assert [rank for rank, _ in results] == list(range(world_size))
    for _, x in results:
        assert torch.equal(x, torch.full((3,), world_size * (world_size + 1.0)))


def trained(rank: int, world_size: int) -> float:
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(64, 64)).square().mean().backward()
    for p in layer.parameters():
        dist.all_reduce(p.grad)
    optimizer.step()
    return float(layer.weight.isfinite().all())


def test_warm_ranks_start_and_train_in_a_few_seconds() -> None:
    torch.randn(512, 512) @ torch.randn(512, 512)  # this process has an OpenMP pool now, its forks would hang
    run_ranks(trained, 2)
    began = time.monotonic()
    assert run_ranks(trained, 4) == [1.0] * 4
    assert time.monotonic() - began < 8  # 0.6 s on two idle cores; importing torch in each rank takes longer


def one_fails(rank: int, world_size: int) -> None:
    if rank == 2:
        raise ValueError("the cause on two")
    dist.barrier()


def test_the_failing_rank_comes_first_with_its_traceback() -> None:
    began = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(one_fails, 4)
    assert time.monotonic() - began < 10
    report = str(caught.value)
    assert report.startswith("4 of 4 ranks failed")
    assert report.splitlines()[1] == "--- rank 2 raised"
    assert 'raise ValueError("the cause on two")' in report
    assert report.index("the cause on two") < report.index("dist.barrier()")


def hang_in_sleep(seconds: float) -> None:
    time.sleep(seconds)


def one_hangs(rank: int, world_size: int) -> int:
    if rank == 1:
        hang_in_sleep(600)
    return rank


def test_a_hanging_rank_is_reported_with_its_stack() -> None:
    began = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(one_hangs, 2, timeout=2)
    assert time.monotonic() - began < 10
    report = str(caught.value)
    assert "rank 1 hung, ended after 2 s" in report
    assert "in hang_in_sleep" in report


def one_fails_one_sleeps(rank: int, world_size: int) -> None:
    if rank == 0:
        raise RuntimeError("cause")
    hang_in_sleep(600)


def test_after_a_failure_the_others_get_three_seconds() -> None:
    began = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(one_fails_one_sleeps, 2, timeout=500)
    assert time.monotonic() - began < 10
    assert "rank 1 hung, ended while another rank failed" in str(caught.value)


def one_crashes(rank: int, world_size: int) -> None:
    if rank == 1:
        print("last words", flush=True)
        os.abort()
    dist.barrier()


def test_a_crash_without_traceback_is_named_first_with_its_output() -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(one_crashes, 2)
    report = str(caught.value)
    assert report.splitlines()[1] == "--- rank 1 died of SIGABRT"
    assert "last words" in report


def all_fail(rank: int, world_size: int) -> None:
    raise AssertionError(f"off by {rank}")


def test_ranks_with_the_same_story_share_one_entry() -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(all_fail, 4, group=False)  # without a group no rank can fail of another one leaving
    assert str(caught.value).count("Traceback") == 1


def surroundings(rank: int, world_size: int) -> tuple[bool, float, str | None, int]:
    fresh = torch.cat([torch.empty(4), torch.empty_like(torch.ones(4)), torch.ones(1).new_empty(4)])
    return (
        bool(fresh.isnan().all()),
        torch.rand(()).item(),
        os.environ.get("OF_THE_TEST"),
        torch.get_num_threads(),
    )


def test_ranks_have_poison_seed_environment_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_TEST", "yes")
    first, second = run_ranks(surroundings, 2)
    assert first[0] is True
    assert first[1] != second[1]  # each rank has a seed of its own
    assert (first[2], first[3]) == ("yes", 1)
    assert run_ranks(surroundings, 2) == [first, second]  # and it repeats


def warns(rank: int, world_size: int) -> None:
    warnings.warn("not in our house", UserWarning, stacklevel=1)


def test_a_warning_in_a_rank_is_an_error_as_it_is_here() -> None:
    with pytest.raises(RanksFailed, match="not in our house"):
        run_ranks(warns, 1)


def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RanksFailed):
        run_ranks(one_hangs, 2, timeout=0.5)
    assert list(tmp_path.iterdir()) == []


def test_empty_is_poisoned_here_too() -> None:
    assert torch.empty(8).isnan().all()
    assert torch.empty(2, dtype=torch.bfloat16, requires_grad=True).isnan().all()
    assert torch.empty(4, dtype=torch.float8_e4m3fn).float().isnan().all()
    assert torch.ones(2, dtype=torch.int64).new_empty(3).shape == (3,)


def test_paper_tests_need_no_torch() -> None:
    """conftest must not import torch: the paper floors are tested in seconds."""
    code = "import sys, tests.conftest; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
