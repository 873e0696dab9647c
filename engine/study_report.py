"""`dfptkd report TABLE.csv...`: what studies have on record, as Markdown with figures."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from .errors import DataError
from .files import first_line, write_atomically
from .groups import Statistic
from .paired import PairedDifference
from .study_figures import study_figures
from .study_results import CellResults, Studies, StudyResults, difference, read_studies

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTHING = "No study is on record yet."
LEGEND = (
    "Test top-1 in percent over n seeds: the student's after the last epoch with its sample "
    "standard deviation, the mean of its best epochs (chosen on the test set), the prompt path's "
    "and the teacher's. *Above X*: the difference from X in points, seed by seed, with its 95 % t "
    "interval and the number of pairs. The seeds are the student's: its teacher is the same. "
    "Seconds: median of a run's training alone."
)
OPEN = "main"  # the study whose tables are not folded


def study_report(
    tables: Sequence[Path], studies: Studies, *, out: Path | None = None, readme: Path | None = None
) -> None:
    """Write the figures of studies, and their Markdown into a README or to the terminal.

    Args:
        tables: `<study>.csv` files, their archives beside them.
        studies: What each is made of.
        out: Folder of the figures; absent: each beside its table.
        readme: File whose block between `BEGIN` and `END` is replaced.

    Raises:
        DataError: Tables, archives and studies disagree, or a file has no such block.
        StorageError: The disk refused.
    """
    before = None if readme is None else read_readme(readme)
    found = read_studies(tables, studies)
    figures = {
        _name(results): {
            (out or results.folder) / file: svg for file, svg in study_figures(results).items()
        }
        for results in found
    }
    for path, svg in (item for drawn in figures.values() for item in drawn.items()):
        _write_text(path, svg)
    block = markdown(found, figures, Path() if readme is None else readme.parent)
    if readme is None or before is None:
        print(block)
        return
    after = with_block(before, block, readme)
    if after != before:
        _write_text(readme, after)
    print(f"report: {readme}")


def read_readme(path: Path) -> str:
    """A text file with its line ends as they are.

    Raises:
        DataError: It cannot be read, or has not one block to replace.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None
    with_block(text, "", path)
    return text


def with_block(text: str, block: str, path: Path) -> str:
    """`text` with `block` between its two markers.

    Raises:
        DataError: A marker of `path` is missing or doubled, or they are in the wrong order.
    """
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise DataError(f"{path}: {text.count(marker)} lines {marker}: expected one")
    before, _, rest = text.partition(BEGIN)
    if END not in rest:
        raise DataError(f"{path}: expected {BEGIN} before {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


# Markdown -----------------------------------------------------------------------------------------


def markdown(
    found: Sequence[StudyResults], figures: Mapping[str, Iterable[Path]], base: Path
) -> str:
    """A section a study and budget, without a line end at the end.

    Args:
        found: The studies.
        figures: Their files by "<study>-<budget>": accuracy, then curves.
        base: Folder that links start from.
    """
    if not found:
        return NOTHING
    sections = ["\n\n".join(_section(r, figures[_name(r)], base)) for r in found]
    return "\n\n".join([LEGEND, *sections])


def _section(results: StudyResults, figures: Iterable[Path], base: Path) -> Iterator[str]:
    study = results.study
    accuracy, *curves = [f"![{_alt(results, f)}]({_link(f, base)})" for f in figures]
    yield f"### {study.name}, {study.budget} budget"
    yield f"**{study.question}**"
    yield f"{_how_it_was_run(results)} {_record(results, base)}"
    yield accuracy
    detail = [*_tables(results), *curves]
    if study.name == OPEN:
        yield from detail
    else:
        what = "Table and curves" if curves else "Table"
        yield f"<details><summary>{what}</summary>"
        yield from detail
        yield "</details>"
    yield from sentences(results)
    yield study.scope


def _how_it_was_run(results: StudyResults) -> str:
    """One sentence, from the rows alone."""
    rows = results.rows
    devices = {f"{_plain(r.device)} ({_count(r.threads, 'thread')})" for r in rows}
    dates = sorted({row.date for row in rows})
    return (
        f"{_all(f'`{r.recipe}`' for r in rows)}; "
        f"{_count(len({row.seed for row in rows}), 'seed')}, "
        f"{_all(str(n) for n in sorted({row.epochs for row in rows}))} epochs on "
        f"{_all(f'{n:,}' for n in sorted({row.train_images for row in rows}))} training images; "
        f"{_all(sorted(devices))}, torch {_all(_plain(row.torch) for row in rows)}, "
        f"commit {_all(_plain(row.commit or 'not known') for row in rows)}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def _record(results: StudyResults, base: Path) -> str:
    """Where the rows are, and what is missing of them."""
    study, folder = results.study, results.folder
    table = _link(folder / f"{study.name}.csv", base)
    archive = _link(folder / "runs" / f"{study.name}-{study.budget}.zip", base)
    text = f"[Rows]({table}), [runs]({archive})."
    total = len(study.cells) * len(study.seeds)
    done = sum(seed in cell.by_seed for cell in results.cells for seed in study.seeds)
    if done < total:
        text += f" Not complete: {done} of {total} runs are on record."
    empty = [cell for cell in results.cells if not cell.rows]
    if empty:
        text += f" No run yet of {'; '.join(_name_in(results, c) for c in empty)}."
    return text


def _tables(results: StudyResults) -> Iterator[str]:
    """One table a group, under its heading where there are several."""
    groups = results.groups()
    for heading, cells in groups.items():
        if len(groups) > 1:
            yield f"`{heading}`:"
        yield _table(cells, results.comparisons(cells))


def _table(
    cells: Sequence[CellResults], comparisons: Sequence[tuple[CellResults, list[CellResults]]]
) -> str:
    header = ["method", "n", "last epoch", "best epoch", "prompt path", "teacher"]
    header += [f"above {_plain(other.label)}" for other, _ in comparisons] + ["seconds"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for cell in cells:
        rows = cell.rows
        lines.append(
            [
                _plain(cell.label),
                str(cell.n),
                "" if cell.last is None else cell.last.text(),
                _mean(row.best_top1 for row in rows),
                _mean(row.prompt_top1 for row in rows),
                _mean(row.teacher_top1 for row in rows),
                *(
                    _difference(difference(cell, other)) if cell in compared else ""
                    for other, compared in comparisons
                ),
                f"{statistics.median(row.seconds for row in rows):,.0f}" if rows else "",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(values: Iterable[float | None]) -> str:
    statistic = Statistic.of(values)
    return "" if statistic is None else f"{statistic.mean:.2f}"


def _difference(found: PairedDifference | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.mean:+.2f} (one pair)"
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f}; {found.n})"


# What the numbers say -----------------------------------------------------------------------------


def sentences(results: StudyResults) -> Iterator[str]:
    """What the comparisons of a study show, and what they leave open."""
    groups = results.groups()
    intervals = 0
    for heading, cells in groups.items():
        lines: list[str] = []
        earlier: list[CellResults] = []
        for other, compared in results.comparisons(cells):
            # An earlier one has been compared the other way round.
            pairs = [(c, difference(c, other)) for c in compared if c not in earlier]
            earlier.append(other)
            intervals += sum(found is not None and found.n > 1 for _, found in pairs)
            lines += _said_of(other, pairs)
        if lines and len(groups) > 1:
            lines.insert(0, f"`{heading}`:\n")
        if lines:
            yield "\n".join(lines)
    if intervals > 1:
        yield f"The {intervals} intervals are not corrected for multiple comparisons."


def _said_of(
    other: CellResults, pairs: Sequence[tuple[CellResults, PairedDifference | None]]
) -> Iterator[str]:
    """Lines of a list: which cells are above another, which below, of which nothing is shown."""
    name = _plain(other.label)
    said: dict[str, list[str]] = {
        f"Above {name} (points, 95 % interval)": [],
        f"Below {name} (points, 95 % interval)": [],
        f"No difference from {name} shown (points that the interval still allows)": [],
        f"Fewer than two pairs with {name}, so no interval": [],
    }
    above, below, open_, few = said.values()
    for cell, found in pairs:
        label = _plain(cell.label)
        if found is None or found.low is None or found.high is None:
            few.append(label)
        elif found.is_shown:
            low, high = sorted((abs(found.low), abs(found.high)))
            (above if found.mean > 0 else below).append(
                f"{label} by {abs(found.mean):.2f} ({low:.2f} to {high:.2f}, n = {found.n} pairs)"
            )
        else:
            largest = max(-found.low, found.high)
            open_.append(f"{label} (up to {largest:.2f}, n = {found.n} pairs)")
    yield from (f"- {what}: {'; '.join(cells)}." for what, cells in said.items() if cells)


# Small things -------------------------------------------------------------------------------------


def _name(results: StudyResults) -> str:
    return f"{results.study.name}-{results.study.budget}"


def _name_in(results: StudyResults, cell: CellResults) -> str:
    """A cell's label, with its group where labels alone would not tell."""
    label = _plain(cell.label)
    return f"{label} (`{cell.cell.heading}`)" if len(results.groups()) > 1 else label


def _alt(results: StudyResults, figure: Path) -> str:
    curve = figure.stem.removeprefix(_name(results)).lstrip("-")
    return f"{results.study.name}: {curve + ' over the epochs' if curve else 'accuracy by method'}"


def _link(path: Path, base: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), base.resolve())).as_posix())


def _all(texts: Iterable[str]) -> str:
    """Each different one, in the order given."""
    return ", ".join(dict.fromkeys(texts))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _plain(text: str) -> str:
    """Text out of a file that stays text in a table of a Markdown page."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
