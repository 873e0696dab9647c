"""The record of studies, read back: no row counts that its archived run does not say."""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .config import Budget, Cell, Study
from .errors import DataError, UsageError
from .files import first_line
from .groups import Statistic
from .identity import DataRecord
from .paired import PairedDifference
from .study_record import ArchivedRun, StudyRow, read_archive, read_rows

Studies = Mapping[str, Callable[[Budget], Study]]
"""By name, in the order in which they are shown."""
Series = list[tuple[float, float]]


@dataclass(frozen=True)
class CellResults:
    """The finished runs of a cell."""

    cell: Cell
    rows: list[StudyRow]
    """By seed; none yet: empty."""
    curves: dict[str, list[Series]]
    """(epoch, value) of each run that has it, by column of metrics.csv."""

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def label(self) -> str:
        return self.cell.label

    @property
    def last(self) -> Statistic | None:
        """Student after the last epoch, in percent."""
        return Statistic.of(row.last_top1 for row in self.rows)

    @property
    def by_seed(self) -> dict[int, float]:
        """The same of each seed."""
        return {row.seed: row.last_top1 for row in self.rows}


@dataclass(frozen=True)
class StudyResults:
    """What is on record of a study under one budget."""

    study: Study
    folder: Path
    """Of the table."""
    cells: list[CellResults]
    """All of the study's, in its order."""

    @property
    def rows(self) -> list[StudyRow]:
        return [row for cell in self.cells for row in cell.rows]

    def groups(self) -> dict[str, list[CellResults]]:
        """The cells, in their order, by the heading of their table."""
        groups: dict[str, list[CellResults]] = {}
        for results in self.cells:
            groups.setdefault(results.cell.heading, []).append(results)
        return groups

    def comparisons(self, cells: list[CellResults]) -> list[tuple[CellResults, list[CellResults]]]:
        """Each cell of a group that others are compared with, and these, in the study's order."""
        by_label = {results.label: results for results in cells}
        against = [by_label[label] for label in self.study.against if label in by_label]
        return [(other, [r for r in cells if r is not other]) for other in against]


def difference(cell: CellResults, other: CellResults) -> PairedDifference | None:
    """Points of top-1 that a cell is above another, seed by seed; None without a common seed."""
    return PairedDifference.of(cell.by_seed, other.by_seed)


def read_studies(tables: Sequence[Path], studies: Studies) -> list[StudyResults]:
    """What tables have on record, in the order of `studies`, the longest budget first.

    Args:
        tables: `<study>.csv` files, their archives in `runs/` beside them.
        studies: What each is made of.

    Raises:
        DataError: A table or archive is damaged, or they say different things, or not what the
            study says.
        UsageError: Two tables of one study.
    """
    by_name: dict[str, Path] = {}
    for table in {path.resolve(): path for path in tables}.values():  # one named twice is one
        if by_name.setdefault(table.stem, table) is not table:
            raise UsageError(f"{by_name[table.stem]} and {table}: expected one table a study")
    for name, table in by_name.items():
        if not table.is_file():
            raise DataError(f"{table}: no such file")
        if name not in studies:
            raise DataError(f"{table}: no study of that name: expected one of {' '.join(studies)}")
    return [
        results
        for name, make in studies.items()
        if name in by_name
        for results in _read_table(by_name[name], make)
    ]


def _read_table(table: Path, make: Callable[[Budget], Study]) -> list[StudyResults]:
    rows = read_rows(table)
    budgets = typing.get_args(Budget)
    for row in rows:
        if row.budget not in budgets:
            raise DataError(f"{table}: {row.run}: unknown budget {row.budget!r}")
    _refuse_doubled(table, rows)
    found = []
    for budget in budgets:
        own = [row for row in rows if row.budget == budget]
        archive = table.parent / "runs" / f"{table.stem}-{budget}.zip"
        runs = read_archive(archive) if archive.is_file() else {}
        without_row = sorted(runs.keys() - {row.run for row in own})
        if without_row:
            raise DataError(f"{archive}: {without_row[0]}: an archived run without a row")
        if own:
            found.append(_results(make(budget), table, archive, own, runs))
    return found


def _refuse_doubled(table: Path, rows: Sequence[StudyRow]) -> None:
    runs = Counter(f"{row.budget}: {row.run}" for row in rows)
    seeds = Counter(
        f"{row.budget}: {row.recipe}: {row.cell!r}, arm {row.arm}, seed {row.seed}" for row in rows
    )
    for what, count in (runs | seeds).items():
        if count > 1:
            raise DataError(f"{table}: {what}: {count} rows, expected one")


def _results(
    study: Study,
    table: Path,
    archive: Path,
    rows: Sequence[StudyRow],
    runs: Mapping[str, ArchivedRun],
) -> StudyResults:
    cells = [CellResults(cell, [], {c: [] for c in study.curves}) for cell in study.cells]
    of = {(r.cell.recipe, r.label, r.cell.arm): r for r in cells}
    for row in sorted(rows, key=lambda row: row.seed):
        where = f"{table}: {row.run}"
        results = of.get((row.recipe, row.cell, row.arm))
        if results is None:
            raise DataError(
                f"{where}: {study.name} has no cell {row.cell!r} of {row.recipe}, arm {row.arm}"
            )
        if row.run not in runs:
            raise DataError(f"{where}: not among the archived runs in {archive}")
        _check_row(row, results.cell, study, runs[row.run], where)
        results.rows.append(row)
        for column, series in results.curves.items():
            try:
                values = runs[row.run].series(column)
            except (KeyError, ValueError) as error:
                raise DataError(f"{archive}: {row.run}: {column}: {first_line(error)}") from None
            if values:
                series.append(values)
    weights = dict(run.teacher for run in runs.values() if run.teacher)
    for name, run in runs.items():
        if run.teacher and weights[run.teacher[0]] != run.teacher[1]:
            raise DataError(
                f"{archive}: {name}: another {run.teacher[0]} as teacher than other runs have: "
                "expected one, as their differences would be the teachers'"
            )
    first: dict[str | None, DataRecord] = {}
    for name, run in runs.items():
        before = first.setdefault(run.data.name, run.data)
        if before.train_sha256 is None:
            first[run.data.name] = run.data
        other = before.differences(run.data, ("class_names", "train_sha256", "test_sha256"))
        if other:
            raise DataError(
                f"{archive}: {name}: on other data than other runs have ({'; '.join(other)}): "
                "expected the same, as their differences would be those of the data"
            )
    for results in cells:
        if len({(row.epochs, row.train_images) for row in results.rows}) > 1:
            raise DataError(
                f"{table}: {results.label}: runs of different length or on different data: "
                "expected ones that differ in their seed alone"
            )
    return StudyResults(study, table.parent, cells)


def _check_row(row: StudyRow, cell: Cell, study: Study, run: ArchivedRun, where: str) -> None:
    """Refuse a row that is not what its run, and the study, give."""
    archived = run.row(study.budget, cell.label, study.command(cell, row.seed), row.run)
    declared = {"method": cell.method, "arm": cell.arm, "epochs": study.epochs or row.epochs}
    for source, values in (
        ("its archived run", asdict(archived)), ("the study", declared)
    ):  # fmt: skip
        for column, value in values.items():
            said = getattr(row, column)
            if said != value:
                raise DataError(f"{where}: {column}: {said!r} in the table, {value!r} by {source}")
