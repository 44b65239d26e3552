"""The text form goes round and says where a text is wrong."""

import pytest
from hypothesis import given, settings

from deepseek_train.schedule.action import Action, Kind, Pair, Placement, Schedule
from deepseek_train.schedule.text import ScheduleSyntaxError, from_text, to_text
from tests.paper.schedules import schedules


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_text_gives_the_same_schedule_back(schedule: Schedule) -> None:
    assert from_text(to_text(schedule)) == schedule


def test_the_form_itself() -> None:
    forward, backward = Action(1, Kind.FORWARD, 1), Action(0, Kind.BACKWARD, 0)
    placement = Placement(2, 2, ((0, 1), (1, 0)))
    schedule = Schedule("mine", placement, ((Action(0, Kind.FORWARD, 0), Pair(forward, backward)), ()))
    text = "mine microbatches=2 stages=0/1,1/0\nrank 0: 0F0 1F1&0B0\nrank 1:\n"
    assert to_text(schedule) == text
    assert from_text("mine microbatches=2 stages=0/1,1/0\n\nrank 0: 0F0,1F1&0B0\n  rank 1: \n") == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: a header like .* got nothing"),
        ("1f1b stages=0\nrank 0: 0F0", "line 1: a header like"),
        ("1f1b microbatches=1 stages=0\n\nrang 0: 0F0", "line 3: a row like .* got 'rang 0: 0F0'"),
        ("1f1b microbatches=1 stages=0\nrank 1: 0F0", "line 2: rank 1 where rank 0 belongs"),
        ("1f1b microbatches=1 stages=0\nrank 0: 0X0", "line 2: '0X0' is no action"),
        ("1f1b microbatches=1 stages=0\nrank 0: 0F0&0B0&0W0", "joins more than two"),
        ("1f1b microbatches=1 stages=0/1,0\nrank 0: 0F0", "as many ranks as the others"),
    ],
)
def test_errors_say_where(text: str, message: str) -> None:
    with pytest.raises(ScheduleSyntaxError, match=message):
        from_text(text)


def test_a_name_of_two_words_is_refused() -> None:
    with pytest.raises(ValueError, match="one word"):
        to_text(Schedule("two words", Placement(1, 1, ((0,),)), ((),)))
