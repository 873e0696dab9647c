"""M2, M3, M35: prompt and fusion blocks of one stage."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfptkd.engine.config import PromptConfig
from dfptkd.engine.errors import UsageError
from dfptkd.engine.models import create_model, split_stages
from dfptkd.engine.models.cifar import CIFAR_MODELS
from dfptkd.engine.models.prompt import PartialConv2d, PromptBlock, PromptFusion

TEACHERS = [f"cifar:{name}" for name in CIFAR_MODELS if not name.endswith("_s2")] + [
    "torchvision:resnet34",
    "torchvision:resnet50",
]
R1, R2 = (2, 4, 8, 16), (0.125, 0.25, 0.5, 1.0)
KERNELS = ((3,), (1, 3, 5), (3, 5, 7), (1, 3, 5, 7))
# Inner width m and convolved channels c_p of section 2.2, width floor 8 included.
WIDTHS = {
    "cifar:resnet32x4": [(16, 4), (32, 8), (64, 16)],
    "cifar:wrn_40_2": [(8, 2), (16, 4), (32, 8)],
    "cifar:resnet56": [(8, 2), (8, 2), (16, 4)],
    "cifar:resnet110": [(8, 2), (8, 2), (16, 4)],
    "cifar:vgg13": [(16, 4), (32, 8), (64, 16), (128, 32), (128, 32)],
    "torchvision:resnet34": [(16, 4), (32, 8), (64, 16), (128, 32)],
    "torchvision:resnet50": [(64, 16), (128, 32), (256, 64), (512, 128)],
}


def make_pair(channels: int, *, post_relu: bool = True, **fields: object) -> PromptFusion:
    """A pair in fp64 whose BatchNorm parameters are not the trivial (1, 0)."""
    torch.manual_seed(0)
    pair = PromptFusion(channels, PromptConfig(**fields), post_relu=post_relu).double()
    for module in pair.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return pair


def shape_is_kept(shape: tuple[int, ...], config: PromptConfig, device: str) -> bool:
    with torch.device(device):
        pair, x = PromptFusion(shape[1], config), torch.empty(shape)
    return pair.prompt(x).shape == x.shape == pair(x).shape


@functools.cache
def stage_shapes() -> set[tuple[int, ...]]:
    """Shapes [B, C, H, W] that the stages of all teachers put out."""
    shapes = set()
    for name in TEACHERS:
        with torch.device("meta"):
            split = split_stages(create_model(name, num_classes=10).eval())
            x = torch.empty(2, 3, *[224 if name.startswith("torchvision") else 32] * 2)
        for stage, channels in zip(split.stages, split.channels, strict=True):
            x = stage(x)
            assert x.shape[1] == channels
            shapes.add(tuple(x.shape))
    return shapes


@pytest.mark.parametrize("r1", R1)
def test_M2_shape_is_kept_at_every_stage_of_every_teacher(r1):
    shapes = stage_shapes()
    assert len(shapes) > 20
    for shape in shapes:
        # each r1 with two of the r2; every combination of the two is in the next test
        for r2 in (R2[R1.index(r1)], R2[R1.index(r1) - 2]):
            assert shape_is_kept(shape, PromptConfig(r1=r1, r2=r2), "meta"), (shape, r2)


@pytest.mark.parametrize("arrangement", ["sequential", "parallel"])
@pytest.mark.parametrize("channels", [12, 116])
def test_M2_shape_is_kept_for_every_configuration(channels, arrangement):
    for r1, r2, kernels, min_width in itertools.product(R1, R2, KERNELS, (1, 8)):
        config = PromptConfig(
            r1=r1, r2=r2, kernels=kernels, min_width=min_width, arrangement=arrangement
        )
        # 1 x 3: a map that is not square and smaller than the kernels
        assert shape_is_kept((2, channels, 1, 3), config, "cpu"), config


def test_M3_structure_is_down_then_partial_and_pointwise_per_scale_then_up():
    block = PromptBlock(64, PromptConfig())
    pointwise = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert [type(m).__name__ for m in block.down] == pointwise
    assert [[type(m).__name__ for m in scale] for scale in block.scales] == [
        ["PartialConv2d", *pointwise]
    ] * 3
    assert [type(m).__name__ for m in block.up] == ["Conv2d", "BatchNorm2d"]

    assert block.down[0].weight.shape == (16, 64, 1, 1)
    assert [scale[0].weight.shape for scale in block.scales] == [(4, 4, k, k) for k in (3, 5, 7)]
    assert all(scale[1].weight.shape == (16, 16, 1, 1) for scale in block.scales)
    assert block.up[0].weight.shape == (64, 16, 1, 1)


def test_M3_sequential_scales_feed_each_other_in_the_order_of_the_kernels():
    block = PromptBlock(8, PromptConfig(kernels=(5, 1, 3))).eval()
    modules = [block.down, *block.scales, block.up]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    for module in modules:
        module.register_forward_hook(lambda m, inputs, out: calls.append((m, inputs[0], out)))
    block(torch.randn(1, 8, 4, 4))
    assert [call[0] for call in calls] == modules
    assert all(later[1] is earlier[2] for earlier, later in itertools.pairwise(calls))
    assert [scale[0].weight.shape[-1] for scale in block.scales] == [5, 1, 3]


@pytest.mark.parametrize(("post_relu", "activations"), [(True, 5), (False, 4)])
def test_M3_a_pair_has_nine_convolutions_six_norms_and_no_bias_before_a_norm(
    post_relu, activations
):
    pair = PromptFusion(64, PromptConfig(), post_relu=post_relu)
    kinds = [type(module) for module in pair.modules()]
    assert kinds.count(nn.Conv2d) + kinds.count(PartialConv2d) == 9
    assert kinds.count(nn.BatchNorm2d) == 6
    assert kinds.count(nn.ReLU) == activations
    assert all(m.bias is None for m in pair.modules() if isinstance(m, nn.Conv2d))
    assert not any(getattr(m, "inplace", False) for m in pair.modules())
    assert pair.fusion[0].weight.shape == (64, 64, 1, 1)


def test_M3_bias_stands_in_for_a_missing_norm():
    pair = PromptFusion(16, PromptConfig(prompt_norm="none", fusion_norm="none"))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in pair.modules())
    assert all(m.bias is not None for m in pair.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", list(WIDTHS))
def test_M3_widths_are_those_of_section_2_2(name):
    with torch.device("meta"):
        channels = split_stages(create_model(name, num_classes=10)).channels
        blocks = [PromptBlock(c, PromptConfig()) for c in channels]
    found = [(b.down[0].out_channels, b.scales[0][0].weight.shape[0]) for b in blocks]
    assert found == WIDTHS[name]


def test_M3_width_floor_and_smallest_partial_convolution():
    def widths(channels: int, **fields: object) -> tuple[int, int]:
        block = PromptBlock(channels, PromptConfig(**fields))
        return block.down[0].out_channels, block.scales[0][0].weight.shape[0]

    assert widths(16, min_width=1) == (4, 1)
    assert widths(16, r1=16, min_width=1) == (1, 1)
    assert widths(16, r1=16, r2=0.125, min_width=2) == (2, 1)
    assert widths(64, r2=1.0) == (16, 16)


def literal_pointwise(layers: nn.Sequential, x: Tensor, *, groups: int = 1) -> Tensor:
    """1x1 convolution as a sum over channels, batch statistics by hand."""
    weight = layers[0].weight[:, :, 0, 0]
    parts = zip(x.chunk(groups, dim=1), weight.chunk(groups), strict=True)
    x = torch.cat([torch.einsum("bihw,oi->bohw", part, w) for part, w in parts], dim=1)
    if len(layers) > 1 and isinstance(layers[1], nn.BatchNorm2d):
        norm = layers[1]
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        var = x.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
        x = (x - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None]
        x = x + norm.bias[:, None, None]
    else:
        x = x + layers[0].bias[:, None, None]
    return x


def literal_pair(pair: PromptFusion, x: Tensor, *, parallel: bool, groups: int = 1) -> Tensor:
    """F(x + P(x)) written out from section 2, with a ReLU at the end."""
    prompt = pair.prompt
    h = literal_pointwise(prompt.down, x).clamp(min=0)
    summed = torch.zeros_like(h)
    for scale in prompt.scales:
        weight = scale[0].weight
        touched, kernel = weight.shape[0], weight.shape[-1]
        first = F.conv2d(F.pad(h[:, :touched], [kernel // 2] * 4), weight)
        mixed = torch.cat([first, h[:, touched:]], dim=1)
        y = literal_pointwise(scale[1:], mixed).clamp(min=0)
        if parallel:
            summed = summed + y
        else:
            h = y
    out = literal_pointwise(prompt.up, summed if parallel else h)
    return literal_pointwise(pair.fusion, x + out, groups=groups).clamp(min=0)


@pytest.mark.parametrize("norm", ["bn", "none"])
@pytest.mark.parametrize("arrangement", ["sequential", "parallel"])
@pytest.mark.parametrize("groups", [1, 4])
def test_M3_M4_a_pair_is_the_literal_formula(arrangement, norm, groups):
    pair = make_pair(
        16, arrangement=arrangement, prompt_norm=norm, fusion_norm=norm, fusion_groups=groups
    )
    x = torch.randn(3, 16, 5, 6, dtype=torch.float64)
    parallel = arrangement == "parallel"
    literal = literal_pair(pair, x, parallel=parallel, groups=groups)
    torch.testing.assert_close(pair(x), literal)
    wrong = literal_pair(pair, x, parallel=not parallel, groups=groups)
    assert not torch.allclose(pair(x), wrong, rtol=1e-3)


def test_M35_fusion_off_is_the_sum_alone():
    pair = make_pair(16, fusion=False).eval()
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    assert torch.equal(pair(x), x + pair.prompt(x))
    assert list(pair.fusion.parameters()) == []
    assert not torch.allclose(make_pair(16).eval()(x), x + pair.prompt(x))


@pytest.mark.parametrize(
    ("fusion_act", "post_relu", "ends_in_relu"),
    [("auto", True, True), ("auto", False, False), ("relu", False, True), ("none", True, False)],
)
def test_fusion_keeps_the_input_domain_of_the_next_stage(fusion_act, post_relu, ends_in_relu):
    pair = make_pair(16, fusion_act=fusion_act, post_relu=post_relu)
    out = pair(torch.randn(2, 16, 4, 4, dtype=torch.float64))
    assert (out.min() >= 0).item() is ends_in_relu


def test_an_additive_prompt_can_be_negative():
    prompt = make_pair(16).prompt(torch.randn(2, 16, 4, 4, dtype=torch.float64))
    assert prompt.min() < 0 < prompt.max()


@pytest.mark.parametrize("groups", [1, 4])
def test_T3_identity_initialisation_returns_the_input(groups):
    x = torch.randn(2, 16, 4, 4).relu()
    exact = PromptFusion(
        16, PromptConfig(init="identity", fusion_norm="none", fusion_groups=groups)
    ).eval()
    assert torch.equal(exact(x), x)
    normed = PromptFusion(16, PromptConfig(init="identity", fusion_groups=groups)).eval()
    torch.testing.assert_close(normed(x), x / (1 + 1e-5) ** 0.5, rtol=1e-6, atol=0)
    random = PromptFusion(16, PromptConfig(fusion_norm="none", fusion_groups=groups)).eval()
    assert not torch.allclose(random(x), x, rtol=0.1)


def test_random_initialisation_is_he_normal_over_fan_out():
    torch.manual_seed(0)
    pair = PromptFusion(512, PromptConfig())
    for weight, fan_out in (
        (pair.prompt.down[0].weight, 128),
        (pair.prompt.up[0].weight, 512),
        (pair.prompt.scales[2][0].weight, 32 * 49),
        (pair.fusion[0].weight, 512),
    ):
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert abs(weight.mean().item()) < 0.05 * (2 / fan_out) ** 0.5


def test_fusion_groups_must_divide_the_channels():
    with pytest.raises(UsageError, match=r"prompt\.fusion_groups=5.*16 channels"):
        PromptFusion(16, PromptConfig(fusion_groups=5))
