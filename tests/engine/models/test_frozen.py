"""freeze: the function of a piece in eval mode, without parameters and with little kept (2.4)."""

import copy
import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfptkd.engine import memory
from dfptkd.engine.models import create_model, frozen, split_stages
from dfptkd.engine.models.external import plain_layers
from dfptkd.engine.models.frozen import FrozenAffine, FrozenBatchNorm2d, FrozenConv2d, freeze

FAMILIES = [
    "cifar:resnet8x4",
    "cifar:ResNet50",
    "cifar:wrn_16_2",
    "cifar:vgg8",
    "cifar:ShuffleV1",
    "cifar:ShuffleV2",
    "cifar:MobileNetV2",
    "imagenet:mobilenetv1",
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:vgg11_bn",
    "torchvision:mobilenet_v2",
    "torchvision:shufflenet_v2_x0_5",
    "timm:resnet18",
    "timm:resnet50d",
    "timm:tf_efficientnet_lite0",
    "timm:mobilenetv2_050",
]
WITH_CUTS = {
    "torchvision:mnasnet0_5": ("layers.8", "layers.10", "layers.12"),
    "torchvision:densenet121": ("features.denseblock1",),
}


def pieces_of(name: str) -> nn.ModuleList:
    """Stages and neck of a model, ready to be a teacher's."""
    return copy.deepcopy(_pieces(name))


@functools.cache
def _pieces(name: str) -> nn.ModuleList:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = create_model(name, num_classes=10).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # the trivial (0, 1) would hide a mistake
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.7, 1.3)
        if getattr(module, "inplace", False):
            module.inplace = False
    split = split_stages(model, WITH_CUTS.get(name))
    return nn.ModuleList([*split.stages, split.neck])


def image_for(name: str) -> Tensor:
    side = 32 if name.startswith("cifar:") else 64
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def output_and_gradient(piece: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = piece(x)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return y.detach(), *torch.autograd.grad(y, x, grad_y)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def layers(module: nn.Module) -> dict[type, int]:
    kinds = [type(m) for m in module.modules() if next(m.children(), None) is None]
    return {kind: kinds.count(kind) for kind in kinds}


# The same function
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, *WITH_CUTS])
def test_frozen_pieces_equal_the_models_own(name):
    """Unfolded: the bits. Folded: rounding, which flips some ReLUs: the next test is in fp64."""
    x = image_for(name)
    for piece in pieces_of(name).to(memory_format=torch.channels_last):
        y, grad_x = output_and_gradient(piece, x)
        same = output_and_gradient(freeze(piece, fold=False), x)
        assert torch.equal(same[0], y)
        assert_close(same[1], grad_x, 1e-3)
        folded = freeze(piece, fold=True)
        got = output_and_gradient(folded, x)
        assert_close(got[0], y, 1e-3)
        assert (got[1] - grad_x).norm() <= 0.1 * grad_x.norm()
        assert got[0].stride() == y.stride()
        with torch.no_grad():
            assert torch.equal(folded(x), got[0])
        x = y


@pytest.mark.parametrize("name", [*FAMILIES, *WITH_CUTS])
@pytest.mark.parametrize("fold", [False, True])
def test_gradients_in_fp64(name, fold):
    x = image_for(name).double()[:1]
    for piece in pieces_of(name).double():
        y, grad_x = output_and_gradient(piece, x)
        got = output_and_gradient(freeze(piece, fold=fold), x)
        assert_close(got[0], y, 1e-12)
        assert_close(got[1], grad_x, 1e-11)
        x = y


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("fold", [False, True])
def test_every_layer_of_a_known_family_is_frozen(name, fold):
    for piece in pieces_of(name):
        piece = freeze(piece, fold=fold)
        assert isinstance(piece, torch.fx.GraphModule)
        assert list(piece.parameters()) == []
        assert not layers(piece).keys() & {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Dropout}
        targets = {node.target for node in piece.graph.nodes if node.op != "call_module"}
        assert not targets & {F.relu, F.relu6, torch.relu, "relu"}
        assert FrozenBatchNorm2d not in layers(piece) or not fold
        pre_activation = name.startswith("cifar:wrn")
        assert FrozenAffine not in layers(piece) or (fold and pre_activation)


def test_timms_layers_in_torchs_terms_leave_the_model_alone():
    pytest.importorskip("timm")
    model = create_model("timm:tf_efficientnet_lite0", num_classes=10).eval()
    before = {name: type(m) for name, m in model.named_modules()}
    plain = plain_layers(model)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert {id(t) for t in plain.state_dict(keep_vars=True).values()} == {
        id(t) for t in model.state_dict(keep_vars=True).values()
    }
    kinds = {type(m) for m in plain.modules()}
    assert {nn.Conv2d, nn.BatchNorm2d} <= kinds
    assert not any(issubclass(k, nn.Conv2d) for k in kinds - {nn.Conv2d})
    assert not any(issubclass(k, nn.BatchNorm2d) for k in kinds - {nn.BatchNorm2d})
    ordinary = create_model("cifar:resnet8", num_classes=10)
    assert plain_layers(ordinary) is ordinary


@pytest.mark.parametrize("side", [7, 8, 13, 32])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (5, 3), (1, 2)])
def test_same_padding_is_timms(side, kernel, stride):
    pytest.importorskip("timm")
    from timm.layers.conv2d_same import Conv2dSame

    torch.manual_seed(0)
    conv, x = Conv2dSame(2, 3, kernel, stride), torch.randn(1, 2, side, side + 3)
    assert torch.equal(plain_layers(conv)(x), conv(x))


def test_without_folding_the_convolutions_are_torchs_own(monkeypatch):
    asked = []

    def note(*args, exact):
        asked.append(exact)
        return F.conv2d(*args)

    monkeypatch.setattr(frozen, "frozen_conv2d", note)
    x, piece = image_for("cifar:"), pieces_of("cifar:resnet8")[0]
    for fold in (False, True):
        freeze(piece, fold=fold)(x)
        assert asked
        assert all(exact is not fold for exact in asked)
        asked.clear()


def test_constants_are_shared_without_folding_and_fresh_with_it():
    piece = pieces_of("cifar:resnet8")[1]
    own = {v.data_ptr() for v in piece.state_dict().values()}
    assert {v.data_ptr() for v in freeze(piece, fold=False).buffers()} < own
    assert not {v.data_ptr() for v in freeze(piece, fold=True).buffers()} & own


class Odd(nn.Module):
    """What a foreign network may hold: nothing here may change the function."""

    def __init__(self) -> None:
        super().__init__()
        self.named = nn.Conv2d(3, 6, 3, padding="same")
        self.mirrored = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.once = nn.Conv2d(6, 6, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.bare = nn.BatchNorm2d(6, affine=False)
        self.batch = nn.BatchNorm2d(6, track_running_stats=False)
        self.relu = nn.LeakyReLU(0.1)  # a name that lies
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(6, 1, 1) * 1.5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.norms[0](self.named(x))
        b = self.norms[1](self.mirrored(a))
        c = self.norms[2](self.twice(b)) + self.norms[2](self.twice(a))  # both called twice
        d = self.once(c)
        e = self.norms[3](d) + d  # a convolution with a second reader
        f = self.drop(self.relu(self.batch(self.bare(self.twice(e)))))
        return self.act(f) * self.scale + F.dropout(F.relu6(e).relu(), 0.5, self.training)


@pytest.mark.parametrize("fold", [False, True])
def test_what_cannot_be_folded_stays_right(fold):
    torch.manual_seed(0)
    module = Odd()
    module(torch.randn(8, 3, 9, 9))  # moves the statistics
    module.eval().double()
    x = image_for("cifar:").double()
    y, grad_x = output_and_gradient(module, x)
    result = freeze(module, fold=fold)
    got = output_and_gradient(result, x)
    assert_close(got[0], y, 1e-12 if fold else 0)
    assert_close(got[1], grad_x, 1e-11)
    kinds = layers(result)
    assert kinds[nn.Conv2d] == 2
    assert kinds[nn.BatchNorm2d] == kinds[nn.LeakyReLU] == 1
    assert kinds[FrozenConv2d] == 2
    assert kinds[FrozenAffine if fold else FrozenBatchNorm2d] == 5
    assert nn.Dropout not in kinds


@pytest.mark.parametrize("fold", [False, True])
def test_the_module_is_left_alone(fold):
    module, x = Odd().train(), image_for("cifar:")
    state = {k: v.clone() for k, v in module.state_dict().items()}
    text = str(module)
    result = freeze(module, fold=fold)
    result(x)
    assert not any(m.training for m in result.modules())
    assert not any(p.requires_grad for p in result.parameters())
    assert str(module) == text
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert all(m.training for m in module.modules())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


class InPlace(nn.Module):
    """Operations in place whose input is read again, as the activation it then is."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        before = h * 1
        if self.kind == "module":
            self.act(h)
        elif self.kind == "function":
            F.relu(h, inplace=True)
        elif self.kind == "method":
            h.relu_()
        else:
            torch.relu_(h)
        return h + 2 * before


@pytest.mark.parametrize("kind", ["module", "function", "method", "torch"])
def test_activations_in_place_are_made_out_of_place(kind):
    torch.manual_seed(0)
    module, x = InPlace(kind).eval(), image_for("cifar:")
    result = freeze(module, fold=True)
    with torch.no_grad():
        assert torch.equal(result(x), module(x))
    assert not any("relu_" in str(node.target) for node in result.graph.nodes)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.rest = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.conv(x)) if x.sum() > 0 else x


def test_an_untraceable_piece_stays_as_it_is_with_one_warning(caplog):
    module = Untraceable().eval()
    with caplog.at_level(logging.WARNING, logger=frozen.__name__):
        assert freeze(module, fold=True) is module
    assert len(caplog.records) == 1
    assert "Untraceable cannot be traced" in caplog.text


# What is kept for the backward
# ------------------------------------------------------------------


def kept_bytes(piece: nn.Module, x: Tensor) -> int:
    constants = [*piece.parameters(), *piece.buffers()]
    return memory.kept_bytes(lambda: piece(x.requires_grad_()), constants)


def kept_ratio(name: str, fold: bool) -> float:
    """Bytes kept by the frozen stages after the first, relative to the ordinary ones."""
    first, *later = pieces_of(name)
    x, ordinary, frozen_bytes = first(image_for(name)), 0, 0
    for piece in later:
        ordinary += kept_bytes(piece, x.detach())
        frozen_bytes += kept_bytes(freeze(piece, fold=fold), x.detach())
        x = piece(x)
    return frozen_bytes / ordinary


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "cifar:resnet32x4",
        "cifar:wrn_40_2",
        "cifar:vgg13",
        "torchvision:resnet34",
        "torchvision:resnet50",
        "torchvision:mobilenet_v2",
    ],
)
def test_frozen_stages_keep_at_most_055_of_what_autograd_keeps(name, fold):
    ratio = kept_ratio(name, fold)
    print(f"{name} fold={fold}: {ratio:.3f}")
    assert ratio <= 0.55


@pytest.mark.parametrize("name", ["cifar:resnet32x4", "torchvision:mobilenet_v2"])
def test_with_ordinary_operations_the_bound_is_broken(name, monkeypatch):
    monkeypatch.setattr(frozen, "frozen_conv2d", lambda *args, exact: F.conv2d(*args))
    monkeypatch.setattr(
        FrozenBatchNorm2d,
        "forward",
        lambda self, x: F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        ),
    )
    assert kept_ratio(name, fold=False) > 0.55


# Precision, devices, compilation
# -----------------------------------------------------------------


def low_precision(piece: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return piece(x)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["cifar:resnet8", "cifar:wrn_16_1"])
def test_autocast_casts_each_constant_once(name, fold):
    piece = pieces_of(name)[0]
    result, x = freeze(piece, fold=fold), image_for(name)
    with torch.no_grad():
        y, want = low_precision(result, x), low_precision(piece, x)
    assert y.dtype == want.dtype == torch.bfloat16
    assert_close(y.float(), want.float(), 0 if not fold else 0.05)
    casts = [m for m in result.modules() if isinstance(m, (FrozenConv2d, FrozenAffine))]
    first = [m.copies[torch.bfloat16] for m in casts]
    low_precision(result, x.requires_grad_()).float().sum().backward()
    assert len(first) >= 3
    assert all(m.copies[torch.bfloat16] is copies for m, copies in zip(casts, first, strict=True))
    assert x.grad.dtype == torch.float32


def test_cast_constants_follow_the_constants():
    a, b = (nn.Sequential(nn.Conv2d(3, 4, 3)).eval() for _ in range(2))
    x = image_for("cifar:")
    result = freeze(a, fold=True)
    stale = low_precision(result, x)
    result.load_state_dict(freeze(b, fold=True).state_dict())
    with torch.no_grad():
        expected = low_precision(b, x)
    assert not torch.equal(expected, stale)
    assert torch.equal(low_precision(result, x), expected)
    assert torch.equal(result.double()(x.double()), b.double()(x.double()))
    assert copy.deepcopy(result).to("meta")(x.double().to("meta")).shape == expected.shape


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["cifar:wrn_16_1", "cifar:MobileNetV2", "torchvision:resnet18"])
def test_compiles_as_one_graph(name, fold):
    torch._dynamo.reset()
    first, second, *_ = pieces_of(name)
    x = first(image_for(name)).detach()
    result = freeze(second, fold=fold)
    expected = output_and_gradient(result, x)
    compiled = torch.compile(result, fullgraph=True, backend="aot_eager")
    for found, want in zip(output_and_gradient(compiled, x), expected, strict=True):
        assert_close(found, want, 1e-3)
    copies = [m.copies for m in result.modules() if isinstance(m, FrozenConv2d)]
    with torch.no_grad():
        want = low_precision(copy.deepcopy(result), x)
        assert torch.equal(low_precision(compiled, x), want)
        assert not any(copies)  # none made inside a graph
        low_precision(result, x)
        assert torch.equal(low_precision(compiled, x), want)
