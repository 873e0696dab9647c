"""How far a computation in finite precision may be from the exact one, element by element.

A running error analysis (N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
SIAM 2002, sections 3.1 to 3.3). Every operation of a working precision with unit roundoff u gives

    fl(a op b) = (a op b) (1 + d),   |d| <= u

so that a computed number comes with its exact value v, in fp64, and a bound e of its error, and an
operation on such pairs gives such a pair:

    a + b     e_a + e_b                               + u |result|
    a b       |a| e_b + |b| e_a + e_a e_b             + u |result|
    sum a b   the same, summed up over the terms      + growth(n) sum |a b|

A sum of n products is within growth(n) sum |terms|, whatever the order in which a CPU, a library or
a number of threads adds them: at most n of the d meet in one term (section 3.1), hence n u. The d
of a long sum do not all point the same way: taken as independent and of mean zero, 6 sqrt(n) u
serves as well, wrong with a probability of 2 exp(-6^2 / 2) = 3e-8 a sum at most, and of far less
where partial sums are smaller than sum |terms| (N. J. Higham and T. Mary, A New Approach to
Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5), 2019). The smaller one counts.
sum |terms| is the same linear map, applied to absolute values.

Such a bound asks nothing of another implementation, which may be exact by luck. Terms of u^2 are
kept where they come for free and covered by `_SECOND_ORDER` elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FP32 = 2.0**-24
_DEVIATIONS = 6
_SECOND_ORDER = 1.01


def growth(terms: int, unit: float = FP32) -> float:
    """What the rounding of a sum of so many products is relative to sum |terms|."""
    return _SECOND_ORDER * unit * min(terms, _DEVIATIONS * math.sqrt(terms))


@dataclass(frozen=True)
class Computed:
    """Numbers as a computation of unit roundoff `unit` knows them: fp64 tensors of one shape."""

    value: Tensor
    error: Tensor
    unit: float = FP32

    @property
    def largest(self) -> Tensor:
        """Bound of the size of what is computed."""
        return self.value.abs() + self.error

    def rounded(self, roundings: float = 1) -> Computed:
        """After so many more roundings of relative size `unit`."""
        more = _SECOND_ORDER * roundings * self.unit * self.largest
        return Computed(self.value, self.error + more, self.unit)

    def stored(self, dtype: torch.dtype, *, is_truncated: bool = False) -> Computed:
        """After the rounding to a dtype of a larger unit, or after cutting off what it lacks."""
        info = torch.finfo(dtype)
        unit = info.eps if is_truncated else info.eps / 2
        if unit <= self.unit:
            return self
        error = self.error + unit * self.largest + info.smallest_normal * unit
        return Computed(self.value, error, self.unit)

    def __add__(self, other: Computed) -> Computed:
        value = self.value + other.value
        return Computed(value, self.error + other.error, self.unit).rounded()

    def __neg__(self) -> Computed:
        return Computed(-self.value, self.error, self.unit)

    def __sub__(self, other: Computed) -> Computed:
        return self + -other

    def __mul__(self, other: Computed) -> Computed:
        return products(torch.mul, self, other, terms=1)

    def times(self, factor: float) -> Computed:
        """By an exact number, rounded once."""
        return Computed(self.value * factor, self.error * abs(factor), self.unit).rounded()

    def reshape(self, *shape: int) -> Computed:
        return Computed(self.value.reshape(shape), self.error.reshape(shape), self.unit)

    def __getitem__(self, index: object) -> Computed:
        return Computed(self.value[index], self.error[index], self.unit)

    def sum(self, dims: int | tuple[int, ...]) -> Computed:
        sizes = [self.value.shape[d] for d in (dims if isinstance(dims, tuple) else (dims,))]
        rounding = growth(math.prod(sizes), self.unit) * self.largest.sum(dims)
        return Computed(self.value.sum(dims), self.error.sum(dims) + rounding, self.unit)

    def relu(self) -> Computed:
        return Computed(self.value.relu(), self.error, self.unit)

    def where_positive(self, gate: Computed) -> Computed:
        """This where the gate is above 0, else 0: anything between the two where it is unsure."""
        is_unsure = gate.value.abs() <= gate.error
        error = torch.where(gate.value > 0, self.error, 0.0)
        error = torch.where(is_unsure, self.largest, error)
        return Computed(torch.where(gate.value > 0, self.value, 0.0), error, self.unit)

    def rsqrt(self) -> Computed:
        """By an operation that is right to two units."""
        value = self.value.rsqrt()
        least = (self.value - self.error).clamp(min=0)
        return Computed(value, least.rsqrt() - value, self.unit).rounded(2)


def exact(tensor: Tensor, unit: float = FP32) -> Computed:
    """Numbers that the computation starts from as they are."""
    value = tensor.detach().double()
    return Computed(value, torch.zeros_like(value), unit)


def products(
    function: Callable[[Tensor, Tensor], Tensor], a: Computed, b: Computed, *, terms: int
) -> Computed:
    """A bilinear map whose every result sums up at most `terms` products of a and b.

    Args:
        function: Any such map with coefficients of 0 and 1: mul, matmul, a convolution.
        a, b: What it is applied to.
        terms: Products in a sum.
    """
    propagated = function(a.largest, b.largest) - function(a.value.abs(), b.value.abs())
    rounding = growth(terms, a.unit) * function(a.largest, b.largest)
    return Computed(function(a.value, b.value), propagated.clamp(min=0) + rounding, a.unit)


def concatenate(parts: list[Computed], dim: int) -> Computed:
    value = torch.cat([part.value for part in parts], dim)
    return Computed(value, torch.cat([part.error for part in parts], dim), parts[0].unit)


def excess(found: Tensor, expected: Computed) -> float:
    """The largest error in units of its bound: at most 1 of a right result, inf of a NaN."""
    assert found.shape == expected.value.shape
    error = (found.detach().double() - expected.value).abs()
    ratio = torch.where(error == 0, 0.0, error / expected.error).nan_to_num(
        nan=math.inf, posinf=math.inf
    )
    return ratio.max().item() if ratio.numel() else 0.0


class RootMeanSquares:
    """Errors over all elements of many cases, relative to the size of what they are errors of.

    How large the largest of one draw is depends on luck; the mean over thousands does not.
    """

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}

    def add(self, key: str, found: Tensor, exact: Tensor, *, scale: Tensor | None = None) -> None:
        """The size is the root mean square of `exact`, unless a scale is given for each element."""
        exact = exact.detach().double()
        if scale is None:
            scale = exact.square().mean().sqrt()
        error = found.detach().double() - exact
        total = torch.where(error == 0, 0.0, error / scale).square().sum()
        more = torch.stack([total, torch.tensor(float(exact.numel()))])
        self._squares[key] = self._squares.get(key, torch.zeros(2)) + more

    def __getitem__(self, key: str) -> float:
        squares, count = self._squares[key].tolist()
        return math.sqrt(squares / count)
