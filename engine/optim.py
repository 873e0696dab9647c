"""Optimiser, learning-rate schedule and weight averaging, all torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .config import OptimConfig
from .methods import Method


def build_optimizer(method: Method, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD over the method's parameter groups (each with its own learning rate).

    Momentum starts as zeros, which gives the bits of torch's own first step, and not as absent:
    a step that is skipped, the first one too, leaves it as it is.
    """
    optimizer = torch.optim.SGD(
        method.parameter_groups(config),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum:
        for group in optimizer.param_groups:
            for param in group["params"]:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return optimizer


def lr_factor(
    config: OptimConfig, total_steps: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Learning rate of a step over its base value.

    `step` multiplies by gamma once `milestone * total_steps` steps are done: with 240 epochs and
    milestone 0.625 the first epoch at the lower rate is the 151st, as in mdistiller.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    milestones = [round(m * total_steps) for m in config.milestones]

    def factor(step: int) -> float:
        scale = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if config.schedule == "step":
            scale *= config.gamma ** sum(step >= m for m in milestones)
        elif config.schedule == "cosine":
            progress = min(step / max(total_steps, 1), 1.0)
            scale *= 0.5 * (1 + math.cos(math.pi * progress))
        return scale

    return factor


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule as a torch scheduler, stepped once an optimisation step."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lr_factor(config, total_steps, steps_per_epoch)
    )


def learning_rates(schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> list[float]:
    """Of each group, in step number `step` (from 0)."""
    return [
        base * factor(step)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]


def build_ema(student: nn.Module, decay: float | None) -> AveragedModel | None:
    """Exponential moving average of the student's parameters and buffers, or None."""
    if decay is None:
        return None
    return AveragedModel(student, next(student.parameters()).device)


@torch.no_grad()
def update_ema(ema: AveragedModel, student: nn.Module, decay: float, passes: Tensor) -> None:
    """Move the average by one step if `passes` (0-d bool).

    `ema.update_parameters` would look at the device and average whatever the step was. The first
    update takes the student's values, as there (but for rounding); integer buffers follow the
    student.
    """
    share = torch.where(ema.n_averaged == 0, 1.0, 1.0 - decay) * passes
    averaged = [*ema.module.parameters(), *ema.module.buffers()]
    current = [*student.parameters(), *student.buffers()]
    floating = [a.is_floating_point() for a in averaged]
    ours = [a for a, f in zip(averaged, floating, strict=True) if f]
    step = torch._foreach_sub([c for c, f in zip(current, floating, strict=True) if f], ours)
    torch._foreach_mul_(step, share)
    torch._foreach_add_(ours, step)
    for a, c, f in zip(averaged, current, floating, strict=True):
        if not f:
            a.copy_(torch.where(passes, c, a))
    ema.n_averaged += passes
