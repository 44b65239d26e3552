"""MaxVio by hand, its tenths of a run, and the report's section on it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_train.monitor.imbalance import even_since, imbalance
from deepseek_train.monitor.metrics import StepMetrics
from deepseek_train.monitor.report_load import load_section
from tests.cpu.monitor_samples import STEP, make_history


def step(number: int, *layers: tuple[int, ...]) -> StepMetrics:
    return replace(STEP, step=number, expert_load={3 + i: counts for i, counts in enumerate(layers)})


def violated(number: int, percent: int) -> StepMetrics:
    """One layer of two experts whose MaxVio is ``percent``, the second expert busier."""
    return step(number, (100 - percent, 100 + percent))


def test_max_violation_of_layers_the_worst_and_their_mean() -> None:
    one = step(1, (10, 20, 30, 20), (20, 20, 20, 20), (0, 0, 80, 0))
    assert one.max_violations() == {3: 0.5, 4: 0.0, 5: 3.0}
    assert one.worst_max_violation() == 3.0
    assert one.mean_max_violation() == 3.5 / 3
    assert one.load_max_over_mean() == 4.0


def test_without_moe_layers_or_tokens_nothing_is_violated() -> None:
    for none in (step(1), step(1, (0, 0))):
        assert (none.worst_max_violation(), none.mean_max_violation(), none.load_max_over_mean()) == (0, 0, 1)


def test_tenths_are_means_over_their_steps_and_the_ends_those_of_the_last() -> None:
    steps = [violated(n, n) for n in range(1, 41)]
    (row,) = imbalance(steps)
    assert row.layer == 3
    assert row.first == pytest.approx((1 + 2 + 3 + 4) / 400)
    assert row.middle == pytest.approx((19 + 20 + 21 + 22) / 400)
    assert row.last == pytest.approx((37 + 38 + 39 + 40) / 400)
    assert (row.busiest, row.idlest) == (1, 0)
    assert (row.busiest_load, row.idlest_load) == pytest.approx((1.4, 0.6))


def test_tenths_are_of_steps_however_few_loads_were_kept() -> None:
    """Dense early, thin later, as ``keeps_load`` leaves them, and one step without loads."""
    thin = [*(violated(n, 50) for n in range(1, 100)), violated(500, 20), violated(990, 10), step(1000)]
    (row,) = imbalance(thin)
    assert (row.first, row.middle, row.last) == pytest.approx((0.5, 0.2, 0.1))
    (alone,) = imbalance([violated(7, 30)])
    assert (alone.first, alone.middle, alone.last) == pytest.approx((0.3, 0.3, 0.3))
    assert imbalance([step(1)]) == ()


def test_even_since_is_about_every_layer_and_the_whole_rest() -> None:
    assert (
        even_since([violated(1, 30), violated(2, 10), violated(3, 30), violated(4, 10), violated(5, 9)]) == 4
    )
    assert even_since([violated(1, 9), violated(2, 11)]) is None
    assert even_since([step(1, (100, 100), (50, 150))]) is None
    assert even_since([violated(1, 20), violated(2, 20)], limit=0.25) == 1
    assert even_since([]) is None


def test_the_section_has_a_row_per_layer(tmp_path: Path) -> None:
    steps = [step(1, (100, 100), (0, 200)), step(2, (90, 110), (120, 80)), step(3, (101, 99), (95, 105))]
    text = "\n".join(load_section(tmp_path, steps))
    assert re.findall(r"^\| (\d.*) \|$", text, re.MULTILINE) == [
        "3 | 0.000 | 0.100 | 0.010 | 0 (1.010) | 1 (0.990)",
        "4 | 1.000 | 0.200 | 0.050 | 1 (1.050) | 0 (0.950)",
    ]
    assert "from 0.50 in the first tenth of the run to 0.03 in the last, averaged over 2 MoE layers" in text
    assert "the worst layer of the last tenth is 4 with 0.05" in text
    assert "every layer is at 0.1 or below from step 3 to the end" in text
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["expert_load.png", "max_violation.png"]


def test_the_section_says_that_a_run_is_not_even_and_is_left_out_without_loads(tmp_path: Path) -> None:
    text = "\n".join(load_section(tmp_path, make_history(20).steps))
    assert "not every layer is at 0.1 or below at the end" in text
    assert len(re.findall(r"^\| \d", text, re.MULTILINE)) == 3
    assert load_section(tmp_path, [step(1)]) == []
