"""`dfptkd bench compare OLD.json NEW.json`: what got slower between two runs of
`pytest bench/ --benchmark-json=FILE`, beyond noise.

A benchmark counts as slower where its median is, by more than the threshold, and where even its
first quartile lies above the third quartile of before: the two spreads do not overlap. As faster,
the other way round. With fewer than five rounds a spread says nothing, and nothing is judged.
(pytest-benchmark's own comparison takes one number of each, passes over what only one file has, and
compares files of different machines after a warning.)

    dfptkd bench compare OLD.json NEW.json [--threshold 10] [--other-machine]

Files of different machines are refused unless `--other-machine` says that this is meant; other
versions of torch and other commits are named. Exit codes: 0 nothing is slower; 6 something is; 3 a
file that is no benchmark file, or nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.cli import Parser
from ..engine.errors import DataError
from ..engine.files import read_json

SLOWER = 6
"""Exit code where something got slower."""
MIN_ROUNDS = 5
THRESHOLD = 10.0
"""Percent. Two runs of the same code differ by less on a machine without other work."""
MACHINE = {"cpu": "CPU", "cores": "cores", "device": "device", "threads": "threads"}
VERSIONS = {"torch": "torch", "triton": "Triton", "python_version": "Python", "commit": "commit"}


@dataclass(frozen=True)
class Spread:
    """Times of one benchmark, in seconds."""

    rounds: int
    q1: float
    median: float
    q3: float


@dataclass(frozen=True)
class Benchmarks:
    """Contents of a file."""

    path: Path
    machine: Mapping[str, Any]
    spreads: Mapping[str, Spread]
    """Name of a benchmark -> its times."""


def read_benchmarks(path: Path) -> Benchmarks:
    """A file of pytest-benchmark.

    Raises:
        DataError: It cannot be read, or is something else.
    """
    expected = "a file of pytest bench/ --benchmark-json"
    content = read_json(path, expected)
    try:
        info = content["machine_info"]
        machine = {
            "cpu": info["cpu"].get("brand_raw", info.get("processor")),
            "cores": info["cpu"].get("count"),
            **{name: info.get(name) for name in ("device", "threads")},
            **{name: info.get(name) for name in ("torch", "triton", "python_version")},
            "commit": content.get("commit_info", {}).get("id"),
        }
        spreads = {
            found["fullname"]: Spread(
                int(found["stats"]["rounds"]),
                *(float(found["stats"][name]) for name in ("q1", "median", "q3")),
            )
            for found in content["benchmarks"]
        }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: expected {expected}: {type(error).__name__}: {error}") from None
    if not all(0 < s.q1 <= s.median <= s.q3 < float("inf") for s in spreads.values()):
        raise DataError(f"{path}: expected {expected}: times that are not in order, or not above 0")
    return Benchmarks(path, machine, spreads)


def differences(old: Benchmarks, new: Benchmarks, names: Mapping[str, str]) -> list[str]:
    """What two files say differently of the machine or of versions, each in a phrase."""
    return [
        f"{label} {old.machine[name]} and {new.machine[name]}"
        for name, label in names.items()
        if old.machine[name] != new.machine[name]
    ]


def verdict(old: Spread, new: Spread, threshold: float) -> str:
    """One of "slower", "faster", "too few rounds" and, within noise, "".

    Args:
        old: Before.
        new: After.
        threshold: Ratio of the medians that is not noise yet, 1.1 for ten percent.
    """
    if min(old.rounds, new.rounds) < MIN_ROUNDS:
        return "too few rounds"
    if new.median > threshold * old.median and new.q1 > old.q3:
        return "slower"
    if old.median > threshold * new.median and old.q1 > new.q3:
        return "faster"
    return ""


def compare(old: Benchmarks, new: Benchmarks, *, threshold: float, other_machine: bool) -> int:
    """Print what differs; returns the exit code.

    Args:
        old: Before.
        new: After.
        threshold: Percent that a median may grow by.
        other_machine: Compare although the machines differ.

    Raises:
        DataError: Different machines, or no benchmark in common.
    """
    machines = differences(old, new, MACHINE)
    if machines and not other_machine:
        raise DataError(
            f"{old.path} and {new.path} are of different machines ({'; '.join(machines)}): "
            "expected one machine, or --other-machine"
        )
    names = [name for name in old.spreads if name in new.spreads]
    if not names:
        raise DataError(f"{old.path} and {new.path} have no benchmark in common")
    for difference in (*machines, *differences(old, new, VERSIONS)):
        print(f"differs: {difference}")
    for owner, other in ((old, new), (new, old)):
        for name in owner.spreads.keys() - other.spreads.keys():
            print(f"missing in {other.path}: {name}")
    found = {
        name: verdict(old.spreads[name], new.spreads[name], 1 + threshold / 100) for name in names
    }
    for kind in ("slower", "faster", "too few rounds"):
        for name in (name for name in names if found[name] == kind):
            print(_line(kind, name, old.spreads[name], new.spreads[name]))
    count = {kind: list(found.values()).count(kind) for kind in ("slower", "faster", "")}
    print(
        f"{len(names)} compared: {count['slower']} slower, {count['faster']} faster, {count['']} "
        f"within noise (medians more than {threshold:g} % apart and quartiles that do not overlap)"
    )
    return SLOWER if count["slower"] else 0


def _line(kind: str, name: str, old: Spread, new: Spread) -> str:
    times = (f"{s.median * 1e3:.4g} ms ({s.q1 * 1e3:.4g}..{s.q3 * 1e3:.4g})" for s in (old, new))
    return f"{kind}: {name}: {' -> '.join(times)}, {new.median / old.median:.2f}x"


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected percent, a number from 0 on")
    return value


def main(args: Sequence[str]) -> int:
    """`dfptkd bench compare`; returns the exit code."""
    parser = Parser(prog="dfptkd bench compare", allow_abbrev=False)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--threshold", type=_percent, default=THRESHOLD, help="percent that a median may grow by"
    )
    parser.add_argument(
        "--other-machine", action="store_true", help="compare files of different machines"
    )
    options = parser.parse_args(args)
    return compare(
        read_benchmarks(options.old),
        read_benchmarks(options.new),
        threshold=options.threshold,
        other_machine=options.other_machine,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
