"""Error bounds of dual_path_loss and distillation_loss: terms, total and gradients.

The equations are those of kernels/dual_path_loss.py, followed as error_bounds.py says, with

    a = z / tau - max(z / tau),  S = sum exp(a),  log p = a - log S,  p = exp(a) / S

of each path. The bounds hold for any way to form them in the log domain: divided by tau before or
after the maximum is taken off, p as a quotient or as exp(log p), log p - log q as a difference of
these or as a_p - a_q - (log S_p - log S_q), and the gradients by formula or by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from error_bounds import FP32, Computed, growth
from torch import Tensor

_UNDERFLOW = 2.0**-124  # exponentials below this may be 0


@dataclass
class _Softmax:
    """Rows [B, C] of one path; `e_...` bounds the error of what stands behind it."""

    z: Tensor
    tau: float
    unit: float

    def __post_init__(self) -> None:
        u, scaled = self.unit, self.z / self.tau
        peak = scaled.max(dim=1, keepdim=True).values
        self.a = scaled - peak
        size = torch.where(self.a.isfinite(), self.a.abs() + scaled.abs() + peak.abs(), 0.0)
        self.e_a = 4 * u * size
        exps = self.a.exp()
        e_exps = exps * (self.e_a.expm1() + 6 * u) + _UNDERFLOW
        total = exps.sum(1, keepdim=True)
        e_total = e_exps.sum(1, keepdim=True) + growth(exps.shape[1] + 4, u) * total
        self.log_sum = total.log()
        self.e_log_sum = 1.01 * e_total / total + 2 * u * (self.log_sum + 1)
        self.p = exps / total
        size = torch.where(self.a.isfinite(), self.a.abs(), 0.0)
        e_log = self.e_a + self.e_log_sum + 2 * u * (size + self.log_sum) + 8 * u
        self.e_p = self.p * e_log.expm1() + _UNDERFLOW
        self.log_p = self.a - self.log_sum


def _log_ratio(q: _Softmax, p: _Softmax) -> tuple[Tensor, Tensor]:
    """log q - log p, 0 where q is, and its error."""
    is_there = q.a != -torch.inf
    ratio = torch.where(is_there, q.log_p - p.log_p, 0.0)
    size = torch.where(is_there, q.a.abs() + p.a.abs(), 0.0) + q.log_sum + p.log_sum
    error = q.e_a + p.e_a + q.e_log_sum + p.e_log_sum + (3 * size + 2) * q.unit
    return ratio, torch.where(is_there, error, 0.0)


def _divergence(q: _Softmax, p: _Softmax) -> tuple[Tensor, Tensor]:
    """KL(q || p) of each row [B] and its error."""
    ratio, e_ratio = _log_ratio(q, p)
    rounding = growth(ratio.shape[1] + 3, q.unit) * (q.p * ratio.abs()).sum(1)
    return (q.p * ratio).sum(1), (q.p * e_ratio + q.e_p * ratio.abs()).sum(1) + rounding


def _divergence_gradient(supervisor: _Softmax, learner: _Softmax, *, is_reversed: bool):
    """Gradient of tau KL towards the learner's logits [B, C] and its error."""
    q, p, u = supervisor, learner, learner.unit
    rounding = growth(p.p.shape[1], u)
    if not is_reversed:
        error = q.e_p + p.e_p + 4 * u * (p.p + q.p) + p.p * (q.e_p.sum(1, keepdim=True) + rounding)
        return p.p - q.p, error
    ratio, e_ratio = _log_ratio(p, q)
    kl = (p.p * ratio).sum(1, keepdim=True)
    size = p.p * (ratio.abs() + 1)  # autograd has p (log p - log q + 1) and takes its sum off
    error = p.e_p * (ratio.abs() + 1) + p.p * e_ratio + 3 * u * size
    of_sum = error.sum(1, keepdim=True) + rounding * size.sum(1, keepdim=True)
    error = error + p.e_p * kl.abs() + p.p * of_sum + 6 * u * (size + p.p * kl.abs())
    return p.p * (ratio - kl), error


def _cross_entropy(path: _Softmax, labels: Tensor) -> SimpleNamespace:
    """Cross-entropy of each row [B], its gradient [B, C], and their errors."""
    u = path.unit
    is_there = labels > 0
    size = torch.where(is_there, labels * (path.a.abs() + path.log_sum), 0.0)
    values = torch.where(is_there, -labels * path.log_p, 0.0).sum(1)
    terms = int(is_there.sum(1).max()) + 4 if len(labels) else 4
    errors = torch.where(is_there, labels * (path.e_a + path.e_log_sum), 0.0) + 6 * u * size
    errors = errors.sum(1) + growth(terms, u) * size.sum(1)
    mass = labels.sum(1, keepdim=True)
    gradient = path.p * mass - labels
    rounding = path.p * mass * growth(terms, u) + 6 * u * (path.p * mass + labels)
    return SimpleNamespace(
        values=values, errors=errors, gradient=gradient, e_gradient=path.e_p * mass + rounding
    )


def loss_bounds(
    logits: dict[str, Tensor],
    target: Tensor,
    weights: tuple[float, ...],
    *,
    tau: float,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reverse_kl: bool = False,
    unit: float = FP32,
    dtype: torch.dtype = torch.float32,
    is_truncated: bool = False,
    factor: float = 1.0,
) -> list[Computed]:
    """Total, terms and the gradients of the learners, in the order of the operators.

    Args:
        logits: student, prompt and teacher [B, C]; of distillation_loss, student and teacher.
        target: int64 [B] or probabilities [B, C].
        weights: Of the six terms; of distillation_loss, two.
        tau, label_smoothing, ignore_index, reverse_kl: As in the operators.
        unit: Unit roundoff of the sums.
        dtype: What gradients are stored in.
        is_truncated: Whether storing cuts off instead of rounding.
        factor: What the gradients are multiplied by afterwards.
    """
    rows, classes = logits["student"].shape
    if target.is_floating_point():
        keep, labels = torch.ones(rows, dtype=torch.bool), target.double()
    else:
        keep = target != ignore_index
        labels = torch.nn.functional.one_hot(torch.where(keep, target, 0), classes).double()
    labels = ((1 - label_smoothing) * labels + label_smoothing / classes)[keep]
    known = {name: z.detach().double()[keep] for name, z in logits.items()}
    count = max(int(keep.sum()), 1)
    tempered = {name: _Softmax(z, tau, unit) for name, z in known.items()}
    learners = [name for name in ("student", "prompt") if name in logits]
    supervisors = {
        "student": [name for name in ("teacher", "prompt") if name in logits],
        "prompt": ["teacher", "student"],
    }

    def mean(values: Tensor, errors: Tensor, scale: float) -> Computed:
        rounding = growth(count + 4, unit) * values.abs().sum()
        value, error = values.sum(), errors.sum() + rounding
        return Computed(value, error, unit).times(scale / count).rounded(2)

    terms: list[Computed] = []
    gradients: list[Computed] = []
    for name in learners:
        ce = _cross_entropy(_Softmax(known[name], 1.0, unit), labels)
        parts = [(ce.gradient, ce.e_gradient, 1.0)]
        terms.append(mean(ce.values, ce.errors, 1.0))
        for other in supervisors[name]:
            q, p = tempered[other], tempered[name]
            terms.append(mean(*(_divergence(p, q) if reverse_kl else _divergence(q, p)), tau**2))
            parts.append((*_divergence_gradient(q, p, is_reversed=reverse_kl), tau))
        value, error, size = (torch.zeros_like(ce.gradient) for _ in range(3))
        for weight, (part, e_part, scale) in zip(
            weights[len(gradients) * 3 :], parts, strict=False
        ):
            if weight:
                value += weight * scale / count * part
                error += abs(weight) * scale / count * e_part
                size += abs(weight * scale / count * part)
        error += 8 * unit * size + _UNDERFLOW
        whole = [torch.zeros(rows, classes, dtype=torch.float64) for _ in range(2)]
        whole[0][keep], whole[1][keep] = value, error
        gradient = Computed(*whole, unit).stored(dtype, is_truncated=is_truncated)
        if factor != 1:
            gradient = gradient.times(factor).stored(dtype, is_truncated=is_truncated)
        gradients.append(gradient)
    weighed = [(w, t) for w, t in zip(weights, terms, strict=True) if w]
    total = Computed(
        torch.tensor(sum(w * t.value.item() for w, t in weighed), dtype=torch.float64),
        torch.tensor(
            sum(abs(w) * (t.error + growth(8, unit) * t.largest).item() for w, t in weighed),
            dtype=torch.float64,
        ),
        unit,
    )
    return [total, *terms, *gradients]
