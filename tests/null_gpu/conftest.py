"""Builds the null GPU and runs programs on it, each in a process of its own."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from null_gpu.build import ADDRESS_SPACE, build, environment, obstacle

HERE = Path(__file__).resolve().parent
LIMIT_S = 600  # of one process, on a machine that has other work to do

OnNullGpu = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def null_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built library."""
    reason = obstacle()
    if reason is not None:
        pytest.skip(f"no null GPU: {reason}")
    folder = tmp_path_factory.mktemp("null_gpu")
    build(folder)
    return folder


@pytest.fixture(scope="session")
def on_null_gpu(null_gpu: Path, tmp_path_factory: pytest.TempPathFactory) -> OnNullGpu:
    """Calls Python with these arguments, in a process that sees the null GPU.

    Compiled code is kept for the session, as it would be on a user's machine.
    """
    kept = tmp_path_factory.mktemp("compiled")

    def call(
        *arguments: object, stdin: str = "", variables: dict[str, str | None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        caches = {
            "TRITON_CACHE_DIR": str(kept / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
            "XDG_CACHE_HOME": str(kept / "cache"),
        }
        given = {**environment(null_gpu), **caches, **(variables or {})}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            input=stdin,
            env={name: value for name, value in given.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            preexec_fn=limit_memory,
        )

    return call


def limit_memory() -> None:
    """Of the process that calls it and its children."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
