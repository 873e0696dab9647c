"""Which implementation serves a call: `reference`, `native` (C++ on CPU) or `triton` (CUDA).

An operation registers by one line in `OPERATIONS`: its name, and for each fast backend that it has
the dtypes which that backend takes. Devices belong to the backend itself. Its public function asks

    if choose("dual_path_loss", student) == "triton": ...

once a call and hands the answer to its backward: autograd runs in threads of its own, which
`use_backend` does not reach. Compiled code is traced again when the forced backend changes.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

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

# Operation -> backends that leave it to PyTorch, forced or not: cuDNN convolves well, and a few
# values a channel need no kernel on a GPU.
_LEFT_TO_PYTORCH = {"frozen_conv2d": ("triton",), "batch_norm_affine": ("triton",)}

_AUTOMATIC = {"cpu": "native", "cuda": "triton"}
_log = logging.getLogger(__name__)


class _Forced(threading.local):
    def __init__(self) -> None:  # in every thread; torch.compile guards on no class attribute
        self.name: str | None = None


_forced = _Forced()


def which_backend(operation: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """The backend that a call would take.

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
    return _resolve(operation, tensor.device.type, dtype or tensor.dtype, _forced.name)


def choose(operation: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """`which_backend`, for the operation itself: an automatic fall-back is logged once."""
    name = _resolve(operation, tensor.device.type, dtype or tensor.dtype, _forced.name)
    if name == "reference" and _forced.name is None:
        _log_fallback(operation, tensor.device.type, dtype or tensor.dtype)
    return name


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
    before = _forced.name
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = before


def forced_backend() -> str | None:
    """The backend that `use_backend` forces on this thread; None: every call takes the best."""
    return _forced.name


def unavailable(backend: str) -> str | None:
    """Why a backend cannot be used on this machine at all, in one phrase; None: it can."""
    return {"native": _load_native, "triton": _find_triton}.get(backend, lambda: None)()


def library_candidates() -> tuple[Path, Path]:
    """Where the native library is looked for: the package's folder, then the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # The digest keeps a library of other sources from being loaded out of the shared cache.
    return Path(__file__).parent / LIBRARY_NAME, cache / "dfptkd" / source_digest() / LIBRARY_NAME


def library_path() -> Path | None:
    """The native library that is loaded, or would be; None where it is not built."""
    return next((path for path in library_candidates() if path.is_file()), None)


@functools.cache
def _load_native() -> str | None:
    path = library_path()
    if path is None:
        return "the native library is not built (dfptkd doctor --build-native)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


@functools.cache
def _find_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _refusal(backend: str, operation: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve this call; None: it can."""
    if backend == "reference":
        return None
    dtypes = OPERATIONS[operation].get(backend)
    if dtypes is None:
        return f"{operation} has no {backend} backend"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if _AUTOMATIC.get(device) != backend and not (interpreted and device == "cpu"):
        return f"{backend} does not run on {device} tensors"
    if dtype not in dtypes:
        return f"the {backend} backend of {operation} does not take {dtype}"
    return unavailable(backend)


def _resolve(operation: str, device: str, dtype: torch.dtype, forced: str | None) -> str:
    if operation not in OPERATIONS:
        raise ValueError(
            f"unknown operation {operation!r}: expected one of {', '.join(OPERATIONS)}"
        )
    if forced in _LEFT_TO_PYTORCH.get(operation, ()):
        return "reference"
    if forced is not None:
        reason = _refusal(forced, operation, device, dtype)
        if reason:
            raise RuntimeError(f"use_backend({forced!r}): {reason}")
        return forced
    fast = _AUTOMATIC.get(device, "reference")
    return "reference" if _refusal(fast, operation, device, dtype) else fast


@functools.cache
def _log_fallback_once(operation: str, reason: str) -> None:
    _log.warning("%s: %s; the reference serves it, slower", operation, reason)


def _log_fallback(operation: str, device: str, dtype: torch.dtype) -> None:
    fast = _AUTOMATIC.get(device)
    if fast in OPERATIONS[operation]:
        _log_fallback_once(operation, str(_refusal(fast, operation, device, dtype)))


# torch.compile calls these while it traces and keeps the answer: nothing in a graph changes it.
# The same mark as torch.compiler.assume_constant_result, which imports the whole compiler.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
_log_fallback._dynamo_marked_constant = True  # type: ignore[attr-defined]
