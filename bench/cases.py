"""What `dfptkd bench kernels` measures: the fused losses, a stage's prompt + fusion pair, and the
normalisation of a batch of images."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.config import PromptConfig
from ..engine.kernel_choice import KernelChoices
from ..engine.models import PromptFusion
from ..kernels import (
    distillation_loss,
    dual_path_loss,
    normalize_images,
    use_backend,
    which_backend,
)

LOSSES = ("dual_path_loss", "distillation_loss")
PAIR = "prompt_fusion"
IMAGES = "normalize_images"

# On a GPU the baseline is the strongest that torch.compile has; a CPU has no such mode.
_COMPILE = {"cuda": {"mode": "max-autotune-no-cudagraphs"}}


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs, by several providers."""

    operation: str
    shape: tuple[int, ...]
    inputs: Any
    providers: dict[str, Callable[[], Tensor]]
    """Name -> its output: a loss [], or an activation."""
    leaves: Sequence[Tensor]
    """What gets a gradient; empty where there is no backward."""
    upstream: Tensor | None
    """Gradient of the output; None for a loss."""
    tolerance: float
    """Largest distance from the reference, relative to its norm."""
    bytes_moved: dict[str, int]
    """Pass -> the least that it can read and write."""


def by_choice(call: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """`call` by the backend that a run would choose here, measured in eager mode: auto[BACKEND]."""
    kernels = KernelChoices()
    with kernels.deciding():
        call()
    (name,) = set(kernels.choices.values()) or {"reference"}

    def run() -> Tensor:
        with kernels.in_force():
            return call()

    return {f"auto[{name}]": run}


# Losses
# -----------------------------------------------------------------------


@dataclass(frozen=True)
class Logits:
    """Logits [B, C] of student, prompt path and teacher; labels int64 [B]."""

    student: Tensor
    prompt: Tensor
    teacher: Tensor
    target: Tensor

    @property
    def learners(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return self.student, self.prompt


def make_logits(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> Logits:
    """Random logits, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    student, prompt, teacher = (
        (3 * torch.randn(rows, classes, generator=generator)).to(device, dtype) for _ in range(3)
    )
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    return Logits(student.requires_grad_(), prompt.requires_grad_(), teacher, target)


def reference_total(operation: str, x: Logits) -> Tensor:
    """The reference's total, eager."""
    with use_backend("reference"):
        return fused_total(operation, x)


def fused_total(operation: str, x: Logits) -> Tensor:
    """The total by whatever backend serves the inputs."""
    if operation == "dual_path_loss":
        return dual_path_loss(x.student, x.prompt, x.teacher, x.target).total
    return distillation_loss(x.student, x.teacher, x.target).total


def loss_case(
    operation: str, rows: int, classes: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """`dual_path_loss` or `distillation_loss` of random logits [rows, classes]."""
    x = make_logits(rows, classes, dtype, device)
    found: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: reference_total(operation, x),
        "compile": torch.compile(lambda: reference_total(operation, x), dynamic=False),
    }
    backend = which_backend(operation, x.student)
    if backend != "reference":
        found[f"ours[{backend}]"] = lambda: fused_total(operation, x)
    found |= by_choice(lambda: fused_total(operation, x))
    if x.student.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        found["liger"] = _liger(operation, x)
    # Each logit read once, each gradient written once.
    tensors = 5 if operation == "dual_path_loss" else 3
    size = tensors * x.student.numel() * x.student.element_size() + 8 * len(x.target)
    return Case(
        operation,
        (rows, classes),
        x,
        found,
        x.learners,
        None,
        tolerance=1e-3,
        bytes_moved={"forward": size, "forward+backward": size},
    )


def _liger(operation: str, x: Logits, tau: float = 4.0) -> Callable[[], Tensor]:
    """The same total composed of Liger-Kernel's cross-entropy and KL (CUDA only)."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    ce, kl = LigerCrossEntropyLoss(), LigerKLDIVLoss(reduction="batchmean")

    def divergence(supervisor: Tensor, learner: Tensor) -> Tensor:
        q = (supervisor.detach().float() / tau).softmax(dim=1)
        return tau**2 * kl((learner.float() / tau).log_softmax(dim=1), q)

    def total() -> Tensor:
        s, p, t, y = x.student, x.prompt, x.teacher, x.target
        if operation == "distillation_loss":
            return 0.1 * ce(s, y) + 0.9 * divergence(t, s)
        student = ce(s, y) + divergence(t, s) + divergence(p, s)
        return student + ce(p, y) + divergence(t, p) + divergence(s, p)

    return total


# Prompt + fusion pair
# -----------------------------------------------------------------------


def pair_case(
    batch: int, channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """A training-mode `PromptFusion` of defaults on the output [B, C, H, W] of a stage.

    `ours[...]` is the fused backend, whether it pays or not.
    """
    generator = torch.Generator().manual_seed(0)
    size = (batch, channels, height, width)
    x, upstream = (
        torch.randn(size, generator=generator)
        .to(device, dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    x = x.relu().requires_grad_()
    torch.manual_seed(0)
    pair = PromptFusion(channels, PromptConfig()).to(device, memory_format=torch.channels_last)
    leaves = [x]

    def provider(backend: str | None, **compile_options: Any) -> Callable[[], Tensor]:
        own = copy.deepcopy(pair)
        leaves.extend(own.parameters())
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

        def run() -> Tensor:
            with autocast:
                if backend is None:
                    return own(x)  # type: ignore[no-any-return]
                with use_backend(backend):
                    return own(x)  # type: ignore[no-any-return]

        return torch.compile(run, **compile_options) if compile_options else run

    fast = which_backend("partial_pointwise_conv", x)
    found = {
        "eager": provider("reference"),
        "compile": provider("reference", dynamic=False, **_COMPILE.get(device.type, {})),
    }
    if fast != "reference":
        found[f"ours[{fast}]"] = provider(fast)
    found |= by_choice(provider(None))
    # Forward: x in, y out. Backward: x and the gradient of y in, the gradient of x out.
    image = x.numel() * x.element_size()
    return Case(
        PAIR,
        size,
        x,
        found,
        leaves,
        upstream,
        tolerance=1e-3 if dtype == torch.float32 else 3e-2,
        bytes_moved={"forward": 2 * image, "forward+backward": 5 * image},
    )


# Images
# -----------------------------------------------------------------------


def images_case(
    batch: int, height: int, width: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """`normalize_images` of random images [B, H, W, 3], with crop (padding 4) and flip."""
    generator = torch.Generator().manual_seed(0)
    size = (batch, height, width, channels)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device)
    offsets = torch.randint(0, 9, (batch, 2), generator=generator).to(device)
    flip = (torch.rand(batch, generator=generator) < 0.5).to(device)

    def run() -> Tensor:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        return normalize_images(images, mean, std, dtype=dtype, crop=(4, offsets), flip=flip)

    def reference() -> Tensor:
        with use_backend("reference"):
            return run()

    options: dict[str, Any] = dict(_COMPILE.get(device.type, {}))
    found: dict[str, Callable[[], Tensor]] = {
        "eager": reference,
        "compile": torch.compile(reference, dynamic=False, **options),
    }
    backend = which_backend(IMAGES, images, dtype)
    if backend != "reference":
        found[f"ours[{backend}]"] = run
    found |= by_choice(run)
    return Case(
        IMAGES,
        size,
        images,
        found,
        leaves=(),
        upstream=None,
        tolerance=1e-3,
        bytes_moved={"forward": images.numel() * (1 + dtype.itemsize) + 17 * batch},
    )
