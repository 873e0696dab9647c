"""Whole runs on a GPU that computes nothing: they end, and no step of theirs waits for it.

Evaluation (captured where steps are), checkpoints, EMA, loaders, a stop and what follows are those
of `run_seeds`; the numbers in what is written mean nothing.
"""

import csv
import json
import os
import sys

import pytest
from null_gpu.conftest import HERE
from sample_images import write_folder

TINY = {"name": "cifar:resnet8"}


@pytest.fixture
def report(on_null_gpu, tmp_path):
    """Runs on the null GPU; see runs.py for the options."""

    def call(variables=None, **options):
        changes = {"teacher": TINY, "epochs": 2, **options.pop("changes", {})}
        options = json.dumps({**options, "changes": changes})
        ended = on_null_gpu(HERE / "runs.py", tmp_path / "runs", options, variables=variables)
        assert ended.returncode == 0, ended.stderr[-3000:]
        found = json.loads(ended.stdout.splitlines()[-1])
        assert found["violations"] == []
        assert found["strays"] == 0
        assert found["warnings"] == {}
        assert found["waits"] == 0
        assert found["shared_workspaces"] == 0
        return found

    return call


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("mode", "backend"), [("eager", "none"), ("compile", "eager"), ("graph", "none")]
)
def test_two_seeds_side_by_side(report, tmp_path, mode, backend):
    changes = {"optim": {"ema_decay": 0.9}, "loss": {"warmup_epochs": 1.0}}
    found = report(mode=mode, backend=backend, seeds=[0, 1], changes=changes)
    assert found["modes"] == [mode, mode]
    assert found["steps"] == [32, 32]
    # a graph for the steps of both, and one for each seed's student, average and prompt path
    assert found["captures"] == (7 if mode == "graph" else 0)
    # One of the frozen teacher; of each seed one for each thread, forward and backward, and none of
    # another's: their branches run side by side.
    assert found["joint_workspaces"] == ([5] if mode == "graph" else [])
    for seed in (0, 1):
        folder = tmp_path / "runs" / "0" / f"custom-dfpt-seed{seed}"
        assert (folder / "student.safetensors").is_file()
        assert [row["step"] for row in rows(folder)] == ["16", "32"]
        assert "test/ema_top1" in rows(folder)[0]


@pytest.mark.parametrize(("mode", "kernels"), [("eager", "auto"), ("graph", "triton")])
def test_a_run_that_is_stopped_goes_on(report, tmp_path, mode, kernels):
    found = report(mode=mode, stop_at=20, changes={"checkpoint_steps": 7, "kernels": kernels})
    assert found["stopped"] == [21]
    assert found["steps"] == [32]
    assert [row["step"] for row in rows(tmp_path / "runs" / "0" / "custom-dfpt-seed0")] == [
        "16",
        "32",
    ]


@pytest.mark.parametrize(
    ("mode", "loader"),
    [
        ("eager", "torchvision"),
        ("graph", "torchvision"),
        ("graph", "device"),
        ("eager", "synthetic"),
    ],
)
def test_photographs_are_loaded_beside_the_steps(report, tmp_path, mode, loader):
    """By worker processes, through pinned memory and on a stream of their own, also while a step is
    captured; or from where they lie on the device."""
    write_folder(tmp_path / "photographs", train=16, val=4, classes=tuple("abcdefghij"))
    data = {
        "name": "folder", "root": str(tmp_path / "photographs"), "loader": loader, "limit": None,
        # What stays on the device is cut alike in every epoch.
        "crops": "small" if loader == "device" else "photographs",
    }  # fmt: skip
    found = report(mode=mode, changes={"data": data})
    assert found["steps"] == [20]


def test_ten_teachers_in_one_process_compile(report):
    """Dynamo keeps a few versions of a function; each teacher needs one of its own."""
    found = report(
        mode="compile", backend="eager", arm="stage_1", runs=10, changes={"max_steps": 1}
    )
    assert found["steps"] == [1] * 10
    assert found["modes"] == ["compile"] * 10


def test_without_a_c_compiler_a_run_is_slower_and_ends(report, tmp_path):
    """Triton makes the code that launches its kernels with one, and containers often have none."""
    tools = tmp_path / "tools"
    tools.mkdir()
    os.symlink(sys.executable, tools / "python")
    variables = {
        "PATH": str(tools), "CC": None, "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    found = report(
        variables, mode="auto", backend="inductor", changes={"epochs": 1, "kernels": "auto"}
    )
    assert found["steps"] == [16]
