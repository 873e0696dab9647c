"""Timing side by side: variants interleaved in one process, medians with spread, rows to a CSV.

A CPU row is timed by the clock around the call. A CUDA row is timed by events, in two contracts:
`hot` launches from Python (below some 100 us it times the host), `graph` replays a captured CUDA
graph. Rows of different devices stand in the same file and are never mixed in a ratio.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..engine.cli import Parser
from ..engine.config import RunConfig
from ..engine.files import first_line
from ..engine.log import commit, hardware, versions
from ..engine.machine import pick_device, prepare_torch
from ..engine.timing import Timing

RESULTS = Path(__file__).with_name("results.csv")

_commit = functools.cache(commit)  # it asks git, and a row is made while others wait to be timed


@dataclass(frozen=True)
class Row:
    """One measurement; times in microseconds, bandwidth in 1e9 bytes/s."""

    date: str
    kernel: str
    provider: str
    passes: str
    contract: str
    shape: str
    dtype: str
    device: str
    threads: int
    torch: str
    triton: str
    commit: str
    n: int
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float | None
    copy_gb_per_s: float | None
    peak_bytes: int | None


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """`call` as the replay of a CUDA graph; it must work on static tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most device memory that a call takes beyond what was there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def make_row(
    timing: Timing,
    device: torch.device,
    *,
    kernel: str,
    provider: str,
    passes: str,
    contract: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bytes_moved: int | None,
    copy_gb_per_s: float | None,
    peak: int | None,
) -> Row:
    """A timing with its circumstances."""
    machine, found = hardware(device), versions()
    name = machine["device"] if device.type == "cuda" else f"cpu: {machine['cpu']}"
    return Row(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        kernel=kernel,
        provider=provider,
        passes=passes,
        contract=contract,
        shape="x".join(map(str, shape)),
        dtype=str(dtype).removeprefix("torch."),
        device=name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=found.get("triton", ""),
        commit=_commit() or "",
        n=timing.n,
        median_us=round(timing.median, 2),
        p20_us=round(timing.p20, 2),
        p80_us=round(timing.p80, 2),
        gb_per_s=None if bytes_moved is None else round(bytes_moved / timing.median / 1e3, 2),
        copy_gb_per_s=None if copy_gb_per_s is None else round(copy_gb_per_s, 1),
        peak_bytes=peak,
    )


def positive(text: str) -> int:
    """An option that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def bench_parser(part: str, *, rounds: int = 50) -> Parser:
    """The options that every `dfptkd bench` has."""
    parser = Parser(prog=f"dfptkd bench {part}", allow_abbrev=False)
    parser.add_argument("--device", help="cpu or cuda; absent: cuda where there is one")
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help="timed calls of each variant"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help=f"CSV to append to; absent: {RESULTS.name}"
    )
    return parser


Keep = Callable[[Row], None]
"""What is done with a row as soon as it is known."""


def keeper(path: Path) -> Keep:
    """Appends each row to the CSV at `path`."""
    return lambda row: append_rows([row], path)


def prepared_device(options: argparse.Namespace) -> torch.device:
    """The device that `--device` asks for, torch's switches set as a run sets them.

    Raises:
        UsageError: There is no such device.
    """
    config = RunConfig(device=options.device)
    device = pick_device(config)
    prepare_torch(config)  # cuDNN's search is on in a run, so that it is on in what predicts one
    return device


class Failures:
    """What could not be measured; the rest goes on."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add(self, name: str, error: Exception) -> None:
        """Say it in one line on the terminal, the end of its traceback behind it."""
        self.names.append(name)
        print(f"FAILED {name}: {type(error).__name__}: {first_line(error)}", flush=True)
        traceback.print_exception(error, limit=-3, file=sys.stderr)

    @property
    def exit_code(self) -> int:
        """1 where anything failed."""
        return 1 if self.names else 0


def append_rows(rows: list[Row], path: Path = RESULTS) -> None:
    """Append to the results; nothing that stands there is changed.

    All of it in one write to the end of the file: a process that is killed leaves whole lines, and
    several may write to one file. A line that somebody else left unfinished is ended first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        text = io.StringIO()
        if size and os.pread(handle, 1, size - 1) != b"\n":
            text.write("\n")
        writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
        if not size:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        os.write(handle, text.getvalue().encode())
        os.fsync(handle)
    finally:
        os.close(handle)
