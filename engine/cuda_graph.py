"""Capture of a call as a CUDA graph, on a stream of the caller's.

Torch's own capture stream is one for the whole process, and cuBLAS keeps one workspace for each
stream: graphs that are captured there write to the same memory when they replay side by side. A
stream that lives as long as its graph also is the one that autograd's accumulators remember from
the warm-up, so that they neither wait for another nor warn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def warm_up(call: Callable[[], object], stream: torch.cuda.Stream, steps: int) -> None:
    """Run `call` on `stream` as it will be captured: compilation, cuDNN's search and the allocator
    settle. Work queued before and after on the current stream keeps its order."""
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(steps):
            call()
    here.wait_stream(stream)


def capture(
    call: Callable[[], Result],
    stream: torch.cuda.Stream,
    pool: Any = None,
    generators: Sequence[torch.Generator] = (),
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record `call` on `stream`; the graph replays on whatever stream is current.

    Args:
        call: Works on memory that stays where it is; `warm_up` has run it.
        stream: Not the current one.
        pool: Memory pool that graphs share which never replay side by side; None: one of its own.
        generators: What `call` draws from beside the device's own one, each moved on by a replay.

    Returns:
        The graph, and what `call` returned: memory that each replay overwrites.

    Raises:
        RuntimeError: `call` cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    if torch.__version__ < (2, 14):  # from then on a graph sees by itself what it draws from
        for generator in generators:
            graph.register_generator_state(generator)
    # Threads that load data may talk to the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = call()
    return graph, result
