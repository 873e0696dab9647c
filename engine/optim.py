"""Optimiser, learning-rate schedule and weight averaging, all torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import OptimConfig
from .methods import Method


def build_optimizer(method: Method, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD over the method's parameter groups (each with its own learning rate)."""
    return torch.optim.SGD(
        method.parameter_groups(config),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


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


def build_ema(student: nn.Module, decay: float | None) -> AveragedModel | None:
    """Exponential moving average of the student's parameters and buffers, or None."""
    if decay is None:
        return None
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
