"""Every operator, forward and backward, by eager and by its fused backend."""

import pytest

from .cases import GROUPED, IMAGES, LOSSES, OPERATORS, Case, grouped_case, make_case

SHAPES = {
    **dict.fromkeys(LOSSES, ((128, 100), (256, 1000))),
    IMAGES: ((64, 32, 32, 3),),
    "batch_norm_affine": ((8, 64, 8, 8),),  # works on channels alone
}
CASES = [
    (operation, shape)
    for operation in OPERATORS
    for shape in SHAPES.get(operation, ((16, 64, 16, 16),))
]


def run(case: Case, provider: str) -> None:
    for leaf in case.learned(provider):
        leaf.grad = None
    output = case.providers[provider]()
    if case.leaves:
        case.backward(output)


@pytest.mark.parametrize("side", ["eager", "ours"])
@pytest.mark.parametrize(
    ("operation", "shape"), CASES, ids=[f"{o}-{'x'.join(map(str, s))}" for o, s in CASES]
)
def test_operator(timed, device, dtype, operation, shape, side):
    case = make_case(operation, shape, dtype, device)
    provider = case.ours if side == "ours" else side
    if provider is None:
        pytest.skip(f"{operation} has no fused backend on {device.type}, or it is not built")
    timed(lambda: run(case, provider))


@pytest.mark.parametrize("provider", ["eager", "bmm"])
def test_grouped_convolution(timed, device, dtype, provider):
    case = grouped_case(16, 240, 60, 16, dtype, device)
    assert case.operation.startswith(GROUPED)
    timed(lambda: run(case, provider))
