"""Rectangles as corners: thousands are drawn at once, single patches take seconds."""

from collections.abc import Sequence
from typing import Any

from matplotlib.patches import PathPatch
from matplotlib.path import Path

Box = tuple[tuple[float, float], ...]


def box(x: float, width: float, bottom: float, height: float) -> Box:
    """The corners, around."""
    return ((x, bottom), (x + width, bottom), (x + width, bottom + height), (x, bottom + height))


def together(boxes: Sequence[Box], **looks: Any) -> PathPatch:
    """One patch of ``boxes`` (at least one; they do not overlap), all with the same ``looks``: in an SVG one path with
    one style."""
    corners = [(*box, box[0]) for box in boxes]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
    vertices = [corner for box in corners for corner in box]
    return PathPatch(Path(vertices, codes), snap=True, **looks)
