"""The report's figures as inline SVG that follows the page's light or dark theme.

Each colour stands for a role (student, prompt path, teacher, ...) in all figures. matplotlib draws
with placeholder colours, which the SVG text then replaces by the page's CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .groups import Group
from .records import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder -> CSS variable. Placeholders are colours that nothing else in a figure has.
THEME = {
    "#010101": "--ink", "#020202": "--muted", "#030303": "--rule",
    "#040401": "--c1", "#040402": "--c2", "#040403": "--c3", "#040404": "--c4", "#040405": "--c5",
    "#040406": "--c6", "#040407": "--c7",
}  # fmt: skip
INK, MUTED, RULE, BLUE, ORANGE, GREY, GREEN, RED, PURPLE, TEAL = THEME
STUDENT, PROMPT, TEACHER = BLUE, ORANGE, GREY
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, GREY)

WIDTH = 11.0  # inches of a full-width figure; the page scales it
PANEL_HEIGHT = 2.9
COLUMNS = 3


@dataclass(frozen=True)
class Curve:
    """One line of a panel: a column of metrics.csv."""

    column: str
    label: str
    color: str
    style: str = "-"


ACCURACY = (
    Curve("test/teacher_top1", "teacher (original path)", TEACHER, "--"),
    Curve("test/prompt_top1", "prompt path", PROMPT),
    Curve("test/student_top1", "student", STUDENT),
    Curve("test/ema_top1", "student, moving average", TEAL),
)
LOSSES = (
    Curve("loss/total", "weighted total", GREY),
    Curve("loss/student_ce", "student: labels", BLUE),
    Curve("loss/student_teacher", "student: teacher", BLUE, "--"),
    Curve("loss/student_prompt", "student: prompt path", BLUE, ":"),
    Curve("loss/prompt_ce", "prompt path: labels", ORANGE),
    Curve("loss/prompt_teacher", "prompt path: teacher", ORANGE, "--"),
    Curve("loss/prompt_student", "prompt path: student", ORANGE, ":"),
    Curve("loss/student_teacher_target", "student: teacher, target class", PURPLE, "--"),
    Curve("loss/student_teacher_nontarget", "student: teacher, other classes", TEAL, "--"),
    Curve("loss/student_prompt_target", "student: prompt path, target class", PURPLE, ":"),
    Curve("loss/student_prompt_nontarget", "student: prompt path, other classes", TEAL, ":"),
    Curve("loss/rkd_distance", "student: distances (RKD)", GREEN, "--"),
    Curve("loss/rkd_angle", "student: angles (RKD)", GREEN, ":"),
    Curve("loss/crd", "student: contrast (CRD)", RED),
    Curve("loss/ce", "labels", BLUE),
    Curve("loss/kl", "teacher", BLUE, "--"),
    Curve("loss/target", "teacher, target class", BLUE, "--"),
    Curve("loss/nontarget", "teacher, other classes", BLUE, ":"),
    Curve("loss/inter", "teacher, between classes", BLUE, "--"),
    Curve("loss/intra", "teacher, within a class", BLUE, ":"),
)
DIVERGENCES = (
    Curve("kl/teacher_prompt", "teacher ∥ prompt path", ORANGE),
    Curve("kl/prompt_student", "prompt path ∥ student", GREEN),
    Curve("kl/teacher_student", "teacher ∥ student", BLUE),
)
DIVERGENCE_PARTS = (
    Curve("kl/prompt_student_target", "prompt path ∥ student, target", GREEN),
    Curve("kl/prompt_student_nontarget", "prompt path ∥ student, other classes", GREEN, ":"),
    Curve("kl/teacher_student_target", "teacher ∥ student, target", BLUE),
    Curve("kl/teacher_student_nontarget", "teacher ∥ student, other classes", BLUE, ":"),
)
PROBABILITIES = (
    Curve("prob/teacher_target", "teacher", TEACHER, "--"),
    Curve("prob/prompt_target", "prompt path", PROMPT),
)


@dataclass(frozen=True)
class Picture:
    """A figure with its caption."""

    title: str
    caption: str
    svg: str


def recipe_figures(groups: Sequence[Group]) -> list[Picture]:
    """The figures of one recipe; those for which nothing was recorded are left out."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        drawn = [_final_accuracy(groups), *_curve_figures(groups)]
    return [picture for picture in drawn if picture is not None]


def _final_accuracy(groups: Sequence[Group]) -> Picture | None:
    rows = [(g, s) for g in groups if (s := g.last) is not None]
    if not rows:
        return None
    figure = new_figure(0.62 * len(rows) + 0.7)
    axes = figure.add_subplot()
    with_teacher = [y for y, (group, _) in enumerate(rows) if group.teacher is not None]
    for y, (group, last) in enumerate(rows):
        values = [v for run in group.finished if (v := run.last("student_top1")) is not None]
        if group.teacher is not None:
            axes.plot(
                [group.teacher.mean] * 2, [y - 0.36, y + 0.36], color=TEACHER, lw=2,
                label="teacher" if y == with_teacher[0] else None,
            )  # fmt: skip
        axes.errorbar(
            last.mean, y, xerr=last.std, fmt="o", ms=8, color=STUDENT, elinewidth=2, capsize=5,
            label="student, mean ± std" if y == 0 else None,
        )  # fmt: skip
        axes.scatter(
            values, [y + 0.24] * len(values), s=16, facecolors="none", edgecolors=STUDENT,
            label="student, each run" if y == 0 else None,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{wrap(g.label, 34)}\nn = {g.n}" for g, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test top-1 accuracy after the last epoch (%)")
    axes.margins(x=0.08)
    order = ("student, mean ± std", "student, each run", "teacher")
    legend_above(figure, [axes], order)
    caption = "Finished runs. The bar is one sample standard deviation to either side."
    return Picture("Student accuracy", caption, _svg(figure, "final"))


def _curve_figures(groups: Sequence[Group]) -> Iterable[Picture | None]:
    band = "Mean over the runs of a group; the band spans their lowest and highest value."
    yield _panels(
        "Easy to hard", f"Test accuracy of the student and of its two supervisors. {band}",
        groups, lambda _: ACCURACY, "test top-1 accuracy (%)", log=False,
    )  # fmt: skip
    yield _panels(
        "Loss terms",
        f"Training means per epoch (learner: supervisor); only the total is weighted. {band}",
        groups, lambda _: LOSSES, "loss (nats)", log=False,
    )  # fmt: skip
    yield _panels(
        "Distance between the paths", f"Means of KL(a ∥ b). {band}",
        groups, lambda _: DIVERGENCES, "KL (nats)",
    )  # fmt: skip
    yield _panels(
        "Target class and other classes",
        f"The two parts of each divergence; they sum to the whole. {band}",
        groups, lambda _: DIVERGENCE_PARTS, "KL (nats)",
    )  # fmt: skip
    yield _panels(
        "Confidence of the supervisors",
        f"Mean probability that each path gives to the true class. {band}",
        groups, lambda _: PROBABILITIES, "mean target probability", log=False,
    )  # fmt: skip
    yield _panels(
        "Strength of the prompt", f"Norm of the prompt over the norm of its input. {band}",
        groups, _stage_curves, "‖P(x)‖ / ‖x‖", log=False,
    )  # fmt: skip


def _stage_curves(group: Group) -> tuple[Curve, ...]:
    columns = {c for run in group.shown for row in run.metrics for c in row}
    stages = sorted((c for c in columns if c.startswith("prompt_norm/")), key=_natural)
    return tuple(
        Curve(c, c.rpartition("/")[2].replace("stage", "stage "), PALETTE[i % len(PALETTE)])
        for i, c in enumerate(stages)
    )


def _panels(
    title: str,
    caption: str,
    groups: Sequence[Group],
    curves_of: Callable[[Group], Sequence[Curve]],
    ylabel: str,
    *,
    log: bool = True,
) -> Picture | None:
    """One panel a group, with shared axes; groups without data are left out.

    `log` asks for a logarithmic axis, which is given to values that span more than a decade.
    """
    from matplotlib.ticker import MaxNLocator

    shown = []
    for group in groups:
        curves = [(c, band) for c in curves_of(group) if (band := _band(group.shown, c.column))]
        if any(c.column != "test/teacher_top1" for c, _ in curves):
            shown.append((group, curves))
    if not shown:
        return None
    lows = [low for _, curves in shown for _, band in curves for _, _, low, _ in band]
    highs = [high for _, curves in shown for _, band in curves for *_, high in band]
    log = log and min(lows) > 0 and max(highs) > 10 * min(lows)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(PANEL_HEIGHT * rows, WIDTH * max(columns, 2) / COLUMNS)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= len(shown):
            axes.remove()
            continue
        group, curves = shown[i]
        for curve, band in curves:
            _draw(axes, curve, band)
        axes.set_title(wrap(group.label, 40), loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if log:
            _log_axis(axes)
        if i + columns >= len(shown):  # the lowest panel of its column
            axes.set_xlabel("epoch")
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel(ylabel)
    order = list(dict.fromkeys(curve.label for group in groups for curve in curves_of(group)))
    legend_above(figure, [a for a in grid.flat if a.figure is not None], order)
    return Picture(title, caption, _svg(figure, title))


def _band(runs: Sequence[RunRecord], column: str) -> list[tuple[float, float, float, float]]:
    """(epoch, mean, lowest, highest) over the runs that recorded the epoch."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for epoch, value in run.series(column):
            values.setdefault(epoch, []).append(value)
    return [(e, sum(v) / len(v), min(v), max(v)) for e, v in sorted(values.items())]


def _draw(axes: Axes, curve: Curve, band: list[tuple[float, float, float, float]]) -> None:
    epochs, mean, low, high = zip(*band, strict=True)
    few: dict[str, Any] = (
        {"marker": "o", "ms": 3.5} if len(epochs) <= 12 and curve.style == "-" else {}
    )
    axes.plot(epochs, mean, curve.style, color=curve.color, lw=1.7, label=curve.label, **few)
    if low != high:
        axes.fill_between(epochs, low, high, color=curve.color, alpha=0.18, lw=0)


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure with no global state (pyplot keeps figures and picks a display)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend_above(figure: Figure, panels: Sequence[Axes], order: Sequence[str]) -> None:
    """One legend for all panels, each label once, in the order given; the figure grows by it."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    labels = [label for label in order if label in entries]
    entry_inches = 0.7 + 0.08 * max(map(len, labels))
    columns = max(1, min(len(labels), int(figure.get_figwidth() / entry_inches)))
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.22 * -(-len(labels) // columns))
    figure.legend(
        [entries[label] for label in labels], labels, loc="outside upper left", frameon=False,
        ncols=columns,
    )  # fmt: skip


STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: in the page's font, to be searched and copied
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.parse_math": False,  # a label comes out of files
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.axisbelow": True,
}


def svg_text(figure: Figure, name: str, *, transparent: bool = True) -> str:
    """A figure as an SVG element, the same text on every call.

    Args:
        figure: The figure, in the placeholders' colours.
        name: Keeps its ids apart from those of other figures on a page.
        transparent: Without a background.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # 1/100 pt is plenty


def _svg(figure: Figure, name: str) -> str:
    """A figure in the page's font and colours."""
    svg = svg_text(figure, name)
    share = f"max-width: {100 * figure.get_figwidth() / WIDTH:.1f}%"
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="{share}"', svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)  # the page's
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for placeholder, variable in THEME.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg


def wrap(text: str, width: int) -> str:
    """Text in lines of `width` characters."""
    import textwrap

    return textwrap.fill(text, width, break_long_words=False)


def _natural(text: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", text)
    return int(digits or 0), text
