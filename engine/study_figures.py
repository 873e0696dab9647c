"""The figures of a study as SVG files, on a light ground whatever page they are shown on."""

from __future__ import annotations

import re
import statistics
from typing import TYPE_CHECKING

from .paired import half_width
from .report_figures import (
    BLUE,
    GREEN,
    GREY,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    STUDENT,
    STYLE,
    TEAL,
    THEME,
    legend_above,
    new_figure,
    svg_text,
    wrap,
)
from .report_style import CSS
from .study_results import CellResults, Series, StudyResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.5  # inches: as wide as a README is shown
CELL_HEIGHT = 0.36
PANEL_HEIGHT, SMALL_PANEL_HEIGHT = 4.2, 3.0
MARGIN = 0.12  # inches: another font may need more width than ours
COLORS = (GREY, ORANGE, GREEN, PURPLE, TEAL, BLUE, RED)
LINE_STYLES = ("-", "--", ":", "-.")  # one for each time round the colours
LIGHT = dict(re.findall(r"(--\w+): (#\w+);", CSS.partition("@media")[0]))
AXIS_NAMES = {
    "test/student_top1": "student, test top-1 (%)",
    "test/prompt_top1": "prompt path, test top-1 (%)",
    "kl/prompt_student": "KL(prompt path ∥ student) (nats)",
}


def study_figures(results: StudyResults) -> dict[str, str]:
    """SVG by file name: the accuracy of each cell, then the study's curves that have values."""
    import matplotlib as mpl

    name = f"{results.study.name}-{results.study.budget}"
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever settings of their own somebody has
        mpl.rcParams.update({**STYLE, "font.size": 9.5})
        drawn = {f"{name}.svg": accuracy_figure(results)}
        for column in results.study.curves:
            if any(cell.curves[column] for cell in results.cells):
                file = f"{name}-{column.replace('/', '-')}.svg"
                drawn[file] = curve_figure(results, column)
        return {file: _file(figure, file) for file, figure in drawn.items()}


def accuracy_figure(results: StudyResults) -> Figure:
    """Each seed's student accuracy, with mean and interval of each cell; a panel a group."""
    groups = results.groups()
    rows = [len(cells) for cells in groups.values()]
    figure = _new_figure(CELL_HEIGHT * sum(rows) + 0.75 * len(rows))
    panels = list(figure.subplots(len(rows), squeeze=False, height_ratios=rows).flat)
    for axes, (heading, cells) in zip(panels, groups.items(), strict=True):
        _draw_reference(axes, results, cells)
        for y, cell in enumerate(cells):
            _draw_cell(axes, y, cell)
        axes.set_yticks(range(len(cells)), [f"{c.label}  (n = {c.n})" for c in cells])
        axes.set_ylim(len(cells) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.06)
        if len(rows) > 1:
            axes.set_title(heading, loc="left", fontsize=9.5, fontweight="bold")
    panels[-1].set_xlabel("student, test top-1 after the last epoch (%)")
    references = [f"mean of {label}" for label in results.study.against]
    legend_above(figure, panels, ("each seed", "mean, 95 % interval", *references))
    return figure


def _draw_reference(axes: Axes, results: StudyResults, cells: list[CellResults]) -> None:
    """A line at the mean of the first cell that all others are compared with."""
    for other, _ in results.comparisons(cells)[:1]:
        if other.last is not None:
            axes.axvline(other.last.mean, color=GREY, lw=1, ls="--", label=f"mean of {other.label}")


def _draw_cell(axes: Axes, y: int, cell: CellResults) -> None:
    values = [row.last_top1 for row in cell.rows]
    if not values:
        return
    axes.scatter(
        values, [y + 0.2] * len(values), s=12, facecolors="none", edgecolors=MUTED, linewidths=0.8,
        label="each seed",
    )  # fmt: skip
    half = half_width(values) if len(values) > 1 else None
    axes.errorbar(
        statistics.fmean(values), y - 0.1, xerr=half, fmt="o", ms=6, color=STUDENT, elinewidth=1.8,
        capsize=4, label="mean, 95 % interval",
    )  # fmt: skip


def curve_figure(results: StudyResults, column: str) -> Figure:
    """A column of metrics.csv over the epochs: a line a cell, a panel a group."""
    from matplotlib.ticker import MaxNLocator

    groups = {h: shown for h, cells in results.groups().items()
              if (shown := [c for c in cells if c.curves[column]])}  # fmt: skip
    labels = list(dict.fromkeys(cell.label for cell in results.cells))
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = _new_figure((PANEL_HEIGHT if columns == 1 else SMALL_PANEL_HEIGHT) * rows)
    grid = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axes in grid[len(groups) :]:
        axes.remove()
    panels = grid[: len(groups)]
    for i, (axes, (heading, cells)) in enumerate(zip(panels, groups.items(), strict=True)):
        for cell in cells:
            turn, color = divmod(labels.index(cell.label), len(COLORS))
            _draw_curve(axes, cell, cell.curves[column], COLORS[color], LINE_STYLES[turn % 4])
        axes.set_ylim(bottom=_bottom(cells, column))
        axes.xaxis.set_major_locator(MaxNLocator(8 // columns, integer=True))
        if i + columns >= len(groups):  # the lowest panel of its column
            axes.set_xlabel("epoch")
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel(AXIS_NAMES.get(column, column))
        if len(groups) > 1:
            axes.set_title(wrap(heading, 44), loc="left", fontsize=9.5, fontweight="bold")
    legend_above(figure, panels, labels)
    return figure


def _bottom(cells: list[CellResults], column: str) -> float | None:
    """Where an axis of accuracies starts: their steep rise would leave little room for the rest."""
    if "top1" not in column:
        return None
    runs = [run for cell in cells for run in cell.curves[column]]
    late = max(epoch for run in runs for epoch, _ in run) / 3
    return min(value for run in runs for epoch, value in run if epoch >= late) - 1


def _draw_curve(axes: Axes, cell: CellResults, runs: list[Series], color: str, style: str) -> None:
    """Mean over the seeds, with a band of one standard deviation to either side."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for epoch, value in run:
            values.setdefault(epoch, []).append(value)
    epochs = sorted(values)
    means = [statistics.fmean(values[e]) for e in epochs]
    axes.plot(epochs, means, style, color=color, lw=1.6, label=cell.label)
    if all(len(v) > 1 for v in values.values()):
        spread = [statistics.stdev(values[e]) for e in epochs]
        low = [m - s for m, s in zip(means, spread, strict=True)]
        high = [m + s for m, s in zip(means, spread, strict=True)]
        axes.fill_between(epochs, low, high, color=color, alpha=0.1, lw=0)


def _new_figure(height: float) -> Figure:
    figure = new_figure(height, WIDTH)
    figure.set_layout_engine("constrained", w_pad=MARGIN)
    return figure


def _file(figure: Figure, name: str) -> str:
    """The text of an SVG file; its first line says what has drawn it."""
    import matplotlib as mpl

    svg = svg_text(figure, name, transparent=False)
    for placeholder, variable in THEME.items():
        svg = svg.replace(placeholder, LIGHT[variable])
    svg = svg.replace(
        "font-family: 'DejaVu Sans'", "font-family: 'DejaVu Sans', Verdana, sans-serif"
    )
    return f"<!-- matplotlib {mpl.__version__} -->\n{svg}"
