"""The HTML report: one file that needs no network, for light and dark screens and for paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .files import write_atomically
from .groups import (
    METHOD_NAMES,
    MIN_RUNS,
    Comparison,
    Group,
    Statistic,
    compare_methods,
    options_read,
    summarise,
)
from .identity import DataRecord
from .records import RunRecord, failure_signatures
from .report_figures import recipe_figures
from .report_style import CSS, PAGE

NOT_KNOWN = "not known to us from the paper"


def write_html(runs: Sequence[RunRecord], path: Path, *, unreadable: Sequence[str] = ()) -> Path:
    """Writes the report of some runs; all text out of files is escaped.

    Args:
        runs: at least one.
        path: the HTML file, replaced as a whole.
        unreadable: a line for each run that had to be left out.

    Raises:
        StorageError: the disk refused.
    """
    page = _page(runs, summarise(runs), unreadable)
    return write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _page(runs: Sequence[RunRecord], groups: Sequence[Group], unreadable: Sequence[str]) -> str:
    recipes = list(dict.fromkeys(group.recipe for group in groups))
    body = [
        _header(runs, groups, recipes),
        _warnings(runs, groups, unreadable),
        _section("Results", _results(groups)),
        _section("Claims of the paper, in these runs", _comparisons(compare_methods(groups))),
    ]
    for recipe in recipes:
        own = [group for group in groups if group.recipe == recipe]
        body.append(_section(recipe, _figures(own)))
    body += [
        _section("Runs", _run_table(runs)),
        _section("Configuration", _configuration(groups)),
        _section("Hardware and versions", _machines(runs)),
    ]
    return PAGE.format(title=escape(", ".join(recipes)), css=CSS, body="\n".join(body))


def _header(runs: Sequence[RunRecord], groups: Sequence[Group], recipes: Sequence[str]) -> str:
    finished = sum(run.finished for run in runs)
    methods = [METHOD_NAMES.get(m, m) for m in dict.fromkeys(group.method for group in groups)]
    students = sorted({str(run.run["config"].get("student", "?")) for run in runs})
    teachers = sorted({(run.run.get("teacher") or {}).get("name", "") for run in runs} - {""})
    data = sorted({str(DataRecord.from_record(run.run.get("data"))) for run in runs})
    facts = [
        ("methods", ", ".join(methods)),
        ("students", ", ".join(students)),
        ("teachers", ", ".join(teachers) or "none"),
        ("data", "; ".join(data)),
        ("runs", f"{len(runs)}, of which {finished} finished"),
    ]
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    title = "<br>".join(escape(recipe) for recipe in recipes)
    return (
        f'<header><p class="kicker">Distillation report</p><h1>{title}</h1>'
        f"<dl>{items}</dl></header>"
    )


def _warnings(runs: Sequence[RunRecord], groups: Sequence[Group], unreadable: Sequence[str]) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for signature in failure_signatures(run):
            found.setdefault(signature, []).append(run.folder.name)
    items = [
        f"<li><strong>{escape(kind)}</strong>: {escape(message)} {_where(names)}</li>"
        for (kind, message), names in found.items()
    ]
    items += [
        f"<li><strong>one seed again</strong>: {escape(group.repeats)}</li>"
        for group in groups
        if group.repeats
    ]
    items += [f"<li><strong>left out</strong>: {escape(problem)}</li>" for problem in unreadable]
    if not items:
        return (
            '<aside class="fine"><h2>No warnings</h2><p>No early saturation of the prompt path, no '
            "overhead above 10 %, no prompt block without fusion, no teacher below expectation; no "
            "step skipped, no image in quarantine, no checkpoint lost.</p></aside>"
        )
    return f'<aside class="warn"><h2>Warnings</h2><ul>{"".join(items)}</ul></aside>'


def _where(names: Sequence[str]) -> str:
    text = names[0] if len(names) == 1 else f"{len(names)} runs"
    return f'<span class="muted" title="{escape(", ".join(names))}">({escape(text)})</span>'


def _results(groups: Sequence[Group]) -> str:
    head = [
        "method", "n", "last top-1 %", "best top-1 %", "prompt path %", "teacher %", "images / s",
        "time", "added params %", "added MACs %",
    ]  # fmt: skip
    rows = [
        (g.recipe, [
            f"<strong>{escape(g.label)}</strong>", _count(g),
            f"<strong>{_stat(g.last)}</strong>", _stat(g.best), _stat(g.prompt), _stat(g.teacher),
            _stat(g.images_per_second, 0), _duration(g.seconds.mean if g.seconds else None),
            g.overhead("params") or "–", g.overhead("macs") or "–",
        ])
        for g in groups
    ]  # fmt: skip
    note = (
        "Test accuracy of the student, mean ± sample standard deviation over n finished runs. "
        "The last epoch is the headline; the best epoch is chosen on the test set "
        f"and so flatters. Fewer than {MIN_RUNS} runs do not carry a mean ± std."
    )
    return _table(head, _by_recipe(rows, len(head)), text_columns=1) + f'<p class="note">{note}</p>'


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "<p>None can be checked: there is no DFPT-KD run.</p>"
    words = {True: "holds", False: "does not hold", None: "open"}
    rows = [
        (c.better.recipe, [
            escape(c.claim), escape(c.better.label),
            escape(c.other.label) if c.other else "–",
            f'<span class="{words[c.holds].split()[0]}">{words[c.holds]}</span>', escape(c.detail),
        ])
        for c in comparisons
    ]  # fmt: skip
    head = ["claim", "of", "against", "in the means", "difference"]
    note = (
        "Difference of the mean last-epoch accuracies ± its standard error. It speaks of these "
        "runs alone and ranks nothing beyond them."
    )
    return _table(head, _by_recipe(rows, len(head)), text_columns=5) + f'<p class="note">{note}</p>'


def _figures(groups: Sequence[Group]) -> str:
    return "".join(
        f"<figure><h3>{escape(p.title)}</h3>{p.svg}<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in recipe_figures(groups)
    )


def _run_table(runs: Sequence[RunRecord]) -> str:
    head = ["run", "state", "epoch", "last top-1 %", "best top-1 %", "prompt path %", "teacher %",
            "images / s", "time", "commit"]  # fmt: skip
    rows = []
    for run in sorted(runs, key=lambda r: (r.recipe, r.folder)):
        status, epochs = run.status, run.run["config"]["epochs"]
        rows.append([
            escape(run.folder.name), escape(str(status.get("state", "?"))),
            f"{_number(status.get('epoch'), 0)} / {epochs}", _number(run.last("student_top1")),
            _number(run.best_student_top1), _number(run.last("prompt_top1")),
            _number(run.teacher_top1), _number(status.get("images_per_second"), 0),
            _duration(status.get("seconds")), escape(str(run.run.get("commit") or "–")[:10]),
        ])  # fmt: skip
    return _table(head, rows, text_columns=2)


def _configuration(groups: Sequence[Group]) -> str:
    """What differs first, then one full configuration for each group."""
    parts = []
    for group in groups:
        open_values = {
            name for run in group.runs for name in run.run.get("not_known_from_paper") or []
        }
        rows = [
            [
                f"<code>{escape(name)}</code>",
                f"<code>{escape(str(value))}</code>",
                f'<span class="flag">{NOT_KNOWN}</span>' if name in open_values else "",
                "differs between groups" if name in group.options else "",
            ]
            for name, value in options_read(group.runs[0]).items()
        ]
        seeds = ", ".join(str(run.seed) for run in group.runs)
        count = f"{len(open_values)} values {NOT_KNOWN}" if open_values else ""
        summary = f"<strong>{escape(group.recipe)}: {escape(group.label)}</strong>"
        parts.append(
            f'<details><summary>{summary} <span class="muted">seeds {seeds}</span> '
            f'<span class="flag">{count}</span></summary>'
            + _table(["option", "value", "", ""], rows, text_columns=4)
            + "</details>"
        )
    note = (
        f"Options marked “{NOT_KNOWN}” hold our reading of the method, not a value that it states. "
        "A group is told apart by the options that its label names."
    )
    return f'<p class="note">{note}</p>' + "".join(parts)


def _machines(runs: Sequence[RunRecord]) -> str:
    kinds: dict[tuple[str, ...], int] = {}
    for run in runs:
        hardware, versions = run.run.get("hardware") or {}, run.run.get("versions") or {}
        keys = ("device", "cpu", "cores", "threads")
        kind = (
            *(str(hardware.get(key, "?")) for key in keys),
            ", ".join(f"{name} {version}" for name, version in versions.items()),
        )
        kinds[kind] = kinds.get(kind, 0) + 1
    rows = [[*map(escape, kind), str(count)] for kind, count in kinds.items()]
    head = ["device", "CPU", "cores", "threads", "versions", "runs"]
    return _table(head, rows, text_columns=5)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _by_recipe(
    rows: Iterable[tuple[str, Sequence[str]]], columns: int
) -> Iterator[str | Sequence[str]]:
    """Rows sorted by recipe, with a line that names the recipe before the first of each."""
    previous = None
    for recipe, cells in rows:
        if recipe != previous:
            head = f'<th colspan="{columns}" scope="rowgroup">{escape(recipe)}</th>'
            yield f'<tr class="recipe">{head}</tr>'
            previous = recipe
        yield cells


def _table(head: Sequence[str], rows: Iterable[str | Sequence[str]], *, text_columns: int) -> str:
    """A table of ready HTML cells, text columns to the left and numbers to the right.

    A row that is a string is a whole row already.
    """

    def row(values: Sequence[str], tag: str) -> str:
        cells = (
            f"<{tag}{'' if i < text_columns else ' class=num'}>{value}</{tag}>"
            for i, value in enumerate(values)
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(r if isinstance(r, str) else row(r, "td") for r in rows)
    return (
        f"<div class=scroll><table><thead>{row([escape(h) for h in head], 'th')}</thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _count(group: Group) -> str:
    unfinished = len(group.runs) - group.n
    return str(group.n) + (
        f'<br><span class="muted">+{unfinished} unfinished</span>' if unfinished else ""
    )


def _stat(statistic: Statistic | None, digits: int = 2) -> str:
    return "–" if statistic is None else statistic.text(digits)


def _number(value: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "–"


def _duration(seconds: float | None) -> str:
    if not isinstance(seconds, (int, float)):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
