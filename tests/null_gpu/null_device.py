"""The Python side of the null GPU: what it counted, and convolutions without cuDNN.

Imported in a process that has the library in front of torch (build.py); torch calls `install` at
the end of its own import.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_library: ctypes.CDLL | None = None
_registrations: list[object] = []  # they hold while the object lives
MOST_WORKSPACES = 32


def library() -> ctypes.CDLL:
    """The one that was preloaded."""
    global _library
    if _library is None:
        _library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        for name in ("null_gpu_count_name", "null_gpu_violation"):
            getattr(_library, name).restype = ctypes.c_char_p
        _library.null_gpu_violation.argtypes = [ctypes.c_long]
        _library.null_gpu_nodes.restype = ctypes.c_long
    return _library


def _names() -> list[str]:
    names: list[str] = []
    while name := library().null_gpu_count_name(len(names)):
        names.append(name.decode())
    return names


def counts() -> dict[str, int]:
    """What has happened since the process began; see `enum count` in null_gpu.h."""
    names = _names()
    values = (ctypes.c_long * len(names))()
    library().null_gpu_counts(values)
    return dict(zip(names, values, strict=True))


def since(before: dict[str, int]) -> dict[str, int]:
    """What has happened since `before`, an earlier answer of `counts`."""
    return {name: value - before[name] for name, value in counts().items()}


def violations() -> list[str]:
    """The rules of capture that were broken."""
    found: list[str] = []
    while text := library().null_gpu_violation(len(found)):
        found.append(text.decode())
    return found


def captures() -> int:
    """Captures begun so far."""
    return library().null_gpu_captures()


def nodes(capture: int) -> int:
    """Nodes of a capture's graph, by its number from 0."""
    return library().null_gpu_nodes(capture)


def workspaces(capture: int) -> set[int]:
    """Addresses of the workspaces that matrix products of a capture compute in."""
    found = (ctypes.c_void_p * MOST_WORKSPACES)()
    number = library().null_gpu_workspaces(capture, found, MOST_WORKSPACES)
    return set(found[:number])


# What cuDNN would do -----------------------------------------------------------------------------


def install() -> None:
    """Put stubs in the place of cuDNN's convolutions and BatchNorms: for each of its kernels one
    that fills with zeros. Tensors of one shape are equal, as they hold nothing."""
    import torch

    aten = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is another one: that is the purpose
        aten.impl("convolution", _convolution, "CUDA")
        aten.impl("convolution_backward", _convolution_backward, "CUDA")
        aten.impl("cudnn_batch_norm", _batch_norm, "CUDA")
        aten.impl("cudnn_batch_norm_backward", _batch_norm_backward, "CUDA")
        aten.impl("equal", _equal, "CUDA")
    _registrations.append(aten)


def _memory_format(x: Tensor, weight: Tensor):
    import torch

    cudnn = torch._C._ConvBackend.Cudnn
    return torch._C._conv_determine_backend_memory_format(x, weight, cudnn)


def _convolution(
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
) -> Tensor:
    import torch

    if x.device != weight.device or x.dtype != weight.dtype:
        raise RuntimeError(
            f"convolution of {x.dtype} on {x.device} with {weight.dtype} on {weight.device}"
        )
    sizes = []
    for i, size in enumerate(x.shape[2:]):
        s, p, d = (v[i % len(v)] for v in (stride, padding, dilation))
        reach = d * (weight.shape[2 + i] - 1)
        if transposed:
            sizes.append(
                (size - 1) * s - 2 * p + reach + output_padding[i % len(output_padding)] + 1
            )
        else:
            sizes.append((size + 2 * p - reach - 1) // s + 1)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    layout = _memory_format(x, weight)
    return torch.empty(
        (len(x), channels, *sizes), dtype=x.dtype, device=x.device, memory_format=layout
    ).zero_()


def _convolution_backward(
    gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups,
    wanted,
):  # fmt: skip
    import torch

    layout = _memory_format(x, weight)
    found = [
        torch.empty_like(tensor, memory_format=layout).zero_() if wants else None
        for tensor, wants in ((x, wanted[0]), (weight, wanted[1]))
    ]
    bias = weight.new_empty(gradient.shape[1]).zero_() if wanted[2] else None
    return (*found, bias)


def _batch_norm(x, weight, bias, mean, variance, training, momentum, eps):
    import torch

    channels = x.new_empty(x.shape[1], dtype=torch.float32)
    reserve = x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(x).zero_(), channels, torch.empty_like(channels), reserve


def _batch_norm_backward(x, gradient, weight, mean, variance, saved_mean, saved_var, eps, reserve):
    import torch

    return torch.empty_like(x).zero_(), torch.empty_like(weight), torch.empty_like(weight)


def _equal(a, b) -> bool:
    import torch

    torch.cuda.current_stream().synchronize()
    return a.shape == b.shape
