"""ShuffleNet V2 (size 1) for CIFAR: stem 1x1 of stride 1, names as in the CRD definitions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parts import Parts, StagedModel, channel_shuffle, pooled_head


class ShuffleUnit(nn.Module):
    """Half of the channels passes; the other half goes through 1x1, depthwise 3x3, 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passed, y = x.chunk(2, dim=1)
        y = F.relu(self.bn1(self.conv1(y)))
        y = self.bn2(self.conv2(y))
        y = F.relu(self.bn3(self.conv3(y)))
        return channel_shuffle(torch.cat([passed, y], 1), 2)


class DownUnit(nn.Module):
    """Two branches of stride 2, concatenated: (depthwise, 1x1) and (1x1, depthwise, 1x1)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)))
        return channel_shuffle(torch.cat([left, right], 1), 2)


class ShuffleNetV2(StagedModel):
    """Three stages of 116, 232 and 464 channels, then a 1x1 convolution to 1024."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 116, 3)
        self.layer2 = _stage(116, 232, 7)
        self.layer3 = _stage(232, 464, 3)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(self.avgpool(x).flatten(1))

    def parts(self) -> Parts:
        first = nn.Sequential(self.conv1, self.bn1, nn.ReLU(inplace=True), self.layer1)
        neck = nn.Sequential(self.conv2, self.bn2, nn.ReLU(inplace=True))
        head = pooled_head(self.avgpool, self.linear)
        return Parts([first, self.layer2, self.layer3], neck, head, [True] * 3)


def _stage(in_channels: int, channels: int, units: int) -> nn.Sequential:
    return nn.Sequential(
        DownUnit(in_channels, channels), *(ShuffleUnit(channels) for _ in range(units))
    )


VARIANTS: dict[str, Callable[[int], nn.Module]] = {"ShuffleV2": ShuffleNetV2}
