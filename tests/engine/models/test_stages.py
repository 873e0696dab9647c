"""M1, M7, M11: teachers split into stages, neck and head that chain to their own forward pass."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from dfptkd.engine.errors import UsageError
from dfptkd.engine.models import (
    DualPathTeacher,
    PromptConfig,
    Stages,
    create_model,
    split_stages,
)
from dfptkd.engine.models.cifar import CIFAR_MODELS

BASIC = [(16, 32), (32, 16), (64, 8)]
# name -> (channels, side) of every stage output, and whether it is non-negative
STAGE_OUTPUTS = {
    "resnet8": (BASIC, True),
    "resnet20": (BASIC, True),
    "resnet110": (BASIC, True),
    "resnet8x4": ([(64, 32), (128, 16), (256, 8)], True),
    "resnet32x4": ([(64, 32), (128, 16), (256, 8)], True),
    "resnet20_s2": ([(16, 16), (32, 8), (64, 4)], True),
    "wrn_40_2": ([(32, 32), (64, 16), (128, 8)], False),
    "wrn_40_1": (BASIC, False),
    "vgg8": ([(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], True),
    "vgg13": ([(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], True),
    "ShuffleV1": ([(240, 16), (480, 8), (960, 4)], True),
    "ShuffleV2": ([(116, 16), (232, 8), (464, 4)], True),
    "MobileNetV2": ([(12, 16), (16, 8), (48, 4), (160, 2)], False),
    "ResNet50": ([(256, 32), (512, 16), (1024, 8), (2048, 4)], True),
}
RESNET_LAYERS = ("layer1", "layer2", "layer3", "layer4")
# name, at, channels, post_relu of models that are not ours
EXTERNAL = [
    ("imagenet:mobilenetv1", None, [128, 256, 512, 1024], [True] * 4),
    ("torchvision:resnet18", None, [64, 128, 256, 512], [True] * 4),
    ("torchvision:resnet34", None, [64, 128, 256, 512], [True] * 4),
    ("torchvision:resnet50", None, [256, 512, 1024, 2048], [True] * 4),
    ("torchvision:vgg13_bn", None, [64, 128, 256, 512, 512], [True] * 5),
    ("torchvision:mobilenet_v2", None, [24, 32, 96, 320], [False] * 4),
    ("torchvision:shufflenet_v2_x1_0", None, [116, 232, 464], [True] * 3),
    ("timm:resnet18", None, [64, 128, 256, 512], [True] * 4),
    ("timm:skresnet18", None, [64, 128, 256, 512], [True] * 4),
    ("timm:res2net50_14w_8s", None, [256, 512, 1024, 2048], [True] * 4),
    ("timm:tf_efficientnet_lite0", None, [24, 40, 112, 320], [False] * 4),
    ("timm:mobilenetv2_050", None, [16, 16, 48, 160], [False] * 4),
    ("torchvision:resnet18", RESNET_LAYERS, [64, 128, 256, 512], [True] * 4),
    ("cifar:wrn_16_1", ("block1", "block2", "block3"), [16, 32, 64], [False] * 3),
    (
        "torchvision:efficientnet_b0",
        ("features.2", "features.3", "features.5", "features.7"),
        [24, 40, 112, 320],
        [False] * 4,
    ),
]


def make(name: str, num_classes: int = 10) -> nn.Module:
    """A model whose batch statistics are not the trivial (0, 1): a missing layer must show."""
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = create_model(name, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.7, 1.3)
    return model.eval()


@torch.no_grad()
def chain(split: Stages, x: Tensor, *, neck: bool = True) -> tuple[Tensor, list[Tensor]]:
    outputs = []
    for stage in split.stages:
        x = stage(x)
        outputs.append(x)
    return split.head(split.neck(x) if neck else x), outputs


def check_split(model: nn.Module, split: Stages, size: int) -> list[Tensor]:
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        logits = model(images)
    got, outputs = chain(split, images)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
    assert torch.equal(got, logits)
    assert [output.shape[1] for output in outputs] == split.channels
    for output, post_relu in zip(outputs, split.post_relu, strict=True):
        assert (output.min() >= 0) or not post_relu
    return outputs


@pytest.mark.parametrize("name", [name for name in CIFAR_MODELS if not name.endswith("_s2")])
def test_m1_chain_gives_the_bits_of_the_zoo_model(name: str) -> None:
    model = make(f"cifar:{name}")
    check_split(model, split_stages(model), 32)


@pytest.mark.parametrize(("name", "at", "channels", "post_relu"), EXTERNAL)
def test_m1_chain_gives_the_bits_of_other_models(
    name: str, at: tuple[str, ...] | None, channels: list[int], post_relu: list[bool]
) -> None:
    model = make(name)
    split = split_stages(model, at)
    check_split(model, split, 64)
    assert split.channels == channels
    assert split.post_relu == post_relu


@pytest.mark.parametrize("name", STAGE_OUTPUTS)
def test_m7_stage_boundaries(name: str) -> None:
    with torch.device("meta"):
        model, x = create_model(name, num_classes=100), torch.empty(2, 3, 32, 32)
    split = split_stages(model)
    _, outputs = chain(split, x)
    shapes, post_relu = STAGE_OUTPUTS[name]
    assert [tuple(output.shape) for output in outputs] == [(2, c, s, s) for c, s in shapes]
    assert split.channels == [c for c, _ in shapes]
    assert split.post_relu == [post_relu] * len(shapes)


def test_m1_negative_control_without_the_neck_the_chain_differs() -> None:
    model, images = make("cifar:wrn_16_2"), torch.randn(2, 3, 32, 32)
    split = split_stages(model)
    with torch.no_grad():
        logits = model(images)
    assert torch.equal(chain(split, images)[0], logits)
    assert not torch.equal(chain(split, images, neck=False)[0], logits)


@pytest.mark.parametrize("name", ["wrn_16_1", "resnet8", "vgg8", "MobileNetV2", "ShuffleV1"])
def test_post_relu_tells_where_outputs_are_negative(name: str) -> None:
    model = make(name)
    split = split_stages(model)
    _, outputs = chain(split, torch.randn(2, 3, 32, 32))
    assert [bool(output.min() >= 0) for output in outputs] == split.post_relu


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("wrn_16_1", None),
        ("ShuffleV2", None),
        ("torchvision:resnet18", None),
        ("torchvision:resnet18", RESNET_LAYERS),
        ("timm:tf_efficientnet_lite0", None),
    ],
)
def test_pieces_share_every_parameter_with_the_model(name: str, at: tuple[str, ...] | None) -> None:
    model = make(name)
    split = split_stages(model, at)
    pieces = [*split.stages, split.neck, split.head]
    shared = [p for piece in pieces for p in piece.parameters()]
    assert sorted(map(id, shared)) == sorted(map(id, model.parameters()))
    layers = {id(module) for module in model.modules()}
    with_weights = [
        module
        for piece in pieces
        for module in piece.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    assert {id(module) for module in with_weights} <= layers


@pytest.mark.parametrize("at", [None, RESNET_LAYERS])
def test_splitting_leaves_the_model_alone(at: tuple[str, ...] | None) -> None:
    model = make("torchvision:resnet18").train()
    model.layer2.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    split_stages(model, at)
    assert {name: module.training for name, module in model.named_modules()} == modes
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("at", [None, RESNET_LAYERS])
def test_m5_head_can_be_copied_and_reset(at: tuple[str, ...] | None) -> None:
    split = split_stages(make("torchvision:resnet18"), at)
    fresh = copy.deepcopy(split.head)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for old, new in zip(split.head.parameters(), fresh.parameters(), strict=True):
        assert old is not new
        assert not torch.equal(old, new)
    assert fresh(torch.randn(2, 512, 3, 3)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "ShuffleV2", "MobileNetV2"])
def test_m11_no_stage_overwrites_what_another_reads(name: str) -> None:
    split = split_stages(make(name).train())
    x = torch.randn(2, 3, 32, 32)
    for piece in [*split.stages, split.neck, split.head]:
        before = x.clone()
        y = piece(x)
        assert torch.equal(x, before)
        x = y


class Overwriting(nn.Module):
    """Its second stage starts with an in-place ReLU; `harmless` switches that off."""

    def __init__(self, harmless: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Sequential(nn.ReLU(inplace=not harmless), nn.Conv2d(4, 8, 1))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x)).mean((2, 3)))


def test_m11_overwriting_a_stage_output_is_refused() -> None:
    assert split_stages(Overwriting(harmless=True), ("first", "second")).channels == [4, 8]
    with pytest.raises(UsageError, match="overwrites the output of stage 1 in place"):
        split_stages(Overwriting(harmless=False), ("first", "second"))


class Branching(nn.Module):
    """Two tensors cross the cut after `first`; control flow on values cannot be traced."""

    def __init__(self, data_dependent: bool = False) -> None:
        super().__init__()
        self.data_dependent = data_dependent
        self.side, self.first, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if self.data_dependent and x.sum() > 0:
            return x.mean((2, 3))
        side, first = self.side(x), self.first(x)
        return (self.last(first) + side).mean((2, 3)) * scale


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (("first",), "cannot cut after first: expected its output alone .* got side, first"),
        (("frist",), "unknown module path of Branching 'frist': did you mean first"),
        ((), "expected one module path"),
        (("last", "first"), "order of execution"),
    ],
)
def test_wrong_cuts_are_refused(at: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        split_stages(Branching(), at)
    assert "\n" not in str(error.value)


def test_optional_arguments_keep_their_defaults() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 10)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = self.first(x)
            if mask is not None:
                x = x * mask
            return self.fc(x.mean((2, 3)))

    model = Optional().eval()
    check_split(model, split_stages(model, ("first",)), 8)


def test_untraceable_model_is_named() -> None:
    with pytest.raises(UsageError, match="Branching cannot be traced"):
        split_stages(Branching(data_dependent=True), ("first",))


def test_unknown_model_says_how_to_name_its_stages() -> None:
    with pytest.raises(UsageError, match=r"DenseNet has no known stages: pass --teacher\.stages"):
        split_stages(create_model("torchvision:densenet121", num_classes=10))


def test_subclass_with_its_own_forward_is_not_cut_as_its_parent() -> None:
    class Scaled(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(UsageError, match="Scaled has no known stages"):
        split_stages(Scaled(BasicBlock, [1, 1, 1, 1]))


class ChannelsLast(nn.Module):
    """Its second stage gives [B, H, W, C], of a square image as large as its channels are many."""

    def __init__(self, side: int | None = None) -> None:
        super().__init__()
        self.register_buffer("grid", torch.zeros(side or 1, side or 1))  # takes one size alone
        self.first, self.second = nn.Conv2d(3, 32, 1), nn.Linear(32, 16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.grid
        return self.fc(self.second(self.first(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("side", [None, 64])
def test_channels_in_another_place_are_refused(side: int | None) -> None:
    """Of images of 16 px the prompt blocks would convolve the rows, without a word."""
    model = ChannelsLast(side)
    assert split_stages(model, ("first",)).channels == [32]
    shape = r"\[2, \d+, \d+, 16\]: expected \[B, C, H, W\]"
    with pytest.raises(UsageError, match=f"stage 2 of ChannelsLast returns shape {shape}"):
        split_stages(model, ("first", "second"))


@pytest.mark.parametrize(
    ("name", "at", "words"),
    [
        ("torchvision:vit_b_32", ("encoder.layers.encoder_layer_5",), "returns tokens"),
        ("torchvision:swin_t", ("features.1", "features.3"), "stage 1 of SwinTransformer returns"),
        ("timm:swin_tiny_patch4_window7_224", ("layers.0",), "stage 1 of SwinTransformer returns"),
    ],
)
def test_prompt_blocks_ask_for_maps(name: str, at: tuple[str, ...], words: str) -> None:
    with torch.device("meta"):
        teacher = create_model(name, num_classes=10)
    with pytest.raises(UsageError, match=words) as error:
        DualPathTeacher(teacher, at=at)
    assert "\n" not in str(error.value)


class Tokens(nn.Module):
    """A stage of maps, then one of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = (
            nn.Conv2d(3, 8, 2, 2),
            nn.Linear(8, 16),
            nn.Linear(16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x).flatten(2).transpose(1, 2)).mean(1))


def test_prompt_blocks_of_a_stage_before_the_tokens() -> None:
    at = ("first", "second")
    split = split_stages(Tokens(), at)
    assert (split.channels, split.width, split.is_map) == ([8, 16], 16, [True, False])
    with pytest.raises(UsageError, match="stage 2 of Tokens returns tokens"):
        DualPathTeacher(Tokens(), at=at)
    dual = DualPathTeacher(Tokens(), prompt=PromptConfig(insert_stages=(1,)), at=at)
    assert dual(torch.randn(2, 3, 8, 8)).prompt_logits.shape == (2, 10)


def test_a_model_that_is_not_built_as_its_class_is_says_how_to_name_its_stages() -> None:
    model = create_model("torchvision:resnet18", num_classes=10)
    del model.layer4
    with pytest.raises(UsageError, match=r"not built as expected .*layer4.*pass --teacher\.stages"):
        split_stages(model)
