"""Which implementation serves a call: `reference`, `native` (C++ on CPU) or `triton` (CUDA).

An operation registers by one line in `OPERATIONS`: its name, and for each fast backend that it has
the dtypes which that backend takes. Devices belong to the backend itself. Its public function asks

    if choose("dual_path_loss", student) == "triton": ...

once a call and hands the answer to its backward: autograd runs in threads of its own, which
`use_backend` does not reach. Compiled code is traced again when the forced backend changes.

What is fastest depends on the machine, the shape and the rest of the program, so nothing here says
it: a training run measures each `Site` once (engine/kernel_choice.py) and puts what it found in
force by `use_choices`. A forced backend overrides them. Where neither is in force, the operations
of `_MEASURED_ONLY` take the reference, and all others the fast backend wherever it can serve.
"""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .build_native import LIBRARY_NAME, source_digest

BACKENDS = ("reference", "native", "triton")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Operation -> fast backend -> dtypes it takes; every operation has a reference that takes them all.
OPERATIONS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    # fp32 is what it writes; uint8 stands for a question about the images alone.
    "normalize_images": {"native": (torch.float32, torch.uint8), "triton": (*_FLOATS, torch.uint8)},
    "dual_path_loss": {"native": _FLOATS, "triton": _FLOATS},
    "distillation_loss": {"native": _FLOATS, "triton": _FLOATS},
    "partial_pointwise_conv": {"native": (torch.float32,), "triton": _FLOATS},
    "batch_norm_affine": {"native": (torch.float32,)},
    "affine_relu": {"native": (torch.float32,), "triton": _FLOATS},
    "frozen_conv2d": {"native": (torch.float32,)},
    "frozen_relu": {"native": (torch.float32,), "triton": _FLOATS},
}

# What several operations do together, by one backend or not at all -> the one whose dtypes count.
COMPOSITES = {"prompt_pair": "partial_pointwise_conv"}

# Operation -> backends that leave it to PyTorch, forced or not: cuDNN convolves well, and a few
# values a channel need no kernel on a GPU.
_LEFT_TO_PYTORCH = {"frozen_conv2d": ("triton",), "batch_norm_affine": ("triton",)}

# Operations whose fast backend is slower than PyTorch in many places: only a measurement, or
# `use_backend`, takes it.
_MEASURED_ONLY = ("frozen_conv2d", "prompt_pair")

_AUTOMATIC = {"cpu": "native", "cuda": "triton"}
_log = logging.getLogger(__name__)


class Site(NamedTuple):
    """A call of a fused operation as far as the choice of its backend depends on it."""

    operation: str
    device: str
    """Type of the device."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Without the number of images where the operation treats every image alike, so that a
    measurement on a training batch serves an evaluation too."""
    options: tuple[str | int | float, ...] = ()
    """Whatever else the kernels' work depends on, in words where a number would not explain it."""


@dataclass(frozen=True)
class Call:
    """A call as it can be made again, in any precision and by any backend."""

    function: Callable[..., Any]
    """Of `tensors`; a module is copied before it is called."""
    tensors: tuple[Tensor | None, ...]
    """The first has the number of images, or rows, in front."""
    exact: Callable[..., Any] | None = None
    """The same in fp64, where that takes more than tensors in fp64."""


Decide = Callable[[Site, Call], str]


class Choices(dict[Site, str]):
    """Backends of sites, as `use_choices` takes them; not to be altered any more."""

    def __init__(self, backends: Mapping[Site, str]) -> None:
        super().__init__(backends)
        items = sorted((repr(site), name) for site, name in self.items())
        self.key = hashlib.sha256(repr(items).encode()).hexdigest()[:16]
        _CHOICES[self.key] = self
        for name in set(self.values()):
            unavailable(name)  # loads what is to serve, in a process that has measured nothing too


# By content: compiled code knows the choices by this name, and equal ones need no second trace.
_CHOICES: dict[str, Choices] = {}


class _Scope(threading.local):
    def __init__(self) -> None:  # in every thread; torch.compile guards on no class attribute
        self.forced: str | None = None
        self.choices: str | None = None
        self.decide: Decide | None = None


_scope = _Scope()


def which_backend(operation: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """The backend that a call would take, measured choices aside.

    Args:
        operation: public name of the operation, a key of `OPERATIONS`.
        tensor: its first tensor, any shape; its device and dtype decide.
        dtype: dtype that decides in place of the tensor's, for an operation that converts.

    Returns:
        "reference", "native" or "triton".

    Raises:
        ValueError: the operation is unknown.
        RuntimeError: the backend forced by `use_backend` cannot serve the call.
    """
    return _resolve(operation, tensor.device.type, dtype or tensor.dtype, _scope.forced)


def choose(operation: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """`which_backend`, for the operation itself: an automatic fall-back is logged once.

    Measured choices have no part in it: it is for operations that serve inside of others.
    """
    name = _resolve(operation, tensor.device.type, dtype or tensor.dtype, _scope.forced)
    if name == "reference" and _scope.forced is None:
        log_fallback(operation, tensor.device.type, dtype or tensor.dtype)
    return name


def choose_at(
    operation: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    options: tuple[str | int | float, ...] = (),
    dtype: torch.dtype | None = None,
) -> str:
    """`choose`, for an operation whose backend is measured.

    Args:
        operation: As of `which_backend`.
        tensor: Its first tensor.
        shape: See `Site`.
        options: See `Site`.
        dtype: As of `which_backend`.
    """
    place = operation, tensor.device.type, dtype or tensor.dtype
    name = _resolve_at(*place, tuple(shape), options, _scope.forced, _scope.choices)
    if name == "reference" and _scope.forced is None and _scope.choices is None:
        log_fallback(*place)
    return name


def is_measuring() -> bool:
    """Whether a call is to ask `decide_at` which backend it takes."""
    return not torch.compiler.is_compiling() and _scope.decide is not None and not _scope.forced


def decide_at(
    call: Call,
    operation: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    options: tuple[str | int | float, ...] = (),
    dtype: torch.dtype | None = None,
) -> str:
    """The backend for a site as whoever measures decides, by `call`; the rest as `choose_at`."""
    assert _scope.decide is not None
    place = operation, tensor.device.type, dtype or tensor.dtype
    return _scope.decide(Site(*place, tuple(shape), options), call)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a convolution of x; None where it leaves x alone.

    autograd.Function is out of autocast's sight, so the cast is ours.
    """
    device = x.device.type
    # torch.amp.is_autocast_available says the same, and Dynamo of torch 2.11 cannot trace it.
    if x.dtype == torch.float64 or device not in _AUTOMATIC:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend on every call of this thread inside the `with` block.

    Args:
        name: "reference", "native" or "triton".

    Raises:
        ValueError: the name is unknown. A call that the backend cannot serve raises RuntimeError.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    before = _scope.forced
    _scope.forced = name
    try:
        yield
    finally:
        _scope.forced = before


def forced_backend() -> str | None:
    """The backend that `use_backend` forces on this thread; None: every call takes the best."""
    return _scope.forced


def in_force() -> tuple[str | None, str | None]:
    """What decides for this thread: the backend that is forced, the `Choices.key` of those in
    force."""
    return _scope.forced, _scope.choices


def are_choices_in_force() -> bool:
    """Whether this thread is inside `use_choices`."""
    return _scope.choices is not None


@contextlib.contextmanager
def use_choices(choices: Choices) -> Iterator[None]:
    """Puts measured choices in force for this thread inside the `with` block.

    A call at a site that is not among them takes the reference: nothing fused serves before it was
    compared.
    """
    before = _scope.choices
    _scope.choices = choices.key
    try:
        yield
    finally:
        _scope.choices = before


@contextlib.contextmanager
def deciding(decide: Decide) -> Iterator[None]:
    """Asks `decide` for the backend of every call of this thread that is not forced, inside the
    `with` block; compiled code asks nobody."""
    before = _scope.decide
    _scope.decide = decide
    try:
        yield
    finally:
        _scope.decide = before


def unavailable(backend: str) -> str | None:
    """Why a backend cannot be used on this machine at all, in one phrase; None: it can.

    Where there is a GPU, Triton is asked by compiling and launching one kernel, once a process.
    """
    if backend == "native":
        return _load_native()
    return _find_triton() if backend == "triton" else None


def cache_folder() -> Path:
    """Where this user's programs may leave what can be made again."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(named or Path.home() / ".cache") / "dfptkd"
    except RuntimeError:  # a user without a home folder, as in some containers: nothing is kept
        return Path("/nonexistent/.cache/dfptkd")


def library_candidates() -> tuple[Path, Path]:
    """Where the native library is looked for: the package's folder, then the user's cache."""
    # The digest keeps a library of other sources from being loaded out of the shared cache.
    return Path(__file__).parent / LIBRARY_NAME, cache_folder() / source_digest() / LIBRARY_NAME


def library_path() -> Path | None:
    """The native library that is loaded, or would be; None where it is not built."""
    return next((path for path in library_candidates() if path.is_file()), None)


@functools.cache
def _load_native() -> str | None:
    path = library_path()
    if path is None:
        return "the native library is not built (dfptkd doctor --build-native)"
    if _is_cut_short(path):  # to load it would end the process by SIGBUS
        return f"{path} is damaged: expected a whole file (dfptkd doctor --build-native)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its last part, the table of its sections, does."""
    with path.open("rb") as file:
        header = file.read(64)
    if not header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian
        return False
    if len(header) < 64:
        return True
    (table,) = struct.unpack_from("<Q", header, 0x28)
    size, number = struct.unpack_from("<HH", header, 0x3A)
    return path.stat().st_size < table + size * number


def backend_failures() -> tuple[type[Exception], ...]:
    """Exceptions by which compiled or fused code says that it does not work here.

    For `except backend_failures()`: what Dynamo, Inductor, a compiler that is missing or fails,
    Triton and the driver raise. torch.OutOfMemoryError is one of them, being a RuntimeError; who
    would not try anything else after it catches it before.
    """
    errors = sys.modules.get("triton.errors")  # not imported: it has raised nothing
    return (
        RuntimeError,
        OSError,  # no compiler, no cache folder
        subprocess.SubprocessError,  # a compiler that fails
        ImportError,  # what it made does not load
        *(() if errors is None else (errors.TritonError,)),
    )


def _find_triton() -> str | None:
    if not _has_triton():
        return "triton is not installed"
    if _probe_triton.cache_info().currsize == 0:
        # The question costs a machine without a GPU nothing. A capture does not take a probe, nor
        # does it need one: what was launched before it has asked.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if interpreted or not torch.cuda.is_available() or _is_capturing():
            return None
    return _probe_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _probe_triton() -> str | None:
    try:
        from .triton_probe import probe
    except Exception as error:  # an installation that is broken
        return f"triton does not import: {error}"
    reason = probe()
    return None if reason is None else f"triton cannot launch a kernel: {reason}"


def fast_backend(device: str) -> str | None:
    """The fast backend of a type of device; None for one that has none."""
    return _AUTOMATIC.get(device)


def refusal(backend: str, operation: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve calls of this kind, in one phrase; None: it can."""
    if backend == "reference":
        return None
    dtypes = OPERATIONS[COMPOSITES.get(operation, operation)].get(backend)
    if dtypes is None:
        return f"{operation} has no {backend} backend"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if _AUTOMATIC.get(device) != backend and not (interpreted and device == "cpu"):
        return f"{backend} does not run on {device} tensors"
    if dtype not in dtypes:
        return f"the {backend} backend of {operation} does not take {dtype}"
    return unavailable(backend)


def _resolve(operation: str, device: str, dtype: torch.dtype, forced: str | None) -> str:
    if operation not in (*OPERATIONS, *COMPOSITES):
        raise ValueError(
            f"unknown operation {operation!r}: expected one of {', '.join(OPERATIONS)}"
        )
    if forced in _LEFT_TO_PYTORCH.get(operation, ()):
        return "reference"
    if forced is not None:
        reason = refusal(forced, operation, device, dtype)
        if reason:
            raise RuntimeError(f"use_backend({forced!r}): {reason}")
        return forced
    if operation in _MEASURED_ONLY:
        return "reference"
    fast = _AUTOMATIC.get(device, "reference")
    return "reference" if refusal(fast, operation, device, dtype) else fast


def _resolve_at(
    operation: str,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    options: tuple[str | int | float, ...],
    forced: str | None,
    choices: str | None,
) -> str:
    if forced is not None or choices is None:
        return _resolve(operation, device, dtype, forced)
    return _CHOICES[choices].get(Site(operation, device, dtype, shape, options), "reference")


@functools.cache
def _log_fallback_once(what: str, reason: str) -> None:
    _log.warning("%s: %s; the reference serves it, slower", what, reason)


def log_fallback(operation: str, device: str, dtype: torch.dtype, asked: str | None = None) -> None:
    """Says once why an operation cannot take the backend asked for, or, where none was, the fast
    one that it has for this device."""
    fast = asked or _AUTOMATIC.get(device)
    if operation not in _MEASURED_ONLY and fast in OPERATIONS[operation]:
        reason = str(refusal(fast, operation, device, dtype))
        # What the machine lacks is said once and not for each operation.
        lacking = reason == unavailable(fast)
        _log_fallback_once("fused operations" if lacking else operation, reason)


# torch.compile calls these while it traces and keeps the answer: nothing in a graph changes it.
# The same mark as torch.compiler.assume_constant_result, which imports the whole compiler.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
_resolve_at._dynamo_marked_constant = True  # type: ignore[attr-defined]
log_fallback._dynamo_marked_constant = True  # type: ignore[attr-defined]
