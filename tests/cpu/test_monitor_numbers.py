import math

import pytest

from deepseek_train.monitor import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (12_345, "12.3k"),
        (999_900, "1.00M"),
        (1_234_567, "1.23M"),
        (671e9, "671B"),
        (14.8e12, "14.8T"),
        (0.5, "0.50"),
        (-2_000, "-2.00k"),
        (math.nan, "-"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert numbers.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.61, "610ms"),
        (8.21, "8.2s"),
        (59.97, "1m00s"),
        (185, "3m05s"),
        (3599.9, "1h00m"),
        (7_440, "2h04m"),
        (5 * 86_400 + 3 * 3_600, "5d03h"),
        (math.nan, "-"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(512, "512 B"), (1_610_612_736, "1.50 GiB"), (1023 * 2**20, "1.00 GiB"), (3e13, "27.3 TiB")],
)
def test_data_size(size: float, text: str) -> None:
    assert numbers.data_size(size) == text
