"""ResNet50 for CIFAR: bottleneck blocks, 3x3 stem of stride 1, names as in the CRD definitions."""

from collections.abc import Callable

from torch import Tensor, nn

from ..parts import Parts, StagedModel, init_convolutions, pooled_head

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolution around a shortcut, ReLU after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.shortcut(x))


class BottleneckResNet(StagedModel):
    """Stem of 64 channels and four stages of bottleneck blocks at strides 1, 2, 2, 2."""

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(64, 64, blocks[0], stride=1)
        self.layer2 = _stage(256, 128, blocks[1], stride=2)
        self.layer3 = _stage(512, 256, blocks[2], stride=2)
        self.layer4 = _stage(1024, 512, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512 * EXPANSION, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.avgpool(x).flatten(1))

    def parts(self) -> Parts:
        first = nn.Sequential(self.conv1, self.bn1, self.relu, self.layer1)
        stages = [first, self.layer2, self.layer3, self.layer4]
        return Parts(stages, nn.Identity(), pooled_head(self.avgpool, self.linear), [True] * 4)


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, channels, stride)
    rest = [Bottleneck(channels * EXPANSION, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _resnet50(num_classes: int) -> nn.Module:
    return BottleneckResNet((3, 4, 6, 3), num_classes)


VARIANTS: dict[str, Callable[[int], nn.Module]] = {"ResNet50": _resnet50}
