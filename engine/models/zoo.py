"""Models by name: ours, torchvision's and timm's, with weights loaded strictly."""

from collections.abc import Callable

from torch import nn

from . import external
from .cifar import CIFAR_MODELS
from .mobilenet_v1 import MobileNetV1
from .names import unknown_name
from .weights import load_strict, read_state_dict

IMAGENET_MODELS: dict[str, Callable[[int], nn.Module]] = {"mobilenetv1": MobileNetV1}
FAMILIES = ("cifar", "imagenet", "torchvision", "timm")


def create_model(name: str, *, num_classes: int, weights: str | None = None) -> nn.Module:
    """Makes a classifier: images [B, 3, H, W] to logits [B, num_classes].

    Args:
        name: "cifar:wrn_40_2", "imagenet:mobilenetv1", "torchvision:resnet34", "timm:resnet50"; a
            name without a family is looked up in the CIFAR zoo.
        num_classes: Number of classes.
        weights: A file (.safetensors, .pth, .pt, .tar), or "package:NAME" for the one in an
            installed package; for torchvision also a member of the
            model's weights enum ("IMAGENET1K_V1", "ResNet34_Weights.DEFAULT"); for timm also
            "pretrained" or a pretrained tag. Absent: random initialisation.

    Raises:
        UsageError: Unknown name, or timm is needed and not installed.
        DataError: The weights are missing, damaged, cannot be downloaded or do not fit.
    """
    family, _, architecture = name.rpartition(":")
    family = family or "cifar"
    if family == "torchvision":
        return external.create_torchvision(architecture, num_classes, weights)
    if family == "timm":
        return external.create_timm(architecture, num_classes, weights)
    if family not in FAMILIES:
        raise unknown_name("model family", family, FAMILIES)

    known = CIFAR_MODELS if family == "cifar" else IMAGENET_MODELS
    if architecture not in known:
        raise unknown_name(f"{family} model", architecture, known)
    model = known[architecture](num_classes)
    if weights is not None:
        load_strict(model, read_state_dict(weights), weights)
    return model
