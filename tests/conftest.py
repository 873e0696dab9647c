"""Fixtures that several test folders share."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Tiny tensors: more threads only wait for each other, and far longer on a busy machine. Set before
# torch is imported, so that child processes have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Which kernels are faster is measured once a session, and never taken from the user's own cache;
# child processes and the workers of pytest-xdist have the same file.
_OWN_CACHE = None
if "DFPTKD_KERNEL_CACHE" not in os.environ:
    _OWN_CACHE = tempfile.mkdtemp(prefix="dfptkd-tests-")
    os.environ["DFPTKD_KERNEL_CACHE"] = f"{_OWN_CACHE}/kernels.json"

_REPOSITORY = Path(__file__).resolve().parents[1]
# Begun first, the longest ahead: whoever gets a long file last is waited for by all other workers
# (`--dist loadfile --no-loadscope-reorder`).
_LONGEST = (
    "null_gpu/test_steps.py", "engine/test_distributed.py", "engine/test_step.py",
    "null_gpu/test_first_gpu.py", "null_gpu/test_runs.py", "engine/test_zoo_of_classifiers.py",
    "faults/test_disk.py", "faults/test_processes.py", "faults/test_preemption.py",
    "null_gpu/test_launches.py", "engine/test_train.py", "recipes/test_recipes.py",
    "engine/models/test_dual_path.py", "engine/test_study.py", "engine/test_plan.py",
    "engine/test_teacher_logits.py", "engine/models/test_frozen.py",
)  # fmt: skip


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test data beside the checkout."""
    given = os.environ.get("DFPTKD_TEST_DATA")
    folder = Path(given) if given else _REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set DFPTKD_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def cifar100_root(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the real cifar-100-binary/."""
    root = tmp_path_factory.mktemp("cifar100")
    subprocess.run(
        [sys.executable, str(shared_data / "unpack_cifar100.py"), str(root)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others as they come."""
    ranks = {_REPOSITORY / "tests" / name: rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_unconfigure() -> None:
    """Takes the session's own cache away."""
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_data_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test finds only the data that it names."""
    monkeypatch.delenv("DFPTKD_DATA", raising=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that tests have made (`record_property("table", text)`)."""
    reports = [r for state in ("passed", "failed") for r in terminalreporter.stats.get(state, [])]
    for report in reports:
        for name, text in getattr(report, "user_properties", ()):
            if name == "table":
                terminalreporter.write_line(f"\n{text}")
