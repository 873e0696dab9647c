"""torchvision and timm: models by name, their weights, where their stages end, and their layers in
torch's own terms."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError, UsageError
from ..files import first_line
from .key_maps import renamed
from .names import unknown_name
from .parts import Parts, pooled_head
from .trace import ends_in_relu
from .weights import check_values, is_file, load_strict


def create_torchvision(architecture: str, num_classes: int, weights: str | None) -> nn.Module:
    """A torchvision classifier; `weights` is a member of the model's weights enum."""
    from torchvision import models

    known = models.list_models(module=models)
    if architecture not in known:
        raise unknown_name("torchvision model", architecture, known)
    model = models.get_model(architecture, weights=None, num_classes=num_classes)
    if weights is None:
        return model

    enum = models.get_model_weights(architecture)
    enum_name, _, member = weights.rpartition(".")
    if enum_name not in ("", enum.__name__) or member not in enum.__members__:
        raise unknown_name(f"weights of {architecture}", weights, enum.__members__)
    entry = enum[member]
    try:
        state = entry.get_state_dict(
            map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cannot download {entry} from {entry.url} ({first_line(error)}); pass a file instead"
        ) from error
    load_strict(model, renamed(state, model, str(entry)), str(entry))
    return model


def create_timm(architecture: str, num_classes: int, weights: str | None) -> nn.Module:
    """A timm classifier; `weights` is "pretrained" or a pretrained tag."""
    timm = _import_timm()
    base, _, tag = architecture.partition(".")
    if not timm.is_model(base):
        raise unknown_name("timm model", base, timm.list_models())
    if weights not in (None, "pretrained"):
        tag = weights
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise unknown_name(f"pretrained tag of timm:{base}", tag, tags)
    tagged = f"{base}.{tag}" if tag else base

    if weights is None:
        return timm.create_model(tagged, num_classes=num_classes)
    if not tags:
        raise UsageError(f"timm has no pretrained weights for {base}: pass a file")
    # timm drops a head of another size silently; here it is an error.
    classes = timm.get_pretrained_cfg(tagged).num_classes
    if classes != num_classes:
        raise DataError(f"timm:{tagged}: has {classes} classes, expected {num_classes}")
    try:
        model = timm.create_model(tagged, pretrained=True, num_classes=num_classes)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"cannot download the weights of timm:{tagged} ({first_line(error)}); "
            "pass a file instead"
        ) from error
    check_values(model.state_dict(), f"timm:{tagged}")
    return model


Statistics = tuple[tuple[float, ...], tuple[float, ...], str]
"""Mean and standard deviation of each channel, pixels in 0..1, and who says so."""


def torchvision_statistics(architecture: str, weights: str, num_classes: int) -> Statistics | None:
    """Mean and std of torchvision's weights, also of a file that has the name of its download.

    Arguments as of `create_torchvision`. None: it says nothing.
    """
    from torchvision import models

    enum = models.get_model_weights(architecture)
    if is_file(weights):
        entry = next((e for e in enum if Path(e.url).name == Path(weights).name), None)
    else:
        entry = enum.__members__.get(weights.rpartition(".")[2])
    if entry is None or len(entry.meta["categories"]) != num_classes:
        return None
    source = f"torchvision's {entry}"
    if architecture in TRANSFORM_INPUT:
        return (0.5,) * 3, (0.5,) * 3, f"{source}, with its transform_input"
    transforms = entry.transforms()
    return tuple(transforms.mean), tuple(transforms.std), source


TRANSFORM_INPUT = ("googlenet", "inception_v3")
"""Weights of TensorFlow: torchvision's own builders let these networks turn images that are
normalised as ImageNet's into what they were trained with; `create_torchvision` does not."""


def timm_statistics(architecture: str, weights: str, num_classes: int) -> Statistics | None:
    """Mean and std in timm's configuration of a model's weights; of a file, where it has as many
    classes as those that timm has trained.

    Arguments as of `create_timm`. None: it says nothing.
    """
    timm = _import_timm()
    base, _, tag = architecture.partition(".")
    if not is_file(weights) and weights != "pretrained":
        tag = weights
    tagged = f"{base}.{tag}" if tag else base
    config = timm.get_pretrained_cfg(tagged)
    if config is None or config.num_classes != num_classes:
        return None
    name = f"{config.architecture}.{config.tag}" if config.tag else base
    return tuple(config.mean), tuple(config.std), f"timm's configuration of {name}"


def imagenet_wordnet_ids() -> list[str]:
    """WordNet ids ("n01440764") of the 1000 classes of ImageNet-1k, by class number.

    Raises:
        UsageError: timm, which has the list, is not installed.
    """
    _import_timm()
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def external_parts(model: nn.Module) -> Parts | None:
    """The pieces of a torchvision or timm model of a known class, None for any other.

    The class itself counts, no subclass: one that overrides `forward` would be cut wrongly.
    """
    cut = _CUTS.get((type(model).__module__, type(model).__name__))
    return cut(model) if cut else None


class GlobalMean(nn.Module):
    """[B, C, H, W] -> [B, C], as torchvision's ShuffleNet V2 pools."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean([2, 3])


def _torchvision_resnet(model: Any) -> Parts:
    first = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1)
    stages = [first, model.layer2, model.layer3, model.layer4]
    return Parts(stages, nn.Identity(), pooled_head(model.avgpool, model.fc), [True] * 4)


def _torchvision_vgg(model: Any) -> Parts:
    """A stage opens with the pool that follows the stage before; the last pool is the neck."""
    layers = list(model.features)
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    starts = [0, *pools[:-1]]
    stages = [model.features[a:b] for a, b in zip(starts, pools, strict=True)]
    head = pooled_head(model.avgpool, model.classifier)
    return Parts(stages, model.features[pools[-1] :], head, [True] * len(stages))


def _torchvision_mobilenet_v2(model: Any) -> Parts:
    """The cuts of our CIFAR MobileNet V2: after 24, 32, 96 and 320 channels (times the width)."""
    ends = (4, 7, 14, 18)
    stages = [model.features[a:b] for a, b in zip((0, *ends[:-1]), ends, strict=True)]
    head = pooled_head(nn.AdaptiveAvgPool2d(1), model.classifier)
    return Parts(stages, model.features[18:], head, [False] * 4)


def _torchvision_shufflenet_v2(model: Any) -> Parts:
    first = nn.Sequential(model.conv1, model.maxpool, model.stage2)
    head = nn.Sequential(GlobalMean(), model.fc)
    return Parts([first, model.stage3, model.stage4], model.conv5, head, [True] * 3)


def _timm_resnet(model: Any) -> Parts:
    first = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool, model.layer1)
    stages = [first, model.layer2, model.layer3, model.layer4]
    last_blocks = [layer[-1] for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
    head = nn.Sequential(model.global_pool, nn.Dropout(float(model.drop_rate)), model.fc)
    post_relu = [ends_in_relu(block) for block in last_blocks]  # blocks name it in many ways
    return Parts(stages, nn.Identity(), head, post_relu)


def _timm_efficientnet(model: Any) -> Parts:
    """A stage ends before the groups of blocks that halve the resolution, but for the first such:
    at 1/4, 1/8, 1/16 and 1/32 of it."""
    groups = list(model.blocks)
    halving = [i for i, group in enumerate(groups) if _strides(group)]
    starts = [0, *halving[1:]]
    parts = [groups[a:b] for a, b in zip(starts, [*starts[1:], len(groups)], strict=True)]
    stages = [nn.Sequential(model.conv_stem, model.bn1, *parts[0])]
    stages += [nn.Sequential(*part) for part in parts[1:]]
    neck = nn.Sequential(model.conv_head, model.bn2)
    dropout = nn.Dropout(float(model.drop_rate))
    head = nn.Sequential(model.global_pool, dropout, model.classifier)
    return Parts(stages, neck, head, [False] * len(stages))


def _strides(module: nn.Module) -> bool:
    return any(max(m.stride) > 1 for m in module.modules() if isinstance(m, nn.Conv2d))


_CUTS: dict[tuple[str, str], Callable[[Any], Parts]] = {
    ("torchvision.models.resnet", "ResNet"): _torchvision_resnet,
    ("torchvision.models.vgg", "VGG"): _torchvision_vgg,
    ("torchvision.models.mobilenetv2", "MobileNetV2"): _torchvision_mobilenet_v2,
    ("torchvision.models.shufflenetv2", "ShuffleNetV2"): _torchvision_shufflenet_v2,
    ("timm.models.resnet", "ResNet"): _timm_resnet,
    ("timm.models.efficientnet", "EfficientNet"): _timm_efficientnet,
}


def plain_layers(module: nn.Module) -> nn.Module:
    """`module` in eval mode, timm's combined layers as torch's own around the same tensors.

    Whatever holds such a layer is a shallow copy; `module` is not altered.
    """
    plain = _PLAIN.get((type(module).__module__, type(module).__name__))
    if plain is not None:
        return plain(module)
    children = {name: plain_layers(child) for name, child in module.named_children()}
    if all(child is getattr(module, name) for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


class SamePadding(nn.Module):
    """Zeros around [B, C, H, W] such that a convolution without padding halves it as TensorFlow's
    does: H / stride rounded up, an odd zero to the right and below."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.windows = list(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for size, (kernel, stride, dilation) in zip(x.shape[2:], self.windows, strict=True):
            covered = (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1
            missing = max(covered - size, 0)
            sides = [missing // 2, missing - missing // 2, *sides]  # F.pad starts from the last
        return F.pad(x, sides)


def _plain_norm_act(layer: Any) -> nn.Module:
    norm = _as(nn.BatchNorm2d, layer)
    del norm._modules["drop"], norm._modules["act"]
    return nn.Sequential(norm, layer.drop, layer.act).eval()


def _plain_conv_same(layer: Any) -> nn.Module:
    return nn.Sequential(SamePadding(layer), _as(nn.Conv2d, layer))


def _as(kind: type[nn.Module], layer: nn.Module) -> Any:
    """The tensors and settings of `layer`, a subclass of `kind`, as a plain `kind`."""
    twin = copy.copy(layer)
    twin.__class__ = kind
    twin._modules = dict(layer._modules)
    return twin


_PLAIN: dict[tuple[str, str], Callable[[Any], nn.Module]] = {
    ("timm.layers.norm_act", "BatchNormAct2d"): _plain_norm_act,
    ("timm.layers.conv2d_same", "Conv2dSame"): _plain_conv_same,
}


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UsageError("timm: models need the package timm: pip install timm") from error
    return timm
