"""Runs that differ in nothing but their seed, as one group with a mean and a spread.

Within a recipe, a group is told apart by its method and by the options in which runs of the recipe
differ. An option counts only where it has an effect (options.py).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .config import to_dict
from .data.crops import crops_of_record
from .identity import DATA_FACTS, SHORT, DataRecord, extensions_of
from .options import counts
from .records import RunRecord

METHOD_ORDER = ("ce", "kd", "dkd", "dist", "dfpt", "dfpt_plus")
METHOD_NAMES = {
    "ce": "labels only",
    "kd": "KD",
    "dkd": "DKD",
    "dist": "DIST",
    "dfpt": "DFPT-KD",
    "dfpt_plus": "DFPT-KD+",
}
MIN_RUNS = 3  # fewer independent runs do not carry a mean ± std

# What a run's data are, as it found them: they stand in the place of what was asked for.
_FACTS = frozenset(f"data.{name}" for name in DATA_FACTS)


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation of n values."""

    mean: float
    std: float | None
    """None for a single value."""
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Statistic | None:
        """None where no value is known."""
        known = [v for v in values if v is not None]
        if not known:
            return None
        std = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), std, len(known))

    def text(self, digits: int = 2) -> str:
        spread = "" if not self.std else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, method and set of options; numbers come from the finished ones."""

    recipe: str
    method: str
    options: dict[str, Any]
    """The options in which the runs of the recipe differ, with this group's values."""
    runs: list[RunRecord]

    @property
    def label(self) -> str:
        """The method with its differing options: "DFPT-KD, prompt.r1=8"."""
        parts = [METHOD_NAMES.get(self.method, self.method)]
        parts += [f"{name}={_short(value)}" for name, value in self.options.items()]
        return ", ".join(parts)

    @cached_property
    def finished(self) -> list[RunRecord]:
        return [run for run in self.runs if run.finished]

    @property
    def shown(self) -> list[RunRecord]:
        """The runs to draw: the finished ones, or what there is."""
        return self.finished or self.runs

    @cached_property
    def by_seed(self) -> dict[int, list[RunRecord]]:
        """The finished runs of each seed. A copy of a run, or the run once more, is no further
        observation: several of a seed are one, with their mean."""
        found: dict[int, list[RunRecord]] = defaultdict(list)
        for run in self.finished:
            found[run.seed].append(run)
        return dict(found)

    @property
    def n(self) -> int:
        """Seeds that have finished."""
        return len(self.by_seed)

    @property
    def last(self) -> Statistic | None:
        """Student accuracy after the last epoch, in percent: the headline number."""
        return self._over_seeds(lambda run: run.last("student_top1"))

    @property
    def best(self) -> Statistic | None:
        """Highest student accuracy of any epoch, in percent (chosen on the test set)."""
        return self._over_seeds(lambda run: run.best_student_top1)

    @property
    def prompt(self) -> Statistic | None:
        return self._over_seeds(lambda run: run.last("prompt_top1"))

    @property
    def teacher(self) -> Statistic | None:
        return Statistic.of(run.teacher_top1 for run in self.shown)

    @property
    def images_per_second(self) -> Statistic | None:
        return Statistic.of(run.status.get("images_per_second") for run in self.finished)

    @property
    def seconds(self) -> Statistic | None:
        return Statistic.of(run.status.get("seconds") for run in self.finished)

    def _over_seeds(self, value: Callable[[RunRecord], float | None]) -> Statistic | None:
        of_seeds = (Statistic.of(map(value, runs)) for runs in self.by_seed.values())
        return Statistic.of(None if found is None else found.mean for found in of_seeds)

    def cost(self, key: str) -> float | None:
        """An entry of run.json's "cost", the same for every run of a group."""
        return (self.runs[0].run.get("cost") or {}).get(key)

    def overhead(self, key: str) -> str | None:
        """The prompt path's share of the teacher's `key` (params, macs) in percent, as text; the
        new head's share, which no option changes, also apart where the record has it."""
        whole, head = self.cost(f"{key}_overhead_percent"), self.cost(f"new_head_{key}")
        if whole is None:
            return None
        base = self.cost(f"teacher_{key}")
        return f"{whole:.1f}" + (f" (head {100 * head / base:.1f})" if head and base else "")


@dataclass(frozen=True)
class Comparison:
    """Whether one of the paper's two claims about the methods holds in these runs (M30)."""

    claim: str
    better: Group
    other: Group | None
    """None: no group to compare with."""
    holds: bool | None
    detail: str


def summarise(runs: Iterable[RunRecord]) -> list[Group]:
    """Groups runs by recipe, method and differing options, in a stable order."""
    by_recipe: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        by_recipe[run.recipe].append(run)
    return [group for name in sorted(by_recipe) for group in _groups_of(name, by_recipe[name])]


def compare_methods(groups: Sequence[Group]) -> list[Comparison]:
    """States for each recipe whether DFPT-KD > KD and DFPT-KD+ >= DFPT-KD.

    Groups are compared where every option that both methods read is the same.
    """
    comparisons = []
    for name, other_name, claim in (
        ("dfpt", "kd", "DFPT-KD above KD"),
        ("dfpt_plus", "dfpt", "DFPT-KD+ not below DFPT-KD"),
    ):
        for group in (g for g in groups if g.method == name):
            others = [g for g in groups if g.method == other_name and _comparable(group, g)]
            if not others:
                detail = f"not compared: no {METHOD_NAMES[other_name]} run with the same options"
                comparisons.append(Comparison(claim, group, None, None, detail))
            comparisons += [_compare(claim, group, other) for other in others]
    return sorted(comparisons, key=lambda c: c.better.recipe)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as {"loss.tau": 4.0, ...}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def reads(run: RunRecord, option: str) -> bool:
    """Whether a run's result depends on an option."""
    return counts("teacher.name" if option == "teacher.sha256" else option, run.config)


def options_read(run: RunRecord) -> dict[str, Any]:
    """The flat options that a run's result depends on; the teacher by its checksum, the data by
    what they are, and how the run was made longer than planned."""
    values = flatten(run.run["config"])
    if run.config is not None:
        values |= flatten(to_dict(run.config))
    data = run.run.get("data") or {}
    rule = (data.get("preprocessing") or {}).get("crops")
    values["data.crops"] = rule or crops_of_record(run.run["config"].get("data") or {})
    options = {k: v for k, v in values.items() if reads(run, k)}
    # The file name of the teacher's weights says little, their checksum everything.
    sha256 = (run.run.get("teacher") or {}).get("sha256")
    if sha256 and reads(run, "teacher.sha256"):
        options["teacher.sha256"] = sha256[:SHORT]
    begun = (run.run.get("student") or {}).get("initial_sha256")
    if begun:
        options["student.initial_sha256"] = begun[:SHORT]
    facts = DataRecord.from_record(data).facts()
    options |= {f"data.{name}": value for name, value in facts.items()}
    options["extended"] = extensions_of(run.run) or "no"
    # What the images were normalised by, whoever said so; by the data's in runs older than that.
    for network in ("student", "teacher"):
        own = run.run.get(network) or {}
        for part in ("mean", "std"):
            if reads(run, f"{network}.{part}"):
                options[f"{network}.{part}"] = own.get(part) or data.get(part)
    return options


def _groups_of(recipe: str, runs: list[RunRecord]) -> list[Group]:
    options = [options_read(run) for run in runs]
    names = {name for o in options for name in o}
    differing = sorted(name for name in names if len(_values(name, options, runs)) > 1)
    grouped: dict[tuple[str, str], Group] = {}
    for run, values in zip(runs, options, strict=True):
        own = {name: values.get(name) for name in differing if reads(run, name)}
        group = grouped.setdefault((run.method, repr(own)), Group(recipe, run.method, own, []))
        group.runs.append(run)
    for group in grouped.values():
        group.runs.sort(key=lambda run: (run.seed, run.folder))
    return sorted(grouped.values(), key=lambda g: (_method_rank(g.method), repr(g.options)))


def _values(name: str, options: Sequence[dict[str, Any]], runs: Sequence[RunRecord]) -> set[str]:
    """The values of an option in those runs whose method reads it."""
    pairs = zip(options, runs, strict=True)
    values = {repr(o.get(name)) for o, run in pairs if reads(run, name)}
    # A run of an older version may lack an option: that is a difference too. What it does not say
    # of its data is unknown, and tells it apart only where the others differ.
    return values - {"None"} if name in _FACTS else values


def _method_rank(method: str) -> int:
    return METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)


def _comparable(a: Group, b: Group) -> bool:
    shared = {name for name in {*a.options, *b.options} if reads(a.runs[0], name)}
    shared = {name for name in shared if reads(b.runs[0], name)}
    same_options = all(a.options.get(name) == b.options.get(name) for name in shared)
    return a.recipe == b.recipe and same_options


def _compare(claim: str, better: Group, other: Group) -> Comparison:
    a, b = better.last, other.last
    if a is None or b is None:
        return Comparison(claim, better, other, None, "not compared: no finished run on one side")
    # As it is shown, and no -0.00: less is an image or two in all runs together.
    difference = round(a.mean - b.mean, 2) + 0.0
    holds = difference > 0 if better.method == "dfpt" else difference >= 0
    spread = ""
    if a.std is not None and b.std is not None:  # standard error of the difference of two means
        spread = f" ± {math.sqrt(a.std**2 / a.n + b.std**2 / b.n):.2f}"
    detail = f"{difference:+.2f}{spread} points, n = {a.n} and {b.n}"
    if min(a.n, b.n) < MIN_RUNS:
        detail += f"; fewer than {MIN_RUNS} runs, so only a hint"
    return Comparison(claim, better, other, holds, detail)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
