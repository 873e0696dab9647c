"""`bench/on_gpu.sh first` from beginning to end, on a GPU that computes nothing."""

import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from null_gpu.build import environment
from null_gpu.conftest import limit_memory

from dfptkd.bench.first import PARTS
from dfptkd.bench.measure import Row

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900  # on a machine that has other work to do
NUMBER = r"[\d.,e+-]+"
TIME = rf"{NUMBER} ms \({NUMBER}\.\.{NUMBER}\)"
STEP = rf"{TIME}, {NUMBER} images/s, .*first after \d+ s"
# Part -> what stands in its lines.
LINES = {
    "environment": [
        r"python 3\.\d+.*, torch 2\.\d+.*triton", r"NVIDIA H200 .*compute capability 9\.0",
        r"C compiler /", r"backend triton: ",
    ],
    # It computes nothing, and is found out.
    "kernels": [
        r"FAILED frozen_relu 3x33x7x5 torch\.bfloat16 ours\[triton\].*the device does not compute",
        r"FAILED frozen_relu 3x33x7x5 torch\.float32 ours\[triton\].*the device does not compute",
    ],
    "ceilings": [rf"copy 65536 .*{TIME}, {NUMBER} GB/s"],
    "modes": [
        rf"ok  {method} {mode}: first step after {NUMBER} s, waits for nothing, 0 steps skipped"
        for method in ("kd", "dfpt")
        for mode in ("eager", "compile", "graph")
    ],
    "cifar": [
        *(
            rf"step:dfpt:\S+ 8x3x16x16 step by {re.escape(side)}: {STEP}"
            for side in (
                "plain", "ours[graph]", "ours[graph]x3", "ours[graph]x6", "plain[compile]",
                "ours[eager]",
            )
        ),
        *(
            rf"step:kd:\S+ 8x3x16x16 step by ours\[graph\]{seeds}: {STEP}"
            for seeds in ("", "x3", "x6")
        ),
        "which kernels dominate: ",
    ],
    "pairs": [
        rf"prompt_fusion 4x32x8x8 forward\+backward by {side}.*: {TIME}"
        for side in ("eager", "compile", r"\w+\[triton\]")
    ],
    "grouped": [
        rf"grouped_conv1x1:24>12 4x24x8x8 forward\+backward by {side}: {TIME}"
        for side in ("eager", "bmm")
    ],
    "imagenet": [
        *(
            rf"step:dfpt:\S+ 16x3x32x32 step by {re.escape(side)}: {STEP}"
            for side in ("plain", "ours[graph]", "ours[eager]")
        ),
        rf"step:kd:\S+ 16x3x32x32 step by ours\[graph\]: {STEP}",
        "which kernels dominate: ",
    ],
}  # fmt: skip
# Kills the part `ceilings` between its two measurements: behind its first row.
PYTHON = """#!/bin/bash
if [[ "$*" != *"bench first ceilings"* ]]; then exec {python} "$@"; fi
{python} "$@" &
until grep -qs '^[^,]*,copy,' "$OUT/results.csv"; do sleep 0.02; done
sleep 1  # its line is printed next
kill -9 $! $$
"""


@pytest.fixture(scope="module")
def done(null_gpu, tmp_path_factory):
    """Output and folder of the whole script."""
    folder = tmp_path_factory.mktemp("first")
    python = folder / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    variables = {
        "PYTHON": str(python),
        "OUT": str(folder / "out"),
        "SMALL": "1",
        "SLOW": "10",  # what is tested is no speed
        "OPERATORS": "frozen_relu,normalize_images",
        "TORCHDYNAMO_DISABLE": "1",  # how regions compile is tested elsewhere, and takes minutes
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    result = subprocess.run(
        [ROOT / "bench/on_gpu.sh", "first"],
        env={**environment(null_gpu), **variables},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        preexec_fn=limit_memory,
    )
    return result, folder / "out"


def lines_of(printed, part):
    """What stands between the headings of a part and of the next."""
    found = re.search(rf"^== {part}, at most \d+ s\n(.*?)^==", printed, re.M | re.S)
    assert found, f"{part} is not there"
    return found[1]


@pytest.mark.parametrize("part", PARTS)
def test_every_line_is_there(done, part):
    result, _ = done
    lines = lines_of(result.stdout, part)
    for expected in LINES[part]:
        assert re.search(expected, lines), f"no {expected!r} in\n{lines}"


def test_parts_that_fail_end_no_other(done):
    result, out = done
    last = result.stdout.strip().splitlines()[-1]
    assert re.match(
        r"== first: 6 ok; failed: kernels \(exit 1\), ceilings \(exit 137\); cut: none; "
        r"not run for lack of time: none; \d+ rows in ",
        last,
    ), last
    assert result.returncode == 1
    printed = (out / "first.txt").read_text()
    assert all(line in printed for line in result.stdout.splitlines() if line.startswith("["))


def test_rows_are_whole_and_as_those_on_record(done):
    """Also the one that was written just before its process was killed."""
    _, out = done
    names = [field.name for field in dataclasses.fields(Row)]
    assert (out / "results.csv").read_bytes().endswith(b"\n")
    with open(out / "results.csv", newline="") as file, open(ROOT / "bench/results.csv") as record:
        rows = list(csv.DictReader(file))
        assert names == next(csv.reader(record))
    for row in rows:
        assert list(row) == names
        assert None not in row.values()
        assert row["device"] == "NVIDIA H200 (null)"
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert int(row["n"]) == 3
    kernels = {row["kernel"].split(":")[0] for row in rows}
    assert kernels >= {"copy", "step", "prompt_fusion", "grouped_conv1x1"}
    seeds = {row["provider"] for row in rows if row["kernel"].startswith("step:dfpt")}
    assert seeds >= {"plain", "plain[compile]", "ours[graph]", "ours[graph]x3", "ours[graph]x6"}


def test_what_is_not_known_is_not_shown(done):
    """No CUPTI: neither launches nor waits."""
    result, _ = done
    assert "launches" not in lines_of(result.stdout, "cifar")
