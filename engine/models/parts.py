"""What a network of several stages says about itself: the pieces its forward pass chains."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ...kernels.backend import in_force
from ...kernels.dual_path_loss import upcast


class Parts(NamedTuple):
    """Pieces whose chain head(neck(stages(x))) is the forward pass, sharing the model's modules."""

    stages: Sequence[nn.Module]
    neck: nn.Module
    """What the backbone still does after its last stage; Identity where there is nothing."""
    head: nn.Module
    """Pool, flatten, linear."""
    post_relu: list[bool]
    """For each stage: its output is non-negative by construction."""


class StagedModel(nn.Module):
    """A classifier of ours: images [B, 3, H, W] to logits [B, C], cut into stages by `parts`.

    No module may overwrite a stage output in place: prompt and fusion blocks read it too.
    """

    def parts(self) -> Parts:
        """The pieces of the forward pass; new containers around the model's own modules."""
        raise NotImplementedError


def pooled_head(pool: nn.Module, linear: nn.Module) -> nn.Sequential:
    """The usual head: [B, C, H, W] -> [B, C] -> [B, num_classes]."""
    return nn.Sequential(pool, nn.Flatten(1), linear)


def pooled(x: Tensor) -> Tensor:
    """Features [B, C] of what a head reads: the mean over positions of maps [B, C, H, W] or tokens
    [B, T, C]; in fp32 at least.

    Of a `pooled_head` that pools by the mean these are the inputs of its linear layer.
    """
    x = upcast(x)
    return x.mean(dim=(2, 3)) if x.dim() == 4 else x.mean(dim=1) if x.dim() == 3 else x


Module = TypeVar("Module", bound=nn.Module)


def channels_last(module: Module, device: torch.device | None = None) -> Module:
    """`module` on `device`, its tensors [N, C, H, W] in memory channels last; in place.

    torch's own `Module.to` refuses a module that also has tensors of five dimensions.
    """

    def move(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        return tensor.to(device or tensor.device, memory_format=layout)

    return module._apply(move)


def init_convolutions(model: nn.Module) -> None:
    """Initialisation of the CRD definitions: He normal over fan-out, no bias, BatchNorm (1, 0)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's interleaving: channel (g, c) of [B, G * C', H, W] moves to (c, g)."""
    batch, channels, height, width = x.shape
    # Pixels first: one copy that ends in channels_last, where channels first would need a second.
    x = x.permute(0, 2, 3, 1).reshape(batch, height, width, groups, channels // groups)
    return x.transpose(3, 4).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, out of DataParallel, DistributedDataParallel, AveragedModel and what
    torch.compile returns: they run it as a whole, and have no layers of their own."""
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while True:
        if isinstance(model, kinds):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode; afterwards every part of it is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class Remembered:
    """A function that knows its last call: asked with the same first argument again, the same
    object and not an equal one, by the same kernels, it gives the same result again."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self._last: tuple[Any, Any, Any] = (None, None, None)

    def __call__(self, argument: Any, *others: Any) -> Any:
        kernels = in_force()
        if self._last[0] is not argument or self._last[1] != kernels:
            self._last = (argument, kernels, self.function(argument, *others))
        return self._last[2]
