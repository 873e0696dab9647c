"""`dfptkd bench kernels`: the fused losses against eager PyTorch, torch.compile and Liger-Kernel.

Same process, same tensors, interleaved; random logits, never zeros; `dynamic=False`. Every
variant's total is checked against the reference before it is timed. A "forward" of ours holds the
gradients already; compare forward+backward.

    dfptkd bench kernels [--shapes 128x100,256x1000] [--device cuda] [--rounds 50] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..kernels import distillation_loss, dual_path_loss, use_backend, which_backend
from .measure import (
    RESULTS,
    Row,
    append_rows,
    captured,
    copy_bandwidth,
    make_row,
    peak_bytes,
    time_interleaved,
)

CPU_SHAPES = "128x100,256x1000"
CUDA_SHAPES = "128x100,256x1000,2048x1000,16384x1000"
OPERATIONS = ("dual_path_loss", "distillation_loss")


@dataclass(frozen=True)
class Inputs:
    """Logits [B, C] of student, prompt path and teacher; labels int64 [B]."""

    student: Tensor
    prompt: Tensor
    teacher: Tensor
    target: Tensor

    @property
    def learners(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return self.student, self.prompt


def make_inputs(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random logits, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    student, prompt, teacher = (
        (3 * torch.randn(rows, classes, generator=generator)).to(device, dtype) for _ in range(3)
    )
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    return Inputs(student.requires_grad_(), prompt.requires_grad_(), teacher, target)


def reference_total(operation: str, x: Inputs) -> Tensor:
    """The reference's total, eager."""
    with use_backend("reference"):
        return fused_total(operation, x)


def fused_total(operation: str, x: Inputs) -> Tensor:
    """The total by whatever backend serves the inputs."""
    if operation == "dual_path_loss":
        return dual_path_loss(x.student, x.prompt, x.teacher, x.target).total
    return distillation_loss(x.student, x.teacher, x.target).total


def providers(operation: str, x: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Name -> the total as that provider computes it."""
    compiled = torch.compile(lambda: reference_total(operation, x), dynamic=False)
    found = {
        "eager": lambda: reference_total(operation, x),
        "compile": compiled,
    }
    backend = which_backend(operation, x.student)
    if backend != "reference":
        found[f"ours[{backend}]"] = lambda: fused_total(operation, x)
    if x.student.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        found["liger"] = liger(operation, x)
    return found


def liger(operation: str, x: Inputs, tau: float = 4.0) -> Callable[[], Tensor]:
    """The same total composed of Liger-Kernel's cross-entropy and KL (CUDA only)."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    ce, kl = LigerCrossEntropyLoss(), LigerKLDIVLoss(reduction="batchmean")

    def divergence(supervisor: Tensor, learner: Tensor) -> Tensor:
        q = (supervisor.detach().float() / tau).softmax(dim=1)
        return tau**2 * kl((learner.float() / tau).log_softmax(dim=1), q)

    def total() -> Tensor:
        s, p, t, y = x.student, x.prompt, x.teacher, x.target
        if operation == "distillation_loss":
            return 0.1 * ce(s, y) + 0.9 * divergence(t, s)
        student = ce(s, y) + divergence(t, s) + divergence(p, s)
        return student + ce(p, y) + divergence(t, p) + divergence(s, p)

    return total


def bytes_moved(operation: str, x: Inputs) -> int:
    """Of one pass: each logit read once, each gradient written once."""
    tensors = 5 if operation == "dual_path_loss" else 3
    return tensors * x.student.numel() * x.student.element_size() + 8 * len(x.target)


def bench(
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int,
    operations: Sequence[str] = OPERATIONS,
) -> list[Row]:
    """Measure every operation, shape, pass and provider."""
    copy = copy_bandwidth(device)
    rows: list[Row] = []
    for operation in operations:
        for shape in shapes:
            x = make_inputs(*shape, dtype, device)
            totals = providers(operation, x)
            _check(operation, x, totals)
            for passes, contract, calls in _variants(totals, x):
                timings = time_interleaved(calls, device, rounds=rounds, warmup=5)
                rows += [
                    make_row(
                        timing,
                        device,
                        kernel=operation,
                        provider=name,
                        passes=passes,
                        contract=contract,
                        shape=shape,
                        dtype=dtype,
                        bytes_moved=bytes_moved(operation, x),
                        copy_gb_per_s=copy,
                        peak=None if contract == "graph" else peak_bytes(calls[name], device),
                    )
                    for name, timing in timings.items()
                ]
    return rows


def _variants(
    totals: dict[str, Callable[[], Tensor]], x: Inputs
) -> list[tuple[str, str, dict[str, Callable[[], object]]]]:
    """(passes, timing contract, provider -> call)."""

    def full(total: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> None:
            for learner in x.learners:
                learner.grad = None
            total().backward()

        return call

    backward = {name: full(total) for name, total in totals.items()}
    found = [("forward", "hot", dict(totals)), ("forward+backward", "hot", backward)]
    if x.student.is_cuda:
        graphs: dict[str, Callable[[], object]] = {}
        for name, call in backward.items():
            try:
                graphs[name] = captured(call)
            except RuntimeError as error:  # a host sync inside, as in some of Liger's losses
                torch.cuda.synchronize()
                print(f"{name}: no CUDA graph: {' '.join(str(error).split())[:100]}")
        found.append(("forward+backward", "graph", graphs))
    return found  # type: ignore[return-value]


def _check(operation: str, x: Inputs, totals: dict[str, Callable[[], Tensor]]) -> None:
    expected = reference_total(operation, x).detach().double()
    for name, total in totals.items():
        error = (total().detach().double() - expected).abs() / expected.abs()
        if not error < 1e-3:
            raise RuntimeError(f"{name}: total off by {error.item():.2e} from the reference")


def print_rows(rows: Sequence[Row]) -> None:
    """A table with the ratio of each provider's time to ours."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("kernel", "shape", "pass", "contract", "provider"):
        table.add_column(column)
    for column in ("median us", "p20..p80", "GB/s", "of copy", "time / ours"):
        table.add_column(column, justify="right")
    ours = {
        (r.kernel, r.shape, r.passes, r.contract): r.median_us
        for r in rows
        if r.provider.startswith("ours")
    }
    for r in rows:
        best = ours.get((r.kernel, r.shape, r.passes, r.contract))
        share = "" if not r.copy_gb_per_s else f"{100 * (r.gb_per_s or 0) / r.copy_gb_per_s:.0f} %"
        table.add_row(
            r.kernel, r.shape, r.passes, r.contract, escape(r.provider), f"{r.median_us:,.1f}",
            f"{r.p20_us:,.0f}..{r.p80_us:,.0f}", f"{r.gb_per_s}", share,
            "" if best is None else f"{r.median_us / best:.2f}",
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 160).print(table)
    if rows:
        r = rows[0]
        print(f"{r.device}, {r.threads} threads, torch {r.torch}, commit {r.commit}, n = {r.n}")


def main(args: Sequence[str]) -> int:
    """`dfptkd bench kernels`; returns the exit code."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="dfptkd bench kernels", allow_abbrev=False)
    parser.add_argument("--device", default=default_device, choices=("cpu", "cuda"))
    parser.add_argument("--shapes", help=f"rows x classes; CPU {CPU_SHAPES}, CUDA {CUDA_SHAPES}")
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each variant")
    parser.add_argument("--out", type=Path, help=f"CSV to append to; absent: {RESULTS.name}")
    options = parser.parse_args(args)
    device = torch.device(options.device)
    shapes = options.shapes or (CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES)
    pairs = [tuple(map(int, shape.split("x"))) for shape in shapes.split(",")]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = bench(pairs, device, dtype, rounds=options.rounds)  # type: ignore[arg-type]
    append_rows(rows, options.out or RESULTS)
    print_rows(rows)
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
