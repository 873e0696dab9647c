"""`dfptkd study`: a declared set of runs, done as far as the machine allows, and put on record.

A study is a table of cells, each a recipe, a method and an arm, run with the same seeds. Its runs are
ordinary ones, in folders of their own, shared by studies that have a cell in common; whatever ends
it, the same command goes on. On record are `<study>.csv`, a row for each finished run, and
`runs/<study>-<budget>.zip` with run.json and metrics.csv of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Budget = Literal["full", "short", "cpu"]


@dataclass(frozen=True)
class Cell:
    """A line of a study's table: runs that differ in their seed alone."""

    label: str
    """As it stands in the table; unique among the cells of a recipe."""
    recipe: str
    method: str
    arm: str | None = None


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it."""

    name: str
    budget: Budget
    question: str
    """One sentence."""
    scope: str
    """One sentence: what the answer does not say."""
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    options: tuple[str, ...] = ()
    """Of the command line, for every run: ("--epochs", "40")."""
    against: tuple[str, ...] = ("KD",)
    """Labels of the cells that the others of the same recipe are compared with, seed by seed."""
    curves: tuple[str, ...] = ()
    """Columns of metrics.csv to draw over the epochs, a figure each."""


@dataclass(frozen=True)
class StudyRow:
    """A finished run: a line of `<study>.csv`, in this order of columns."""

    budget: str
    cell: str
    """Label of the cell."""
    recipe: str
    method: str
    arm: str | None
    seed: int
    epochs: int
    train_images: int
    last_top1: float
    """Student after the last epoch, in percent."""
    best_top1: float
    """Student at its best epoch, chosen on the test set."""
    prompt_top1: float | None
    teacher_top1: float | None
    seconds: float
    """Training alone, without evaluations."""
    device: str
    threads: int
    torch: str
    commit: str
    date: str
    run: str
    """Name of the run's folder in the archive."""
    command: str
    """What makes this run again (but for the paths of data and teacher)."""
