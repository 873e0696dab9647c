"""All loss terms of a dual-path step: two cross-entropies, four temperature KL terms, two hit
counts.

    L = w_ce CE(z_S, y) + alpha   tau^2 KL(sg p_T || p_S) + beta     tau^2 KL(sg p_P || p_S)
      + v_ce CE(z_P, y) + lambda_T tau^2 KL(sg p_T || p_P) + lambda_S tau^2 KL(sg p_S || p_P)

with p = softmax(z / tau), KL(q || p) = sum_c q (log q - log p), the mean over the rows that
count, and sg a detach. The objective is *our reading* of DFPT-KD (arXiv 2506.18244): the paper's
equations are not known to us. `reverse_kl` swaps the arguments of the four KL terms; the
supervisor stays the detached one.

In: student, prompt, teacher [B, C] of one floating dtype; target int64 [B] or class probabilities
[B, C]. Out: fp32 (fp64 for fp64 input). Accumulates in the output's dtype, in the log domain
throughout. Bytes moved by one pass: 3 reads of B C elements and 2 gradient writes. FLOPs: about
40 B C, exponentials counted as one. Unsupported: double backward in the fused backends; a gradient
towards teacher, target or weights.

Suffixes: B rows, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import Call, choose, choose_at, decide_at, is_measuring


@dataclass(frozen=True)
class DualPathWeights:
    """Weights of the six terms, in the order used everywhere (1 each: *our reading*)."""

    student_ce: float = 1.0
    student_teacher: float = 1.0
    student_prompt: float = 1.0
    prompt_ce: float = 1.0
    prompt_teacher: float = 1.0
    prompt_student: float = 1.0

    def numbers(self) -> tuple[float, ...]:
        """The six in order, written out: Dynamo of torch 2.11 traces no loop over the fields."""
        return (
            self.student_ce,
            self.student_teacher,
            self.student_prompt,
            self.prompt_ce,
            self.prompt_teacher,
            self.prompt_student,
        )


class DualPathLoss(NamedTuple):
    """What `dual_path_loss` returns."""

    total: Tensor
    """0-d, differentiable towards student and prompt."""
    terms: Tensor
    """[6], detached: the unweighted means, in the order of `DualPathWeights`."""
    student_correct: Tensor
    """0-d int64: rows whose largest student logit is the target class."""
    prompt_correct: Tensor
    """0-d int64: the same for the prompt path."""


def dual_path_loss_reference(
    student: Tensor,
    prompt: Tensor,
    teacher: Tensor,
    target: Tensor,
    tau: float,
    weights: DualPathWeights | Tensor,
    label_smoothing: float,
    ignore_index: int,
    reverse_kl: bool,
) -> DualPathLoss:
    """Eager PyTorch: the specification, the oracle of the tests and the fallback."""
    keep_B = counted_rows(target, ignore_index)
    s_BC, p_BC, t_BC = (counted_logits(z, keep_B) for z in (student, prompt, teacher.detach()))
    log_s_BC, log_p_BC, log_t_BC = ((z / tau).log_softmax(dim=1) for z in (s_BC, p_BC, t_BC))

    def kl(supervisor: Tensor, learner: Tensor) -> Tensor:
        q, p = supervisor.detach(), learner
        return tau**2 * (kl_rows(p, q) if reverse_kl else kl_rows(q, p))

    rows = (
        cross_entropy_rows(s_BC, target, label_smoothing, ignore_index),
        kl(log_t_BC, log_s_BC),
        kl(log_p_BC, log_s_BC),
        cross_entropy_rows(p_BC, target, label_smoothing, ignore_index),
        kl(log_t_BC, log_p_BC),
        kl(log_s_BC, log_p_BC),
    )
    terms = [mean_over(row_B, keep_B) for row_B in rows]
    if isinstance(weights, DualPathWeights):
        total = weighted_sum(terms, weights.numbers(), s_BC, p_BC)
    else:
        total = weighted_sum(terms, weights, s_BC, p_BC)
    return DualPathLoss(
        total,
        torch.stack(terms).detach(),
        correct_count(s_BC, target, keep_B),
        correct_count(p_BC, target, keep_B),
    )


def dual_path_loss(
    student: Tensor,
    prompt: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    tau: float = 4.0,
    weights: DualPathWeights | Tensor = DualPathWeights(),
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reverse_kl: bool = False,
    is_root: bool = False,
) -> DualPathLoss:
    """Loss of student and prompt path under labels, original path and each other.

    Args:
        student: Student logits [B, C], fp16, bf16, fp32 or fp64.
        prompt: Prompt-path logits [B, C], same dtype and device.
        teacher: Original-path logits [B, C], same dtype and device; never gets a gradient.
        target: Labels, int64 [B], or class probabilities [B, C] (mixup, cutmix); a hit then
            compares argmax.
        tau: Temperature of the KL terms, above 0.
        weights: Six numbers, or a tensor [6] on the device. A zero weight drops the gradient only.
        label_smoothing: In [0, 1), for both cross-entropies.
        ignore_index: Rows with this label give no gradient and leave every mean and count.
        reverse_kl: KL(learner || supervisor) instead of KL(supervisor || learner).
        is_root: Promises that backward starts at the total itself: the gradient that arrives is 1,
            and no kernel multiplies by it.

    Returns:
        `DualPathLoss`; total and terms are fp32, or fp64 for fp64 logits. With no row to count
        all are 0.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, an option is out of its range, or
            teacher, target or weights require grad, which they would not get.
        IndexError: A label is out of range (CPU; on a GPU a device-side assertion).
    """
    check_logits(target, tau, label_smoothing, student=student, prompt=prompt, teacher=teacher)
    check_constants(
        "student, prompt, teacher, target", teacher=teacher, target=target, weights=weights
    )
    if isinstance(weights, Tensor) and (weights.shape, weights.device) != ((6,), student.device):
        raise ValueError(
            f"weights: expected a tensor of shape [6] on {student.device}, got "
            f"{list(weights.shape)} on {weights.device}"
        )
    options = (label_smoothing, ignore_index, reverse_kl)
    at = ("dual_path_loss", student, student.shape, loss_words(target, label_smoothing, reverse_kl))
    if is_measuring():
        call = functools.partial(
            dual_path_loss,
            tau=tau,
            weights=weights,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reverse_kl=reverse_kl,
        )
        backend = decide_at(Call(call, (student, prompt, teacher, target)), *at)
    else:
        backend = choose_at(*at)
    if backend == "reference":
        return dual_path_loss_reference(student, prompt, teacher, target, tau, weights, *options)
    numbers = weights if isinstance(weights, Tensor) else weights.numbers()
    inputs = (student, prompt, teacher, target, fused_weights(numbers, student.device), tau)
    return DualPathLoss(*_fused_dual_path_loss(backend, is_root, *inputs, *options))


# The fused backends of the family
# -----------------------------------------------------------------------


class FusedLoss:
    """A member of the family on its fused backends, which form the gradients in the forward pass.

    Two operators: `dfptkd::<operation>_native` is csrc/dual_path_loss.cpp, CPU, without autograd;
    `dfptkd::<operation>_fused` runs on any device and is differentiable. Compiled code and dispatch
    modes see the latter. A plain eager call goes past it through an autograd.Function, because what
    torch.library adds in Python takes longer than the native kernel for 128 x 100 logits.

    They take logits [B, C], learners first; target int64 [B] or probabilities [B, C]; weights, fp32
    [terms]; then tau, label_smoothing, ignore_index, reverse_kl, and `_fused` also is_root. They
    return total 0-d and terms, both fp32; a hit count, 0-d int64, for each learner; and for each
    learner the gradient of the total, contiguous [B, C] in the logits' dtype.
    """

    def __init__(
        self, operation: str, learners: tuple[str, ...], teacher: str, num_terms: int
    ) -> None:
        self.operation, self.num_learners, self.num_terms = operation, len(learners), num_terms
        tensors = ", ".join(f"Tensor {x}" for x in (*learners, teacher, "target", "weights"))
        inputs = f"{tensors}, float tau, float label_smoothing, int ignore_index, bool reverse_kl"
        outputs = ", ".join(["Tensor"] * (2 + 2 * len(learners)))
        native, fused = f"dfptkd::{operation}_native", f"dfptkd::{operation}_fused"
        for name, schema in (
            (native, f"({inputs}) -> ({outputs})"),
            (fused, f"({inputs}, bool is_root) -> ({outputs})"),
        ):
            torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
            torch.library.register_fake(name, self._allocate)
        torch.library.impl(fused, ("cpu", "cuda"), self._serve)
        torch.library.register_autograd(fused, self._backward, setup_context=self._setup_context)
        self._native = getattr(torch.ops.dfptkd, f"{operation}_native").default
        self._fused = getattr(torch.ops.dfptkd, f"{operation}_fused").default

    def __call__(self, backend: str, is_root: bool, *inputs: Any) -> tuple[Tensor, ...]:
        """Total (differentiable), terms and hit counts; `inputs` are those of the operators."""
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return self._fused(*inputs, is_root)[: 2 + self.num_learners]
        launch = self._launcher(backend)
        return _EagerFusedLoss.apply(launch, self.num_learners, is_root, *inputs)  # type: ignore[no-any-return]

    def _launcher(self, backend: str) -> Callable[..., tuple[Tensor, ...]]:
        if backend == "native":
            return self._native
        from . import dual_path_loss_triton

        return getattr(dual_path_loss_triton, f"launch_{self.operation}")

    def _serve(self, *inputs: Any) -> tuple[Tensor, ...]:
        backend = choose(self.operation, inputs[0])
        if backend == "reference":
            reason = f"{self.operation} has no fused backend for {inputs[0].dtype} here"
            raise RuntimeError(f"{reason}: call dfptkd.kernels.{self.operation} instead")
        return self._launcher(backend)(*inputs[:-1])

    def _allocate(self, *inputs: Any) -> tuple[Tensor, ...]:
        student = inputs[0]
        total = student.new_empty((), dtype=torch.float32)
        terms = student.new_empty(self.num_terms, dtype=torch.float32)
        hits = [student.new_empty((), dtype=torch.int64) for _ in range(self.num_learners)]
        return total, terms, *hits, *(z.new_empty(z.shape) for z in inputs[: self.num_learners])

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.is_root = inputs[-1]
        ctx.num_inputs = len(inputs)
        ctx.save_for_backward(*output[-self.num_learners :])

    @staticmethod
    @once_differentiable
    def _backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        if not ctx.is_root:
            grads = [grad * grad_total for grad in grads]
        return *grads, *[None] * (ctx.num_inputs - len(grads))


class _EagerFusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, launch: Callable, num_learners: int, is_root: bool, *inputs: Any
    ) -> tuple[Tensor, ...]:
        total, *rest = launch(*inputs)
        by_products, grads = rest[:-num_learners], rest[-num_learners:]
        ctx.is_root, ctx.num_inputs = is_root, 3 + len(inputs)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*by_products)
        ctx.set_materialize_grads(False)
        return total, *by_products

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        # The refusal of a second derivative takes time that only create_graph need spend.
        return (_scale_once if torch.is_grad_enabled() else _scale)(ctx, grad_total)


def _scale(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    grads = ctx.saved_tensors
    # On a CPU a look at the value costs nothing; on a GPU it would wait for the device.
    if not ctx.is_root and (grad_total.is_cuda or grad_total.item() != 1):
        needed = ctx.needs_input_grad[3:]
        grads = [g * grad_total if n else None for g, n in zip(grads, needed, strict=False)]
    return None, None, None, *grads, *[None] * (ctx.num_inputs - 3 - len(grads))


_scale_once = once_differentiable(_scale)


def fused_weights(weights: tuple[float, ...] | Tensor, device: torch.device) -> Tensor:
    """Weights of the terms as the operators take them: fp32, on the device."""
    if isinstance(weights, Tensor):
        return weights.detach().to(torch.float32)
    if torch.compiler.is_compiling():  # filled on the device: a copy from the host bars CUDA graphs
        return torch.stack([torch.full((), w, dtype=torch.float32, device=device) for w in weights])
    if is_in_torch_dispatch_mode():  # it may make another kind of tensor
        return torch.tensor(weights, dtype=torch.float32, device=device)
    return _weights_on(weights, device)


@functools.lru_cache(maxsize=64)
def _weights_on(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """Remembered, because the copy to a GPU waits for it."""
    return torch.tensor(weights, dtype=torch.float32, device=device)


_fused_dual_path_loss = FusedLoss("dual_path_loss", ("student", "prompt"), "teacher", num_terms=6)


# What the family of losses shares
# -----------------------------------------------------------------------


def loss_words(target: Tensor, label_smoothing: float, reverse_kl: bool) -> tuple[str, ...]:
    """What the work of a loss depends on beside its shape, as `Site` has it."""
    words = ("probabilities",) * target.is_floating_point()
    return words + ("smoothing",) * (label_smoothing > 0) + ("reversed",) * reverse_kl


def upcast(z: Tensor) -> Tensor:
    """Logits in the dtype that sums are made in: fp64 stays, all else becomes fp32."""
    return z if z.dtype == torch.float64 else z.float()


def kl_rows(log_q_BC: Tensor, log_p_BC: Tensor) -> Tensor:
    """KL(q || p) of each row [B] from log-probabilities.

    Classes of probability 0 under q (a logit of -inf) add nothing, also not to the gradient:
    without the mask they would be 0 * (inf - inf).
    """
    difference = torch.where(log_q_BC == -torch.inf, 0.0, log_q_BC - log_p_BC)
    return (log_q_BC.exp() * difference).sum(dim=1)


def cross_entropy_rows(
    z_BC: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> Tensor:
    """Cross-entropy of each row [B]; 0 where the row is ignored."""
    if not target.is_floating_point():
        return F.cross_entropy(
            z_BC,
            target,
            reduction="none",
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
    y_BC = target.detach().to(z_BC.dtype) * (1 - label_smoothing) + label_smoothing / z_BC.shape[1]
    # As in kl_rows: a class of probability 0 adds nothing even where its logit is -inf.
    return -torch.where(y_BC == 0, 0.0, y_BC * z_BC.log_softmax(dim=1)).sum(dim=1)


def counted_logits(z_BC: Tensor, keep_B: Tensor) -> Tensor:
    """Logits in the dtype of the sums, ignored rows blanked so that nothing in them can spread."""
    return torch.where(keep_B[:, None], upcast(z_BC), 0.0)


def counted_rows(target: Tensor, ignore_index: int) -> Tensor:
    """bool [B]: the rows that enter means and counts."""
    if target.is_floating_point():
        return torch.ones(target.shape[0], dtype=torch.bool, device=target.device)
    return target != ignore_index


def mean_over(row_B: Tensor, keep_B: Tensor) -> Tensor:
    """Mean over the counted rows, 0 if there is none."""
    return torch.where(keep_B, row_B, 0.0).sum() / keep_B.sum().clamp(min=1)


def weighted_sum(
    terms: list[Tensor], weights: Sequence[float] | Tensor, *learners: Tensor
) -> Tensor:
    """Sum of weight * term. A number 0 takes the term out of the graph, whatever its value.

    Every learner stays on the graph (by the sum of none of its rows), so that it gets a gradient,
    zeros if need be, under any weights.
    """
    anchor = torch.stack([z_BC[:0].sum() for z_BC in learners]).sum()
    if isinstance(weights, Tensor):
        return (weights.to(anchor.dtype).detach() * torch.stack(terms)).sum() + anchor
    return sum((w * t for w, t in zip(weights, terms, strict=True) if w != 0), start=anchor)


def correct_count(z_BC: Tensor, target: Tensor, keep_B: Tensor) -> Tensor:
    """0-d int64: counted rows whose largest logit is the target class."""
    label_B = target.argmax(dim=1) if target.is_floating_point() else target
    return ((z_BC.argmax(dim=1) == label_B) & keep_B).sum()


def check_logits(target: Tensor, tau: float, label_smoothing: float, **logits: Tensor) -> None:
    """The checks of the loss family, before any work; `logits` by argument name."""
    (first_name, first), *others = logits.items()
    if first.dim() != 2 or not first.is_floating_point() or first.shape[1] == 0:
        raise ValueError(
            f"{first_name}: expected floating logits [B, C], got {first.dtype} {list(first.shape)}"
        )
    for name, z in others:
        if z.shape != first.shape or z.dtype != first.dtype or z.device != first.device:
            raise ValueError(
                f"{name}: expected {first.dtype} {list(first.shape)} on {first.device} like "
                f"{first_name}, got {z.dtype} {list(z.shape)} on {z.device}"
            )
    shape = first.shape if target.is_floating_point() else first.shape[:1]
    if target.shape != shape or target.device != first.device or target.dtype in _NOT_LABELS:
        raise ValueError(
            f"target: expected int64 [{first.shape[0]}] or probabilities {list(first.shape)} on "
            f"{first.device}, got {target.dtype} {list(target.shape)} on {target.device}"
        )
    if not tau > 0:
        raise ValueError(f"tau: expected a temperature above 0, got {tau}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a value in [0, 1), got {label_smoothing}")


_NOT_LABELS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32)


def check_constants(order: str, **constants: Any) -> None:
    """Refuse what asks for a gradient where the family gives none: arguments in another order would
    train without a word a network that they mean to hold still, and not the one that they mean to
    train.

    Args:
        order: Of the function's arguments, for the message.
        constants: By argument name; only tensors are looked at.
    """
    if not torch.is_grad_enabled():
        return
    for name, value in constants.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name}: requires grad, and gets none here: expected it detached, and the "
                f"arguments in the order {order} (DualPathTeacher returns teacher_logits, "
                "prompt_logits)"
            )
