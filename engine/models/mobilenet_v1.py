"""MobileNet V1 for ImageNet, names as in the CRD and mdistiller definitions."""

from torch import Tensor, nn

from .parts import Parts, StagedModel, pooled_head

# Channels and stride of the 13 depthwise-separable blocks.
BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1),
    (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
STAGE_ENDS = (4, 6, 12, 14)
"""Layers of `model` after which a stage ends: the last at 1/4, 1/8, 1/16 and 1/32 of the side."""


class MobileNetV1(StagedModel):
    """Stem of stride 2 and 13 depthwise-separable blocks, each convolution with BN and ReLU."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers, channels = [_conv_bn_relu(3, 32, 3, stride=2)], 32
        for out_channels, stride in BLOCKS:
            depthwise = _conv_bn_relu(channels, channels, 3, stride, groups=channels)
            layers.append(depthwise + _conv_bn_relu(channels, out_channels, 1))
            channels = out_channels
        self.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.model(x).flatten(1))

    def parts(self) -> Parts:
        starts = (0, *STAGE_ENDS[:-1])
        stages = [self.model[a:b] for a, b in zip(starts, STAGE_ENDS, strict=True)]
        return Parts(stages, nn.Identity(), pooled_head(self.model[-1], self.fc), [True] * 4)


def _conv_bn_relu(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )
