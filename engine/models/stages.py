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

PROBE_SIZES = (32, 224, 64, 96, 128, 160, 192, 240, 256, 288, 299, 384)
"""Image sides in pixels that are tried in turn to find the stages' channels: what stays the same at
two of them."""


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
    is_map: list[bool]
    """For each stage: its output is [B, C, H, W]."""


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
        UsageError: No known stages, an unknown path, a model that cannot be traced or cut there, an
            in-place operation that overwrites a stage output, or a stage output with its channels
            in another place.
    """
    model = unwrapped(model)
    parts = cut_after(model, tuple(at)) if at is not None else _known_parts(model)
    shapes = _probe_shapes(model, parts)
    *channels, width = (_channels(model, number, *pair) for number, pair in enumerate(shapes, 1))
    is_map = [len(pair[0]) == 4 for pair in shapes[:-1]]
    stages = list(parts.stages)
    return Stages(stages, parts.neck, parts.head, channels, parts.post_relu, width, is_map)


def _known_parts(model: nn.Module) -> Parts:
    name = type(model).__name__
    children = ", ".join(name for name, _ in model.named_children())
    advice = (
        "pass --teacher.stages a,b,c with the paths of the modules that end a stage (top level: "
        f"{children}), or a method without prompt blocks (kd, dkd, dist)"
    )
    try:
        parts = model.parts() if isinstance(model, StagedModel) else external_parts(model)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # of another version
        raise UsageError(
            f"{name} is not built as expected of it ({first_line(error)}): {advice}"
        ) from error
    if parts is None:
        raise UsageError(f"{name} has no known stages: {advice}")
    return parts


def _probe_shapes(model: nn.Module, parts: Parts) -> list[tuple[torch.Size, torch.Size]]:
    """Shape of each stage output and of the neck's, for images of two sizes; for a model that takes
    one size alone the same shape twice."""
    reasons: list[str] = []
    found: list[list[torch.Size]] = []
    for size in PROBE_SIZES:
        try:
            found.append(_shapes_at(model, parts, size, with_head=not found))
        except UsageError:
            raise
        except Exception as error:  # of foreign code
            reasons.append(f"{size} px: {first_line(error)}")
        if len(found) == 2:
            break
    if not found:
        name = type(model).__name__
        raise UsageError(f"{name} takes no square RGB image ({'; '.join(reasons[:2])})")
    return list(zip(found[0], found[-1], strict=True))


def _shapes_at(model: nn.Module, parts: Parts, size: int, *, with_head: bool) -> list[torch.Size]:
    """Runs the pieces on the meta device, where nothing is computed and nothing can change.

    A head may take one size of maps alone, and has no channels to be found.
    """
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    values = [torch.empty(2, 3, size, size, dtype=dtype, device="meta")]
    versions = []
    for number, piece in enumerate((*parts.stages, parts.neck, *[parts.head] * with_head), 1):
        versions.append(values[-1]._version)  # counts writes in place, also those through a view
        value = _run_on_meta(piece, values[-1])
        if not isinstance(value, Tensor):
            raise UsageError(
                f"stage {number} of {type(model).__name__} returns a {type(value).__name__}: "
                "expected one tensor"
            )
        values.append(value)

    count = len(parts.stages)
    for i in range(count + 1):
        if values[i]._version != versions[i]:
            what = f"the output of stage {i}" if i else "the image"
            raise UsageError(
                f"{type(model).__name__} overwrites {what} in place: end the stage after that"
            )
    return [value.shape for value in values[1 : count + 2]]


def _run_on_meta(piece: nn.Module, x: Tensor) -> Tensor:
    tensors = itertools.chain(piece.named_parameters(), piece.named_buffers())
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    with torch.no_grad():
        return functional_call(piece, state, (x,))


def _channels(model: nn.Module, number: int, shape: torch.Size, other: torch.Size) -> int:
    """Channels of an output, given its shapes for square images of two sizes.

    Raises:
        UsageError: They are not where convolutions, or a mean over tokens, look for them.
    """
    place = 2 if len(shape) == 3 else 1
    # Channels do not grow with the image; and an image as high as it is wide gives such maps.
    moved = shape[place:][:1] != other[place:][:1]
    moved |= len(shape) == 4 and shape[1] == shape[2] != shape[3]
    if len(shape) not in (2, 3, 4) or moved:
        raise UsageError(
            f"stage {number} of {type(model).__name__} returns shape {list(shape)}: expected "
            "[B, C, H, W], or tokens [B, T, C]"
        )
    return shape[place]
