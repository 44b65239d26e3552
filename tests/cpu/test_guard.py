"""The guard's verdicts and memory, the windows it makes, the events it leaves."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_train.config.guard import GuardConfig
from deepseek_train.data.windows import Window, number_outside
from deepseek_train.monitor.events import Event, read_events, record_event
from deepseek_train.train.guard import GuardState

GUARD = GuardConfig(loss_factor=2.0, norm_factor=10.0, mean_steps=4)
WARM = GuardState(accepted=4, loss=3.0, grad_norm=0.5)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("state", [GuardState(), WARM])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(state: GuardState, bad: float) -> None:
    assert state.objection(GUARD, (3.0, 0.0, 0.0), 0.5) is None
    for place in range(3):
        losses = [3.0, 0.0, 0.0]
        losses[place] = bad
        assert state.objection(GUARD, tuple(losses), 0.5) == "the loss is not finite"
    assert state.objection(GUARD, (3.0, 0.0, 0.0), bad) == "a gradient is not finite"


@pytest.mark.parametrize(
    ("loss", "norm", "why"),
    [
        (6.0, 5.0, None),  # the factors themselves are no spikes
        (6.1, 0.5, "loss 6.1 is more than 2 times its running mean 3"),
        (3.0, 5.1, "gradient norm 5.1 is more than 10 times its running mean 0.5"),
    ],
)
def test_a_spike_is_refused_once_the_means_are_warm(loss: float, norm: float, why: str | None) -> None:
    assert WARM.objection(GUARD, (loss, 99.0, 99.0), norm) == why
    assert replace(WARM, accepted=3).objection(GUARD, (loss, 0.0), norm) is None
    assert WARM.objection(replace(GUARD, loss_factor=0.0, norm_factor=0.0), (loss, 0.0), norm) is None


def test_means_are_plain_at_first_and_then_forget() -> None:
    state = GuardState()
    for loss in (1.0, 2.0, 3.0, 6.0):
        state = state.after_accepted(GUARD, loss, 2 * loss)
    assert (state.loss, state.grad_norm, state.accepted) == (pytest.approx(3.0), pytest.approx(6.0), 4)
    assert state.after_accepted(GUARD, 7.0, 6.0).loss == pytest.approx(4.0)  # a quarter of the way


def test_skipped_steps_leave_the_means_alone_and_make_a_row() -> None:
    once = WARM.after_skipped(10, 160)
    twice = once.after_skipped(11, 176)
    assert twice == replace(WARM, skipped=2, in_a_row=2, row_after_step=10, row_start=160)
    again = twice.after_accepted(GUARD, 3.0, 0.5).after_skipped(13, 208)
    assert (again.skipped, again.in_a_row, again.row_after_step, again.row_start) == (3, 1, 13, 208)


@given(FINITE, FINITE, st.integers(0, 1 << 60))
def test_the_state_survives_json_bit_for_bit(loss: float, norm: float, count: int) -> None:
    state = GuardState(count, loss, norm, count, count, count, count)
    found = GuardState.from_dict(json.loads(json.dumps(state.as_dict())))
    assert found == state
    assert (found.loss.hex(), found.grad_norm.hex()) == (loss.hex(), norm.hex())  # -0.0 == 0.0


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=5), st.integers(0, 60))
def test_the_kth_sequence_outside_of_windows_is_found_by_counting(
    spans: list[tuple[int, int]], k: int
) -> None:
    windows = [Window(first, first + length) for first, length in spans]
    outside = [n for n in range(200) if not any(w.first <= n < w.end for w in windows)]
    assert number_outside(windows, k) == outside[k]


def test_an_empty_window_is_none() -> None:
    with pytest.raises(ValueError, match="first < end"):
        Window(4, 4)


def test_events_are_added_and_read_back(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    events = [Event(3, "skipped", "why", (32, 48)), Event(3, "stopped", 'a "reason"')]
    for event in events:
        record_event(tmp_path, event)
    assert read_events(tmp_path) == events
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["time"].endswith("+00:00")
