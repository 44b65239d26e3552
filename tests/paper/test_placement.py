"""Layers on stages: of even cost by default, by hand as text."""

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.config.parse import ConfigError
from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec.layers import layers_text, parse_layers
from deepseek_train.spec.partition import even_parts
from deepseek_train.spec.stages import StageSpec, most_stages, split_layers, stage_weights, stage_work
from deepseek_train.spec.weights import all_weights
from tests.paper.models import models, shipped


def sizes_of(stages: tuple[StageSpec, ...]) -> list[int]:
    return [len(s.layers) for s in stages]


@st.composite
def hand_written(draw: st.DrawFn, num_layers: int) -> list[int]:
    """Any legal sizes: inner stages have a layer."""
    first, last = draw(st.integers(0, num_layers)), draw(st.integers(0, num_layers))
    if first + last > num_layers:
        first, last = num_layers - last, last
    rest, inner = num_layers - first - last, []
    while rest:
        inner.append(draw(st.integers(1, rest)))
        rest -= inner[-1]
    return [first, *inner, last]


@settings(deadline=None)
@given(models(), st.data())
def test_stages_cover_all_layers_once_in_order(m: ModelConfig, data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        num_stages = data.draw(st.integers(1, most_stages(m)))
        stages = split_layers(m, num_stages, data.draw(st.integers(1, 99)))
    else:
        sizes = data.draw(hand_written(m.num_layers))
        num_stages = len(sizes)
        stages = split_layers(m, num_stages, layers=layers_text(sizes))
        assert sizes_of(stages) == sizes
    assert [s.index for s in stages] == list(range(num_stages))
    assert [i for s in stages for i in s.layers] == list(range(m.num_layers))
    assert all(s.layers for s in stages[1:-1])
    assert [s.first for s in stages] == [True] + [False] * (num_stages - 1)
    assert [s.last for s in stages] == [False] * (num_stages - 1) + [True]
    assert [s.mtp_depth for s in stages[:-1]] == [0] * (num_stages - 1)
    assert stages[-1].mtp_depth == m.mtp_depth


@settings(deadline=None)
@given(models(), st.data())
def test_stages_together_hold_the_table(m: ModelConfig, data: st.DataObject) -> None:
    """Each weight once, but the embedding twice where the last stage embeds tokens for MTP or is tied to it."""
    num_stages = data.draw(st.integers(1, most_stages(m)))
    stages = split_layers(m, num_stages)
    held = [w.name for s in stages for w in stage_weights(m, s)]
    twice = ["embed"] if (m.mtp_depth or m.tie_embeddings) and num_stages > 1 else []
    assert sorted(held) == sorted([w.name for w in all_weights(m)] + twice)
    assert all(stage_weights(m, s) for s in stages)


@settings(deadline=None)
@given(models(), st.integers(1, 512), st.data())
def test_the_dearest_stage_is_never_dearer_than_with_even_counts(
    m: ModelConfig, length: int, data: st.DataObject
) -> None:
    """Even counts of layers, an MTP module counted as one."""
    num_stages = data.draw(st.integers(1, m.num_layers))
    count = (
        max(1, (m.num_layers + m.mtp_depth) // num_stages - m.mtp_depth) if num_stages > 1 else m.num_layers
    )
    rest, others = m.num_layers - count, num_stages - 1
    even = [rest // others + (s < rest % others) for s in range(others)] + [count]

    def dearest(stages: tuple[StageSpec, ...]) -> int:
        return max(stage_work(m, s, length).total for s in stages)

    plain = split_layers(m, num_stages, length, layers_text(even))
    assert dearest(split_layers(m, num_stages, length)) <= dearest(plain)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=8),
    st.integers(1, 10),
    st.integers(0, 30),
    st.integers(0, 30),
    st.data(),
)
def test_parts_are_the_most_even_there_are(
    costs: list[int], num_parts: int, before: int, after: int, data: st.DataObject
) -> None:
    num_parts = min(num_parts, len(costs) + 2)
    found = even_parts(costs, num_parts, before, after)

    def worth(sizes: tuple[int, ...]) -> tuple[int, int]:
        starts = [sum(sizes[:i]) for i in range(num_parts)]
        parts = [sum(costs[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
        parts[0] += before
        parts[-1] += after
        return max(parts), sum(p * p for p in parts)

    def every() -> list[tuple[int, ...]]:
        all_bars = combinations(range(len(costs) + num_parts - 1), num_parts - 1)
        ends = [(-1, *bars, len(costs) + num_parts - 1) for bars in all_bars]
        cuts = [tuple(b - a - 1 for a, b in zip(e, e[1:], strict=False)) for e in ends]
        return [cut for cut in cuts if all(cut[1:-1])]

    assert sum(found) == len(costs)
    assert found in every()
    assert worth(found) == min(map(worth, every()))


def test_too_few_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 costs do not fill the 3 inner ones of 5 parts"):
        even_parts([1, 1], 5)
    with pytest.raises(ValueError, match="61 layers fill at most 63 stages, not 64"):
        split_layers(shipped("deepseek_v3"), 64)


def test_defaults_of_the_shipped_models() -> None:
    """The last stage gives its layers for head and MTP; where these outweigh a fair share, it keeps none."""
    v3, small, tiny = shipped("deepseek_v3"), shipped("deepseek_16b"), shipped("tiny")
    assert layers_text(sizes_of(split_layers(v3, 16))) == "4*15|1"
    assert layers_text(sizes_of(split_layers(v3, 8))) == "8*7|5"
    assert layers_text(sizes_of(split_layers(small, 4))) == "8*3|3"
    assert layers_text(sizes_of(split_layers(small, 8))) == "4*6|3|0"
    assert layers_text(sizes_of(split_layers(tiny, 2, 128))) == "3|0"
    assert layers_text(sizes_of(split_layers(tiny, 4, 128))) == "1*3|0"
    assert layers_text(sizes_of(split_layers(replace(v3, mtp_depth=0), 16))) == "4*14|3|2"
    assert layers_text(sizes_of(split_layers(replace(tiny, num_layers=2), 4))) == "0|1*2|0"


def test_what_hand_written_layers_may_look_like() -> None:
    for text in ("3|4*14|2", " 3 | 4 * 14 | 2 ", "3|4*7|4|4*6|2*1"):
        assert parse_layers(text, 61, 16, "") == (3, *[4] * 14, 2)
    assert parse_layers("0|3|0", 3, 3, "") == (0, 3, 0)
    assert parse_layers("7", 7, 1, "") == (7,)
    assert layers_text([3, *[4] * 14, 2]) == "3|4*14|2"


@settings(deadline=None)
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), hand_written(n))))
def test_layers_as_text_and_back(drawn: tuple[int, list[int]]) -> None:
    num_layers, sizes = drawn
    assert list(parse_layers(layers_text(sizes), num_layers, len(sizes), "")) == sizes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3|x|2", [["'x' (piece 2 of '3|x|2') is no number of layers", "Write 4 for"]]),
        ("", [["'' (piece 1 of '') is no number of layers"]]),
        ("31||30", [["'' (piece 2 of"]]),
        ("-1|62", [["'-1' (piece 1"]]),
        ("4*15.5|1", [["'4*15.5'"]]),
        ("4x15|a", [["'4x15'"], ["'a'"]]),
        ("4*0|61", [["'4*0' (piece 1 of '4*0|61') repeats a stage 0 times", "Leave it out"]]),
        ("4*14|5", [["describes 15 stages, the pipeline has 16", "Write 4*15|1 or the like, or null"]]),
        ("4*16", [["places 64 layers, the model has 61: 3 too many", "Write 4*15|1"]]),
        ("3*16", [["places 48 layers, the model has 61: 13 are missing"]]),
        ("4*999999999", [["describes 999999999 stages"], ["places 3999999996 layers"]]),
        ("5|0|4*14", [["leaves stage 1 (counted from 0) without a layer", "Only the first stage"]]),
        ("0*2|4*13|9", [["leaves stage 1 (counted"]]),
        ("7*8|5|0*7", [["leaves stage 9 (counted"]]),
    ],
)
def test_mistakes_in_hand_written_layers(text: str, said: list[list[str]]) -> None:
    with pytest.raises(ConfigError) as error:
        split_layers(shipped("deepseek_v3"), 16, layers=text)
    problems = error.value.problems
    assert [p.where for p in problems] == ["parallel.layers"] * len(said)
    for problem, words in zip(problems, said, strict=True):
        for word in words:
            assert word in str(problem)
