"""`pytest bench/`: the cases of `dfptkd bench ...` under pytest-benchmark, at sizes of two minutes
on two cores. `pytest bench/ --benchmark-json=FILE` keeps the times, `dfptkd bench compare` sets two
such files side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ..engine.config import RunConfig
from ..engine.log import hardware, versions
from ..engine.machine import pick_device, prepare_torch

DEVICE = pick_device(RunConfig())
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
# Enough rounds for quartiles that mean something, and no more than half a second of each.
PACE = pytest.mark.benchmark(min_rounds=9, max_time=0.4, warmup=True, warmup_iterations=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every benchmark keeps the same pace."""
    for item in items:
        item.add_marker(PACE)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What a time depends on beside the CPU: `dfptkd bench compare` looks at it."""
    found = hardware(DEVICE)
    machine_info |= {
        "device": found["device"],
        "threads": found["threads"],
        "torch": torch.__version__,
        "triton": versions().get("triton"),
    }


@pytest.fixture(autouse=True)
def _as_a_run() -> None:
    """torch's switches are those of a run."""
    prepare_torch(RunConfig())


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return DEVICE


@pytest.fixture(scope="session")
def dtype() -> torch.dtype:
    """What a run computes in on the device."""
    return DTYPE


@pytest.fixture
def timed(benchmark: Any) -> Callable[[Callable[[], object]], None]:
    """Times a call, the device's work included."""

    def measure(call: Callable[[], object]) -> None:
        def waited() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark(waited)

    return measure
