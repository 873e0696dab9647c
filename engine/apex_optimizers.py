"""NVIDIA apex's fused SGD and LAMB, where its CUDA extension `amp_C` has been built.

Both leave everything alone in a step that `optimizer.found_inf` says to skip, as torch's fused
optimizers do:

    SGD    apex's kernel returns at once where its flag is set; the flag is set here
    LAMB   apex has two. `FusedLAMB` ignores the flag on purpose ("to propagate infs/nans") and
           counts its steps and takes its rate on the host. `FusedMixedPrecisionLamb` obeys it, and
           its step count and its rate are tensors on the device, so that a CUDA graph may hold it:
           it is the one used
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError
from .files import first_line

BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)


def require_apex(name: str, device: torch.device) -> None:
    """Whether apex's optimizers can be had here.

    Raises:
        UsageError: No CUDA device, or no apex with its CUDA extension.
    """
    if device.type != "cuda":
        raise UsageError(
            f"optim.name={name!r}: apex's kernels need a CUDA device, this is {device.type}: "
            "expected sgd or adamw"
        )
    try:
        for module in ("amp_C", "apex.optimizers"):
            importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"optim.name={name!r}: NVIDIA apex with its CUDA extension is not there "
            f"({first_line(error)}): expected sgd or adamw, or build it: {BUILD} "
            "(PyPI's apex is another project)"
        ) from error


def apex_sgd(groups: Iterable[dict], **options: Any) -> torch.optim.Optimizer:
    """`FusedSGD`; options as of `torch.optim.SGD`. Its rate is a number, which a graph freezes."""
    from apex.optimizers import FusedSGD

    class GatedSGD(FusedSGD):
        _step_supports_amp_scaling = True

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            self._dummy_overflow_buf.copy_(_found_inf(self))
            return super().step(closure)

    return GatedSGD(groups, **options)


def apex_lamb(groups: Iterable[dict], **options: Any) -> torch.optim.Optimizer:
    """`FusedMixedPrecisionLamb`; options as of `torch.optim.AdamW`.

    A group without weight decay takes plain steps of its rate: apex scales a step to the length of
    the parameter only where there is decay.
    """
    from apex.optimizers import FusedMixedPrecisionLamb

    class GatedLamb(FusedMixedPrecisionLamb):
        takes_tensor_rate = True

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            return super().step(closure, grad_scaler=_Verdict(_found_inf(self)))

    groups = list(groups)
    rates = [group["lr"] for group in groups]
    # Gradients are clipped by the step, for every optimizer alike. apex divides by norm /
    # max_grad_norm where the norm is larger: 0 would not switch that off but divide by infinity.
    optimizer = GatedLamb(groups, max_grad_norm=math.inf, **options)
    # apex gives every group the default rate, also in the dictionaries that it was handed.
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"].fill_(rate)
    return optimizer


def _found_inf(optimizer: torch.optim.Optimizer) -> Tensor:
    """[1] fp32 on the device: 1 where the step is to be skipped."""
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        found = torch.zeros((), device=optimizer.param_groups[0]["params"][0].device)
    return found.reshape(1)


class _Verdict:
    """What apex asks of a gradient scaler: whether to skip, and the scale (gradients have none)."""

    def __init__(self, found_inf: Tensor) -> None:
        self.found_inf = found_inf

    def _check_inf_per_device(self, _: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self.found_inf)
