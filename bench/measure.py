"""Timing side by side: variants interleaved in one process, medians with spread, rows to a CSV.

A CPU row is timed by the clock around the call. A CUDA row is timed by events, in two contracts:
`hot` launches from Python (below some 100 us it times the host), `graph` replays a captured CUDA
graph. Rows of different devices stand in the same file and are never mixed in a ratio.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..engine.cli import Parser
from ..engine.log import commit, hardware, versions

RESULTS = Path(__file__).with_name("results.csv")


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


@dataclass(frozen=True)
class Timing:
    """Spread of one variant over `n` calls, in microseconds."""

    n: int
    median: float
    p20: float
    p80: float


def time_interleaved(
    variants: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, warmup: int
) -> dict[str, Timing]:
    """Time every variant `rounds` times, A B A B, after `warmup` untimed calls of each."""
    for call in variants.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    timer = _time_cuda if device.type == "cuda" else _time_cpu
    for _ in range(rounds):
        for name, call in variants.items():
            samples[name].append(timer(call))
    return {name: _timing(values) for name, values in samples.items()}


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


def copy_bandwidth(device: torch.device) -> float:
    """Measured copy (read + write) in 1e9 bytes/s, the roof of a memory-bound kernel."""
    source = torch.randn(1 << 26, device=device)  # 256 MiB: no cache holds it
    target = torch.empty_like(source)
    call = {"copy": lambda: target.copy_(source)}
    timing = time_interleaved(call, device, rounds=10, warmup=3)["copy"]
    return 2 * source.numel() * source.element_size() / timing.median / 1e3


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
        commit=commit() or "",
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


def append_rows(rows: list[Row], path: Path = RESULTS) -> None:
    """Append to the results; nothing that stands there is changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _time_cpu(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6


def _time_cuda(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _timing(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        len(ordered),
        statistics.median(ordered),
        ordered[round(0.2 * last)],
        ordered[round(0.8 * last)],
    )
