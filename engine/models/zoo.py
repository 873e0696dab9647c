"""Models by name: ours, torchvision's and timm's, with weights loaded strictly."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..config import EmaChoice
from ..errors import UsageError
from . import external
from .cifar import CIFAR_MODELS
from .mobilenet_v1 import MobileNetV1
from .names import unknown_name
from .weights import is_file, load_weights

IMAGENET_MODELS: dict[str, Callable[[int], nn.Module]] = {"mobilenetv1": MobileNetV1}
FAMILIES = ("cifar", "imagenet", "torchvision", "timm")


def create_model(
    name: str,
    *,
    num_classes: int,
    weights: str | Path | None = None,
    ema: EmaChoice = "auto",
    say: Callable[[str], None] = print,
) -> nn.Module:
    """Makes a classifier: images [B, 3, H, W] to logits [B, num_classes].

    Args:
        name: "cifar:wrn_40_2", "imagenet:mobilenetv1", "torchvision:resnet34", "timm:resnet50"; a
            name without a family is looked up in the CIFAR zoo.
        num_classes: Number of classes.
        weights: A file, or "package:NAME" for the one in an installed package (`load_weights` says
            which forms of files are read); for torchvision also a member of the model's weights
            enum ("IMAGENET1K_V1", "ResNet34_Weights.DEFAULT"); for timm also "pretrained" or a
            pretrained tag. Absent: random initialisation.
        ema: Which weights of a file that holds an average beside the raw ones; see `load_weights`.
        say: Gets a line where the file left a choice.

    Raises:
        UsageError: Unknown name, timm is needed and not installed, or an EMA of weights that are
            no file.
        DataError: The weights are missing, damaged, cannot be downloaded, do not fit, or hold
            values that no trained network has.
    """
    if isinstance(weights, Path):
        weights = str(weights)
    if weights is not None and (is_file(weights) or _family(name) in ("cifar", "imagenet")):
        model = create_model(name, num_classes=num_classes)
        load_weights(model, weights, ema=ema, say=say)
        return model
    if ema == "yes":
        raise UsageError(
            f"teacher.ema='yes' with weights {weights}: expected a file that holds one"
        )
    family, architecture = _family(name), name.rpartition(":")[2]
    if family == "torchvision":
        return external.create_torchvision(architecture, num_classes, weights)
    if family == "timm":
        return external.create_timm(architecture, num_classes, weights)
    if family not in FAMILIES:
        raise unknown_name("model family", family, FAMILIES)

    known = CIFAR_MODELS if family == "cifar" else IMAGENET_MODELS
    if architecture not in known:
        raise unknown_name(f"{family} model", architecture, known)
    return known[architecture](num_classes)


def _family(name: str) -> str:
    return name.rpartition(":")[0] or "cifar"
