"""The hash behind sample order and augmentation (M15: every method sees the same data order)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfptkd.engine.data import order
from dfptkd.engine.data.order import (
    Stream,
    crop_offsets,
    epoch_order,
    flips,
    hash_bits,
    integers,
    uniforms,
)

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """One output of the published generator, in Python's unbounded integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def expected_bits(seed: int, epoch: int, counter: int, stream: int) -> int:
    key = 0
    for part in (seed, epoch, stream):
        key = splitmix64(key ^ part)
    return splitmix64((key + (counter - 1) * 0x9E3779B97F4A7C15) & MASK)


def test_oracle_gives_published_splitmix64_values():
    weyl = 0x9E3779B97F4A7C15
    outputs = [splitmix64(1234567 + i * weyl) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10_000),
    counter=st.integers(0, 2**40),
    stream=st.sampled_from(list(Stream)),
)
def test_hash_equals_unbounded_integer_arithmetic(seed, epoch, counter, stream):
    bits = hash_bits(seed, epoch, torch.tensor([counter]), stream)
    assert bits.item() & MASK == expected_bits(seed, epoch, counter, stream)


def test_draws_are_frozen():
    # These values are part of every run on disk: a change breaks exact resume of old runs.
    assert hash_bits(0, 0, torch.arange(4), Stream.ORDER).tolist() == [
        -8995600720072774737,
        2391539541053276776,
        920862675595841680,
        -6081368185890229076,
    ]
    assert epoch_order(0, 0, 10).tolist() == [0, 8, 3, 4, 6, 2, 1, 9, 5, 7]
    assert epoch_order(0, 1, 10).tolist() == [5, 1, 9, 3, 8, 0, 7, 4, 2, 6]
    assert crop_offsets(0, 0, torch.arange(4), 4).tolist() == [[6, 5], [7, 8], [1, 6], [4, 5]]
    assert flips(0, 0, torch.arange(8)).long().tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [int(stream) for stream in Stream] == list(range(10))


@pytest.mark.parametrize("stream", list(Stream))
def test_every_bit_is_uniform(stream):
    n = 40_000
    bits = hash_bits(3, 5, torch.arange(n), stream)
    share = torch.stack([((bits >> i) & 1).double().mean() for i in range(64)])
    # 64 proportions of n fair coins: 5 standard deviations of 0.5 / sqrt(n)
    assert (share - 0.5).abs().max() < 5 * 0.5 / n**0.5


def test_draws_are_uniform_and_uncorrelated():
    n = 50_000
    ids = torch.arange(n)
    counts = torch.bincount(integers(hash_bits(0, 0, ids, Stream.CROP_ROW), 9), minlength=9)
    chi_squared = ((counts - n / 9) ** 2 / (n / 9)).sum()
    assert len(counts) == 9
    assert chi_squared < 33.4  # 8 degrees of freedom, p = 5e-5

    draws = torch.stack(
        [uniforms(hash_bits(0, epoch, ids, s)) for epoch in (0, 1) for s in Stream]
        + [uniforms(hash_bits(1, 0, ids, Stream.ORDER))]
        + [uniforms(hash_bits(0, 0, ids + 1, Stream.ORDER))]
    )
    assert draws.min() >= 0
    assert draws.max() < 1
    correlations = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlations.abs().max() < 5 / n**0.5  # streams, epochs, seeds, neighbours


def test_weak_hash_fails_the_correlation_check(monkeypatch):
    # negative control: without the mixing neighbouring samples draw correlated numbers
    monkeypatch.setattr(order, "_xor_shift", lambda x, shift: x)
    ids = torch.arange(50_000)
    draws = torch.stack([uniforms(hash_bits(0, 0, ids + i, Stream.ORDER)) for i in (0, 1)])
    assert torch.corrcoef(draws)[0, 1].abs() > 5 / 50_000**0.5


@given(n=st.integers(1, 3000), seed=st.integers(0, 1000), epoch=st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_epoch_order_is_a_permutation(n, seed, epoch):
    assert epoch_order(seed, epoch, n).sort().values.tolist() == list(range(n))


def test_epochs_and_seeds_order_differently():
    n = 10_000
    orders = [epoch_order(s, e, n) for s, e in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0))]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            # two independent permutations agree in about one place (Poisson)
            assert (a == b).sum() < 12
            assert torch.corrcoef(torch.stack((a, b)).double())[0, 1].abs() < 5 / n**0.5


def test_draws_of_a_sample_do_not_depend_on_the_batch():
    ids = torch.tensor([5, 77, 4])
    everything = torch.arange(100)
    assert torch.equal(crop_offsets(1, 2, everything, 4)[ids], crop_offsets(1, 2, ids, 4))
    assert torch.equal(flips(1, 2, everything)[ids], flips(1, 2, ids))


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_crop_offsets_reach_every_position(padding):
    offsets = crop_offsets(0, 0, torch.arange(20_000), padding)
    assert offsets.dtype == torch.int64
    assert len(offsets.unique(dim=0)) == (2 * padding + 1) ** 2
    assert offsets.min() == 0
    assert offsets.max() == 2 * padding


def test_draws_are_the_same_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ids = torch.arange(50_000)
    assert torch.equal(epoch_order(1, 2, 50_000, "cuda").cpu(), epoch_order(1, 2, 50_000))
    assert torch.equal(crop_offsets(1, 2, ids.cuda(), 4).cpu(), crop_offsets(1, 2, ids, 4))
    assert torch.equal(flips(1, 2, ids.cuda()).cpu(), flips(1, 2, ids))


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    epoch_order(0, 0, 100)
    crop_offsets(0, 0, torch.arange(10), 4)
    flips(0, 0, torch.arange(10))
    assert torch.equal(torch.get_rng_state(), before)
