"""What this environment offers, what is missing and what that costs: `dfptkd doctor`."""

import importlib.metadata
import importlib.util
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from ..kernels import backend, build_native, normalize_images
from .apex_optimizers import BUILD
from .errors import DfptkdError, StorageError, UsageError
from .kernel_cache import KernelCache, cache_path


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    state: str
    ok: bool
    cost: str = ""
    """What is lost without it."""


class _Optional(NamedTuple):
    name: str
    module: str
    distribution: str
    cost: str


# The newest versions that the tests have run with; the lowest are setup.py's.
NEWEST_TESTED = {"torch": (2, 14, 1), "torchvision": (0, 29, 1), "triton": (3, 8)}

_OPTIONAL = (
    _Optional(
        "triton", "triton", "triton", "no fused GPU kernels: eager PyTorch and torch.compile"
    ),
    _Optional("timm", "timm", "timm", "no timm:... models and weights"),
    _Optional("onnx", "onnx", "onnx", "no ONNX export (pip install 'dfptkd[onnx]')"),
    _Optional("onnxruntime", "onnxruntime", "onnxruntime", "an exported ONNX file is not verified"),
    _Optional(
        "DALI",
        "nvidia.dali",
        "nvidia-dali-cuda130",
        "image files are decoded by Pillow, at 2.3 times the CPU time",
    ),
)


def run_doctor(build_native: bool = False) -> int:
    """Prints what is there, what is missing and what each missing part costs.

    Args:
        build_native: compile the native CPU library first.

    Returns:
        0: the core works. 1: it does not.

    Raises:
        UsageError: the library was asked for and a tool to build it is missing.
        StorageError: no place to put the library can be written.
        DfptkdError: CMake or the compiler failed.
    """
    if build_native:
        print(f"built {_build_library()}")
    core = _core()
    _print_table([*_versions(), *_hardware(), *_packages(), _apex(), _native(), core])
    newer = newer_than_tested()
    if newer:
        print(f"warning: {newer}")
    print_kernels()
    return 0 if core.ok else 1


def newer_than_tested() -> str:
    """Which packages are newer than any that the tests have run with, in one line; else empty."""
    found = []
    for name, tested in NEWEST_TESTED.items():
        version = _version(name)
        release = re.match(r"\d+(\.\d+)*", version or "0")
        numbers = tuple(map(int, release[0].split("."))) if release else (0,)
        if numbers[: len(tested)] > tested:
            found.append(f"{name} {version} (tested up to {'.'.join(map(str, tested))})")
    return f"newer than tested: {', '.join(found)}" if found else ""


def print_kernels() -> None:
    """What the runs on this machine have measured, a line for each fused call."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = [line for d in sorted({device, "cpu"}) for line in KernelCache("").of_machine(d)]
    if not known:
        print(f"kernels: nothing measured on this machine yet ({cache_path()})")
        return
    print(f"kernels chosen on this machine ({cache_path()}; medians of forward and backward):")
    for mode, choice in known:
        medians = ", ".join(f"{name} {us:,.0f} us" for name, us in choice.median_us.items())
        parts = [
            f"{mode:7} {choice.site.device} {choice}, {choice.images} images: {choice.backend}"
        ]
        print("  " + "; ".join([*parts, choice.why, *([medians] if medians else [])]))


def _build_library() -> Path:
    missing = build_native.missing_tool()
    if missing:
        raise UsageError(
            f"doctor --build-native: {missing}; expected torch, cmake and a C++ compiler"
        )
    for path in backend.library_candidates():
        if _writable(path.parent):
            try:
                return build_native.build(path.parent)
            except RuntimeError as error:
                raise DfptkdError(f"doctor --build-native: {error}") from error
    folders = " or ".join(str(path.parent) for path in backend.library_candidates())
    raise StorageError(f"doctor --build-native: cannot write to {folders}")


def _writable(folder: Path) -> bool:
    """Whether the folder takes a new file: tried, as permission bits do not tell of every mount."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _versions() -> list[Finding]:
    found = [Finding("python", f"{platform.python_version()} {sys.executable}", True)]
    for name in ("dfptkd", "torch", "torchvision"):
        version = _version(name)
        found.append(Finding(name, version or "not installed", version is not None, "needed"))
    return found


def _hardware() -> list[Finding]:
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    cpu = Finding("CPU", f"{platform.machine()}, {capability}, {threads} threads", True)
    if not torch.cuda.is_available():
        return [
            cpu,
            Finding("CUDA", "no device", False, "training on the CPU, for trying out only"),
        ]
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [cpu] + [
        Finding(
            f"cuda:{i}", f"{c.name}, {c.total_memory / 2**30:.0f} GiB, sm_{c.major}{c.minor}", True
        )
        for i, c in enumerate(cards)
    ]


def _packages() -> list[Finding]:
    return [_package(package) for package in _OPTIONAL]


def _package(package: _Optional) -> Finding:
    if not _has_module(package.module):
        return Finding(package.name, "not installed", False, package.cost)
    state = _version(package.distribution) or "installed"
    # Present is not all: what compiles on this machine may fail there.
    reason = backend.unavailable("triton") if package.name == "triton" else None
    if reason:
        state = f"{state}: {reason}"
    return Finding(package.name, state, reason is None, package.cost)


def _apex() -> Finding:
    # The feature, not the name: PyPI's `apex` is a web toolkit without this extension.
    if _has_module("amp_C"):
        return Finding("apex", "CUDA extension amp_C found", True)
    state = "not installed"
    if _has_module("apex"):
        state = (
            "without amp_C: another project (PyPI's apex is not NVIDIA's) or a build without CUDA"
        )
    return Finding("apex", state, False, f"no --optim.name apex-sgd, apex-lamb (build it: {BUILD})")


def _native() -> Finding:
    reason = backend.unavailable("native")
    return Finding(
        "native library",
        reason or str(backend.library_path()),
        reason is None,
        "CPU operations run as eager PyTorch, several times slower",
    )


def _core() -> Finding:
    """One operation from end to end, on the reference."""
    try:
        with backend.use_backend("reference"):
            images = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
            out = normalize_images(images, (0.5,) * 3, (0.5,) * 3, dtype=torch.float32)
        if not torch.equal(out, -torch.ones(1, 3, 2, 2)):
            raise ArithmeticError(f"black normalised by 0.5, 0.5 gave {out.unique().tolist()}")
        import torchvision  # noqa: F401  (fails where it was built for another torch)
    except Exception as error:  # whatever is broken here is what the user wants to read
        return Finding("core", f"{type(error).__name__}: {error}", False, "nothing works")
    return Finding("core", "works", True)


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent of a dotted name is missing
        return False


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for what, state, ok, cost in findings:
            print(f"{what:15} {'ok' if ok else '--':3} {state}" + ("" if ok else f"  [{cost}]"))
        return
    table = Table("", "", "state", "without it", title="dfptkd doctor")
    for what, state, ok, cost in findings:
        mark = Text("ok", "green") if ok else Text("--", "yellow")
        table.add_row(what, mark, Text(state, overflow="fold"), "" if ok else cost)
    console.print(table)
