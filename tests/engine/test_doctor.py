"""doctor: what it says about what is there and what is missing, and its exit codes."""

import os
import subprocess
import sys

import pytest

from dfptkd.engine import doctor
from dfptkd.engine.errors import StorageError, UsageError
from dfptkd.kernels import backend, build_native


def test_reports_every_part_and_returns_0(capsys):
    assert doctor.run_doctor() == 0
    out = capsys.readouterr().out
    for part in ("python", "torchvision", "CPU", "triton", "timm", "onnx", "DALI", "apex", "core"):
        assert any(line.startswith(part) for line in out.splitlines()), part
    assert "\x1b" not in out  # plain where no terminal is


def test_missing_part_is_named_with_its_cost(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_has_module", lambda name: False)
    monkeypatch.setattr(backend, "_load_native", lambda: "the native library is not built")
    assert doctor.run_doctor() == 0
    out = capsys.readouterr().out
    assert "no timm:... models" in out
    assert "the native library is not built  [CPU operations run as eager" in out


def test_a_triton_that_cannot_launch_is_said_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_has_module", lambda name: name == "triton")
    monkeypatch.setattr(backend, "_find_triton", lambda: "Failed to find C compiler")
    assert doctor.run_doctor() == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("triton"))
    assert "-- " in line
    assert "Failed to find C compiler  [no fused GPU kernels" in line


def test_broken_core_returns_1(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise OSError("undefined symbol")

    monkeypatch.setattr(doctor, "normalize_images", broken)
    assert doctor.run_doctor() == 1
    assert "OSError: undefined symbol" in capsys.readouterr().out


def test_apex_is_known_by_its_extension_not_by_its_name(monkeypatch):
    monkeypatch.setattr(doctor, "_has_module", lambda name: name == "apex")
    assert not doctor._apex().ok
    assert "another project" in doctor._apex().state
    assert "APEX_CUDA_EXT=1 pip install" in doctor._apex().cost
    monkeypatch.setattr(doctor, "_has_module", lambda name: name == "amp_C")
    assert doctor._apex().ok


def test_terminal_gets_a_table(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    doctor.run_doctor()
    assert "\x1b[" in capsys.readouterr().out


def test_build_without_a_tool_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(build_native, "missing_tool", lambda: "no cmake")
    with pytest.raises(UsageError, match="no cmake"):
        doctor.run_doctor(build_native=True)


def test_build_with_nowhere_to_write_is_a_storage_error(monkeypatch):
    monkeypatch.setattr(build_native, "missing_tool", lambda: None)
    monkeypatch.setattr(doctor, "_writable", lambda folder: False)
    with pytest.raises(StorageError, match="cannot write to"):
        doctor.run_doctor(build_native=True)


@pytest.mark.skipif(
    backend.unavailable("native") is not None, reason=str(backend.unavailable("native"))
)
def test_library_goes_to_the_cache_where_the_package_is_read_only_and_is_found_there(tmp_path):
    """No compiler here: tests/test_package.py runs it. /proc refuses a file even from root."""
    code = """
import shutil, torch
from pathlib import Path
from dfptkd.kernels import backend, build_native, normalize_images
library = backend.library_path()
package, cached = backend.library_candidates()
backend.library_candidates = lambda: (Path("/proc/none") / package.name, cached)
build_native.build = lambda folder: shutil.copy(library, folder / package.name)
build_native.missing_tool = lambda: None
from dfptkd.engine.doctor import run_doctor
assert backend.library_path() is None
assert run_doctor(build_native=True) == 0
with backend.use_backend("native"):
    normalize_images(torch.zeros(1, 2, 2, 3).byte(), (.5,) * 3, (.5,) * 3, dtype=torch.float32)
assert backend.library_path() == cached
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("dfptkd/*/*.so"))
