"""M27: the zoo holds the networks of the field, with their sizes, names and costs."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfptkd.engine.errors import UsageError
from dfptkd.engine.models import create_model
from dfptkd.engine.models.cifar import CIFAR_MODELS

# name -> parameters (exact; each rounds to the published figure), MACs in millions and digits given
CIFAR_SIZES = {
    "resnet8": (83_892, 12.5, 1),
    "resnet14": (181_108, 26.7, 1),
    "resnet20": (278_324, 40.8, 1),
    "resnet32": (472_756, 69.1, 1),
    "resnet44": (667_188, 97.4, 1),
    "resnet56": (861_620, 125.8, 1),
    "resnet110": (1_736_564, 253.2, 1),
    "resnet8x4": (1_233_540, 177.1, 1),
    "resnet32x4": (7_433_860, 1083.0, 1),
    "wrn_40_2": (2_255_156, 327.6, 1),
    "wrn_40_1": (569_780, 83.3, 1),
    "wrn_16_2": (703_284, 101.1, 1),
    "vgg8": (3_965_028, 96.2, 1),
    "vgg13": (9_462_180, 284.9, 1),
    "ShuffleV1": (949_258, 38.7, 1),
    "ShuffleV2": (1_355_528, 44.5, 1),
    "MobileNetV2": (812_836, 6.5, 1),
    "ResNet50": (23_705_252, 1298.0, 1),
}
IMAGENET_SIZES = {
    "torchvision:resnet18": (11_689_512, 1814, 0),
    "torchvision:resnet34": (21_797_672, 3663.8, 1),
    "torchvision:resnet50": (25_557_032, 4089.2, 1),
    "imagenet:mobilenetv1": (4_231_976, 569, 0),
}


def macs(name: str, num_classes: int, size: int) -> int:
    with torch.device("meta"):
        model, image = create_model(name, num_classes=num_classes), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", CIFAR_SIZES)
def test_m27_cifar_sizes(name: str) -> None:
    params, mmacs, digits = CIFAR_SIZES[name]
    with torch.device("meta"):
        model = create_model(f"cifar:{name}", num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == params
    assert round(macs(name, 100, 32) / 1e6, digits) == mmacs


@pytest.mark.parametrize("name", IMAGENET_SIZES)
def test_m27_imagenet_sizes(name: str) -> None:
    params, mmacs, digits = IMAGENET_SIZES[name]
    with torch.device("meta"):
        model = create_model(name, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == params
    assert round(macs(name, 1000, 224) / 1e6, digits) == mmacs


def test_m27_resnet32x4_stage_parameters() -> None:
    model = create_model("resnet32x4", num_classes=100)
    layers = (model.layer1, model.layer2, model.layer3)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert [round(count / 1e3, 1) for count in counts] == [353.7, 1411.8, 5641.7]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet8x4", ["bn1.weight", "layer2.0.downsample.1.running_var", "fc.bias"]),
        ("wrn_16_2", ["block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.bias", "bn1.bias"]),
        ("vgg13", ["block0.0.bias", "block4.4.num_batches_tracked", "classifier.weight"]),
        ("ShuffleV1", ["layer1.0.conv1.weight", "layer3.3.bn3.weight", "linear.weight"]),
        ("ShuffleV2", ["layer1.0.conv5.weight", "layer2.7.bn3.weight", "conv2.weight"]),
        ("MobileNetV2", ["conv1.0.weight", "blocks.6.0.conv.7.bias", "classifier.0.bias"]),
        ("ResNet50", ["layer1.0.shortcut.1.bias", "layer4.2.conv3.weight", "linear.bias"]),
        ("imagenet:mobilenetv1", ["model.0.1.running_mean", "model.13.4.bias", "fc.weight"]),
    ],
)
def test_checkpoint_names_of_the_field(name: str, keys: list[str]) -> None:
    with torch.device("meta"):
        state = create_model(name, num_classes=100).state_dict()
    assert set(keys) <= set(state)


@pytest.mark.parametrize("name", [*(n for n in CIFAR_MODELS if "_s2" not in n), "resnet8x4_s2"])
@pytest.mark.parametrize("size", [28, 64, 224])
def test_other_image_sizes(name: str, size: int) -> None:
    with torch.device("meta"):
        model, images = create_model(name, num_classes=7), torch.empty(2, 3, size, size)
    assert model.eval()(images).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4"])
def test_s2_has_the_same_weights_and_a_quarter_of_the_macs(name: str) -> None:
    full, halved = (create_model(n, num_classes=10) for n in (f"cifar:{name}", f"cifar:{name}_s2"))
    halved.load_state_dict(full.state_dict())
    head = 10 * full.fc.in_features
    assert macs(name, 10, 32) - head == 4 * (macs(f"{name}_s2", 10, 32) - head)


def test_vgg_pools_before_its_last_block_at_64_px_only() -> None:
    model = create_model("vgg8", num_classes=10).eval()
    seen = []
    model.block4.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    for size in (32, 64, 128):
        model(torch.zeros(1, 3, size, size))
    assert seen == [4, 4, 16]


def test_bare_name_is_a_cifar_name() -> None:
    bare, full = (create_model(n, num_classes=10) for n in ("wrn_16_1", "cifar:wrn_16_1"))
    assert type(bare) is type(full)


def test_weights_may_be_a_path(tmp_path) -> None:
    source = create_model("resnet8", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    found = create_model("resnet8", num_classes=3, weights=tmp_path / "w.pth")
    assert torch.equal(found.fc.weight, source.fc.weight)


def test_same_seed_gives_the_same_weights() -> None:
    models: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(create_model("resnet8", num_classes=10))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("cifar:resnet21", "resnet20"),
        ("wrn_40_3", "wrn_40_2"),
        ("shufflev1", "ShuffleV1"),
        ("cifr:resnet20", "cifar"),
        ("torchvision:resnet35", "resnet34"),
        ("imagenet:mobilenet", "mobilenetv1"),
    ],
)
def test_unknown_name_gets_close_matches(name: str, answer: str) -> None:
    with pytest.raises(UsageError, match=answer) as error:
        create_model(name, num_classes=10)
    assert "\n" not in str(error.value)


def test_unknown_timm_name() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=r"did you mean .*resnet18"):
        create_model("timm:resnet81", num_classes=10)
    with pytest.raises(UsageError, match="unknown pretrained tag of timm:resnet18 'a9_in1k'"):
        create_model("timm:resnet18", num_classes=1000, weights="a9_in1k")


def test_timm_absent_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        create_model("timm:resnet18", num_classes=10)
