"""normalize_images against a loop in fp64, on every backend that runs here."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dfptkd.kernels import backend, normalize_images, use_backend

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
NO_NATIVE = backend.unavailable("native")
needs_native = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
SHAPES = [(0, 4, 4), (1, 1, 1), (2, 5, 7), (3, 8, 8), (2, 33, 17), (5, 32, 32)]


def make_batch(count, height, width, padding=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, height, width, 3), generator=generator).byte()
    offsets = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    return images, (padding, offsets), flip


def oracle(images, mean, std, crop, flip):
    """The definition, image by image, in fp64: pad, crop, flip, normalise."""
    count, height, width, _ = images.shape
    out = np.empty((count, 3, height, width))
    for n, image in enumerate(images.numpy()):
        if crop is not None:
            padding, offsets = crop
            padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
            top, left = offsets[n].tolist()
            image = padded[top : top + height, left : left + width]
        if flip is not None and flip[n]:
            image = image[:, ::-1]
        out[n] = ((image / 255.0 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
    return torch.from_numpy(out)


def rounding_bound(dtype):
    """Product, sum and two rounded constants, each half a unit of the largest term (1 / std < 4);
    then the result, at most 2.5 in size, is rounded to its own dtype."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return 4 * 4 * torch.finfo(work).eps / 2 + 2.5 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("with_crop", [False, True])
@pytest.mark.parametrize("with_flip", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(name, shape, with_crop, with_flip):
    images, crop, flip = make_batch(*shape)
    crop, flip = crop if with_crop else None, flip if with_flip else None
    with use_backend(name):
        out = normalize_images(images, MEAN, STD, dtype=torch.float32, crop=crop, flip=flip)
    assert out.shape == (shape[0], 3, *shape[1:])
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    error = (out.double() - oracle(images, MEAN, STD, crop, flip)).abs()
    assert (error <= rounding_bound(torch.float32)).all()


def test_the_bound_tells_a_wrong_order_apart():
    """Negative control: zeros padded after normalisation would be grey, and are seen."""
    images, (padding, offsets), _ = make_batch(3, 8, 8)
    crop = (padding, torch.zeros_like(offsets))
    out = normalize_images(images, MEAN, STD, dtype=torch.float32, crop=crop)
    wrong = out.clone()
    wrong[:, :, :padding] = 0
    error = (wrong.double() - oracle(images, MEAN, STD, crop, None)).abs()
    assert (error > rounding_bound(torch.float32)).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    images, crop, flip = make_batch(4, 9, 6)
    out = normalize_images(images, MEAN, STD, dtype=dtype, crop=crop, flip=flip)
    assert out.dtype == dtype
    error = (out.double() - oracle(images, MEAN, STD, crop, flip)).abs()
    assert (error <= rounding_bound(dtype)).all()


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 20), st.integers(1, 40)),
    padding=st.integers(0, 24),
    use=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_native_equals_reference_bit_for_bit(shape, padding, use, seed):
    images, crop, flip = make_batch(*shape, padding=padding, seed=seed)
    out = []
    for name in ("reference", "native"):
        with use_backend(name):
            out.append(
                normalize_images(
                    images, MEAN, STD, dtype=torch.float32,
                    crop=crop if use[0] else None, flip=flip if use[1] else None,
                )
            )  # fmt: skip
    assert torch.equal(*out)


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_inputs_and_large_batches(name):
    """Beyond one thread's share, with every tensor a view."""
    images, (padding, offsets), flip = make_batch(300, 32, 24)
    images = images.transpose(1, 2)[::2]  # [150, 24, 32, 3]
    offsets, flip = offsets[::2].flip(1), flip[::2]
    assert not images.is_contiguous()
    before = images.clone()
    with use_backend(name):
        out = normalize_images(
            images, MEAN, STD, dtype=torch.float32, crop=(padding, offsets), flip=flip
        )
    expected = oracle(images.contiguous(), MEAN, STD, (padding, offsets), flip)
    assert ((out.double() - expected).abs() <= rounding_bound(torch.float32)).all()
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", BACKENDS)
def test_mean_and_std_as_tensors(name):
    images, _, _ = make_batch(2, 6, 6)
    with use_backend(name):
        numbers = normalize_images(images, MEAN, STD, dtype=torch.float32)
        tensors = normalize_images(
            images, torch.tensor(MEAN).double(), torch.tensor(STD), dtype=torch.float32
        )
    assert ((numbers - tensors).abs() <= 4 * 4 * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(1, 4, 4, 3)}, "images: expected uint8"),
        ({"images": torch.zeros(1, 3, 4, 4).byte()}, "images: expected uint8"),
        ({"images": torch.zeros(4, 4, 3).byte()}, "images: expected uint8"),
        ({"dtype": torch.int32}, "dtype: expected a floating"),
        ({"mean": (0.5, 0.5)}, "mean and std: expected 3 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std above 0"),
        ({"mean": torch.zeros(4)}, "mean: expected 3 values"),
        ({"std": torch.ones(3, device="meta")}, "std: expected 3 values on cpu"),
        ({"crop": (4, torch.zeros(2, 2).long())}, "crop offsets: expected torch.int64"),
        ({"crop": (4, torch.zeros(1, 2).int())}, "crop offsets: expected torch.int64"),
        ({"crop": (4, torch.tensor([[0, 9]]))}, r"expected 0\.\.8 for padding 4"),
        ({"crop": (4, torch.tensor([[-1, 0]]))}, r"got -1\.\.0"),
        ({"crop": (-1, torch.zeros(1, 2).long())}, "crop padding: expected 0 or more"),
        ({"flip": torch.zeros(1)}, "flip: expected torch.bool"),
        ({"flip": torch.zeros(1, 1).bool()}, "flip: expected torch.bool"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(change, message):
    call = {
        "images": torch.zeros(1, 4, 4, 3).byte(), "mean": MEAN, "std": STD, "dtype": torch.float32,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message) as caught:
        normalize_images(call.pop("images"), call.pop("mean"), call.pop("std"), **call)
    assert "\n" not in str(caught.value)


@needs_native
@pytest.mark.parametrize("offsets", [[[0, 9]], [[-1, 0]]])
def test_the_operator_itself_stays_in_bounds(offsets):
    """Compiled code skips the Python check of the values."""
    scale = torch.ones(3)
    with pytest.raises(RuntimeError, match="crop offset"):
        torch.ops.dfptkd.normalize_images(
            torch.zeros(1, 4, 4, 3).byte(),
            scale,
            scale,
            torch.float32,
            4,
            torch.tensor(offsets),
            None,
        )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("kind", ["numbers", "tensors", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_on_cuda_it_is_one_operator_but_for_fp64(kind, dtype):
    """Fake tensors need no GPU. Numbers go into the operator as they are."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Record():
        images = torch.empty(2, 5, 7, 3, dtype=torch.uint8, device="cuda")
        mean = MEAN if kind == "numbers" else torch.empty(3, device="cuda")
        std = torch.empty(3, device="cuda") if kind == "tensors" else STD
        flip = torch.empty(2, dtype=torch.bool, device="cuda")
        seen.clear()
        out = normalize_images(images, mean, std, dtype=dtype, flip=flip)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 5, 7), dtype, "cuda")
    assert out.is_contiguous(memory_format=torch.channels_last)
    ours = [name for name in seen if "dfptkd" in name]
    if dtype == torch.float64:
        assert ours == []
    elif kind == "numbers":
        assert seen == ["dfptkd.normalize_images_numbers.default"]
    else:
        assert ours == ["dfptkd.normalize_images.default"]
    assert not any("lift" in name for name in seen)  # torch.tensor: a copy from the host


@needs_native
def test_operator_passes_opcheck():
    images, (padding, offsets), flip = make_batch(3, 5, 7)
    scale, shift = torch.rand(3), torch.rand(3)
    for o, f in itertools.product((None, offsets), (None, flip)):
        arguments = (images, scale, shift, torch.float32, padding, o, f)
        torch.library.opcheck(torch.ops.dfptkd.normalize_images, arguments)


@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    images, (padding, offsets), flip = make_batch(3, 8, 8)

    def run(images, offsets, flip):
        out = normalize_images(
            images, MEAN, STD, dtype=torch.float32, crop=(padding, offsets), flip=flip
        )
        return out.square()

    with use_backend(name):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(images, offsets, flip), run(images, offsets, flip))
