"""Timing side by side, and the roofs of a device that times are judged by.

CPU times are those of the clock around a call, CUDA times those of events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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
    for _ in range(rounds):
        for name, call in variants.items():
            samples[name].append(time_call(call, device))
    return {name: spread(values) for name, values in samples.items()}


def spread(samples: list[float]) -> Timing:
    """Median and quintiles of samples in microseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        len(ordered),
        statistics.median(ordered),
        ordered[round(0.2 * last)],
        ordered[round(0.8 * last)],
    )


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds of one call on `device`."""
    return _time_cuda(call) if device.type == "cuda" else _time_cpu(call)


def copy_bandwidth(device: torch.device) -> float:
    """Measured copy (read + write) in 1e9 bytes/s, the roof of a memory-bound kernel."""
    source = torch.randn(1 << 26, device=device)  # 256 MiB: no cache holds it
    target = torch.empty_like(source)
    call = {"copy": lambda: target.copy_(source)}
    timing = time_interleaved(call, device, rounds=10, warmup=3)["copy"]
    return 2 * source.numel() * source.element_size() / timing.median / 1e3


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measured matrix product in 1e9 FLOP/s, the roof of a kernel bound by arithmetic."""
    side = 8192 if device.type == "cuda" else 2048
    # Random values: zeros cost a GPU less power, and it then runs faster than it ever will.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = [time_call(lambda: a @ b, device) for _ in range(7)]
    return 2 * side**3 / min(times) / 1e3  # a roof is what was reached at best


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
