"""Optimiser, learning-rate schedule and weight averaging: torch's own, or apex's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .apex_optimizers import apex_lamb, apex_sgd, require_apex
from .config import OptimConfig
from .methods import Method


def check_optimizer(config: OptimConfig, device: torch.device) -> None:
    """Whether the optimiser can be had here.

    Raises:
        UsageError: It is apex's, and there is no CUDA device or no apex.
    """
    if config.name.startswith("apex-"):
        require_apex(config.name, device)


def graph_obstacle(config: OptimConfig) -> str | None:
    """Why a CUDA graph cannot hold the optimiser's step, or None."""
    if config.name == "apex-sgd":
        return "apex's SGD takes its learning rate as a number, which a graph would freeze"
    return None


def build_optimizer(
    method: Method, config: OptimConfig, global_batch: int
) -> torch.optim.Optimizer:
    """The optimiser over the method's parameter groups (each with its own learning rate).

    Its state starts as zeros, which gives the bits of its own first step, and not as absent: a
    step that is skipped, the first one too, leaves it as it is, and a checkpoint always holds the
    same names.

    Args:
        method: Gives the groups.
        config: Name and settings.
        global_batch: Images in a step, for `lr_batch`.

    Raises:
        UsageError: As `check_optimizer`.
    """
    if config.lr_batch is not None:
        rate = config.lr * global_batch / config.lr_batch
        config = dataclasses.replace(config, lr=rate, lr_batch=None)
    groups = method.parameter_groups(config)
    if not config.decay_norm_and_bias:
        groups = [part for group in groups for part in _without_decay(group)]
    for group in groups:
        group["initial_lr"] = group["lr"]  # a number, though an optimiser may make tensors of rates
    check_optimizer(config, groups[0]["params"][0].device)
    optimizer = _make(groups, config)
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param].update(_first_state(param, config))
    return optimizer


def _make(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    rates: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name in ("adamw", "apex-lamb"):
        rates |= {"betas": config.betas, "eps": config.eps}
    else:
        rates |= {"momentum": config.momentum, "nesterov": config.nesterov}
    match config.name:
        case "apex-sgd":
            return apex_sgd(groups, **rates)
        case "apex-lamb":
            return apex_lamb(groups, **rates)
        case "adamw":
            return torch.optim.AdamW(groups, fused=True, **rates)
        case _:
            return torch.optim.SGD(groups, fused=True, **rates)


def _first_state(param: Tensor, config: OptimConfig) -> dict[str, Tensor]:
    """What the optimiser keeps of one parameter, before the first step.

    Buffers take the memory format of their parameter: the fused kernels walk both linearly.
    """
    if config.name in ("adamw", "apex-lamb"):
        state = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        if config.name == "adamw":  # LAMB counts the steps of a group, not of a parameter
            state["step"] = torch.zeros((), device=param.device)
        return state
    if config.momentum or config.name == "apex-sgd":  # which makes it in any case
        return {"momentum_buffer": torch.zeros_like(param)}
    return {}


def _without_decay(group: dict) -> list[dict]:
    """A group in two of the same name, the second one without weight decay; no empty one."""
    wide = [p for p in group["params"] if p.dim() > 1]
    narrow = [p for p in group["params"] if p.dim() <= 1]
    parts = [{**group, "params": wide}, {**group, "params": narrow, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer.found_inf` keeps a step from changing anything: torch's own mark of it."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def rates_to_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Learning rates as tensors, so that every replay of a graph reads them anew."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:  # AdamW asks for it; its fused kernels always are
            group["capturable"] = True
    # It would warn of the steps that warm up, which are not captured.
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]


def rates_to_numbers(optimizer: torch.optim.Optimizer) -> None:
    """Inverse of `rates_to_device`, for steps without a graph."""
    for group in optimizer.param_groups:
        if not getattr(optimizer, "takes_tensor_rate", False):
            group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False


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
        elif config.schedule == "linear":
            scale *= min(max(total_steps - step, 0) / max(total_steps - warmup, 1), 1.0)
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
    pairs = list(zip(averaged, current, strict=True))
    ours, current = zip(*((a, c) for a, c in pairs if a.is_floating_point()), strict=True)
    step = torch._foreach_sub(current, ours)
    torch._foreach_mul_(step, share)
    torch._foreach_add_(ours, step)
    integers = [(a, c) for a, c in pairs if not a.is_floating_point()]
    if integers:
        counts, students = map(list, zip(*integers, strict=True))
        moves = torch._foreach_sub(students, counts)
        # A list of it: the host would read one tensor that serves for all.
        torch._foreach_mul_(moves, [passes.long()] * len(moves))
        torch._foreach_add_(counts, moves)
    ema.n_averaged += passes
