"""Programs that break a rule of capture each, and sound ones that look like them.

    python tests/null_gpu/rules.py        in a process that sees the null GPU (build.py)

Each runs in a process of its own, as a capture that fails leaves nothing to go on with. A line of
JSON comes back for each: what was raised, and what the null GPU noted.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable

import null_device
import torch
from torch import Tensor

from dfptkd.engine.cuda_graph import capture, warm_up


def captured(body: Callable[[Tensor], object], mode: str = "thread_local") -> None:
    """Captures `body` on a stream of its own."""
    x = torch.ones(8, 8, device="cuda")
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        body(x)


def sound() -> None:
    """Forks to another stream and joins it back."""

    def body(x: Tensor) -> None:
        other, here = torch.cuda.Stream(), torch.cuda.current_stream()
        other.wait_stream(here)
        with torch.cuda.stream(other):
            y = x + 1
        here.wait_stream(other)
        y.add_(x)

    captured(body)


def reads_back() -> None:
    """A number of the device decides what the host does."""
    captured(lambda x: x.sum().item())


def copies_from_pageable_memory() -> None:
    """The copy would be made again from memory that has long been freed."""
    captured(lambda x: x.copy_(torch.ones(8, 8), non_blocking=True))


def leaves_a_stream_behind() -> None:
    """Work that was forked is not joined back."""

    def body(x: Tensor) -> None:
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x.add_(1)

    captured(body)


def waits_for_work_outside() -> None:
    """An event from before the capture."""
    before = torch.cuda.Event()
    before.record()
    captured(lambda x: torch.cuda.current_stream().wait_event(before))


def works_on_another_stream() -> None:
    """What runs elsewhere is not in the graph."""
    other, y = torch.cuda.Stream(), torch.ones(8, device="cuda")

    def body(x: Tensor) -> None:
        x.add_(1)
        with torch.cuda.stream(other):
            y.add_(1)

    captured(body)


def waits_for_the_device() -> None:
    """From within."""
    captured(lambda x: torch.cuda.synchronize())


def _in_another_thread(mode: str) -> None:
    def allocate() -> None:
        torch.empty(1 << 24, dtype=torch.uint8).pin_memory().to("cuda", non_blocking=True)
        torch.cuda.synchronize()

    def body(x: Tensor) -> None:
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()
        x.add_(1)

    captured(body, mode)


def another_thread_waits() -> None:
    """Forbidden to all threads by the strictest mode."""
    _in_another_thread("global")


def another_thread_waits_as_it_may() -> None:
    """Forbidden to the capturing thread alone."""
    _in_another_thread("thread_local")


def two_graphs_on_one_stream() -> None:
    """They share a workspace of cuBLAS."""
    stream = torch.cuda.Stream()
    _capture_products(stream, stream)


def two_graphs_on_two_streams() -> None:
    """They have a workspace of cuBLAS each."""
    _capture_products(torch.cuda.Stream(), torch.cuda.Stream())


def _capture_products(*streams: torch.cuda.Stream) -> None:
    x = torch.ones(64, 64, device="cuda")
    for stream in streams:
        warm_up(lambda: x @ x, stream, 1)
        capture(lambda: x @ x, stream)


PROGRAMS = (
    sound, reads_back, copies_from_pageable_memory, leaves_a_stream_behind, waits_for_work_outside,
    works_on_another_stream, waits_for_the_device, another_thread_waits,
    another_thread_waits_as_it_may, two_graphs_on_one_stream, two_graphs_on_two_streams,
)  # fmt: skip


def report(program: Callable[[], None]) -> dict[str, object]:
    """Run a program and say what came of it."""
    raised = None
    try:
        program()
    except RuntimeError as error:
        raised = str(error).splitlines()[0]
    graphs = [null_device.workspaces(i) for i in range(null_device.captures())]
    return {
        "program": program.__name__,
        "raised": raised,
        "violations": null_device.violations(),
        "strays": null_device.counts()["strays"],
        "shared_workspaces": sum(map(len, graphs)) - len(set().union(*graphs)),
    }


if __name__ == "__main__":
    for program in PROGRAMS:
        child = os.fork()  # before anything has touched the GPU: that does not survive a fork
        if child == 0:
            print(json.dumps(report(program)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
