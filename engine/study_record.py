"""The record of a study: a row a run, and beside it what the run itself has written.

    <results>/<study>.csv                   a StudyRow a line, all budgets
    <results>/runs/<study>-<budget>.zip     <run>/run.json and <run>/metrics.csv of each

A row holds nothing that the archived files do not say (`row_of`), and these no path of a machine.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .config import Configure, DataConfig, RunConfig, Study
from .errors import DataError
from .files import first_line, write_atomically
from .identity import STUDENT_FILE, DataRecord, data_identity, extensions_of
from .resume import differences
from .teacher import run_folder

# The folders of an absolute path, but not its last part.
_FOLDERS = re.compile(r"(?<![\w.:/])/(?=[^/\s])(?:[^/\s]+/)*")


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
    """Prompt path after the last epoch."""
    teacher_top1: float | None
    seconds: float
    """Training alone, without evaluations."""
    device: str
    """GPU, or the CPU's model."""
    threads: int
    """Of the CPU, in the run's process."""
    torch: str
    commit: str | None
    date: str
    run: str
    """Name of the run's folder in the archive."""
    command: str
    """What makes this run again, but for the folders of data and runs."""


@dataclass(frozen=True)
class ArchivedRun:
    """What is kept of a run."""

    run: str
    """run.json, without paths."""
    metrics: str
    """metrics.csv"""
    date: tuple[int, int, int, int, int, int]
    """When it ended, UTC."""

    def series(self, column: str) -> list[tuple[float, float]]:
        """(epochs completed, value) of a column of metrics.csv; empty where it does not apply."""
        rows = csv.DictReader(io.StringIO(self.metrics))
        return [(float(row["epoch"]), float(row[column])) for row in rows if row.get(column)]

    @property
    def teacher(self) -> tuple[str, str] | None:
        """Name and hash of its weights.

        Raises:
            DataError: They are not there.
        """
        try:
            teacher = json.loads(self.run)["teacher"]
            return None if teacher is None else (str(teacher["name"]), str(teacher["sha256"]))
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(f"an archived run.json is damaged: {first_line(error)}") from None

    @property
    def data(self) -> DataRecord:
        """The data that it had, as far as it says.

        Raises:
            DataError: It is damaged.
        """
        try:
            return DataRecord.from_record(json.loads(self.run).get("data"))
        except (AttributeError, ValueError) as error:
            raise DataError(f"an archived run.json is damaged: {first_line(error)}") from None

    def check(self, config: RunConfig, where: str) -> None:
        """Refuse what is kept of a run of other options, on other data, or longer than planned.

        Raises:
            DataError: It names them, and `where`.
        """
        try:
            run = json.loads(self.run)
            different = differences(run["config"], config, exact=("max_steps",))
            extended = extensions_of(run)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"{where}: run.json is damaged: {first_line(error)}") from None
        if extended is not None:
            different.append(extended)
        here = opened(config.data)
        if here is not None and not different:
            different = self.data.differences(here)
        if different:
            raise DataError(f"{where}: holds another run ({'; '.join(different)})")

    def row(self, budget: str, cell: str, command: str, name: str) -> StudyRow:
        """Its line.

        Args:
            budget: The study's.
            cell: Label of the cell.
            command: What makes it again.
            name: Of its folder.

        Raises:
            DataError: What is kept lacks something.
        """
        try:
            return self._row(budget, cell, command, name)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{name}: run.json or metrics.csv in the archive is damaged: {first_line(error)}"
            ) from None

    def _row(self, budget: str, cell: str, command: str, name: str) -> StudyRow:
        run = json.loads(self.run)
        config, hardware = run["config"], run["hardware"]
        student = [value for _, value in self.series("test/student_top1")]
        prompt = self.series("test/prompt_top1")
        return StudyRow(
            budget=budget,
            cell=cell,
            recipe=config["recipe"],
            method=config["method"],
            arm=config["arm"],
            seed=config["seed"],
            epochs=config["epochs"],
            train_images=run["data"]["train_images"],
            last_top1=student[-1],
            best_top1=max(student),
            prompt_top1=prompt[-1][1] if prompt else None,
            teacher_top1=(run["teacher"] or {}).get("top1"),
            seconds=self.series("seconds")[-1][1],
            device=hardware["cpu"] if hardware["device"] == "cpu" else hardware["device"],
            threads=hardware["threads"],
            torch=run["versions"]["torch"],
            commit=run["commit"],
            date="{:04}-{:02}-{:02}".format(*self.date),
            run=name,
            command=command,
        )


@functools.cache
def _opened(config: DataConfig, folder: str) -> DataRecord | None:
    return data_identity(dataclasses.replace(config, root=folder))


def opened(config: DataConfig) -> DataRecord | None:
    """`data_identity` of data in a folder, opened once for many runs; None: no folder is named, so
    that opening them might fetch them."""
    folder = config.root or os.environ.get("DFPTKD_DATA")
    return _opened(config, folder) if folder else None


def put_on_record(study: Study, configure: Configure, results: Path) -> int:
    """Add what is finished of a study to its record; returns how many of its seeds' runs are on it.

    A run that is on record stays, whatever has become of its folder; done again, it is replaced.

    Args:
        study: The study.
        configure: Configuration of a cell, with its folders.
        results: Folder of the record.

    Raises:
        DataError: A run's folder, or the record, is damaged.
        StorageError: The disk refused; the record is as it was before.
    """
    table = results / f"{study.name}.csv"
    archive = archive_of(study, results)
    before = on_record(study, configure, results)
    others = [r for r in read_rows(table) if r.budget != study.budget] if table.is_file() else []
    kept: dict[str, ArchivedRun] = {}
    rows: list[StudyRow] = []
    order = {(cell.recipe, cell.label, cell.arm): i for i, cell in enumerate(study.cells)}
    for cell in study.cells:
        config = study.config(cell, configure)
        of_cell = by_seed(before, config)
        for seed in study.seeds:
            archived = archived_run(dataclasses.replace(config, seed=seed))
            if archived is not None:
                of_cell[seed] = archived
        for seed, run in of_cell.items():
            name = run_folder(dataclasses.replace(config, seed=seed)).name
            rows.append(run.row(study.budget, cell.label, study.command(cell, seed), name))
            kept[name] = run
    rows.sort(key=lambda row: (order[row.recipe, row.cell, row.arm], row.seed))
    if not kept and not others:
        return 0
    if kept != (read_archive(archive) if archive.is_file() else {}):
        write_atomically(archive, lambda path: _write_archive(path, kept))
    if [*others, *rows] != (read_rows(table) if table.is_file() else []):
        write_atomically(table, lambda path: _write_rows(path, [*others, *rows]))
    return sum(row.seed in study.seeds for row in rows)


def archive_of(study: Study, results: Path) -> Path:
    """Where the runs of a study are kept."""
    return results / "runs" / f"{study.name}-{study.budget}.zip"


def on_record(study: Study, configure: Configure, results: Path) -> dict[str, ArchivedRun]:
    """What is kept of a study's runs, by the names of their folders.

    A run that is kept of another study under this budget is this one's too.

    Raises:
        DataError: An archive is damaged, or holds a run of other options than the study's, or the
            study's own one a run of no cell.
    """
    own = archive_of(study, results)
    kept: dict[str, ArchivedRun] = {}
    origin: dict[str, Path] = {}
    for archive in (*sorted(own.parent.glob(f"*-{study.budget}.zip")), own):
        runs = read_archive(archive) if archive.is_file() else {}
        kept |= runs
        origin |= dict.fromkeys(runs, archive)
    found: dict[str, ArchivedRun] = {}
    for cell in study.cells:
        config = study.config(cell, configure)
        for seed, run in by_seed(kept, config).items():
            of_seed = dataclasses.replace(config, seed=seed)
            name = run_folder(of_seed).name
            run.check(of_seed, f"{origin[name]}: {name}")
            found[name] = run
    lost = sorted(name for name in kept.keys() - found.keys() if origin[name] == own)
    if lost:
        raise DataError(f"{own}: {lost[0]}: a run of no cell of the study: expected to be removed")
    return found


def by_seed(kept: Mapping[str, ArchivedRun], config: RunConfig) -> dict[int, ArchivedRun]:
    """Those runs whose folders have the name that a run of `config` with some seed has."""
    prefix = run_folder(dataclasses.replace(config, seed=0)).name.removesuffix("0")
    seeds = {name.removeprefix(prefix): name for name in kept if name.startswith(prefix)}
    return {int(seed): kept[name] for seed, name in seeds.items() if seed.isdecimal()}


def archived_run(config: RunConfig) -> ArchivedRun | None:
    """What is to be kept of a run, or None if it is not finished.

    Raises:
        DataError: The folder is damaged, or holds a run of other options.
    """
    folder = run_folder(config)
    done = folder / STUDENT_FILE
    if not done.is_file():
        return None
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        metrics = (folder / "metrics.csv").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read: {first_line(error)}") from None
    time = int(done.stat().st_mtime) // 2 * 2  # as exact as the archive has it
    ended = datetime.fromtimestamp(time, timezone.utc).timetuple()[:6]
    kept = ArchivedRun(json.dumps(_without_paths(run), indent=1) + "\n", metrics, ended)
    kept.check(config, str(folder))
    return kept


def _without_paths(value: Any) -> Any:
    """JSON data that says nothing of where it was made: of absolute paths the last part is left."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def read_archive(path: Path) -> dict[str, ArchivedRun]:
    """The runs in an archive, by the names of their folders.

    Raises:
        DataError: It is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix("/run.json") for name in archive.namelist()]
            return {
                name: ArchivedRun(
                    archive.read(f"{name}/run.json").decode(),
                    archive.read(f"{name}/metrics.csv").decode(),
                    archive.getinfo(f"{name}/run.json").date_time,
                )
                for name in names
                if not name.endswith("/metrics.csv")
            }
    except Exception as error:  # a byte that is wrong can make zipfile raise anything
        raise DataError(f"{path}: damaged archive: {first_line(error)}") from None


def _write_archive(path: Path, runs: dict[str, ArchivedRun]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, run in sorted(runs.items()):
            for file, text in (("run.json", run.run), ("metrics.csv", run.metrics)):
                member = zipfile.ZipInfo(f"{name}/{file}", run.date)
                archive.writestr(member, text, zipfile.ZIP_LZMA)


def _write_rows(path: Path, rows: Sequence[StudyRow]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f.name for f in dataclasses.fields(StudyRow))
        writer.writerows(dataclasses.astuple(row) for row in rows)


def read_rows(path: Path) -> list[StudyRow]:
    """The rows of a study.

    Raises:
        DataError: It is not such a file; line and column are named.
    """
    return list(_rows(path))


def _rows(path: Path) -> Iterator[StudyRow]:
    fields = dataclasses.fields(StudyRow)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None
    lines = csv.reader(io.StringIO(text))
    header = next(lines, [])
    names = [f.name for f in fields]
    if header != names:
        raise DataError(f"{path}: line 1: expected the columns {','.join(names)}")
    for cells in lines:
        where = f"{path}: line {lines.line_num}"
        if len(cells) != len(fields):
            raise DataError(f"{where}: expected {len(fields)} cells, got {len(cells)}")
        values: dict[str, Any] = {}
        for field, cell in zip(fields, cells, strict=True):
            kind = str(field.type)
            try:
                empty = cell == "" and "None" in kind
                values[field.name] = None if empty else _KINDS[kind.split(" ")[0]](cell)
            except ValueError:
                raise DataError(
                    f"{where}: {field.name}={cell!r}: expected a {kind.split(' ')[0]}"
                ) from None
        yield StudyRow(**values)


_KINDS: dict[str, type] = {"str": str, "int": int, "float": float}
