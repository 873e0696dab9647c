"""Cutting a classifier into stages, neck and head that share its modules."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UsageError
from ..files import first_line
from .external import external_parts
from .parts import Parts, StagedModel, unwrapped
from .trace import cut_after

PROBE_SIZES = (32, 224)
"""Image sides in pixels that are tried in turn to find the stages' channels."""


@dataclass(frozen=True)
class Stages:
    """A model as a chain: head(neck(stage_N(... stage_1(x)))) is the model's own forward pass.

    The modules are the model's own, in new containers: a change to one is a change to the model.
    """

    stages: list[nn.Module]
    neck: nn.Module
    """What the backbone still does after its last stage; Identity where there is nothing."""
    head: nn.Module
    """Pool, flatten, linear."""
    channels: list[int]
    """Channels of each stage output: [B, C, H, W], or tokens [B, T, C]."""
    post_relu: list[bool]
    """For each stage: its output is non-negative by construction."""
    width: int
    """Features that the head reads: channels of the neck's output."""


def split_stages(model: nn.Module, at: Iterable[str] | None = None) -> Stages:
    """Cuts a classifier after each stage (boundaries: method reference, section 6, *our reading*).

    Args:
        model: A model of our zoo, a torchvision ResNet, VGG, MobileNet V2 or ShuffleNet V2, a timm
            ResNet or EfficientNet; any other model that torch.fx can trace, with `at`. One inside
            DataParallel or torch.compile is taken out of it.
        at: Module paths whose outputs end a stage, in order of execution.

    Returns:
        The pieces; in fp32 and eval mode their chain gives the bits of `model(x)`.

    Raises:
        UsageError: No known stages, an unknown path, a model that cannot be traced or cut there, or
            an in-place operation that overwrites a stage output.
    """
    model = unwrapped(model)
    parts = cut_after(model, tuple(at)) if at is not None else _known_parts(model)
    *channels, width = _probe_channels(model, parts)
    return Stages(list(parts.stages), parts.neck, parts.head, channels, parts.post_relu, width)


def _known_parts(model: nn.Module) -> Parts:
    parts = model.parts() if isinstance(model, StagedModel) else external_parts(model)
    if parts is None:
        children = ", ".join(name for name, _ in model.named_children())
        raise UsageError(
            f"{type(model).__name__} has no known stages: pass --teacher.stages a,b,c with the "
            f"paths of the modules that end a stage (top level: {children})"
        )
    return parts


def _probe_channels(model: nn.Module, parts: Parts) -> list[int]:
    reasons = []
    for size in PROBE_SIZES:
        try:
            return _channels_at(model, parts, size)
        except UsageError:
            raise
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            reasons.append(f"{size} px: {first_line(error)}")
    raise UsageError(f"{type(model).__name__} takes no square RGB image ({'; '.join(reasons)})")


def _channels_at(model: nn.Module, parts: Parts, size: int) -> list[int]:
    """Channels of each stage output and of the neck's.

    Runs all pieces on the meta device, where nothing is computed and nothing can change.
    """
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    values = [torch.empty(2, 3, size, size, dtype=dtype, device="meta")]
    versions = []
    for piece in (*parts.stages, parts.neck, parts.head):
        versions.append(values[-1]._version)  # counts writes in place, also those through a view
        values.append(_run_on_meta(piece, values[-1]))

    count = len(parts.stages)
    for i in range(count + 1):
        if values[i]._version != versions[i]:
            what = f"the output of stage {i}" if i else "the image"
            raise UsageError(
                f"{type(model).__name__} overwrites {what} in place: end the stage after that"
            )
    width = values[count + 1].shape[2 if values[count + 1].dim() == 3 else 1]
    return [*(_channels(values[i], i) for i in range(1, count + 1)), width]


def _run_on_meta(piece: nn.Module, x: Tensor) -> Tensor:
    tensors = itertools.chain(piece.named_parameters(), piece.named_buffers())
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    with torch.no_grad():
        return functional_call(piece, state, (x,))


def _channels(output: Tensor, stage: int) -> int:
    if output.dim() == 4:
        return output.shape[1]
    if output.dim() == 3:
        return output.shape[2]
    raise UsageError(
        f"stage {stage} returns shape {list(output.shape)}, expected [B, C, H, W] or [B, T, C]"
    )
