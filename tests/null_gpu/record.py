"""Kernels and graph nodes of a step, as they stand on record in launches.csv.

    python tests/null_gpu/record.py               the small pair, and the headline uncaptured
    python tests/null_gpu/record.py --headline    the headline captured too: minutes a method

Rows of other torch versions stay as they are. A step that asks for more kernels than its row says
fails test_launches.py.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
TABLE = HERE / "launches.csv"
COLUMNS = ("torch", "pair", "batch", "method", "mode", "launches", "nodes")
BATCH = 64
SMALL = ("cifar:resnet8", "cifar:resnet8")
HEADLINE = ("cifar:wrn_40_2", "cifar:ShuffleV1")
METHODS = ("kd", "dfpt", "dfpt_plus")
SLOW = [(HEADLINE, method, "graph") for method in METHODS]
QUICK = [
    (SMALL, "kd", "eager"),
    *((SMALL, "dfpt", mode) for mode in ("eager", "graph")),
    *((HEADLINE, method, "eager") for method in METHODS),
]
VERSION = torch.__version__.split("+")[0]


def case_of(pair: tuple[str, str], method: str, mode: str) -> dict[str, Any]:
    """The case for steps.py, compiled as a user's run would be."""
    teacher, student = pair
    data = {"num_classes": 100, "limit": 8 * BATCH}
    changes = {"teacher": {"name": teacher}, "student": student, "data": data}
    changes["global_batch"] = BATCH
    # What Inductor fuses with its neighbours costs it no kernel.
    unfused = ["prompt_pair", "frozen_relu"] if mode == "graph" else ["prompt_pair"]
    return {"method": method, "mode": mode, "changes": changes, "unfused": unfused}


def row_of(pair: tuple[str, str], result: dict[str, Any]) -> dict[str, str]:
    """What a step did, as a row of the table."""
    counts = result["counts"]
    values = (
        VERSION, " > ".join(pair), BATCH, result["name"], result["mode"],
        counts["launches"] + counts["memsets"], result["nodes"],
    )  # fmt: skip
    return {name: str(value) for name, value in zip(COLUMNS, values, strict=True)}


def key(row: dict[str, str]) -> tuple[str, ...]:
    """What a row is about."""
    return tuple(row[name] for name in COLUMNS[:-2])


def on_record() -> dict[tuple[str, ...], dict[str, str]]:
    """The table's rows by what they are about."""
    if not TABLE.is_file():
        return {}
    with TABLE.open(newline="") as file:
        return {key(row): row for row in csv.DictReader(file)}


def measured(cases: Sequence[tuple[tuple[str, str], str, str]]) -> list[dict[str, str]]:
    """Rows of steps that are done now, in a process of their own.

    Raises:
        SystemExit: The null GPU cannot be built, or a step failed.
    """
    from build import ADDRESS_SPACE, build, environment, obstacle

    reason = obstacle()
    if reason is not None:
        sys.exit(f"no null GPU: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        ended = subprocess.run(
            [sys.executable, str(HERE / "steps.py")],
            input=json.dumps([case_of(*case) for case in cases]),
            env={**environment(Path(folder)), "TRITON_CACHE_DIR": f"{folder}/triton",
                 "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"},
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE)
            ),
        )  # fmt: skip
    results = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    for result in results:
        if result["error"] is not None:
            sys.exit(f"{result['name']} by {result['mode']}: {result['error']}")
    if len(results) != len(cases):
        sys.exit(f"the process ended early, with code {ended.returncode}")
    return [row_of(case[0], result) for case, result in zip(cases, results, strict=True)]


def write(rows: Sequence[dict[str, str]]) -> None:
    """Put rows into the table, in the place of those about the same."""
    table = on_record() | {key(row): row for row in rows}
    new = TABLE.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[name] for name in sorted(table))
    os.replace(new, TABLE)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--headline"]):
        sys.exit(f"usage: python {sys.argv[0]} [--headline]")
    before = on_record()
    found = measured(QUICK + (SLOW if sys.argv[1:] else []))
    write(found)
    for row in found:
        old = before.get(key(row), {})
        was = "" if old.get("launches") is None else f"  (was {old['launches']}, {old['nodes']})"
        print(", ".join(row.values()) + was)
