"""Whether networks fit the images of a run and the parts of its batches: known before anything is
trained.

One forward and one backward pass of a copy whose tensors have a shape and no memory: nothing is
computed, no random number is drawn, and the network, its statistics and its gradients stay as they
are. Code that such tensors do not take is run again on a real copy, with at most two images: what
fails then is the network's own refusal.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import use_backend
from ..config import RunConfig
from ..errors import UsageError
from ..files import first_line
from .parts import channels_last

MOST_REAL_IMAGES = 2  # one image is what many networks do not take in training mode, two are many


@dataclass(frozen=True)
class Demand:
    """The demands of a run on its networks."""

    num_classes: int
    image_size: tuple[int, int]
    """H, W in pixels."""
    part: int
    """Images of the smallest part of a batch that is trained on."""
    evaluated: int
    """Images of the smallest batch of an evaluation."""
    start_size: tuple[int, int] | None = None
    """H, W in pixels of the first training images, where they grow."""

    @property
    def trained_sizes(self) -> list[tuple[int, int]]:
        """H, W of the smallest and of the largest training images."""
        first = [] if self.start_size in (None, self.image_size) else [self.start_size]
        return [*first, self.image_size]  # type: ignore[list-item]


def check_student(name: str, network: nn.Module, demand: Demand) -> None:
    """Refuse a network that cannot be trained and evaluated as a run needs it.

    Args:
        name: As the user has it.
        network: Images [B, 3, H, W] to logits [B, num_classes]; it is not touched.
        demand: Of the run.

    Raises:
        UsageError: It names the network, the images and what was expected.
    """
    who = f"student {name}"
    for size in demand.trained_sizes:
        _check(who, network, demand.part, size, demand.num_classes, training=True)
    _check(who, network, demand.evaluated, demand.image_size, demand.num_classes, training=False)


def check_teacher(name: str, network: nn.Module, demand: Demand) -> None:
    """Refuse a network that gives no logits in eval mode; arguments and errors as of
    `check_student`."""
    who = f"teacher {name}"
    for size in demand.trained_sizes:
        _check(who, network, demand.part, size, demand.num_classes, training=False)
    _check(who, network, demand.evaluated, demand.image_size, demand.num_classes, training=False)


def check_step(config: RunConfig, method: nn.Module, demand: Demand) -> None:
    """Refuse networks that do not fit together, or whose new parts do not fit the images.

    Args:
        config: For the names in the message.
        method: As `build_method` makes it; it is not touched.
        demand: Of the run.

    Raises:
        UsageError: It names the method, the images and what was expected.
    """

    def step(twin: Any, images: Tensor) -> Tensor:
        return twin(*twin.example(images)).total

    who = f"method {config.method} with teacher {config.teacher.name}"
    for size in demand.trained_sizes:
        _passes(who, method, step, demand.part, size, training=True)


def meta_twin(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers lie on the meta device; none of them is copied."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, tensor.requires_grad)
                memo[id(tensor)] = empty
    return copy.deepcopy(module, memo)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Afterwards the generators of the host stand where they stood before."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _check(
    who: str,
    network: nn.Module,
    images: int,
    size: tuple[int, int],
    num_classes: int,
    *,
    training: bool,
) -> None:
    """One network, alone."""

    def call(twin: nn.Module, x: Tensor) -> Any:
        return twin(x)

    output, count = _passes(who, network, call, images, size, training=training)
    mode = "training" if training else "evaluation"
    expected = f"expected one tensor of logits [B, {num_classes}]"
    if not isinstance(output, Tensor):
        hint = " (a network with auxiliary heads can be a teacher)" if training else ""
        raise UsageError(
            f"{who} returns a {type(output).__name__} in {mode} mode: {expected}{hint}"
        )
    if output.shape != (count, num_classes) or not output.is_floating_point():
        raise UsageError(
            f"{who} returns {output.dtype} {list(output.shape)} in {mode} mode for {count} images "
            f"of {size[0]} x {size[1]} pixels: {expected}"
        )


def _passes(
    who: str,
    network: nn.Module,
    call: Callable[[nn.Module, Tensor], Any],
    images: int,
    size: tuple[int, int],
    *,
    training: bool,
) -> tuple[Any, int]:
    """The output of a pass, and of how many images; without memory where it can be had so.

    Raises:
        UsageError: There is none.
    """
    with same_random_numbers(), use_backend("reference"):
        try:
            return _pass(meta_twin(network), call, images, size, training), images
        except Exception:  # of foreign code: its own, or of an operation that needs values
            real = min(images, MOST_REAL_IMAGES)
        try:
            return _pass(copy.deepcopy(network), call, real, size, training), real
        except Exception as error:
            reason = first_line(error)
        verb = "trained on parts" if training else "evaluated on batches"
        pixels = f"{size[0]} x {size[1]} pixels"
        expected = f"expected a network for images of {pixels}"
        if training and images == 1 and _takes_two(network, call, size):
            expected = (
                "expected 2 images or more in every part of a batch (a larger --global-batch, or "
                "a smaller --accumulate)"
            )
    plural = "" if images == 1 else "s"
    raise UsageError(
        f"{who} cannot be {verb} of {images} image{plural} of {pixels} ({reason}): {expected}"
    )


def _takes_two(
    network: nn.Module, call: Callable[[nn.Module, Tensor], Any], size: tuple[int, int]
) -> bool:
    try:
        _pass(copy.deepcopy(network), call, 2, size, True)
    except Exception:
        return False
    return True


def _pass(
    twin: nn.Module,
    call: Callable[[nn.Module, Tensor], Any],
    images: int,
    size: tuple[int, int],
    training: bool,
) -> Any:
    """Forward, and in training mode backward, of a copy that may be written on."""
    tensor = next(iter((*twin.parameters(), *twin.buffers())), torch.empty(0))
    x = torch.zeros(images, 3, *size, device=tensor.device)
    x = x.contiguous(memory_format=torch.channels_last)
    channels_last(twin.train(training))
    with torch.set_grad_enabled(training):
        output = call(twin, x)
        if training and isinstance(output, Tensor) and output.requires_grad:
            output.float().sum().backward()
    return output
