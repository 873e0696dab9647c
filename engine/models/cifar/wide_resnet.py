"""Wide ResNets for CIFAR: pre-activation blocks, depth 6n + 4, names as in the CRD definitions."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ..parts import Parts, StagedModel, init_convolutions, pooled_head


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions.

    Where the width changes, the shortcut reads the activated input; otherwise the input itself.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + y


class WideResNet(StagedModel):
    """Stem of 16 channels and three stages of (depth - 4) / 6 blocks, 16, 32, 64 times `widen`."""

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        narrow, middle, broad = 16 * widen, 32 * widen, 64 * widen
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, narrow, blocks, stride=1)
        self.block2 = _stage(narrow, middle, blocks, stride=2)
        self.block3 = _stage(middle, broad, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(broad)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(broad, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        return self.fc(self.avgpool(x).flatten(1))

    def parts(self) -> Parts:
        stages = [nn.Sequential(self.conv1, self.block1), self.block2, self.block3]
        neck = nn.Sequential(self.bn1, self.relu)
        return Parts(stages, neck, pooled_head(self.avgpool, self.fc), [False] * 3)


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(in_channels, channels, stride)
    rest = [PreActivationBlock(channels, channels) for _ in range(blocks - 1)]
    layer = nn.Sequential(first, *rest)
    return nn.Sequential(OrderedDict(layer=layer))  # checkpoints say block1.layer.0...


VARIANTS: dict[str, Callable[[int], nn.Module]] = {
    f"wrn_{depth}_{widen}": partial(WideResNet, depth, widen)
    for depth, widen in ((40, 2), (40, 1), (16, 2), (16, 1))
}
