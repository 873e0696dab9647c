"""MobileNet V2 at half width for CIFAR (`mobile_half`), names as in the CRD definitions."""

from collections.abc import Callable

from torch import Tensor, nn

from ..parts import Parts, StagedModel, init_convolutions, pooled_head

# Expansion, channels at half width, blocks and first stride of the seven block groups.
GROUPS = (
    (1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2),
    (6, 160, 1, 1),
)  # fmt: skip
STEM, LAST = 16, 1280
# A stage ends after these groups: the last one at each resolution that the CRD definitions tap.
STAGE_ENDS = (2, 3, 5, 7)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1; a shortcut where the shapes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(StagedModel):
    """Stem of stride 2, seven groups of inverted residuals, 1x1 convolution to 1280 channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _conv_bn_relu(3, STEM, kernel=3, stride=2)
        self.blocks = nn.Sequential()
        channels = STEM
        for expansion, out_channels, count, stride in GROUPS:
            self.blocks.append(_group(channels, out_channels, count, stride, expansion))
            channels = out_channels
        self.conv2 = _conv_bn_relu(channels, LAST, kernel=1, stride=1)
        linear = nn.Linear(LAST, num_classes)
        self.classifier = nn.Sequential(linear)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        init_convolutions(self)
        nn.init.normal_(linear.weight, 0, 0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(self.avgpool(x).flatten(1))

    def parts(self) -> Parts:
        starts = (0, *STAGE_ENDS[:-1])
        stages = [self.blocks[a:b] for a, b in zip(starts, STAGE_ENDS, strict=True)]
        stages[0] = nn.Sequential(self.conv1, *stages[0])
        head = pooled_head(self.avgpool, self.classifier)
        return Parts(stages, self.conv2, head, [False] * len(stages))


def _conv_bn_relu(in_channels: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def _group(
    in_channels: int, channels: int, count: int, stride: int, expansion: int
) -> nn.Sequential:
    first = InvertedResidual(in_channels, channels, stride, expansion)
    rest = [InvertedResidual(channels, channels, 1, expansion) for _ in range(count - 1)]
    return nn.Sequential(first, *rest)


VARIANTS: dict[str, Callable[[int], nn.Module]] = {"MobileNetV2": MobileNetV2}
