"""Whole steps of every method, beside the plain loop; three seeds at once."""

import pytest

from ..engine.config import PromptConfig
from .step import Setting, build_sides

SIDES = [
    ("kd", "ours[eager]"), ("kd", "ours[eager]x3"), ("dfpt", "plain"), ("dfpt", "ours[eager]"),
    ("dfpt", "ours[eager]x3"), ("dfpt_plus", "plain"), ("dfpt_plus", "ours[eager]"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "side"), SIDES, ids=[f"{m}-{s}" for m, s in SIDES])
def test_step(timed, device, method, side):
    setting = Setting(
        "cifar:resnet20", "cifar:resnet8", method, 16, 32, 100, PromptConfig(), device
    )
    provider, _, seeds = side.partition("x")
    ((_, made),) = build_sides(setting, provider, (int(seeds or 1),))
    timed(made.call)
