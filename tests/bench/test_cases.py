"""Cases: every operator has one, and a fused backend that errs in anything is found out."""

import dataclasses

import pytest
import torch

from dfptkd.bench import first, step
from dfptkd.bench.cases import OPERATORS, PAIR, cases, disagreement, grouped_case, make_case
from dfptkd.bench.measure import Failures
from dfptkd.engine.cli import main
from dfptkd.engine.config import PromptConfig
from dfptkd.kernels.backend import OPERATIONS, unavailable

CPU = torch.device("cpu")
SHAPES = {"normalize_images": (3, 9, 7, 3), "dual_path_loss": (7, 10), "distillation_loss": (7, 10)}
FUSED = [name for name in OPERATORS if name != "normalize_images"]

needs_native = pytest.mark.skipif(
    unavailable("native") is not None, reason=f"no C++ kernels: {unavailable('native')}"
)


def make(operation):
    return make_case(operation, SHAPES.get(operation, (3, 20, 7, 5)), torch.float32, CPU)


def with_ours(case, change):
    """`case` whose fused backend's output goes through `change`."""
    right = case.providers[case.ours]

    def wrong():
        output = right()
        return change(output) if isinstance(output, torch.Tensor) else tuple(map(change, output))

    return dataclasses.replace(case, providers=case.providers | {case.ours: wrong})


def test_every_operator_has_a_case_and_so_has_a_pair():
    assert set(OPERATORS) == {*OPERATIONS, PAIR}


@needs_native
@pytest.mark.parametrize("operation", OPERATORS)
def test_fused_backends_are_as_near_to_fp64_as_eager(operation):
    found = disagreement(make(operation))
    assert found.holds, found


@needs_native
@pytest.mark.parametrize("operation", OPERATORS)
def test_a_wrong_output_is_found(operation):
    found = disagreement(with_ours(make(operation), lambda y: y * 1.001))
    assert not found.holds
    assert found.ours > found.allowed


@needs_native
@pytest.mark.parametrize("operation", FUSED)
def test_a_wrong_gradient_behind_a_right_output_is_found(operation):
    def change(y):  # the value of y, and half of its gradient
        return y.detach() + 0.5 * (y - y.detach())

    assert not disagreement(with_ours(make(operation), change)).holds


@needs_native
@pytest.mark.parametrize("operation", ["dual_path_loss", "frozen_relu"])
def test_what_is_not_a_number_is_found(operation):
    found = disagreement(with_ours(make(operation), lambda y: y * float("nan")))
    assert not found.holds


@needs_native
def test_a_device_that_does_not_compute_is_found():
    case = make("frozen_relu")
    idle = dataclasses.replace(case, exact=lambda: [torch.zeros_like(t) for t in case.exact()])
    with pytest.raises(RuntimeError, match="the device does not compute"):
        disagreement(idle)


def test_a_shape_goes_to_the_operators_that_it_is_one_of():
    shapes = [(4, 5), (2, 3, 4, 5), (2, 4, 5, 3)]
    found = [(case.operation, case.shape) for case in cases(shapes, CPU, torch.float32, OPERATORS)]
    assert len(found) == len(OPERATORS)
    assert [operation for operation, shape in found if len(shape) == 2] == list(OPERATORS[:2])
    assert ("normalize_images", (2, 4, 5, 3)) in found


def test_a_grouped_convolution_is_the_same_by_a_batched_product():
    case = grouped_case(4, 24, 12, 8, torch.float32, CPU)
    for a, b in zip(case.results("eager"), case.results("bmm"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@needs_native
def test_the_check_of_a_first_gpu_says_which_kernel_is_wrong(monkeypatch, tmp_path, capsys):
    def with_a_wrong_one(*args, **options):
        for case in cases(*args, **options):
            is_wrong = case.operation == "affine_relu"
            yield with_ours(case, lambda y: y * 1.001) if is_wrong else case

    options = ["--small", "--device", "cpu", "--out", str(tmp_path / "r.csv")]
    kernels = ["bench", "first", "kernels", "--operators", "affine_relu,frozen_relu", *options]
    assert main(kernels) == 0
    assert capsys.readouterr().out.count("] ok ") == 4
    monkeypatch.setattr(first, "cases", with_a_wrong_one)
    assert main(kernels) == 1
    lines = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines()]
    assert sorted(line.split()[:2] for line in lines) == [
        ["FAILED", "affine_relu"], ["FAILED", "affine_relu"],
        ["ok", "frozen_relu"], ["ok", "frozen_relu"],
    ]  # fmt: skip


def test_a_mode_that_goes_another_way_is_found(monkeypatch, capsys):
    way = first._way

    def turned(setting, mode):
        found = way(setting, "eager")
        return found if mode == "eager" else dataclasses.replace(found, way=-found.way)

    monkeypatch.setattr(first, "_way", turned)
    report = first.Report(print)
    first.modes(report, CPU, dataclasses.replace(first.SMALL, methods=("kd",)))
    assert len(report.failures.names) == 1
    assert "FAILED  kd compile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["first"], "the following arguments are required: part"),
        (["first", "everything"], "invalid choice: 'everything'"),
        (["first", "kernels", "--operators", "relu"], "--operators relu: expected all, or some of"),
        (["kernels", "--operators", "relu"], "--operators relu: expected all, or some of"),
        (["step", "--seeds", "3,none"], "'none': expected a whole number of at least 1"),
    ],
    ids=" ".join,
)
def test_wrong_options_are_one_line(args, said, capsys):
    assert main(["bench", *args]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# What a profile shows ----------------------------------------------------------------------------


def test_launches_and_waits_are_counted_without_the_profilers_own():
    events = {
        "cudaLaunchKernel": 7, "cudaGraphLaunch": 1, "cudaMemcpyAsync": 2, "cuLaunchKernelEx": 3,
        "cudaDeviceSynchronize": 1, "cudaStreamSynchronize": 2, "aten::copy_": 50,
    }  # fmt: skip
    assert step.count_host_calls(events) == step.HostCalls(launches=13, syncs=2)


def test_without_cupti_nothing_is_shown(capsys):
    assert step.count_host_calls({"aten::conv2d": 12, "autograd::engine": 3}) is None
    assert step._memory(_measured(None), on_gpu=True)[1:] == ("", "")
    assert step._memory(_measured(step.HostCalls(13, 0)), on_gpu=True)[1:] == ("13", "0")


def _measured(host):
    setting = step.Setting("cifar:resnet8", "cifar:resnet8", "dfpt", 2, 8, 10, PromptConfig(), CPU)
    ((_, found),) = step.measure([setting], ["plain"], rounds=1, failures=Failures())
    return dataclasses.replace(found, host=host)
