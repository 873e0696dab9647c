"""Device memory: what a forward pass keeps, and what a call holds from moment to moment.

A program that only differs in its number of images makes the same allocations in the same order,
and each is linear in that number. So two small traces give every moment of a large call: fixed
bytes and bytes an image, moment by moment, and the peak is the largest of them. Peaks alone would
not do: with few images they stand where parameters weigh most, with many where activations do.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], object], constants: Iterable[Tensor]) -> int:
    """Bytes of the storages that the graph of a forward pass keeps alive for its backward.

    Args:
        forward: Makes the graph.
        constants: Parameters and buffers, which live without it: not counted.
    """
    known = {t.untyped_storage().data_ptr() for t in constants}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(size for address, size in kept.items() if address not in known)


def storage_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of the storages of `tensors` on `device`, shared ones once."""
    storages = [t.untyped_storage() for t in tensors if t.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Growth:
    """Bytes at every moment of a call, beyond what was there before: fixed, and for each image."""

    moments: tuple[tuple[float, float], ...]

    def peak(self, images: float) -> int:
        """Most bytes that a call with so many images holds."""
        return round(max(fixed + slope * images for fixed, slope in self.moments))


def measure_growth(
    call: Callable[[int], object], sizes: tuple[int, int], device: torch.device
) -> Growth:
    """Trace `call(images)` at two sizes.

    Args:
        call: Does the same work for any number of images.
        sizes: Two numbers of images, ascending.
        device: Whose memory counts.
    """
    small, large = (live_bytes(functools.partial(call, images), device) for images in sizes)
    if len(small) != len(large):
        # Libraries that choose an algorithm by the size allocate differently: peaks must do.
        small, large = [max(small)], [max(large)]
    spread = sizes[1] - sizes[0]
    slopes = [(b - a) / spread for a, b in zip(small, large, strict=True)]
    return Growth(
        tuple((a - slope * sizes[0], slope) for a, slope in zip(small, slopes, strict=True))
    )


def live_bytes(call: Callable[[], object], device: torch.device) -> list[int]:
    """Bytes allocated on `device` and not freed, after every allocation and release of a call.

    The call runs once before: what is made on first use is no part of the trace. On a CPU it runs
    in one thread, since the helpers of several threads allocate in no fixed order.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _one_thread(), _silent_stderr():
        call()
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            call()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type().name.lower() == device.type
    ]
    events.sort(key=lambda event: event[0])
    return [0, *itertools.accumulate(size for _, size in events)]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Standard error of the C++ side goes nowhere: the profiler reports its own state there."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def available_bytes(device: torch.device) -> int:
    """Memory that a new process could take: free on the GPU, or the system's own estimate."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def process_bytes(which: str) -> int | None:
    """A figure of /proc/self/status in bytes, `VmRSS` or `VmHWM`; None on other systems."""
    for line in _lines("/proc/self/status"):
        if line.startswith(which + ":"):
            return int(line.split()[1]) * 1024
    return None


def _lines(path: str) -> Sequence[str]:
    try:
        with open(path) as file:
            return file.readlines()
    except OSError:
        return []
