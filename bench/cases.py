"""Cases of the operators, for `dfptkd bench kernels`, `pytest bench/` and a first GPU:
every fused operator, a stage's prompt + fusion pair, and the grouped convolutions of ShuffleNet."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.config import PromptConfig
from ..engine.kernel_choice import KernelChoices
from ..engine.models import PromptFusion
from ..kernels import (
    affine_relu,
    batch_norm_affine,
    distillation_loss,
    dual_path_loss,
    frozen_conv2d,
    frozen_relu,
    normalize_images,
    partial_pointwise_conv,
    use_backend,
    which_backend,
)

LOSSES = ("dual_path_loss", "distillation_loss")
PAIR = "prompt_fusion"
IMAGES = "normalize_images"
GROUPED = "grouped_conv1x1"

# On a GPU the baseline is the strongest that torch.compile has; a CPU has no such mode.
TUNED = {"cuda": {"mode": "max-autotune-no-cudagraphs"}}
# What a run compiles with: it is there in seconds and not in minutes.
AS_A_RUN = {"cuda": {"options": {"force_layout_optimization": True}}}

Output = Tensor | tuple[Tensor, ...]
CompileOptions = Mapping[str, Mapping[str, Any]]
"""Type of a device -> options of torch.compile."""


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs, by several providers."""

    operation: str
    shape: tuple[int, ...]
    inputs: Any
    providers: dict[str, Callable[[], Output]]
    """Name -> its output: a loss [], an activation, or several tensors."""
    leaves: Sequence[Tensor]
    """Tensors that get a gradient, the same for all providers; empty where there is no backward."""
    upstream: Sequence[Tensor] | None
    """Gradients of the output; None for a loss."""
    tolerance: float
    """Largest distance from the reference, relative to its norm."""
    bytes_moved: dict[str, int]
    """Pass -> the least that it can read and write."""
    parameters: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    """Provider -> what else gets a gradient: its own copy of a module's parameters."""
    exact: Callable[[], list[Tensor]] | None = None
    """Output and gradients as `results` has them, in fp64 by the reference; None: all providers
    have the same bits."""

    @property
    def ours(self) -> str | None:
        """The provider that is a fused backend; None where none serves."""
        return next((name for name in self.providers if name.startswith("ours[")), None)

    def learned(self, provider: str) -> list[Tensor]:
        """All that gets a gradient from a call of `provider`."""
        return [*self.leaves, *self.parameters.get(provider, ())]

    def backward(self, output: Output) -> None:
        """The backward pass of an output."""
        torch.autograd.backward(tensors_of(output), self.upstream)

    def results(self, provider: str) -> list[Tensor]:
        """Output, then the gradient of everything learned."""
        learned = self.learned(provider)
        for leaf in learned:
            leaf.grad = None
        output = self.providers[provider]()
        if learned:
            self.backward(output)
        found = [t.detach() for t in tensors_of(output)]
        return found + [leaf.grad for leaf in learned if leaf.grad is not None]


def tensors_of(output: Output) -> tuple[Tensor, ...]:
    """An output as a tuple."""
    return (output,) if isinstance(output, Tensor) else output


@dataclass(frozen=True)
class Disagreement:
    """Largest distance from fp64 of an output or a gradient, relative to the norm of either."""

    eager: float
    ours: float
    allowed: float
    """Bounds on the errors of `ours`, from those that eager makes itself."""

    @property
    def holds(self) -> bool:
        """Whether ours is as good as eager; what is not a number is not."""
        return self.ours <= self.allowed


# Machine epsilons, relative to the norm. Half precision: sums are made in fp32, and what is rounded
# is what is stored between a pair's six convolutions. fp32: the square root of the length of the
# sums over pixels, some thousand terms in whatever order.
_ROUNDINGS = {torch.float32: 32, torch.float64: 32}


def disagreement(case: Case) -> Disagreement:
    """How far eager and the fused backend are from fp64, in outputs and gradients.

    Ours may be three times as far from it as eager is, and in any case as far as rounding takes a
    pair (`_ROUNDINGS`): eager may have been lucky. Without fp64 (`Case.exact`) the bits must be
    equal.

    Raises:
        RuntimeError: No fused backend serves the case here.
    """
    if case.ours is None:
        raise RuntimeError(f"{case.operation}: no fused backend serves it here")
    eager, ours = (case.results(name) for name in ("eager", case.ours))
    if case.exact is None:
        equal = [torch.equal(a, b) for a, b in zip(eager, ours, strict=True)]
        return Disagreement(0.0, 0.0 if all(equal) else float("inf"), 0.0)
    exact = case.exact()
    # A gradient may be zero by mathematics, as that of a shift before a BatchNorm: what there is of
    # it is rounding, and small beside the others.
    largest = max(t.norm().item() for t in exact)
    if not 0 < largest < float("inf"):
        raise RuntimeError(
            f"{case.operation}: its own fp64 result has the norm {largest}: the device does not "
            "compute"
        )
    least = 1e-3 * largest
    norms = [max(t.norm().item(), least) for t in exact]
    errors = [
        [(a.double() - t).norm().item() / n for a, t, n in zip(found, exact, norms, strict=True)]
        for found in (eager, ours)
    ]
    floors = [_ROUNDINGS.get(t.dtype, 8) * torch.finfo(t.dtype).eps for t in eager]
    allowed = [max(3 * e, floor) for e, floor in zip(errors[0], floors, strict=True)]
    # The one that is nearest to its bound, or beyond it; what is not a number comes first.
    worst = max(
        zip(*errors, allowed, strict=True),
        key=lambda found: found[1] / found[2] if found[1] == found[1] else float("inf"),
    )
    return Disagreement(*worst)


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
    operation: str,
    rows: int,
    classes: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    auto: bool = True,
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
    if auto:
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
        x.learners if operation == "dual_path_loss" else (x.student,),
        None,
        tolerance=1e-3,
        bytes_moved={"forward": size, "forward+backward": size},
        exact=lambda: _exact_loss(operation, x),
    )


def _exact_loss(operation: str, x: Logits) -> list[Tensor]:
    student, prompt, teacher = (z.detach().double() for z in (x.student, x.prompt, x.teacher))
    twin = Logits(student.requires_grad_(), prompt.requires_grad_(), teacher, x.target)
    learners = twin.learners if operation == "dual_path_loss" else (twin.student,)
    total = reference_total(operation, twin)
    return [total.detach(), *torch.autograd.grad(total, learners)]


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
    batch: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    auto: bool = True,
    compile_options: CompileOptions = TUNED,
) -> Case:
    """A training-mode `PromptFusion` of defaults on the output [B, C, H, W] of a stage.

    `ours[...]` is the fused backend, whether it pays or not.
    """
    size = (batch, channels, height, width)
    x, upstream = _activations(2, size, dtype, device)
    x = x.relu().requires_grad_()
    torch.manual_seed(0)
    pair = PromptFusion(channels, PromptConfig()).to(device, memory_format=torch.channels_last)
    copies: list[torch.nn.Module] = []

    def provider(backend: str | None, **compile_options: Any) -> Callable[[], Tensor]:
        own = copy.deepcopy(pair)
        copies.append(own)
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
        "compile": provider("reference", dynamic=False, **compile_options.get(device.type, {})),
    }
    if fast != "reference":
        found[f"ours[{fast}]"] = provider(fast)
    if auto:
        found |= by_choice(provider(None))

    def exact() -> list[Tensor]:
        own, leaf = copy.deepcopy(pair).double(), x.detach().double().requires_grad_()
        with use_backend("reference"):
            y = own(leaf)
        y.backward(upstream.double())
        return [y.detach(), *(t.grad for t in (leaf, *own.parameters()) if t.grad is not None)]

    # Forward: x in, y out. Backward: x and the gradient of y in, the gradient of x out.
    image = x.numel() * x.element_size()
    return Case(
        PAIR,
        size,
        x,
        found,
        [x],
        [upstream],
        tolerance=1e-3 if dtype == torch.float32 else 3e-2,
        bytes_moved={"forward": 2 * image, "forward+backward": 5 * image},
        parameters={name: list(own.parameters()) for name, own in zip(found, copies, strict=True)},
        exact=exact,
    )


def _activations(
    count: int, size: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """Random, channels last, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(*size, generator=generator).to(device, dtype)
        yield x.contiguous(memory_format=torch.channels_last)


# Images
# -----------------------------------------------------------------------


def images_case(
    batch: int,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    auto: bool = True,
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

    options: dict[str, Any] = dict(TUNED.get(device.type, {}))
    found: dict[str, Callable[[], Tensor]] = {
        "eager": reference,
        "compile": torch.compile(reference, dynamic=False, **options),
    }
    backend = which_backend(IMAGES, images, dtype)
    if backend != "reference":
        found[f"ours[{backend}]"] = run
    if auto:
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


# The operators that prompt pairs and frozen stages are made of
# -----------------------------------------------------------------------


def operator_case(
    operation: str,
    batch: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """One fused operator on activations [B, C, H, W], by eager and by its fused backend alone.

    `ours[...]` is forced here: whether a run takes it is another question.
    """
    size = (batch, channels, height, width)
    x, upstream = _activations(2, size, dtype, device)
    call, tensors, given = _OPERATORS[operation](x)
    leaves = [t.requires_grad_() for t in given]

    def provider(backend: str, tensors: Sequence[Tensor]) -> Callable[[], Output]:
        def run() -> Output:
            with use_backend(backend):
                return call(*tensors)

        return run

    found = {"eager": provider("reference", tensors)}
    fast = _fused_backend(operation, tensors[0])
    if fast is not None:
        found[f"ours[{fast}]"] = provider(fast, tensors)
    with torch.no_grad():
        outputs = list(tensors_of(found["eager"]()))
    upstreams = [
        upstream if t.shape == upstream.shape else torch.linspace(-1, 1, t.numel(), device=device)
        for t in outputs
    ]
    upstreams = [u.to(t.dtype).view(t.shape) for u, t in zip(upstreams, outputs, strict=True)]

    def exact() -> list[Tensor]:
        twins = [t.detach().double() for t in tensors]
        learned = [
            twin.requires_grad_() for twin, t in zip(twins, tensors, strict=True) if t.requires_grad
        ]
        output = tensors_of(provider("reference", twins)())
        gradients = torch.autograd.grad(output, learned, [u.double() for u in upstreams])
        return [*(t.detach() for t in output), *gradients]

    moved = sum(t.numel() * t.element_size() for t in (*tensors, *outputs))
    given_back = sum(t.numel() * t.element_size() for t in (*outputs, *leaves))
    return Case(
        operation,
        size,
        x,
        found,
        leaves,
        upstreams,
        tolerance=1e-3 if tensors[0].dtype == torch.float32 else 3e-2,
        bytes_moved={"forward": moved, "forward+backward": 2 * moved + given_back},
        exact=exact,
    )


def _fused_backend(operation: str, x: Tensor) -> str | None:
    """The one that can serve a call, whether it would by itself or not."""
    for name in ("native", "triton"):
        with use_backend(name), suppress(RuntimeError):  # it cannot
            if which_backend(operation, x) == name:
                return name
    return None


# x [B, C, H, W] -> the call, its tensors, and those of them that get a gradient.
_Operator = tuple[Callable[..., Output], Sequence[Tensor], Sequence[Tensor]]


def _vectors(x: Tensor, count: int) -> list[Tensor]:
    """[C] each, fp32: around 1, around 0, and so on."""
    generator = torch.Generator().manual_seed(1)
    channels = x.shape[1]
    return [
        (1 - i % 2 + 0.3 * torch.randn(channels, generator=generator)).to(x.device)
        for i in range(count)
    ]


def _weights(x: Tensor, *sizes: Sequence[int]) -> list[Tensor]:
    """Weights of convolutions whose outputs are about as large as their inputs."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for size in sizes:
        fan_in = torch.Size(size[1:]).numel()
        found.append((torch.randn(*size, generator=generator) / fan_in**0.5).to(x.device, x.dtype))
    return found


def _frozen_relu(x: Tensor) -> _Operator:
    return frozen_relu, [x], [x]


def _affine_relu(x: Tensor) -> _Operator:
    tensors = [x, *_vectors(x, 2)]
    return lambda x, scale, shift: affine_relu(x, scale, shift, relu=True), tensors, tensors


def _frozen_conv(x: Tensor) -> _Operator:
    (weight,) = _weights(x, (x.shape[1], x.shape[1], 3, 3))
    return lambda x, weight: frozen_conv2d(x, weight, padding=1), [x, weight], [x]


def _batch_norm(x: Tensor) -> _Operator:
    values = x.float()
    sums, squared = values.sum((0, 2, 3)), values.square().sum((0, 2, 3))
    tensors = [sums, squared, *_vectors(x, 2)]
    count = x.numel() // x.shape[1]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return batch_norm_affine(*tensors, count=count, eps=1e-5)[:2]  # the others have no gradient

    return call, tensors, tensors


def _partial_pointwise(x: Tensor) -> _Operator:
    channels = x.shape[1]
    touched = max(1, channels // 4)
    weights = _weights(x, (touched, touched, 3, 3), (channels, channels))
    tensors = [x, *_vectors(x, 2), *weights]
    return lambda *t: partial_pointwise_conv(*t, relu=True), tensors, tensors


_OPERATORS: dict[str, Callable[[Tensor], _Operator]] = {
    "frozen_relu": _frozen_relu,
    "affine_relu": _affine_relu,
    "frozen_conv2d": _frozen_conv,
    "batch_norm_affine": _batch_norm,
    "partial_pointwise_conv": _partial_pointwise,
}


# Grouped 1x1 convolutions
# -----------------------------------------------------------------------


def grouped_case(
    batch: int,
    channels: int,
    out_channels: int,
    side: int,
    dtype: torch.dtype,
    device: torch.device,
    groups: int = 3,
) -> Case:
    """A grouped 1x1 convolution of ShuffleNetV1, by `conv2d` and as one batched matrix product of
    the pixels [N H W, groups, C / groups], which needs no copy of channels_last activations."""
    (x,) = _activations(1, (batch, channels, side, side), dtype, device)
    (upstream,) = _activations(1, (batch, out_channels, side, side), dtype, device)
    (weight,) = _weights(x, (out_channels, channels // groups, 1, 1))
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def convolution(x: Tensor = x, weight: Tensor = weight) -> Tensor:
        return F.conv2d(x, weight, groups=groups)

    def product() -> Tensor:
        pixels = x.permute(0, 2, 3, 1).reshape(-1, groups, channels // groups).transpose(0, 1)
        y = torch.bmm(pixels, weight.view(groups, out_channels // groups, -1).transpose(1, 2))
        return y.transpose(0, 1).reshape(batch, side, side, out_channels).permute(0, 3, 1, 2)

    image = (x.numel() + upstream.numel()) * x.element_size()
    return Case(
        f"{GROUPED}:{channels}>{out_channels}",
        (batch, channels, side, side),
        x,
        {"eager": convolution, "bmm": product},
        leaves,
        [upstream],
        tolerance=1e-3 if dtype == torch.float32 else 3e-2,
        bytes_moved={"forward": image, "forward+backward": 3 * image},
    )


# All of them
# -----------------------------------------------------------------------

USUAL = (*LOSSES, PAIR, IMAGES)
OPERATORS = (*USUAL, *_OPERATORS)


def cases(
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    operators: Sequence[str] = USUAL,
    *,
    auto: bool = True,
) -> Iterator[Case]:
    """Cases of `operators` on every shape: the losses where it has two numbers, images where the
    last of four is 3, all others on the other shapes of four.

    `auto`: what a run would choose is a provider too, and measured for that.
    """
    for shape in shapes:
        for operation in operators:
            if (operation in LOSSES, operation == IMAGES) == (len(shape) == 2, shape[-1] == 3):
                torch.compiler.reset()  # one case's graphs are of no use to the next
                yield make_case(operation, shape, dtype, device, auto=auto)


def make_case(
    operation: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    auto: bool = False,
) -> Case:
    """One of `OPERATORS` on a shape that is one of its own; `auto` as in `cases`."""
    sizes: Any = shape
    if operation in LOSSES:
        return loss_case(operation, *sizes, dtype, device, auto=auto)
    if operation == IMAGES:
        return images_case(*sizes, dtype, device, auto=auto)
    if operation == PAIR:
        return pair_case(*sizes, dtype, device, auto=auto)
    return operator_case(operation, *sizes, dtype, device)
