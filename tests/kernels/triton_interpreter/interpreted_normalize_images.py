"""The Triton kernel of normalize_images, interpreted, against the reference, bit for bit.

Run by ../test_triton_interpreter.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from dfptkd.kernels import normalize_images, use_backend
from dfptkd.kernels import normalize_images_triton as triton_images

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Lines of 1, 2, 4, 8 and 16 elements a chunk; programs that end before, at and after an image.
SHAPES = [
    (1, 1, 1), (3, 5, 7), (2, 7, 2), (2, 3, 4), (3, 9, 24), (1, 33, 17), (2, 32, 32), (3, 4, 256),
]  # fmt: skip


def make_batch(count, height, width, padding=4):
    generator = torch.Generator().manual_seed(count + height + width + padding)
    images = torch.randint(0, 256, (count, height, width, 3), generator=generator).byte()
    offsets = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    return images, (padding, offsets), flip


def run(name, images, mean=MEAN, std=STD, **options):
    with use_backend(name):
        return normalize_images(images, mean, std, **options)


def assert_same(images, mean=MEAN, std=STD, *, dtype, **options):
    found = run("triton", images, mean, std, dtype=dtype, **options)
    if dtype == torch.bfloat16:  # the interpreter cuts a number off where a GPU rounds it
        exact = run("reference", images, mean, std, dtype=torch.float32, **options)
        expected = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)
    else:
        expected = run("reference", images, mean, std, dtype=dtype, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_crop", [False, True])
@pytest.mark.parametrize("with_flip", [False, True])
def test_equals_the_reference(shape, dtype, with_crop, with_flip):
    images, crop, flip = make_batch(*shape)
    crop, flip = crop if with_crop else None, flip if with_flip else None
    assert_same(images, dtype=dtype, crop=crop, flip=flip)


@pytest.mark.parametrize("padding", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("size", [(5, 7), (8, 16)], ids=str)
@pytest.mark.parametrize("flipped", [False, True])
def test_offsets_at_the_ends(padding, size, flipped):
    """Padding 9 puts a whole image out of sight."""
    ends = torch.tensor(list(itertools.product((0, padding, 2 * padding), repeat=2)))
    images, _, _ = make_batch(len(ends), *size)
    flip = torch.full((len(ends),), flipped)
    assert_same(images, dtype=torch.float32, crop=(padding, ends), flip=flip)


def test_every_byte_in_every_channel():
    images = torch.arange(256).byte()[:, None].expand(256, 3).reshape(1, 16, 16, 3)
    for dtype in DTYPES:
        assert_same(images, dtype=dtype)


def test_the_comparison_sees_one_unit_in_the_last_place():
    """Negative control: rounded once, as a fused multiply-add is, some values differ."""
    images, _, _ = make_batch(2, 32, 32)
    found = run("triton", images, dtype=torch.float32)
    scale = torch.tensor([1 / (255 * s) for s in STD]).double()
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).double()
    fused = (images.double() * scale + shift).float().permute(0, 3, 1, 2)
    assert 0 < (fused != found).sum() < found.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_and_std_as_tensors(dtype):
    images, crop, flip = make_batch(3, 9, 24)
    mean, std = torch.tensor(MEAN).double(), torch.tensor([STD, STD]).T[:, 0]
    assert_same(images, mean, std, dtype=dtype, crop=crop, flip=flip)
    assert_same(images, MEAN, std, dtype=dtype)


def test_views_and_empty_batches():
    images, (padding, offsets), flip = make_batch(6, 12, 10)
    before = images.clone()
    images = images.transpose(1, 2)[::2]
    crop = padding, offsets[::2].flip(1)
    assert_same(images, dtype=torch.float32, crop=crop, flip=flip[::2])
    assert torch.equal(images, before.transpose(1, 2)[::2])
    assert_same(images[:0], dtype=torch.float32, flip=flip[:0])
    assert_same(images[1:, :5], dtype=torch.bfloat16)


OUT_OF_RANGE = [[0, 9], [-1, 0], [0, -200], [2**32, 0], [-(2**40), 2**20]]


@pytest.fixture
def launched():
    """The launch itself, since the public function finds such offsets before on a CPU."""
    images, _, _ = make_batch(1, 5, 7)
    ones, zeros = [1.0] * 3, [0.0] * 3

    def launch(offset):
        offsets = torch.tensor([offset])
        return triton_images.launch(images, ones, zeros, torch.float32, 4, offsets, None)

    return images, launch


@pytest.mark.parametrize("offset", OUT_OF_RANGE, ids=str)
def test_an_offset_out_of_range_fails_the_assertion(launched, monkeypatch, offset):
    builder = interpreter.interpreter_builder  # which would leave assertions out
    options = replace(builder.options, debug=True, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", options)
    _, launch = launched
    launch([8, 0])
    with pytest.raises((AssertionError, InterpreterError), match="offset out of range"):
        launch(offset)


@pytest.mark.parametrize("offset", OUT_OF_RANGE, ids=str)
def test_without_the_assertion_it_still_stays_in_bounds(launched, offset):
    images, launch = launched
    found = launch(offset)
    assert set(found.flatten().tolist()) <= {0.0, *map(float, images.flatten().tolist())}
    if offset == [0, -200]:
        assert not found.any()


def test_fp64_stays_with_the_reference():
    images, _, _ = make_batch(1, 5, 7)
    with use_backend("triton"), pytest.raises(RuntimeError, match="does not take"):
        normalize_images(images, MEAN, STD, dtype=torch.float64)
