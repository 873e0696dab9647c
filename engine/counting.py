"""FLOPs and bytes of a step by component, counted on tensors that have a shape and no memory.

FLOPs are those of torch's FlopCounterMode (2 FLOP a MAC; convolutions and matrix products) on the
eager reference, forward and backward: what autograd really does. The formulas of models/cost.py
charge an input gradient to every convolution; where nothing asks for one (at the images, at the
frozen output that the first prompt block reads) it is left out here and reported on its own.

Bytes are the reads and writes of all tensor arguments of all operations of the eager reference, as
if no cache held anything and no kernel did the work of two: an upper bound.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ..kernels import use_backend
from .config import RunConfig
from .data import Batch, ImageData
from .methods import Method
from .optim import build_ema
from .step import TrainStep
from .timeline import Ledger, Part, borders

aten = torch.ops.aten
_ALLOCATE = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)


@dataclass(frozen=True)
class Work:
    """What a part of a step does."""

    flops: int = 0
    """2 a MAC."""
    bytes: int = 0
    """Read and written by unfused operations."""


@dataclass(frozen=True)
class StepWork:
    """What a whole step does."""

    parts: dict[Part, Work]
    left_out_flops: int
    """Input gradients of convolutions that the formulas charge and nothing asks for."""

    @property
    def flops(self) -> int:
        """Of all parts."""
        return sum(work.flops for work in self.parts.values())


def count_work(
    method: Method, config: RunConfig, data: ImageData, device: torch.device
) -> StepWork:
    """Count one step on a batch of `config.global_batch`; nothing is allocated or run.

    Args:
        method: Left as it is.
        config: The run; its execution mode does not matter.
        data: For mean, standard deviation and image size.
        device: Where the step would run, which decides the dtypes under mixed precision.
    """
    ema = build_ema(method.student, config.optim.ema_decay)
    twins = copy.deepcopy(method), ema
    optim = replace(config.optim, ema_decay=None)  # torch's average cannot be made of fake tensors
    plain = replace(config, optim=optim, step=replace(config.step, mode="eager"))
    gradients = _LeftOut()
    formulas: dict[Any, Any] = {aten.convolution_backward: gradients.flops}
    with FakeTensorMode(), use_backend("reference"):
        faked, average = (None if twin is None else _without_memory(twin, device) for twin in twins)
        step = TrainStep(
            faked,  # type: ignore[arg-type]
            plain,
            data,
            total_steps=1,
            steps_per_epoch=1,
            device=device,
        )
        step.config, step.ema = replace(plain, optim=config.optim), average  # type: ignore[assignment]
        batch = _batch(config.global_batch, data.image_size, device)
        traffic = Traffic()
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        with traffic, counter:
            ledger = Ledger(lambda: (counter.get_total_flops(), traffic.bytes))
            with borders(step, ledger.enter):
                step.body(batch, 0)
            ledger.close()
    parts = {part: Work(*entry) for part, entry in ledger.entries.items()}
    return StepWork(parts, gradients.left_out)


def _without_memory(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every tensor replaced; to be called in a FakeTensorMode."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    return module._apply(fake)


def _batch(size: int, image_size: tuple[int, int], device: torch.device) -> Batch:
    """Without a crop, whose offsets would have to be looked at."""
    images = torch.empty(size, *image_size, 3, dtype=torch.uint8, device=device)
    labels = torch.empty(size, dtype=torch.int64, device=device)
    flip = torch.empty(size, dtype=torch.bool, device=device)
    return Batch(images, labels, None, flip, labels)


class _LeftOut:
    """The FLOPs of a convolution's backward, and of the gradients that it does not compute."""

    def __init__(self) -> None:
        self.left_out = 0

    def flops(
        self,
        grad_y: list[int],
        x: list[int],
        weight: list[int],
        _bias: Any,
        _stride: Any,
        _padding: Any,
        _dilation: Any,
        transposed: bool,
        _output_padding: Any,
        _groups: int,
        mask: list[bool],
        **_: Any,
    ) -> int:
        """Each gradient costs what the forward pass does.

        torch's own formula takes a grouped weight gradient for a dense one, too much by the number
        of groups.
        """
        once = conv_flop_count(x, weight, grad_y, transposed)
        if mask[1] and not mask[0]:
            self.left_out += once
        return once * (mask[0] + mask[1])


class Traffic(TorchDispatchMode):
    """Sums the bytes that every operation inside reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not (func.is_view or func in _ALLOCATE):
            self.bytes += _bytes([_read(func, args), kwargs]) + _bytes(output)
        return output


def _read(func: Any, args: tuple) -> tuple:
    """Arguments whose values matter: a gradient needs the other factor of the product alone."""
    if func is not aten.convolution_backward.default:
        return args
    grad_y, x, weight, *_, mask = args
    return grad_y, x if mask[1] else None, weight if mask[0] else None


def _bytes(tree: Any) -> int:
    """Of all tensors in it; an expanded one counts as the memory that it has."""
    return sum(
        min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
        for t in tree_leaves(tree)
        if isinstance(t, Tensor)
    )
