"""Tiny ImageNet: 200 classes of ImageNet at 64 pixels, the CIFAR networks from scratch.

The paper says nothing of this data set, and no published table is followed: the protocol is our
choice, that of CIFAR-100 (240 epochs, batch 64, SGD 0.9, weight decay 5e-4, learning rate 0.05, or
0.01 for the ShuffleNets, times 0.1 after epochs 150, 180, 210; random crop, flip), with a padding
of 8 for images of twice the size. Teachers come from train-teacher. The networks keep the strides
they have on CIFAR, so a step costs four times as much.
"""

from __future__ import annotations

from ..engine.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    PromptConfig,
    RunConfig,
    TeacherConfig,
)
from .cifar100 import WIDE_TEACHER


def _pair(
    name: str,
    teacher: str,
    student: str,
    method: str,
    *,
    dkd_beta: float,
    lr: float = 0.05,
    prompt: PromptConfig = PromptConfig(),
) -> RunConfig:
    return RunConfig(
        recipe=f"tiny_imagenet.{name}",
        method=method,  # type: ignore[arg-type]
        student=f"cifar:{student}",
        data=DataConfig(name="tiny_imagenet", image_size=64, num_classes=200, crop_padding=8),
        teacher=TeacherConfig(name=f"cifar:{teacher}"),
        prompt=prompt,
        loss=LossConfig(dkd_beta=dkd_beta, warmup_epochs=20 if method == "dkd" else 0),
        optim=OptimConfig(lr=lr),
    )


def resnet32x4_resnet8x4(method: str = "dfpt") -> RunConfig:
    """Same style; DKD's beta as on CIFAR-100."""
    return _pair("resnet32x4_resnet8x4", "resnet32x4", "resnet8x4", method, dkd_beta=8)


def vgg13_vgg8(method: str = "dfpt") -> RunConfig:
    """Same style, a wide teacher; DKD's beta as on CIFAR-100."""
    return _pair("vgg13_vgg8", "vgg13", "vgg8", method, dkd_beta=6, prompt=WIDE_TEACHER)


def wrn_40_2_shufflenetv1(method: str = "dfpt") -> RunConfig:
    """Different style, the paper's headline pair on CIFAR-100; DKD's beta as there."""
    return _pair("wrn_40_2_shufflenetv1", "wrn_40_2", "ShuffleV1", method, dkd_beta=8, lr=0.01)
