"""How numbers are written for people: console, pictures and report all use these."""

import math

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(value: float) -> str:
    """Three significant digits with a decimal suffix: 999, 12.3k, 1.23M, 671B, 14.8T."""
    if not math.isfinite(value):
        return "-"
    for size, suffix in _SUFFIXES:
        if abs(value) >= size * 0.9995:  # 999.9k rounds to 1.00M, not to 1000k
            return _three_digits(value / size) + suffix
    return _three_digits(value) if value != int(value) else str(int(value))


def data_size(num_bytes: float) -> str:
    """Binary multiples: 512 B, 1.5 GiB."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:  # not 1024: "1010 MiB" would be four digits wide
            return f"{_three_digits(value)} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1024
    return f"{_three_digits(value)} TiB"


def duration(seconds: float) -> str:
    """The two largest units: 8.2s, 3m05s, 2h04m, 5d03h; "-" when unknown."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.3g}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours < 1:
        return f"{minutes}m{whole % 60:02d}s"
    if days < 1:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{days}d{hours % 24:02d}h"


def percent(share: float) -> str:
    """12.3%."""
    return f"{100 * share:.1f}%"


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.2f}" if magnitude < 9.995 else f"{value:.1f}" if magnitude < 99.95 else f"{value:.0f}"
