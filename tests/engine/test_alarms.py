"""The alarms, each with a case in which it must stay silent."""

import math

import pytest

from dfptkd.engine.alarms import loss_spike, overhead_warning, saturates_early, teacher_warning

GRADUAL = [(e, 75.0 * (1 - math.exp(-e / 60))) for e in range(1, 241)]
IDENTITY = [(e, 75.0 - 0.1 * (e % 3)) for e in range(1, 241)]


def test_M44_silent_on_a_gradual_curve():
    assert saturates_early(GRADUAL, 75.0, 240) is None


def test_M44_fires_for_a_curve_like_identity_initialisation():
    assert saturates_early(IDENTITY, 75.0, 240) == 1
    assert saturates_early([(0.0, 75.0), *GRADUAL], 75.0, 240) == 0


def test_M44_thresholds_are_half_a_point_in_the_first_tenth():
    assert saturates_early([(24, 74.5)], 75.0, 240) == 24
    assert saturates_early([(24, 74.49)], 75.0, 240) is None
    assert saturates_early([(25, 75.0)], 75.0, 240) is None
    assert saturates_early([(24, 73.0)], 75.0, 240, margin=2.0) == 24
    assert saturates_early([(25, 75.0)], 75.0, 240, share=0.2) == 25


def test_a_loss_far_above_the_epochs_before():
    assert "rose to 9" in loss_spike([3.0, 2.0, 2.5], 9.0)
    assert loss_spike([3.0, 2.0, 2.5], 4.9) is None  # not yet twice the median
    assert loss_spike([1.0], 9.0) is None  # nothing to compare with
    assert loss_spike([0.1] + [4.0] * 5, 5.0) is None  # the first one is forgotten
    assert loss_spike([1.0, 1.0], math.nan) is None  # skipped steps have an alarm of their own


def test_M44_a_short_run_is_judged_by_its_first_epoch():
    assert saturates_early([(1, 75.0), (2, 75.0)], 75.0, 3) == 1
    assert saturates_early([(1, 60.0), (2, 75.0)], 75.0, 3) is None
    assert saturates_early([], 75.0, 3) is None


@pytest.mark.parametrize(("added", "fires"), [(23, False), (100, False), (101, True), (416, True)])
def test_M45_overhead_is_raised_above_ten_percent(added, fires):
    message = overhead_warning(added, 1000, "MACs")
    assert (message is not None) is fires
    if fires:
        assert f"{added / 10:.1f} %" in message
        assert "MACs" in message


def test_teacher_more_than_two_points_under_its_recipe_is_told():
    assert teacher_warning(73.6, 75.61) is not None
    assert teacher_warning(73.61, 75.61) is None
    assert teacher_warning(10.0, None) is None
