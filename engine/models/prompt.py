"""Prompt block P_i and fusion block F_i of one teacher stage: x -> F_i(x + P_i(x)).

    P_i = 1x1 down (C -> m); for each kernel k: partial convolution (first c_p of m channels), 1x1;
          1x1 up (m -> C)
    F_i = 1x1 (C -> C)                m = max(C / r1, min_width), c_p = max(round(m r2), 1)

The blocks and their order are stated by reviews of arXiv 2506.18244; normalisation, activation,
initialisation and the values of r1, r2 and the kernels are *our reading* (not known to us from
the paper).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...kernels import affine_relu, batch_norm_affine, partial_pointwise_conv
from ...kernels.backend import Call, autocast_dtype, choose_at, decide_at, is_measuring
from ...kernels.partial_pointwise_conv import partial_conv
from ..config import PromptConfig
from ..errors import UsageError


class PartialConv2d(nn.Module):
    """k x k convolution of the first c_p channels, the rest untouched (arXiv 2303.03667)."""

    def __init__(self, touched: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(touched, touched, kernel, kernel))

    def forward(self, x: Tensor) -> Tensor:  # [B, m, H, W] -> same
        return partial_conv(x, self.weight)


class Pending(NamedTuple):
    """An activation act(y * scale + shift) that its reader is still to apply."""

    y: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False

    def applied(self) -> Tensor:
        """The activation itself, [B, C, H, W]."""
        return affine_relu(self.y, self.scale, self.shift, relu=self.relu)


class PromptBlock(nn.Module):
    """P_i: a prompt of the shape of its input."""

    def __init__(self, channels: int, config: PromptConfig) -> None:
        super().__init__()
        width = max(channels // config.r1, config.min_width)
        touched = max(int(width * config.r2 + 0.5), 1)
        norm, act = config.prompt_norm, config.prompt_act
        self.words = (f"width {width}", f"partial {touched}", *config.kernels)
        self.parallel = config.arrangement == "parallel"
        self.down = _pointwise(channels, width, norm, act)
        self.scales = nn.ModuleList(
            nn.Sequential(PartialConv2d(touched, kernel), *_pointwise(width, width, norm, act))
            for kernel in config.kernels
        )
        # The last layer is linear, so that an additive prompt can be negative.
        self.up = _pointwise(width, channels, norm, "none")

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> same
        h = self.down(x)
        if self.parallel:
            h = torch.stack([scale(h) for scale in self.scales]).sum(dim=0)
        else:
            for scale in self.scales:
                h = scale(h)
        return self.up(h)

    def fused(self, x: Tensor) -> Pending:
        """The same prompt by `partial_pointwise_conv`, its last BatchNorm pending."""
        h = _convolve(self.down, Pending(x))
        if not self.parallel:
            for scale in self.scales:
                h = _convolve(scale[1:], h, partial=scale[0].weight)
            return _convolve(self.up, h)
        outputs = [_convolve(scale[1:], h, partial=scale[0].weight) for scale in self.scales]
        others = [output.applied() for output in outputs[:-1]]
        residual = torch.stack(others).sum(dim=0) if others else None
        return _convolve(self.up, outputs[-1], residual=residual)


class PromptFusion(nn.Module):
    """The pair of one stage, x -> F(x + P(x)).

    Args:
        channels: C, channels of the stage's output.
        config: Shape of the blocks.
        post_relu: Whether the stage's output is non-negative; `fusion_act="auto"` then ends in a
            ReLU, which keeps the input domain of the frozen next stage.

    Attributes:
        observer: Called with x and P(x) of every forward pass, where given.

    Raises:
        UsageError: `fusion_groups` does not divide the channels.
    """

    def __init__(
        self, channels: int, config: PromptConfig = PromptConfig(), *, post_relu: bool = True
    ) -> None:
        super().__init__()
        if channels % config.fusion_groups:
            raise UsageError(
                f"prompt.fusion_groups={config.fusion_groups}: expected a divisor of the stage's "
                f"{channels} channels"
            )
        act = config.fusion_act
        if act == "auto":
            act = "relu" if post_relu else "none"
        self.prompt = PromptBlock(channels, config)
        self.fusion = (
            _pointwise(channels, channels, config.fusion_norm, act, config.fusion_groups)
            if config.fusion
            else nn.Identity()
        )
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        fusion = (config.fusion_norm, act, config.fusion_groups) if config.fusion else ("none",)
        # What the work of the pair depends on beside its input: see kernels.backend.Site.
        self.words = (
            *self.prompt.words,
            config.arrangement,
            config.prompt_norm,
            config.prompt_act,
            "fusion",
            *fusion,
        )
        self._initialise(config.init)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> same
        if self.backend(x) != "reference":
            return self._fused(x)
        prompt = self.prompt(x)
        if self.observer is not None:
            self.observer(x, prompt)
        return self.fusion(x + prompt)

    def backend(self, x: Tensor) -> str:
        """The backend of the pair's convolutions for x [B, C, H, W]; the reference: plain layers.

        The reference unless measured choices or `use_backend` say otherwise.
        """
        if self._is_synchronised():
            return "reference"
        at = ("prompt_pair", x, x.shape[1:], self.words, autocast_dtype(x))
        if is_measuring():
            return decide_at(Call(self, (x,)), *at)
        return choose_at(*at)

    def _is_synchronised(self) -> bool:
        """Whether BatchNorms add their sums up over processes; the kernels' sums are one's own."""
        blocks = (self.prompt.up, self.prompt.down, self.fusion)
        return any(isinstance(m, nn.SyncBatchNorm) for block in blocks for m in block.children())

    def _fused(self, x: Tensor) -> Tensor:
        """The same by at most seven convolution kernels; no split, concatenation or other pass."""
        prompt = self.prompt.fused(x)
        if self.observer is not None:
            self.observer(x, prompt.applied())
        if isinstance(self.fusion, nn.Identity):
            return x + prompt.applied()
        return _convolve(self.fusion, prompt, residual=x).applied()

    def _initialise(self, init: str) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, PartialConv2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if init == "identity":
            nn.init.zeros_(self.prompt.up[0].weight)
            if isinstance(self.fusion, nn.Sequential):
                weight = self.fusion[0].weight  # [C, C / groups, 1, 1]
                per_group = weight.shape[1]
                with torch.no_grad():
                    eye = torch.eye(per_group).repeat(weight.shape[0] // per_group, 1)
                    weight.copy_(eye[:, :, None, None])


def _pointwise(
    channels_in: int, channels_out: int, norm: str, act: str, groups: int = 1
) -> nn.Sequential:
    """1x1 convolution, normalisation, activation; a bias only where no BatchNorm follows."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, 1, bias=norm == "none", groups=groups)
    ]
    if norm == "bn":
        layers.append(nn.BatchNorm2d(channels_out))
    if act == "relu":
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _convolve(
    layers: nn.Sequential,
    h: Pending,
    *,
    partial: Tensor | None = None,
    residual: Tensor | None = None,
) -> Pending:
    """A `_pointwise` of `layers` on h (and its partial convolution before), by one kernel."""
    conv = layers[0]
    y, sums, squared_sums = partial_pointwise_conv(
        h.y,
        h.scale,
        h.shift,
        partial,
        conv.weight.flatten(1),
        relu=h.relu,
        residual=residual,
        groups=conv.groups,
    )
    relu = isinstance(layers[-1], nn.ReLU)
    norm = layers[1] if len(layers) > 1 else None
    if isinstance(norm, nn.BatchNorm2d):
        scale, shift = _batch_norm(norm, sums, squared_sums, y.numel() // y.shape[1])
        return Pending(y, scale, shift, relu)
    return Pending(y, None, conv.bias, relu)


def _batch_norm(
    norm: nn.BatchNorm2d, sums: Tensor, squared_sums: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """scale and shift of a BatchNorm, as its mode says; in training mode its buffers move."""
    if not norm.training:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # type: ignore[operator]
        return scale, norm.bias - norm.running_mean * scale  # type: ignore[operator]
    if count == 1:  # as torch's own: one value has no variance
        raise ValueError("BatchNorm in training mode needs more than 1 value per channel")
    scale, shift, mean, var = batch_norm_affine(
        sums, squared_sums, norm.weight, norm.bias, count, norm.eps
    )
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)  # type: ignore[union-attr]
        norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)  # type: ignore[union-attr]
    return scale, shift
