"""The bounds that kernels are held to: right sums keep them in every order, wrong ones do not."""

import math

import numpy as np
import pytest
import torch
from error_bounds import Computed, RootMeanSquares, exact, excess, growth, products

ORDERS = {
    "as given": lambda t: t,
    "backwards": lambda t: t.flip(0),
    "rising": lambda t: t.sort().values,  # all negative terms first: the largest partial sums
    "falling": lambda t: t.sort(descending=True).values,
    "smallest first": lambda t: t[t.abs().argsort()],
    "in blocks": lambda t: torch.stack([part.sum() for part in t.split(16)]),
}


def one_by_one(terms, dtype=torch.float32):
    """Their sum, rounded to the dtype after every addition."""
    if dtype == torch.float32:
        return torch.tensor(np.add.accumulate(terms.numpy())[-1])
    total = torch.zeros(())
    for term in terms:
        total = (total + term).to(dtype).float()
    return total


@pytest.mark.parametrize("count", [1, 2, 30, 1000, 100_000])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_sum_in_fp32_is_within_its_bound_in_every_order(count, offset):
    terms = offset + torch.randn(count, generator=torch.Generator().manual_seed(count))
    expected = exact(terms).sum(0)
    found = {name: excess(one_by_one(order(terms)), expected) for name, order in ORDERS.items()}
    assert max(found.values()) <= 1, found
    assert excess(terms.sum(), expected) <= 1


def test_a_sum_in_bf16_and_a_lost_term_are_beyond_it():
    terms = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    expected = exact(terms).sum(0)
    assert excess(one_by_one(terms, torch.bfloat16), expected) >= 100
    assert excess(one_by_one(terms[1:]), expected) >= 100


def test_the_bound_of_a_long_sum_grows_with_the_root_of_its_length():
    assert growth(10) == pytest.approx(10 * 2**-24, rel=0.02)
    assert growth(10_000) == pytest.approx(600 * 2**-24, rel=0.02)
    assert growth(4, 2.0**-9) == pytest.approx(2**-7, rel=0.02)


def test_errors_of_the_factors_reach_a_product():
    a = Computed(torch.tensor([2.0, -3.0]).double(), torch.tensor([0.5, 0.25]).double())
    b = Computed(torch.tensor([4.0, 5.0]).double(), torch.tensor([0.125, 0.0]).double())
    found = products(torch.mul, a, b, terms=1)
    corners = [(2.5 * 4.125) - 8, (3.25 * 5) - 15]
    assert found.error.tolist() == pytest.approx(corners, rel=1e-6)
    assert (a - b).error.tolist() == pytest.approx([0.625, 0.25], rel=1e-5)
    assert a.relu().value.tolist() == [2, 0]


def test_a_gate_that_rounding_may_open_or_close_leaves_both_open():
    gate = Computed(torch.tensor([1.0, -1.0, 1e-9]).double(), torch.full((3,), 1e-8).double())
    through = exact(torch.tensor([5.0, 5.0, 5.0])).where_positive(gate)
    assert through.value.tolist() == [5, 0, 5]
    assert through.error.tolist() == [0, 0, 5]


def test_storing_in_a_dtype_adds_half_a_unit_or_a_whole_one():
    one = exact(torch.ones(1))
    assert one.stored(torch.float32).error.item() == 0
    assert one.stored(torch.bfloat16).error.item() == pytest.approx(2**-8)
    assert one.stored(torch.bfloat16, is_truncated=True).error.item() == pytest.approx(2**-7)


def test_nan_and_infinity_are_beyond_every_bound():
    expected = Computed(torch.zeros(3).double(), torch.ones(3).double())
    assert excess(torch.tensor([0.0, 0.5, -0.5]), expected) == 0.5
    for wrong in (math.nan, math.inf, -math.inf):
        assert excess(torch.tensor([0.0, wrong, 0.0]), expected) == math.inf
    assert excess(torch.ones(2), exact(torch.ones(2))) == 0
    assert excess(torch.ones(2), exact(torch.zeros(2))) == math.inf


def test_root_mean_squares_are_over_all_that_was_added():
    means = RootMeanSquares()
    means.add("a", torch.tensor([2.0, 4.0]), torch.tensor([2.0, 2.0]))  # errors 0 and 1 of 2
    means.add("a", torch.tensor([3.0, 9.0]), torch.tensor([3.0, 5.0]), scale=torch.tensor(4.0))
    assert means["a"] == pytest.approx(math.sqrt((0 + 1 + 0 + 1) / 4))
