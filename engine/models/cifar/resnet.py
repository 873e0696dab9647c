"""CIFAR ResNets of basic blocks: depth 6n + 2, three stages, names as in the CRD definitions."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ..parts import Parts, StagedModel, init_convolutions, pooled_head


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, ReLU after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(y + shortcut)


class ResNet(StagedModel):
    """Stem and three stages of (depth - 2) / 6 blocks at strides 1, 2, 2.

    Args:
        depth: 6n + 2.
        widths: Channels of the stem and of the three stages.
        num_classes: Number of classes.
        stem_stride: 2 computes everything on maps of half the side, a quarter of the work; not part
            of the CRD definitions.
    """

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int], num_classes: int, stem_stride: int = 1
    ) -> None:
        super().__init__()
        stem, *stages = widths
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, stem, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(stem, stages[0], blocks, stride=1)
        self.layer2 = _stage(stages[0], stages[1], blocks, stride=2)
        self.layer3 = _stage(stages[1], stages[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(stages[2], num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))

    def parts(self) -> Parts:
        first = nn.Sequential(self.conv1, self.bn1, self.relu, self.layer1)
        stages = [first, self.layer2, self.layer3]
        return Parts(stages, nn.Identity(), pooled_head(self.avgpool, self.fc), [True] * 3)


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    rest = [BasicBlock(channels, channels) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _variants() -> dict[str, Callable[[int], nn.Module]]:
    narrow, wide = (16, 16, 32, 64), (32, 64, 128, 256)
    sizes = {f"resnet{depth}": (depth, narrow) for depth in (8, 14, 20, 32, 44, 56, 110)}
    sizes |= {"resnet8x4": (8, wide), "resnet32x4": (32, wide)}
    plain = {name: partial(ResNet, *size) for name, size in sizes.items()}
    halved = {f"{name}_s2": partial(ResNet, *size, stem_stride=2) for name, size in sizes.items()}
    return {**plain, **halved}


VARIANTS = _variants()
