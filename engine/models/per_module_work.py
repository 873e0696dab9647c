"""What PyTorch does for every module by itself in a training forward pass, done once for all.

A BatchNorm counts its batches, autocast casts the weight of every convolution and every gradient
back: some two hundred kernels of a step, each of a few hundred values, which cost their launch and
nothing else. Both are taken out of the forward pass here and done by one call over all tensors. The
values are those of PyTorch's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .prompt import PartialConv2d


class BatchCounters:
    """The `num_batches_tracked` of networks.

    Args:
        networks: Whatever runs in training mode; only BatchNorms with torch's own forward pass and
            a fixed momentum are taken, which read no count.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self.norms = [
            module
            for network in networks
            for module in network.modules()
            if isinstance(module, _BatchNorm)
            and type(module).forward is _BatchNorm.forward
            and module.momentum is not None
            and module.num_batches_tracked is not None
        ]

    def owns(self, buffer: Tensor) -> bool:
        """Whether `buffer` is one of the counts."""
        return any(buffer is norm.num_batches_tracked for norm in self.norms)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Forward passes inside count nothing."""
        counts = [norm.num_batches_tracked for norm in self.norms]
        for norm in self.norms:
            norm._buffers["num_batches_tracked"] = None
        try:
            yield
        finally:
            for norm, count in zip(self.norms, counts, strict=True):
                norm._buffers["num_batches_tracked"] = count

    @torch.no_grad()
    def add(self, batches: Tensor) -> None:
        """Count `batches` (0-d int64, on the device) for every BatchNorm in training mode."""
        counts = [norm.num_batches_tracked for norm in self.norms if norm.training]
        if counts:
            # A list of it: the host would read one tensor that serves for all.
            torch._foreach_add_(counts, [batches] * len(counts))


class CastWeights:
    """Weights and biases of convolutions and linear layers in autocast's dtype.

    Args:
        networks: Whatever is trained.
        dtype: What autocast casts to; None: it is off, and nothing is done.
    """

    def __init__(self, networks: Iterable[nn.Module], dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.slots: list[tuple[nn.Module, str]] = []
        kinds = (nn.Conv2d, nn.Linear)
        for module in [m for network in networks for m in network.modules()]:
            is_plain = type(module) is PartialConv2d or any(
                isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds
            )
            for name in ("weight", "bias") if is_plain and dtype is not None else ():
                value = module._parameters.get(name)
                if value is not None and value.requires_grad and value.dtype == torch.float32:
                    self.slots.append((module, name))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Forward passes inside read the cast weights; their gradients reach the real ones."""
        if self.dtype is None or not self.slots:
            yield
            return
        own = [module._parameters[name] for module, name in self.slots]
        cast = _CastTogether.apply(self.dtype, *own)
        for (module, name), value in zip(self.slots, cast, strict=True):
            module._parameters[name] = value
        try:
            yield
        finally:
            for (module, name), value in zip(self.slots, own, strict=True):
                module._parameters[name] = value


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        return tuple(_cast(tensors, [dtype] * len(tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [(g, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True) if g is not None]
        cast = iter(_cast([g for g, _ in given], [dtype for _, dtype in given]))
        return None, *(None if g is None else next(cast) for g in grads)


def _cast(tensors: Iterable[Tensor], dtypes: Iterable[torch.dtype]) -> list[Tensor]:
    tensors = list(tensors)
    cast = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    if tensors:
        torch._foreach_copy_(cast, tensors)
    return cast
