"""Means and paired differences with their 95 % t intervals, for a handful of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """What two sets of runs differ by, pair by pair; in the unit of their values."""

    mean: float
    n: int
    low: float | None
    """Lower end of the 95 % interval of the mean; None for a single pair."""
    high: float | None

    @classmethod
    def of(cls, a: Mapping[int, float], b: Mapping[int, float]) -> PairedDifference | None:
        """`a` minus `b` where both have a value; None where no pair is complete.

        Args:
            a: Values by seed.
            b: The same of what it is compared with.
        """
        differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
        if not differences:
            return None
        mean = statistics.fmean(differences)
        if len(differences) < 2:
            return cls(mean, 1, None, None)
        half = half_width(differences)
        return cls(mean, len(differences), mean - half, mean + half)

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of two values or more."""
    n = len(values)
    return t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)


def t_quantile(degrees: int) -> float:
    """What the absolute value of Student's t stays below with a probability of 95 %.

    Args:
        degrees: Of freedom, 1 or more.
    """
    # As a function of the angle atan(t / sqrt(degrees)) the probability is a finite sum.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, degrees) < CONFIDENCE else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _central(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) tan(angle)): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
