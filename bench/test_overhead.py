"""What the prompt blocks cost: teacher, pairs, pairs with their backward, whole step."""

import pytest

from ..engine.config import PromptConfig
from .overhead import PARTS, Setting, make_side

SIDES = {"eager": "reference", "ours": None}


@pytest.fixture(scope="module", params=SIDES)
def side(request, device):
    setting = Setting(
        "cifar:resnet20", "cifar:resnet8", "dfpt", 16, 32, 100, PromptConfig(), device
    )
    return make_side(setting, SIDES[request.param])


@pytest.mark.parametrize("part", PARTS)
def test_overhead(timed, side, part):
    timed(side.calls[part])
