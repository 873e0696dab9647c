"""The Triton losses on a GPU: numerics, determinism, no host sync, CUDA graphs, bad labels.

Run by bench/on_gpu.sh; needs neither tyro nor a network.
"""

import os
import subprocess
import sys

import pytest
import torch

from dfptkd.kernels import DualPathWeights, dual_path_loss, use_backend, which_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WEIGHTS = DualPathWeights(0.3, 0.7, 1.1, 0.9, 0.5, 1.3)
CASES = [
    (rows, classes, dtype, tau, reverse_kl)
    for i, (rows, classes) in enumerate(
        [(1, 2), (7, 10), (64, 100), (256, 1000), (33, 1001), (1000, 1000), (5, 4096), (3, 21841)]
    )
    for dtype, tau, reverse_kl in [
        (torch.bfloat16, (4.0, 1.0)[i % 2], False),
        (torch.float16, 20.0, True),
        (torch.float32, 0.5, i % 2 == 0),
    ]
]


def make_logits(rows, classes, dtype):
    generator = torch.Generator().manual_seed(rows + classes)
    logits = (3 * torch.randn(3, rows, classes, generator=generator)).to("cuda", dtype)
    target = torch.randint(classes, (rows,), generator=generator).cuda()
    return *logits, target


def run(logits, target, **options):
    """Total, terms and the two gradients."""
    student, prompt, teacher = (z.detach().clone() for z in logits)
    leaves = student.requires_grad_(), prompt.requires_grad_()
    result = dual_path_loss(*leaves, teacher, target, weights=WEIGHTS, **options)
    return result.total.detach(), result.terms, *torch.autograd.grad(result.total, leaves)


@pytest.mark.parametrize(("rows", "classes", "dtype", "tau", "reverse_kl"), CASES, ids=str)
def test_error_is_at_most_twice_that_of_eager(rows, classes, dtype, tau, reverse_kl):
    """As root mean squares, and a few units where that is exact by luck."""
    *logits, target = make_logits(rows, classes, dtype)
    assert which_backend("dual_path_loss", logits[0]) == "triton"
    target[0] = -100 if rows > 1 else target[0]
    options = {"tau": tau, "reverse_kl": reverse_kl, "label_smoothing": 0.1}
    exact = run([z.double() for z in logits], target, **options)
    fused = run(logits, target, **options)
    with use_backend("reference"):
        eager = run(logits, target, **options)
    for ours, theirs, truth in zip(fused, eager, exact, strict=True):
        tiny = 4 * torch.finfo(torch.float32).eps * truth.abs().max().clamp(min=1e-6)
        error, allowed = ((side.double() - truth).square().mean().sqrt() for side in (ours, theirs))
        assert error <= 2 * allowed + tiny


def test_two_launches_are_bit_equal():
    *logits, target = make_logits(1000, 1000, torch.bfloat16)
    for a, b in zip(run(logits, target), run(logits, target), strict=True):
        assert torch.equal(a, b)


def test_no_host_sync():
    *logits, target = make_logits(64, 100, torch.bfloat16)
    weights = torch.ones(6, device="cuda")
    leaves = [z.requires_grad_() for z in logits[:2]]
    dual_path_loss(*leaves, logits[2], target, weights=weights).total.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dual_path_loss(*leaves, logits[2], target, weights=weights).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_it():
    *logits, target = make_logits(64, 100, torch.float32)
    weights = torch.tensor(WEIGHTS.numbers(), device="cuda")
    static = [z.clone() for z in logits]

    def step():
        leaves = [z.detach().requires_grad_() for z in static[:2]]
        total = dual_path_loss(*leaves, static[2], target, weights=weights).total
        return total, *torch.autograd.grad(total, leaves)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for held, fresh in zip(static, logits, strict=True):
        held.copy_(fresh * 0.5)
    graph.replay()
    total, _, *gradients = run([z * 0.5 for z in logits], target)
    assert torch.equal(captured[0], total)
    assert all(map(torch.equal, captured[1:], gradients))


def test_compiles_as_one_graph():
    *logits, target = make_logits(64, 100, torch.float32)
    compiled = torch.compile(lambda s, p, t, y: dual_path_loss(s, p, t, y).total, fullgraph=True)
    assert torch.equal(compiled(*logits, target), dual_path_loss(*logits, target).total)


def test_a_label_out_of_range_is_a_device_assertion():
    """In a process of its own: the assertion ends the CUDA context."""
    code = (
        "import torch; from dfptkd.kernels import dual_path_loss; "
        "z = torch.randn(3, 4, 5, device='cuda'); y = torch.tensor([0, 1, 9, 2], device='cuda'); "
        "print(dual_path_loss(*z, y).total.item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode != 0
    assert "assert" in (done.stdout + done.stderr).lower()
