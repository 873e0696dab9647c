"""VGG with BatchNorm for CIFAR: five blocks, one linear layer; names as in the CRD definitions."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..parts import Parts, StagedModel, init_convolutions, pooled_head

WIDTHS = (64, 128, 256, 512, 512)


class PoolMapsOf8(nn.MaxPool2d):
    """Max-pooling of 8-pixel maps alone, which images of 64 pixels have here; others pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-2] == 8 else x


class VGG(StagedModel):
    """Five blocks of 3x3 convolutions; the ReLU that ends a block follows outside of it.

    Args:
        convolutions: Number of convolutions in each of the five blocks.
        num_classes: Number of classes.
    """

    def __init__(self, convolutions: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.block0 = _block(3, WIDTHS[0], convolutions[0])
        self.block1 = _block(WIDTHS[0], WIDTHS[1], convolutions[1])
        self.block2 = _block(WIDTHS[1], WIDTHS[2], convolutions[2])
        self.block3 = _block(WIDTHS[2], WIDTHS[3], convolutions[3])
        self.block4 = _block(WIDTHS[3], WIDTHS[4], convolutions[4])
        self.pool0 = nn.MaxPool2d(2)
        self.pool1 = nn.MaxPool2d(2)
        self.pool2 = nn.MaxPool2d(2)
        self.pool3 = PoolMapsOf8(2)
        self.pool4 = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(WIDTHS[4], num_classes)
        init_convolutions(self)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.block0(x))
        x = F.relu(self.block1(self.pool0(x)))
        x = F.relu(self.block2(self.pool1(x)))
        x = F.relu(self.block3(self.pool2(x)))
        x = F.relu(self.block4(self.pool3(x)))
        return self.classifier(self.pool4(x).flatten(1))

    def parts(self) -> Parts:
        stages: list[nn.Module] = [
            nn.Sequential(self.block0, nn.ReLU(inplace=True)),
            nn.Sequential(self.pool0, self.block1, nn.ReLU(inplace=True)),
            nn.Sequential(self.pool1, self.block2, nn.ReLU(inplace=True)),
            nn.Sequential(self.pool2, self.block3, nn.ReLU(inplace=True)),
            nn.Sequential(self.pool3, self.block4, nn.ReLU(inplace=True)),
        ]
        return Parts(stages, nn.Identity(), pooled_head(self.pool4, self.classifier), [True] * 5)


def _block(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convolutions):
        convolution = nn.Conv2d(channels if i else in_channels, channels, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


VARIANTS: dict[str, Callable[[int], nn.Module]] = {
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
}
