"""`dfptkd report`: what a set of runs shows, as a table in the terminal and as one HTML file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .errors import DataError
from .groups import Group, Statistic, summarise
from .records import RunRecord, find_runs, read_run
from .report_page import write_html


def report(run_folders: Sequence[Path], out: Path | None = None) -> Path:
    """Prints the table of groups and writes the HTML report.

    Args:
        run_folders: run folders, or folders that hold run folders at any depth. A bad run among
            several that were found is named and left out.
        out: the HTML file; absent: `report.html` in the first folder.

    Returns:
        The HTML file.

    Raises:
        DataError: no folder given, no run in one, or no run that can be read.
        StorageError: the disk refused.
    """
    if not run_folders:
        raise DataError("report: no folder given: expected run folders")
    runs, unreadable = _read_all(run_folders)
    groups = summarise(runs)
    print_table(groups)
    for group in groups:
        if group.repeats:
            print(f"warning: {group.repeats}", file=sys.stderr)
    path = write_html(runs, out or run_folders[0] / "report.html", unreadable=unreadable)
    for problem in unreadable:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"report: {path}")
    return path


def print_table(groups: Sequence[Group], console: Console | None = None) -> None:
    """One row a group; without a terminal plain text, as wide as it needs to be."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=200, color_system=None)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("recipe")
    table.add_column("method", overflow="fold")
    for name in ("n", "last top-1 %", "best top-1 %", "prompt path %", "teacher %", "images/s",
                 "+params %", "+MACs %"):  # fmt: skip
        table.add_column(name, justify="right")
    for g in groups:
        table.add_row(
            g.recipe, g.label, _count(g), _text(g.last), _text(g.best), _text(g.prompt),
            _text(g.teacher), _text(g.images_per_second, 0), _percent(g, "params"),
            _percent(g, "macs"),
        )  # fmt: skip
    console.print(table, markup=False)


def _read_all(folders: Sequence[Path]) -> tuple[list[RunRecord], list[str]]:
    found = {path.resolve(): path for folder in folders for path in find_runs(folder)}
    runs, problems = [], []
    for path in found.values():  # one named twice is one run
        try:
            runs.append(read_run(path))
        except DataError as error:
            problems.append(error)
    if not runs:
        raise problems[0]
    return runs, [str(problem) for problem in problems]


def _count(group: Group) -> str:
    unfinished = len(group.runs) - group.n
    return f"{group.n} (+{unfinished} unfinished)" if unfinished else str(group.n)


def _text(statistic: Statistic | None, digits: int = 2) -> str:
    return "-" if statistic is None else statistic.text(digits)


def _percent(group: Group, key: str) -> str:
    return group.overhead(key) or "-"
