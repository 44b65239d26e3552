"""A soak of three faults: see ``soak``, which takes minutes for thirty."""

from pathlib import Path

import pytest

from tests.faults.soak import EVERY, SoakFailed, compare, soak
from tests.faults.soak_plan import KINDS, Fault, plan
from tests.faults.soak_report import write_report

BY_NAME = {kind.name: kind for kind in KINDS}


def test_three_faults_leave_no_trace(tmp_path: Path) -> None:
    faults = [
        Fault(BY_NAME["rank killed while its file is half written"], "writing", 1, 8),
        Fault(BY_NAME["newest checkpoint: a bit flipped"], "optimizer", 0, 14),
        Fault(BY_NAME["stop asked of the launcher (SIGTERM)"], "forward", 1, 19),
    ]
    found = soak(tmp_path, faults, 2)
    assert found.commands >= 2
    assert found.restarts >= 2
    written, flipped, asked = found.costs
    assert written.lost_steps > 0
    assert flipped.lost_steps > EVERY
    assert asked.lost_steps == 0
    assert "a bit flipped" in write_report(tmp_path / "results", found, 0, [1.0])
    with pytest.raises(SoakFailed, match="metrics"):
        compare(tmp_path / "clean" / "runs" / "clean", tmp_path / "clean" / "runs" / "clean", found.steps + 1)


def test_a_plan_has_every_kind_before_any_comes_twice_and_room_for_checkpoints() -> None:
    for seed in range(50):
        faults = plan(30, seed, 4, EVERY)
        assert {fault.kind for fault in faults[: len(KINDS)]} == set(KINDS)
        assert all(a.step + EVERY < b.step for a, b in zip(faults, faults[1:], strict=False))
        assert faults[-1].place != "loading"
        assert faults == plan(30, seed, 4, EVERY)
