"""Rectangles as corners: a collection of thousands is drawn at once, single patches take seconds."""

Box = tuple[tuple[float, float], ...]


def box(x: float, width: float, bottom: float, height: float) -> Box:
    """The corners, around."""
    return ((x, bottom), (x + width, bottom), (x + width, bottom + height), (x, bottom + height))
