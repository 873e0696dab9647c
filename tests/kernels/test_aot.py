"""What comes out of the compiler for the Triton kernels, without a GPU (gate of bench/aot.py)."""

import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing compiles in this process", allow_module_level=True)

import triton
import triton.language as tl

from dfptkd.bench import aot
from dfptkd.kernels import dual_path_loss_triton as loss
from dfptkd.kernels import (
    frozen_relu_triton,
    normalize_images_triton,
    partial_pointwise_conv_triton,
)
from dfptkd.kernels.triton_common import row_launch, shared_alignment

KERNELS = (
    loss,
    frozen_relu_triton,
    normalize_images_triton,
    partial_pointwise_conv_triton,
)


@triton.jit
def softmax_row(x_ptr, y_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    z = tl.load(x_ptr + columns, mask=columns < C, other=-1e30).to(tl.float32)
    e = tl.exp(z - tl.max(z, 0))
    tl.store(y_ptr + columns, (e / tl.sum(e, 0)).to(tl.bfloat16), mask=columns < C)


def softmax_report(classes, aligned=("x_ptr", "y_ptr"), **options):
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "C": "constexpr", "BLOCK": "constexpr"}
    constants = {"C": classes, "BLOCK": triton.next_power_of_2(classes)}
    return aot.report(softmax_row, signature, constants, 90, aligned, **options)


def loss_case(name):
    return next(case for case in loss.aot_cases(torch.bfloat16) if case.name == name)


@pytest.fixture(scope="module")
def dual():
    case = loss_case("dual C=1000")
    return case, aot.case_report(case, 90)


def smallest_middle_largest(names):
    """Indices: of launches that differ in their number of channels or classes alone, three.

    `make aot` compiles them all, for every architecture and dtype.
    """
    kinds = {}
    for index, name in enumerate(names):
        kinds.setdefault(re.sub(r"C=\d+", "C=", name), []).append(index)
    sizes = [{same[0], same[len(same) // 2], same[-1]} for same in kinds.values()]
    return sorted(set().union(*sizes))


def test_every_kind_of_launch_in_bf16_on_sm_90_passes_the_gate():
    jobs = [
        (file, "bf16", index, 90)
        for file in aot.KERNEL_FILES
        for index in smallest_middle_largest([case.name for case in aot._cases(file, "bf16")])
    ]
    assert len(jobs) > 100
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(aot._compile_one, jobs, chunksize=4))
    assert [(row.kernel, row.faults) for row in rows if row.faults] == []


def test_the_command_fails_on_a_fault_and_prints_a_line_a_launch(dual, monkeypatch, capsys):
    case, report = dual
    sound = aot.Row(case.name, "bf16", 90, report, [])
    spilling = replace(sound, faults=["8 bytes of stack: registers spill"])
    asked = []

    def compile_all(*what):
        asked.append(what)
        yield from rows

    monkeypatch.setattr(aot, "compile_all", compile_all)
    for rows, code in (([sound], 0), ([sound, spilling], 1)):
        assert aot.main(["--caps", "90", "--dtypes", "bf16", "--json"]) == code
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(line["kernel"], line["faults"]) for line in lines] == [
            (row.kernel, row.faults) for row in rows
        ]
    assert asked == [([90], ["bf16"])] * 2


def test_every_launch_is_among_those_that_the_command_compiles(monkeypatch):
    class InProcess:
        def __init__(self, *_, **__):
            pass

        __enter__, __exit__ = (lambda self: self), (lambda *_: None)
        map = staticmethod(lambda function, jobs, chunksize: jobs)

    monkeypatch.setattr(aot, "ProcessPoolExecutor", InProcess)
    jobs = list(aot.compile_all([90], ["bf16"]))
    cases = {file: aot._cases(file, "bf16") for file in aot.KERNEL_FILES}
    names = [cases[file][index].name for file, _, index, _ in jobs]
    assert names == [case.name for file in KERNELS for case in file.aot_cases(torch.bfloat16)]


def test_each_logit_is_loaded_once_where_a_row_fits_in_registers(dual):
    _, report = dual
    # Three rows; two logits of the label; the label and, counting, a block of labels; six weights.
    # A block of 256 labels on 128 threads is two loads.
    assert report.load_count == 3 + 2 + 1 + 2 + 6


def test_the_assertion_on_labels_is_left_in_and_overflow_checks_are_not(dual):
    case, report = dual
    assert report.asserts
    assert not aot.case_report(replace(case, options={**case.options, "debug": False}), 90).asserts
    assert not aot.case_report(loss_case("dual C=1000 soft"), 90).asserts


def test_a_spilling_kernel_is_found(dual):
    case, _ = dual
    spilled = softmax_report(4096, num_warps=1, maxnreg=32)
    assert spilled.stack_bytes > 0
    assert any("spill" in fault for fault in aot.faults(case, 90, spilled))
    assert softmax_report(4096, num_warps=16).stack_bytes == 0


def test_each_rule_of_the_gate_can_fail(dual):
    case, report = dual
    assert aot.faults(case, 90, report) == []
    assert "145 registers" in aot.faults(case, 90, replace(report, registers=145))[0]
    shared = replace(report, shared_bytes=100 * 1024)
    assert aot.faults(case, 90, shared) == []
    assert "shared memory" in aot.faults(case, 120, shared)[0]
    dot = replace(case, mma=True)
    assert "no matrix instruction" in aot.faults(dot, 90, report)[0]
    assert aot.faults(dot, 90, replace(report, mma="mma.sync")) == []
    assert "no v4.b32 load" in aot.faults(case, 90, replace(report, loads=("ld.global.b16",)))[0]
    narrow = replace(report, stores=("st.global.b16",))
    assert aot.faults(case, 90, narrow) == []
    assert "no v4.b32 store" in aot.faults(replace(case, store="v4.b32"), 90, narrow)[0]


def test_load_width_needs_the_divisibility_that_a_real_launch_has(dual):
    case, _ = dual
    assert "ld.global.v4.b32" in softmax_report(1000, num_warps=4).loads
    assert "ld.global.v4.b32" not in softmax_report(1000, aligned=(), num_warps=4).loads
    runtime_stride_of_odd = replace(case, constexprs={**case.constexprs, "ALIGN": 1})
    assert "v4.b32" in aot.faults(case, 90, aot.case_report(runtime_stride_of_odd, 90))[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_images_that_stay_as_they_are_are_loaded_16_bytes_at_a_time(dtype):
    cases = {case.name: case for case in normalize_images_triton.aot_cases(dtype)}
    plain = aot.case_report(cases["normalize 32x32 plain"], 90)
    assert plain.loads == ("ld.global.v4.b32",)
    assert (plain.load_count, plain.stores) == (1, ("st.global.v4.b32",))
    assert not plain.asserts
    moved = aot.case_report(cases["normalize 32x32 crop flip"], 90)
    assert moved.load_count == 16 + 2 + 1  # bytes of a thread, two offsets, the flip
    assert moved.stores == ("st.global.v4.b32",)
    assert moved.asserts


@pytest.mark.parametrize(
    ("strides", "alignment"), [((1000, 1000), 8), ((1024, 100), 4), ((1001,), 1), ((0, 0), 16)]
)
def test_shared_alignment(strides, alignment):
    assert shared_alignment(*strides) == alignment


def test_the_launch_table_keeps_rows_up_to_4096_in_registers():
    assert all(row_launch(c).block >= c for c in (1, 2, 10, 100, 1000, 1001, 4096))
    assert row_launch(4097).block < 4097
    # One program's registers must fit a multiprocessor.
    for classes in (2, 100, 256, 512, 1000, 2048, 4096, 21841):
        launch = row_launch(classes)
        assert launch.max_registers * 32 * launch.num_warps <= 65536


def test_fp32_multiplies_as_a_convolution_of_pytorch_would():
    def precision():
        return partial_pointwise_conv_triton._arithmetic(torch.float32)["PRECISION"]

    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for name in ("ieee", "tf32"):
            conv.fp32_precision = name  # the other operators keep theirs
            assert precision() == name
    finally:
        conv.fp32_precision = before
