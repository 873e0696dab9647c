"""The fused losses under pytest-benchmark: `pytest bench/`. For the records: `dfptkd bench`."""

import pytest
import torch

from .cases import LOSSES, fused_total, make_logits, reference_total

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SIDES = {"eager": reference_total, "ours": fused_total}


@pytest.mark.parametrize("shape", [(128, 100), (256, 1000)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("operation", LOSSES)
@pytest.mark.parametrize("side", SIDES)
def test_forward_and_backward(benchmark, operation, shape, side):
    x = make_logits(*shape, DTYPE, DEVICE)

    def call():
        for learner in x.learners:
            learner.grad = None
        SIDES[side](operation, x).backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
    assert x.student.grad.isfinite().all()
