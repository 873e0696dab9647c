"""How the Triton prompt path is spread over a GPU: programs, serial steps and launches of a call.

Kernels are replaced by recorders and tensors have no memory, so that neither a GPU nor a compiler
is needed.
"""

from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from dfptkd.kernels import partial_pointwise_conv_triton as conv

PROCESSORS = 132


@dataclass(frozen=True)
class Launch:
    kernel: str
    programs: int
    arguments: dict

    @property
    def steps(self):
        """Serial steps of a program of `sum_rows_kernel`."""
        span = self.arguments.get("span", self.arguments["rows"])
        return -(-min(span, self.arguments["rows"]) // self.arguments["ROWS"])


class Recorder:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            programs = torch.Size(grid).numel()
            self.launches.append(Launch(self.kernel.__name__, programs, arguments))

        return launch


@pytest.fixture
def launches(monkeypatch):
    found = []
    for name in vars(conv).copy():
        if name.endswith("_kernel"):
            monkeypatch.setattr(conv, name, Recorder(getattr(conv, name), found))
    return found


def run(
    batch, channels, size, *, touched=0, kernel=1, dtype=torch.bfloat16, weights=torch.bfloat16
):
    """Forward and backward of one convolution with everything that it can have."""
    x, y_grad, residual = torch.empty(3, batch, channels, size, size, dtype=dtype, device="meta")
    scale, shift, *grads = torch.empty(4, channels, device="meta")
    point = torch.empty(channels, channels, dtype=weights, device="meta")
    partial = torch.empty(touched, touched, kernel, kernel, dtype=weights, device="meta")
    inputs = (x, scale, shift, partial if touched else None, point, residual)
    y, *_ = conv.launch_forward(*inputs, True, 1)
    conv.launch_backward(y_grad, *grads, *inputs, y, True, 1, True, True, True)


@pytest.mark.parametrize(
    ("batch", "channels", "size"),
    [(256, 64, 56), (256, 16, 56), (256, 128, 28), (256, 512, 7), (64, 32, 32), (64, 128, 8)],
)
def test_rows_of_sums_are_added_up_in_few_steps(launches, batch, channels, size):
    """256x64x56x56 has 12,544 rows of sums by channel."""
    run(batch, channels, size)
    sums = [launch for launch in launches if launch.kernel == "sum_rows_kernel"]
    assert sums
    for launch in sums:
        assert launch.steps <= 8
    for launch in sums:  # what one program reads: 8192 values a step
        values = launch.arguments["rows_ptr"].numel()
        assert launch.programs * launch.steps >= values / 8192
    if batch * size**2 <= 64 * 32**2:  # at this size launches are what costs
        assert len(sums) == 3


@pytest.mark.parametrize("channels", [16, 64, 128, 256])
def test_sums_over_all_pixels_fill_a_gpu(launches, channels):
    run(256, channels, 56, touched=channels // 4, kernel=3)
    (launch,) = (x for x in launches if x.kernel == "point_weight_kernel")
    assert 3.5 * PROCESSORS <= launch.programs <= 8 * PROCESSORS
    (launch,) = (x for x in launches if x.kernel == "partial_weight_kernel")
    assert launch.programs >= 3.5 * PROCESSORS


def test_rows_of_a_wide_weight_stay_small_beside_the_activations(launches):
    run(256, 512, 7)
    rows = next(x for x in launches if x.kernel == "point_weight_kernel").arguments["rows_ptr"]
    assert rows.nbytes <= 256 * 512 * 7 * 7 * 2


class Copies(TorchDispatchMode):
    """How often a tensor of this many elements is copied, cast or not."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.name() in ("aten::clone", "aten::_to_copy", "aten::copy_"):
            self.count += found.numel() == self.numel
        return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_partial_weight_is_copied_once_each_way(launches, dtype):
    with Copies(numel=9 * 9 * 5 * 5) as copies:
        run(2, 36, 8, touched=9, kernel=5, dtype=torch.bfloat16, weights=dtype)
    assert copies.count == 2
