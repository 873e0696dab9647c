"""What every bench shares: torch as a run has it, whole rows, and no package to install."""

import argparse
import csv
import os
import subprocess
import sys
import textwrap
from dataclasses import fields

import pytest
import torch

from dfptkd.bench import data, first, kernels, measure, optim, overhead, step
from dfptkd.bench.measure import Failures, Row, append_rows, make_row
from dfptkd.engine.cli import main
from dfptkd.engine.timing import Timing

CPU = torch.device("cpu")


def row(**changes):
    values = {
        "kernel": "k", "provider": "p", "passes": "forward", "contract": "hot", "shape": (2, 3),
        "dtype": torch.float32, "bytes_moved": None, "copy_gb_per_s": None, "peak": None,
    }  # fmt: skip
    return make_row(Timing(5, 2.0, 1.0, 3.0), CPU, **{**values, **changes})


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("bench", [kernels, step, overhead, data, optim, first])
def test_a_bench_sets_the_switches_of_a_run_before_it_measures(bench, monkeypatch, tmp_path):
    class Reached(Exception):
        pass

    def prepare(config):
        raise Reached

    class Untouched:
        @property
        def type(self):
            raise AssertionError("the device is used before torch is prepared")

    monkeypatch.setattr(measure, "pick_device", lambda config: Untouched())
    monkeypatch.setattr(measure, "prepare_torch", prepare)
    with pytest.raises(Reached):
        bench.main([*(["ceilings"] if bench is first else []), "--out", str(tmp_path / "r.csv")])


def test_switches_are_those_of_a_run(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert measure.prepared_device(argparse.Namespace(device="cpu")) == CPU
    assert torch.backends.cudnn.benchmark


def test_rows_are_one_write(tmp_path, monkeypatch):
    """However many: whoever is killed in between leaves whole lines."""
    path, writes = tmp_path / "rows.csv", []
    write = os.write
    monkeypatch.setattr(os, "write", lambda *args: writes.append(args) or write(*args))
    append_rows([row(kernel="k" * 100)] * 200, path)
    assert len(writes) == 1
    assert len(writes[0][1]) > 4 * 8192  # more than a buffered file passes on at once
    assert len(read(path)) == 200
    append_rows([row()], path)
    assert len(read(path)) == 201
    assert list(read(path)[0]) == [field.name for field in fields(Row)]


def test_a_line_that_was_left_unfinished_spoils_no_other(tmp_path):
    path = tmp_path / "rows.csv"
    append_rows([row(), row()], path)
    path.write_bytes(path.read_bytes()[:-20])
    append_rows([row(kernel="new")], path)
    assert [found["kernel"] for found in read(path)] == ["k", "k", "new"]


def test_a_step_that_fails_takes_no_row_of_another(tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(step, "our_step", fail)
    out = tmp_path / "rows.csv"
    options = ["--methods", "dfpt", "--providers", "ours[eager],plain", "--rounds", "1"]
    sizes = ["--pairs", "cifar:resnet8>cifar:resnet8", "--batch", "2", "--image-size", "8"]
    assert main(["bench", "step", *options, *sizes, "--out", str(out)]) == 1
    assert [found["provider"] for found in read(out)] == ["plain"]
    said = capsys.readouterr().out
    assert "FAILED step:dfpt:cifar:resnet8>cifar:resnet8 ours[eager]: RuntimeError: no comp" in said
    assert "images/s" in said  # the table of what was measured


def test_a_row_is_kept_before_the_next_side_is_built(tmp_path, monkeypatch):
    out, rows_then = tmp_path / "rows.csv", []
    build = step.our_step

    def our_step(*args):
        rows_then.append(len(read(out)))
        return build(*args)

    monkeypatch.setattr(step, "our_step", our_step)
    options = ["--methods", "dfpt", "--providers", "plain,ours[eager]", "--seeds", "2"]
    sizes = ["--pairs", "cifar:resnet8>cifar:resnet8", "--batch", "2", "--image-size", "8"]
    assert main(["bench", "step", *options, *sizes, "--rounds", "1", "--out", str(out)]) == 0
    assert rows_then == [1, 2]  # plain is there; and then one seed's
    assert [r["provider"] for r in read(out)] == ["plain", "ours[eager]", "ours[eager]x2"]


def test_failures_are_a_line_each_and_an_exit_code(capsys):
    failures = Failures()
    assert failures.exit_code == 0
    failures.add("this", ValueError("one\ntwo"))
    assert failures.exit_code == 1
    assert capsys.readouterr().out == "FAILED this: ValueError: one\n"


MISSING = (
    "tyro", "rich", "safetensors", "tensorboard", "matplotlib", "timm", "scipy", "nvidia.dali",
    "apex", "pytest",
)  # fmt: skip


def test_a_first_gpu_needs_what_torch_brings_alone(tmp_path):
    """torch and torchvision, with what they need themselves."""
    program = f"""
        import sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name in {MISSING!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}")

        sys.meta_path.insert(0, Missing())
        import dfptkd.bench.aot, dfptkd.bench.data, dfptkd.bench.optim, dfptkd.bench.overhead
        from dfptkd.engine.cli import main

        own = ["--device", "cpu", "--out", "r.csv"]
        for part in ("environment", "ceilings", "grouped", "kernels"):
            small = ["--small", "--operators", "frozen_relu,affine_relu"]
            assert main(["bench", "first", part, *small, *own]) == 0

        import torch
        from dfptkd.bench import first

        report = first.Report(print)
        setting = first.SMALL.cifar.setting("dfpt", torch.device("cpu"))
        first._steps(report, setting, ["plain", "ours[eager]"], first.SMALL)
        assert not report.failures.names
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by ours[eager]: " in done.stdout
    kinds = {found["kernel"].split(":")[0] for found in read(tmp_path / "r.csv")}
    assert kinds == {"copy", "matmul", "grouped_conv1x1"}
