"""How all pictures look. Figures are objects of their own: pyplot and its global state are never touched."""

from io import StringIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from deepseek_train.monitor import numbers
from deepseek_train.monitor.pictures.svg import shrink

INK = "#2b2b33"
FAINT = "#d9dbe1"
DPI = 140


def new_figure(width: float, height: float) -> Figure:
    """Inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title on the left, two spines, small ink."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    axes.set_ylabel(y_label, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)


def count_ticks(axes: Axes) -> None:
    """1.00M instead of 1000000 along x."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.count(value)))


def save(figure: Figure, path: Path) -> Path:
    """SVG if ``path`` ends so, else PNG; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        with rc_context({"svg.hashsalt": "deepseek_train", "svg.fonttype": "none"}):
            written = StringIO()
            figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        path.write_text(shrink(written.getvalue()), encoding="utf-8")
    else:
        figure.savefig(path, format="png", metadata={"Software": None})
    return path
