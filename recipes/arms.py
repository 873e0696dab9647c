"""Named variations of any recipe: controls and ablations, as `--arm NAME`.

Each takes the recipe's configuration and returns the arm's. Requirement numbers refer to the
method reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..engine.config import RunConfig


def _loss(**values: object) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, loss=replace(config.loss, **values))


def _prompt(**values: object) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, prompt=replace(config.prompt, **values))


def _optim(**values: object) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, optim=replace(config.optim, **values))


def _teacher(name: str) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(
        config, teacher=replace(config.teacher, name=name, expected_top1=None, expected_of=None)
    )


def _under(name: str) -> Callable[[RunConfig], RunConfig]:
    return lambda config: _same_total(_teacher(name)(config))


def _same_total(config: RunConfig) -> RunConfig:
    loss = config.loss
    total = loss.student_teacher + loss.student_prompt
    return replace(config, loss=replace(loss, kd_ce=loss.student_ce, kd_kl=total))


ARMS: dict[str, Callable[[RunConfig], RunConfig]] = {
    # KD's conventional weights, shared between the two supervisors (M23)
    "kd_matched": _loss(student_ce=0.1, student_teacher=0.45, student_prompt=0.45),
    # with --method kd: KD under the label and total KD weight of DFPT-KD (M23)
    "same_total": _same_total,
    # no prompt modules, mixture as target (M21)
    "mixture": _loss(mixture_control=True),
    # lambda_S = 0 (M18)
    "teacher_only": _loss(prompt_student=0.0),
    # single-term arms (M42)
    "no_student_teacher": _loss(student_teacher=0.0),
    "no_student_prompt": _loss(student_prompt=0.0),
    "no_prompt_ce": _loss(prompt_ce=0.0),
    "no_prompt_teacher": _loss(prompt_teacher=0.0),
    # objective and order (M19, M43)
    "reverse_kl": _loss(reverse_kl=True),
    "alternating": _loss(update="alternating"),
    # with terms of other methods, under their published weights (M49)
    "rkd": _loss(rkd_distance=25.0, rkd_angle=50.0),
    "crd": _loss(crd=0.8),
    "decoupled": _loss(decoupled=True),
    # structure (M35, M43, M44)
    "no_fusion": _prompt(fusion=False),
    "identity_init": _prompt(init="identity"),
    "parallel": _prompt(arrangement="parallel"),
    "single_scale": _prompt(kernels=(3,), r2=1.0),
    "small_kernels": _prompt(kernels=(1, 3, 5)),
    "no_prompt_norm": _prompt(prompt_norm="none"),
    "batch_statistics": _prompt(bn_mode="train"),
    "grouped_fusion": _prompt(r1=16, fusion_groups=8),
    "dense_fusion": _prompt(r1=4, fusion_groups=1),
    # one convolution of 3x3 with about the MACs of the three partial ones and their 1x1s (M34)
    "single_scale_matched": _prompt(kernels=(3,), r2=0.894),
    # some stages alone (M36, M43); of teachers with three
    **{f"stage_{i}": _prompt(insert_stages=(i,)) for i in (1, 2, 3)},
    "no_last_stage": _prompt(insert_stages=(1, 2)),
    # sweeps (M37, M38, M40, M41), the default left out; inner widths without their floor
    **{f"lambda_s_{v:g}": _loss(prompt_student=v) for v in (0.1, 0.5, 2.0)},
    **{f"lambda_t_{v:g}": _loss(prompt_teacher=v) for v in (0.1, 0.5, 2.0)},
    **{f"alpha_{v:g}": _loss(student_teacher=v) for v in (0.5, 2.0)},
    **{f"beta_{v:g}": _loss(student_prompt=v) for v in (0.5, 2.0)},
    **{f"tau_{v:g}": _loss(tau=v) for v in (1.0, 2.0, 8.0)},
    **{f"r1_{v}": _prompt(r1=v, min_width=1) for v in (1, 2, 4, 8, 16)},
    **{f"r2_{v:g}": _prompt(r2=v) for v in (0.125, 0.5, 1.0)},
    **{f"prompt_lr_{v:g}": _optim(prompt_lr_scale=v) for v in (0.1, 0.3, 3.0)},
    **{f"backbone_lr_{v:g}": _optim(backbone_lr_scale=v) for v in (0.001, 0.1, 1.0)},
    # another teacher for the recipe's student (M39), with --method kd under equal total weights too
    **{
        f"{arm}_{name}": change(f"cifar:{name}")
        for depth in (14, 20, 32, 44, 56, 110)
        for name in (f"resnet{depth}", f"resnet{depth}_s2")
        for arm, change in (("teacher", _teacher), ("same_total_teacher", _under))
    },
    # DKD's warm-up in 40 epochs: as large a share as 20 are of 240
    "short_warmup": _loss(warmup_epochs=3),
}
