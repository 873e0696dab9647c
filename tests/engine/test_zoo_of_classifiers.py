"""A classifier of each family of torchvision and timm, as student and as teacher under kd and dfpt:
it takes a step, or is refused in one line.

On tensors without memory, each at its own image size: the code that `train` asks before it trains.
DFPTKD_ZOO=all adds the families that take longest; DFPTKD_ZOO=real trains each for a step as well.
"""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dfptkd.engine import stand_in
from dfptkd.engine.cli import main
from dfptkd.engine.config import RunConfig, TeacherConfig
from dfptkd.engine.errors import UsageError
from dfptkd.engine.models import create_model
from dfptkd.engine.models.cost import teacher_cost
from dfptkd.engine.models.fit import Demand
from dfptkd.engine.models.frozen import freeze

SMALL = "cifar:resnet8_s2"
SIZES = {"torchvision:inception_v3": 299}
# Cut into stages without being told where: all that dfpt takes.
CUT = [
    "torchvision:mobilenet_v2", "torchvision:resnet18", "torchvision:shufflenet_v2_x0_5",
    "torchvision:vgg11", "timm:mobilenetv1_100", "timm:resnest14d", "timm:resnet10t",
    "timm:seresnet18", "timm:skresnet18", "timm:tinynet_e",
]  # fmt: skip
# In training mode they give the logits of auxiliary heads, too.
AUXILIARY = ["torchvision:googlenet", "torchvision:inception_v3"]
OTHERS = [
    "torchvision:alexnet", "torchvision:convnext_tiny", "torchvision:densenet121",
    "torchvision:efficientnet_b0", "torchvision:mnasnet0_5", "torchvision:mobilenet_v3_small",
    "torchvision:regnet_x_400mf", "torchvision:squeezenet1_0", "torchvision:swin_t",
    "torchvision:swin_v2_t", "torchvision:vit_b_32",
    "timm:coat_lite_tiny", "timm:convit_tiny",
    "timm:convnext_atto", "timm:convnextv2_atto", "timm:deit_tiny_distilled_patch16_224",
    "timm:dla34", "timm:edgenext_xx_small", "timm:efficientformer_l1",
    "timm:efficientvit_b0", "timm:fasternet_t0", "timm:ghostnet_050", "timm:hardcorenas_a",
    "timm:hgnetv2_b0", "timm:hiera_tiny_224", "timm:inception_next_atto", "timm:lcnet_035",
    "timm:mambaout_femto", "timm:mixer_s32_224", "timm:mobilenetv3_small_050",
    "timm:mobilenetv4_conv_small_035", "timm:mobilevit_xxs", "timm:mobilevitv2_050",
    "timm:nest_tiny", "timm:nf_resnet26", "timm:pit_ti_224",
    "timm:poolformer_s12", "timm:pvt_v2_b0", "timm:rdnet_tiny", "timm:regnetx_002",
    "timm:repvgg_a0", "timm:resmlp_12_224", "timm:resnetv2_18",
    "timm:selecsls42", "timm:starnet_s1", "timm:swin_tiny_patch4_window7_224",
    "timm:tiny_vit_5m_224", "timm:vit_tiny_patch16_224",
]  # fmt: skip
CUT_SLOWLY = [
    "timm:mixnet_s", "timm:mnasnet_small", "timm:mobilenetv2_035", "timm:res2net50_14w_8s",
    "timm:tf_efficientnet_lite0",
]  # fmt: skip
SLOW = [
    "torchvision:maxvit_t",
    "timm:botnet26t_256", "timm:convmixer_768_32", "timm:crossvit_tiny_240", "timm:cspresnet50",
    "timm:davit_tiny", "timm:densenet121", "timm:dpn68", "timm:efficientformerv2_s0",
    "timm:efficientvit_m0", "timm:ese_vovnet19b_dw", "timm:eva02_tiny_patch14_224",
    "timm:fastvit_t8", "timm:focalnet_tiny_srf", "timm:gcvit_xxtiny", "timm:hrnet_w18_small",
    "timm:inception_v4", "timm:mobileone_s0", "timm:nextvit_small", "timm:repghostnet_050",
    "timm:repvit_m0_9", "timm:shvit_s1", "timm:swiftformer_xs", "timm:swinv2_cr_tiny_ns_224",
    "timm:swinv2_tiny_window8_256", "timm:tnt_s_legacy_patch16_224", "timm:tresnet_m",
    "timm:twins_pcpvt_small", "timm:vgg11", "timm:visformer_tiny", "timm:volo_d1_224",
    "timm:xception41", "timm:xcit_nano_12_p16_224",
    "timm:cait_xxs24_224", "timm:rexnet_100", "timm:levit_128s",
    "timm:coatnet_nano_rw_224", "timm:dm_nfnet_f0", "timm:mvitv2_tiny",
]  # fmt: skip
ASKED = os.environ.get("DFPTKD_ZOO")
ZOO = [*CUT, *AUXILIARY, *OTHERS, *([*CUT_SLOWLY, *SLOW] if ASKED else [])]


def side_of(name: str) -> int:
    """Of the images that it is made for, in pixels."""
    family, _, architecture = name.partition(":")
    if family == "timm":
        timm = pytest.importorskip("timm")
        return timm.get_pretrained_cfg(architecture).input_size[-1]
    return SIZES.get(name, 224)


def without_memory(name: str, **options) -> nn.Module:
    try:
        with torch.device("meta"):
            return create_model(name, **options)
    except NotImplementedError:  # it is initialised by its values
        return create_model(name, **options)


@pytest.mark.parametrize("name", ZOO)
def test_a_classifier_takes_a_step_or_is_refused_in_one_line(name, monkeypatch):
    monkeypatch.setattr(stand_in, "create_model", without_memory)
    side = side_of(name)
    demand = Demand(num_classes=10, image_size=(side, side), part=2, evaluated=1)
    if name in AUXILIARY:
        with pytest.raises(UsageError, match=f"^student {name} returns a .*Outputs in training"):
            stand_in.check_networks(RunConfig(method="ce", student=name), demand)
    else:
        stand_in.check_networks(RunConfig(method="ce", student=name), demand)
    config, beside = (
        RunConfig(method=method, student=SMALL, teacher=TeacherConfig(name=name))
        for method in ("kd", "dfpt")
    )
    refused = stand_in.check_networks(config, demand, [beside])
    if name in [*CUT, *CUT_SLOWLY]:
        assert refused == {}
    else:
        assert (
            teacher_cost(without_memory(name, num_classes=10), None, (side, side)).teacher_macs > 0
        )
        assert list(refused) == ["dfpt"]
        assert "no known stages: pass --teacher.stages" in refused["dfpt"]
        assert "\n" not in refused["dfpt"]


@pytest.mark.skipif(ASKED != "real", reason="DFPTKD_ZOO=real trains networks of full size")
@pytest.mark.parametrize("name", ZOO)
def test_a_classifier_trains_for_a_step_or_is_refused_in_one_line(name, tmp_path, capsys):
    side, weights = side_of(name), tmp_path / "teacher.safetensors"
    args = (
        "train quickstart --device cpu --kernels reference --data.name synthetic --data.limit 2 "
        f"--data.num-classes 10 --data.image-size {side} --global-batch 2 --epochs 1 "
        f"--teacher.weights {weights} --out-root {tmp_path} --method"
    ).split()
    network = create_model(name, num_classes=10).eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        logits, frozen = network(images), freeze(network, fold=True)(images)
    assert (frozen - logits).abs().max() < 1e-5 * logits.abs().max()
    for teacher, student, method in (
        (SMALL, name, "kd"),
        (name, SMALL, "kd"),
        (name, SMALL, "dfpt"),
    ):
        tensors = (network if teacher == name else create_model(SMALL, num_classes=10)).state_dict()
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, weights)
        out = ["--out", str(tmp_path / f"{method}-{student == name}")]
        code = main([*args, method, "--teacher.name", teacher, "--student", student, *out])
        errors = [li for li in capsys.readouterr().err.splitlines() if li.startswith("dfptkd: ")]
        is_refused = student in AUXILIARY or (method == "dfpt" and name not in [*CUT, *CUT_SLOWLY])
        assert (code, len(errors)) == ((2, 1) if is_refused else (0, 0)), errors
