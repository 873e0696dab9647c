"""Signs that a run goes wrong in one of the ways the paper's summary names, as pure functions.

The trainer calls them while a run goes on, the report calls them again on what a run has left.
Thresholds are *our reading*.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def saturates_early(
    prompt_top1: Iterable[tuple[float, float]],
    teacher_top1: float,
    total_epochs: float,
    *,
    margin: float = 0.5,
    share: float = 0.1,
) -> float | None:
    """First epoch at which the prompt path is already as good as the teacher, or None.

    A prompt path that starts out as the teacher (identity initialisation) shows the student no
    easy-to-hard path. A short run is judged by its first epoch, since a tenth of it ends before
    anything is measured.

    Args:
        prompt_top1: (epochs completed, accuracy in percent) of the prompt path, in any order.
        teacher_top1: accuracy of the original path, in percent.
        total_epochs: epochs of the whole run.
        margin: points under the teacher that count as "as good".
        share: share of the run, from its start, in which that is too early.
    """
    early = max(share * total_epochs, 1.0)
    epochs = [e for e, top1 in prompt_top1 if e <= early and top1 >= teacher_top1 - margin]
    return min(epochs, default=None)


def loss_spike(
    before: Sequence[float], now: float, *, factor: float = 2.0, epochs: int = 5
) -> str | None:
    """One line if the loss of an epoch stands far above those of the epochs before.

    Args:
        before: mean cross-entropy of the student in earlier epochs, in their order.
        now: in this one.
        factor: over the median of the last `epochs`, at least two, that counts as far.
        epochs: how many of them to look at.
    """
    recent = before[-epochs:]
    if len(recent) < 2 or not now > factor * statistics.median(recent):
        return None
    return (
        f"the student's cross-entropy rose to {now:.3g}, the median of the {len(recent)} epochs "
        f"before is {statistics.median(recent):.3g}"
    )


def overhead_warning(added: int, base: int, what: str, limit: float = 10.0) -> str | None:
    """One line if prompt and fusion blocks cost more than `limit` percent of the teacher.

    Args:
        added: what the blocks add.
        base: what the teacher has.
        what: name of the quantity, "parameters" or "MACs".
        limit: percent above which the line is given.
    """
    percent = 100.0 * added / base
    if percent <= limit:
        return None
    return (
        f"prompt and fusion blocks add {percent:.1f} % to the teacher's {what}, above {limit:g} %: "
        "a larger prompt.fusion_groups or prompt.r1 makes them cheaper, as do fewer "
        "prompt.insert_stages"
    )


def overhead_warnings(cost: Mapping[str, Any], limit: float = 10.0) -> list[str]:
    """The lines of prompt and fusion blocks that cost more than `limit` percent of the teacher.

    Args:
        cost: as run.json has it. The new head is counted apart: classes and the teacher's features
            give its size, no option does. A record that does not know its share counts it in.
        limit: as of `overhead_warning`.
    """
    lines = []
    for key, what in (("params", "parameters"), ("macs", "MACs")):
        added, base = cost.get(f"added_{key}"), cost.get(f"teacher_{key}")
        if added and base:
            blocks = added - (cost.get(f"new_head_{key}") or 0)
            lines.append(overhead_warning(blocks, base, what, limit))
    return [line for line in lines if line is not None]


def saturation_warning(epoch: float, total_epochs: float) -> str:
    """The line that goes with an epoch from `saturates_early`."""
    return (
        f"the prompt path is as good as the teacher after {epoch:g} of {total_epochs:g} epochs: "
        "the student sees no easy-to-hard path"
    )


def fusion_warning() -> str:
    """The line of a run whose prompt blocks have no fusion block behind them."""
    return (
        "prompt blocks without fusion (prompt.fusion=False): the next stage reads x + P(x) itself"
    )


def chance_warning(top1: float, counts: Sequence[int], *, deviations: float = 3.0) -> str | None:
    """One line if a teacher is no better than one that always names the most frequent class.

    Args:
        top1: its accuracy in percent.
        counts: test images of each class.
        deviations: above chance that count as better, in standard deviations of so many images.
    """
    images = sum(counts)
    if not images:
        return None
    chance = max(counts) / images
    noise = math.sqrt(chance * (1 - chance) / images)
    if top1 / 100 > chance + deviations * noise:
        return None
    return (
        f"the teacher reaches {top1:.2f} % on {images:,} test images, which chance explains "
        f"({100 * chance:.2f} % ± {100 * noise:.2f}): it has nothing to teach"
    )


def relation_warning(terms: Sequence[str], part: int, batch: int) -> str | None:
    """One line if loss terms relate the images of a part with each other, and not all of a batch.

    Args:
        terms: Their weights, by the names of the options.
        part: Images of a part.
        batch: Images of a step, of all parts and processes.
    """
    if not terms or part >= batch:
        return None
    return (
        f"loss terms compare the {part} images of a part with each other, not the {batch} of a "
        f"step ({', '.join(terms)}): another loss than of whole batches (accumulate, processes)"
    )


def teacher_warning(top1: float, expected_top1: float | None, tolerance: float = 2.0) -> str | None:
    """One line if the teacher is more than `tolerance` points under what its recipe counts on."""
    if expected_top1 is None or top1 >= expected_top1 - tolerance:
        return None
    return (
        f"the teacher reaches {top1:.2f} %, {expected_top1 - top1:.2f} points under the recipe's "
        f"{expected_top1:.2f} %: results are not comparable with published ones"
    )
