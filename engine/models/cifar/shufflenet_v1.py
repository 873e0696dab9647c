"""ShuffleNet V1 for CIFAR: 3 groups, stem 1x1 of stride 1, names as in the CRD definitions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parts import Parts, StagedModel, channel_shuffle, pooled_head

STEM = 24
GROUPS = 3


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; stride 2 concatenates the pooled input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = channels - in_channels if stride == 2 else channels
        inner = branch // 4
        self.groups = 1 if in_channels == STEM else GROUPS  # the stem is too thin to be grouped
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, branch, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = channel_shuffle(y, self.groups)
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.stride == 2:
            return F.relu(torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], 1))
        return F.relu(y + x)


class ShuffleNetV1(StagedModel):
    """Three stages of 240, 480 and 960 channels, 4, 8 and 4 units, each stage at stride 2."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = _stage(STEM, 240, 4)
        self.layer2 = _stage(240, 480, 8)
        self.layer3 = _stage(480, 960, 4)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))

    def parts(self) -> Parts:
        first = nn.Sequential(self.conv1, self.bn1, nn.ReLU(inplace=True), self.layer1)
        stages = [first, self.layer2, self.layer3]
        return Parts(stages, nn.Identity(), pooled_head(self.avgpool, self.linear), [True] * 3)


def _stage(in_channels: int, channels: int, units: int) -> nn.Sequential:
    down = ShuffleUnit(in_channels, channels, stride=2)
    return nn.Sequential(down, *(ShuffleUnit(channels, channels, 1) for _ in range(units - 1)))


VARIANTS: dict[str, Callable[[int], nn.Module]] = {"ShuffleV1": ShuffleNetV1}
