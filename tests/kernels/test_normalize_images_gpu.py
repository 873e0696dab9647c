"""The Triton normalize_images on a GPU: equality with the reference, no host sync, CUDA graphs.

Needs neither tyro nor a network.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from dfptkd.kernels import normalize_images, use_backend, which_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (1, 1, 1), (3, 5, 7), (2, 33, 17), (5, 9, 24), (64, 32, 32), (128, 28, 28), (8, 224, 224),
]  # fmt: skip


def make_batch(count, height, width, padding=4):
    generator = torch.Generator().manual_seed(count + height + width)
    images = torch.randint(0, 256, (count, height, width, 3), generator=generator).byte()
    offsets = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    return images.cuda(), (padding, offsets.cuda()), flip.cuda()


def assert_same(images, mean=MEAN, std=STD, **options):
    found = normalize_images(images, mean, std, **options)
    with use_backend("reference"):
        expected = normalize_images(images, mean, std, **options)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_crop", [False, True])
@pytest.mark.parametrize("with_flip", [False, True])
def test_equals_the_reference_bit_for_bit(shape, dtype, with_crop, with_flip):
    images, crop, flip = make_batch(*shape)
    assert which_backend("normalize_images", images, dtype) == "triton"
    crop, flip = crop if with_crop else None, flip if with_flip else None
    assert_same(images, dtype=dtype, crop=crop, flip=flip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 1, 4, 40])
def test_offsets_at_the_ends(dtype, padding):
    ends = torch.tensor(list(itertools.product((0, padding, 2 * padding), repeat=2))).cuda()
    images, _, flip = make_batch(len(ends), 32, 32)
    assert_same(images, dtype=dtype, crop=(padding, ends), flip=flip)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_views_and_addresses_that_are_not_aligned(dtype):
    images, (padding, offsets), flip = make_batch(6, 32, 32)
    mean, std = torch.tensor(MEAN).cuda(), torch.tensor(STD).double().cuda()
    assert_same(images, mean, std, dtype=dtype, crop=(padding, offsets), flip=flip)
    assert_same(images, mean, STD, dtype=dtype)
    crop = padding, offsets[::2].flip(1)
    assert_same(images.transpose(1, 2)[::2], dtype=dtype, crop=crop, flip=flip[::2])
    assert_same(make_batch(6, 5, 7)[0][1:], dtype=dtype)  # 105 bytes from an aligned address
    assert_same(images[:0], dtype=dtype, flip=flip[:0])


def test_a_result_of_more_than_2_to_31_bytes():
    images = torch.randint(0, 256, (3700, 224, 224, 3), dtype=torch.uint8, device="cuda")
    flip = torch.rand(len(images), device="cuda") < 0.5
    found = normalize_images(images, MEAN, STD, dtype=torch.float32, flip=flip)
    last = normalize_images(images[-2:], MEAN, STD, dtype=torch.float32, flip=flip[-2:])
    assert torch.equal(found[-2:], last)


def arguments(mean, std):
    images, crop, flip = make_batch(64, 32, 32)
    return (images, mean, std), {"dtype": torch.bfloat16, "crop": crop, "flip": flip}


def channels(kind):
    if kind == "numbers":
        return MEAN, STD
    mean = torch.tensor(MEAN).cuda()
    return mean, STD if kind == "mixed" else torch.tensor(STD).cuda()


KINDS = pytest.mark.parametrize("kind", ["numbers", "tensors", "mixed"])


@KINDS
def test_no_host_sync_and_no_copy_from_the_host(kind):
    args, options = arguments(*channels(kind))
    normalize_images(*args, **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            normalize_images(*args, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = [event.name for event in profile.events()]
    assert not any("HtoD" in name for name in names)
    launches = [name for name in names if name.startswith("normalize_kernel")]
    assert len(launches) == 1


@KINDS
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_a_cuda_graph_replays_it(kind, name):
    (images, mean, std), options = arguments(*channels(kind))
    static = images.clone()
    with use_backend(name):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            normalize_images(static, mean, std, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = normalize_images(static, mean, std, **options)
    static.copy_(255 - images)
    graph.replay()
    assert torch.equal(captured, normalize_images(255 - images, mean, std, **options))


@KINDS
def test_compiles_as_one_graph_through_the_operator(kind):
    torch._dynamo.reset()
    args, options = arguments(*channels(kind))
    seen = []

    def compiler(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def run(*args):
        return normalize_images(*args, **options) + 1

    expected = run(*args)
    assert torch.equal(torch.compile(run, fullgraph=True)(*args), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, fullgraph=True, backend=compiler)(*args), expected)
    assert any("dfptkd.normalize_images" in target for target in seen)


def test_operators_pass_opcheck():
    images, (padding, offsets), flip = make_batch(3, 5, 7)
    scale, shift = torch.rand(2, 3, device="cuda")
    for o, f in itertools.product((None, offsets), (None, flip)):
        rest = (torch.bfloat16, padding, o, f)
        operators = torch.ops.dfptkd
        torch.library.opcheck(operators.normalize_images, (images, scale, shift, *rest))
        numbers = [0.1, 0.2, 0.3]
        torch.library.opcheck(operators.normalize_images_numbers, (images, numbers, numbers, *rest))


def test_an_offset_out_of_range_is_a_device_assertion():
    """In a process of its own: the assertion ends the CUDA context."""
    code = (
        "import torch; from dfptkd.kernels import normalize_images; "
        "images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8, device='cuda'); "
        "crop = 4, torch.tensor([[0, 9]], device='cuda'); half = (0.5,) * 3; "
        "y = normalize_images(images, half, half, dtype=torch.float32, crop=crop); "
        "print(y.sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode != 0
    assert "assert" in (done.stdout + done.stderr).lower()
