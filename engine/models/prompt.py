"""Prompt block P_i and fusion block F_i of one teacher stage: x -> F_i(x + P_i(x)).

    P_i = 1x1 down (C -> m); for each kernel k: partial convolution (first c_p of m channels), 1x1;
          1x1 up (m -> C)
    F_i = 1x1 (C -> C)                m = max(C / r1, min_width), c_p = max(round(m r2), 1)

The blocks and their order are stated by reviews of arXiv 2506.18244; normalisation, activation,
initialisation and the values of r1, r2 and the kernels are *our reading* (not known to us from
the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


class PromptBlock(nn.Module):
    """P_i: a prompt of the shape of its input."""

    def __init__(self, channels: int, config: PromptConfig) -> None:
        super().__init__()
        width = max(channels // config.r1, config.min_width)
        touched = max(int(width * config.r2 + 0.5), 1)
        norm, act = config.prompt_norm, config.prompt_act
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


class PromptFusion(nn.Module):
    """The pair of one stage, x -> F(x + P(x)).

    Args:
        channels: C, channels of the stage's output.
        config: Shape of the blocks.
        post_relu: Whether the stage's output is non-negative; `fusion_act="auto"` then ends in a
            ReLU, which keeps the input domain of the frozen next stage.

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
        self._initialise(config.init)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> same
        return self.fusion(x + self.prompt(x))

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
