"""What can be said about pictures without eyes: their numbers, colours where they matter, bytes."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from deepseek_train.monitor.jsonl import History
from deepseek_train.monitor.pictures.lanes import draw_lanes, middle_chunks
from deepseek_train.monitor.pictures.load import draw_expert_load, draw_max_violation, load_history
from deepseek_train.monitor.pictures.loss import draw_loss, smooth
from deepseek_train.monitor.pictures.timeline import draw_timeline
from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.rows import pairs, reverse_microbatches
from deepseek_train.schedule.simulate import Durations, simulate
from deepseek_train.schedule.timeline import Span, Timeline
from tests.cpu.monitor_samples import EXPOSED_SHARE, STEP, make_history, make_timeline, with_phases


def share_of_colour(path: Path, colour: str) -> float:
    """Share of the picture's pixels that have ``colour`` (#rrggbb) within rounding."""
    pixels = imread(path)[..., :3]
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float((np.abs(pixels - wanted).max(-1) < 0.01).mean())


def test_the_same_facts_give_the_same_bytes(tmp_path: Path) -> None:
    load = load_history(make_history(40).steps)
    assert load is not None
    for draw in (
        lambda path: draw_loss(make_history(40), path),
        lambda path: draw_max_violation(load, path),
        lambda path: draw_expert_load(load, path),
        lambda path: draw_timeline(make_timeline(2, 4), path),
        lambda path: draw_lanes(with_phases(make_timeline(2, 4)), path),
    ):
        for suffix in ("png", "svg"):
            first, second = draw(tmp_path / f"a.{suffix}"), draw(tmp_path / f"b.{suffix}")
            assert first.read_bytes() == second.read_bytes()
        assert b"<svg" in first.read_bytes()[:500]


def test_an_svg_writes_every_style_once(tmp_path: Path) -> None:
    """DeepSeek's figure, 8 ranks and 20 micro-batches: small enough to keep in a repository, its words whole."""
    timeline = simulate(make_schedule("dualpipe", 8, 20), Durations(1.0, 1.0, 1.0, 3.0))
    text = draw_timeline(timeline, tmp_path / "figure.svg", "1.23456").read_text()
    assert len(text) < 100_000
    assert len(re.findall(r"<text ", text)) > 300
    assert "1.23456: " in text
    styles = re.findall(r'style="([^"]*)"', text)
    assert len(styles) == len(set(styles))
    classes = set(re.findall(r'class="(s\d+)"', text))
    assert classes == set(re.findall(r"^\.(s\d+){", text, re.MULTILINE))


def test_smoothing_keeps_a_straight_line_and_shrinks_noise() -> None:
    line = np.linspace(9, 3, 200)
    np.testing.assert_allclose(smooth(line)[:190], line[:190], rtol=1e-12)
    noise = np.random.default_rng(0).normal(0, 1, 2000)
    assert smooth(noise)[50:].std() < 0.3
    assert smooth(np.array([2.0])).tolist() == [2.0]


def test_loss_of_one_step_of_only_skipped_steps_and_of_validation_alone(tmp_path: Path) -> None:
    skipped = History(tuple(replace(STEP, step=i, tokens=i, loss=math.nan, skipped=True) for i in (1, 2)), ())
    for history in (make_history(1), skipped, History((), make_history(50).evaluations)):
        path = draw_loss(history, tmp_path / "loss.png")
        assert imread(path)[..., :3].min() < 0.5  # not an empty sheet
    with_marks = draw_loss(make_history(200), tmp_path / "with.png")
    assert share_of_colour(with_marks, "#c4122f") > 0  # step 180 was skipped
    without_marks = draw_loss(make_history(100), tmp_path / "without.png")
    assert share_of_colour(without_marks, "#c4122f") == 0


def test_load_is_relative_and_max_violation_follows_from_it() -> None:
    load = load_history([STEP])
    assert load is not None
    assert load.layers == (1, 2)
    np.testing.assert_allclose(load.load_LCE[0, 0], [0.5, 1.0, 1.5, 1.0])
    np.testing.assert_allclose(load.max_violation_LC, [[0.5], [0.0]])
    assert load.edges_C1.tolist() == [119.5, 120.5]


def test_many_steps_become_columns_that_average_all_of_them() -> None:
    steps = make_history(1000, layers=(1,), experts=4).steps
    load = load_history([*steps, replace(STEP, step=1001, expert_load={})])  # a step without kept load
    assert load is not None
    assert load.load_LCE.shape == (1, 240, 4)
    assert (np.diff(load.edges_C1) > 0).all()
    assert (load.edges_C1[0], load.edges_C1[-1]) == (0.5, 1000.5)
    first = steps[: int(load.edges_C1[1])]
    expected = np.mean([step.load_max_over_mean() - 1 for step in first])
    assert load.max_violation_LC[0, 0] == pytest.approx(expected)
    np.testing.assert_allclose(load.load_LCE.sum(-1), 4)
    assert load_history([replace(STEP, expert_load={})]) is None


@pytest.mark.parametrize(("layers", "experts", "steps"), [(1, 8, 1), (1, 8, 40), (2, 3, 5), (58, 64, 30)])
def test_load_pictures_for_one_to_58_layers(tmp_path: Path, layers: int, experts: int, steps: int) -> None:
    load = load_history(make_history(steps, tuple(range(3, 3 + layers)), experts).steps)
    assert load is not None
    height = imread(draw_max_violation(load, tmp_path / "violation.png")).shape[0]
    assert 300 < height < 1600
    assert imread(draw_expert_load(load, tmp_path / "load.png")).shape[0] < 1400


def test_balanced_experts_are_white_and_starved_ones_blue(tmp_path: Path) -> None:
    even = load_history([replace(STEP, expert_load={1: (20, 20, 20, 20)})])
    starved = load_history([replace(STEP, expert_load={1: (0, 40, 20, 20)})])
    assert even is not None
    assert starved is not None
    darkest = "#053061"  # of RdBu
    bar = share_of_colour(draw_expert_load(even, tmp_path / "even.png"), darkest)
    assert share_of_colour(draw_expert_load(starved, tmp_path / "starved.png"), darkest) > bar + 0.1


def test_a_perfect_layer_can_be_drawn_on_the_logarithmic_scale(tmp_path: Path) -> None:
    load = load_history([replace(STEP, expert_load={1: (20, 20), 2: (10, 30)})] * 3)
    assert load is not None
    path = draw_max_violation(load, tmp_path / "violation.png")
    assert share_of_colour(path, "#000004") > 0.02  # darkest of magma, half of the heatmap


def test_directions_are_told_apart_by_where_a_microbatch_starts() -> None:
    assert reverse_microbatches(make_timeline(4, 12)) == frozenset(range(6, 12))
    one_way = Timeline(2, (Span(0, Kind.FORWARD, 0, 0, 0, 1), Span(1, Kind.FORWARD, 1, 0, 1, 2)))
    assert reverse_microbatches(one_way) == frozenset()


def test_pairs_are_grouped() -> None:
    single = Span(0, Kind.FORWARD, 0, 0, 0, 1)
    forward = Span(0, Kind.FORWARD, 0, 1, 1, 3, paired=True)
    backward = Span(0, Kind.BACKWARD, 0, 0, 1, 3, paired=True)
    weights = Span(0, Kind.BACKWARD_WEIGHT, 0, 0, 3, 4)
    assert pairs([single, forward, backward, weights]) == [(single,), (forward, backward), (weights,)]
    assert pairs([single, forward]) == [(single,), (forward,)]


@pytest.mark.parametrize("side_by_side", [False, True])
def test_timeline_shows_every_kind_idle_time_and_pairs(tmp_path: Path, side_by_side: bool) -> None:
    timeline = make_timeline(4, 12, side_by_side)
    path = draw_timeline(timeline, tmp_path / "pairs.png")
    for colour in ("#fdd09a", "#ea8a2c", "#b9dfa6", "#4f9d45", "#23907f", "#3a73c4", "#e9eaee"):
        assert share_of_colour(path, colour) > 0.004, colour
    apart = Timeline(timeline.num_ranks, tuple(replace(span, paired=False) for span in timeline.spans))
    ink = "#2b2b33"
    framed, unframed = (
        share_of_colour(path, ink),
        share_of_colour(draw_timeline(apart, tmp_path / "x.png"), ink),
    )
    assert framed > unframed + 0.003


def test_timeline_that_starts_late_is_drawn_from_zero(tmp_path: Path) -> None:
    timeline = make_timeline(2, 4)
    late = Timeline(2, tuple(replace(s, start=s.start + 1024, end=s.end + 1024) for s in timeline.spans))
    early_blue = share_of_colour(draw_timeline(timeline, tmp_path / "early.png"), "#3a73c4")
    late_blue = share_of_colour(draw_timeline(late, tmp_path / "late.png"), "#3a73c4")
    assert late_blue == pytest.approx(early_blue, rel=0.02)


def test_lanes_show_the_middle_pair_and_what_nothing_hid(tmp_path: Path) -> None:
    timeline = with_phases(make_timeline(4, 12))
    halves = middle_chunks(timeline, 2)
    assert [half.kind for half in halves] == [Kind.FORWARD, Kind.BACKWARD]
    begin, end = halves[0].start, max(half.end for half in halves)
    exposed = timeline.exposed_communication(2, begin, end)
    assert exposed / (end - begin) == pytest.approx(EXPOSED_SHARE)
    path = draw_lanes(timeline, tmp_path / "lanes.png", rank=2)
    for colour in ("#ea8a2c", "#fdd09a", "#23907f", "#a6e0d6", "#3a73c4", "#c4122f"):
        assert share_of_colour(path, colour) > 0.0005, colour
    # the same without the exposed message: only the red of the legend is left
    hidden = replace(timeline, phases=tuple(p for p in timeline.phases if p.name != "dispatch"))
    red = share_of_colour(draw_lanes(hidden, tmp_path / "hidden.png", rank=2), "#c4122f")
    assert share_of_colour(path, "#c4122f") > red + 0.0005


def test_lanes_of_a_row_without_pairs_show_the_chunk_in_its_middle() -> None:
    chunks = tuple(Span(0, Kind.FORWARD, 0, m, float(m), m + 1.0) for m in range(3))
    assert middle_chunks(Timeline(2, chunks), 0) == (chunks[1],)
    assert middle_chunks(Timeline(2, chunks), 1) == ()
