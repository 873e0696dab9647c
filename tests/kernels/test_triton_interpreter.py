"""Numerics of the Triton kernels without a GPU: runs triton_interpreter/ in processes of its own.

TRITON_INTERPRET is read when a kernel is decorated, and a process that has it set cannot compile:
neither this process nor that of the compilation gate may see it. A file of that folder is named
interpreted_*.py, so that only its child process collects it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "triton_interpreter"


def run_child(file: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("interpreted_*.py")), ids=lambda f: f.stem)
def test_M17_M18_interpreted_kernels_pass(file):
    done = run_child(file, TRITON_INTERPRET="1")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_without_the_variable_a_child_fails():
    done = run_child(FOLDER / "interpreted_dual_path_loss.py", TRITON_INTERPRET="0")
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1" in done.stdout + done.stderr
