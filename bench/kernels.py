"""`dfptkd bench kernels`: the fused losses, the prompt + fusion pair and `normalize_images` against
eager PyTorch, torch.compile and, for the losses on CUDA, Liger-Kernel.

Same process, same tensors, interleaved; random values, never zeros; `dynamic=False`. Every
provider's output is checked against the reference before it is timed. A loss's "forward" of ours
holds the gradients already; compare forward+backward. `ours[...]` is the fused backend, `auto[...]`
what a run in eager mode would choose here by its own measurement, forward and backward.

    dfptkd bench kernels [--shapes 128x100,64x64x32x32] [--device cuda] [--rounds 50] [--out FILE]

A shape is rows x classes for the losses, batch x channels x height x width for a pair, and
batch x height x width x 3 for images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..engine.config import RunConfig
from ..engine.errors import UsageError
from ..engine.machine import pick_device
from ..engine.timing import copy_bandwidth, time_interleaved
from .cases import LOSSES, Case, images_case, loss_case, pair_case
from .measure import (
    Row,
    append_rows,
    bench_parser,
    captured,
    make_row,
    peak_bytes,
)

# The last three: the stages of resnet32x4; the last four: of ResNet-34 at 224 pixels.
CPU_SHAPES = "128x100,256x1000,64x32x32x3,64x64x32x32,64x128x16x16,64x256x8x8"
CUDA_SHAPES = (
    "128x100,256x1000,2048x1000,16384x1000,64x32x32x3,256x224x224x3,"
    "256x64x56x56,256x128x28x28,256x256x14x14,256x512x7x7"
)


def cases(
    shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    """Both losses of every shape of two numbers, a pair of every shape of four, or images where
    the last of the four is 3."""
    for shape in shapes:
        torch.compiler.reset()  # one case's graphs are of no use to the next
        if len(shape) == 2:
            for operation in LOSSES:
                yield loss_case(operation, *shape, dtype, device)
        elif shape[3] == 3:
            yield images_case(*shape, dtype, device)
        else:
            yield pair_case(*shape, dtype, device)


def bench(
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int,
) -> Iterator[Row]:
    """Measure every shape, pass and provider; rows as they are done."""
    copy = copy_bandwidth(device)
    for case in cases(shapes, device, dtype):
        check(case)
        for passes, contract, calls in _variants(case, device):
            timings = time_interleaved(calls, device, rounds=rounds, warmup=5)
            for name, timing in timings.items():
                yield make_row(
                    timing,
                    device,
                    kernel=case.operation,
                    provider=name,
                    passes=passes,
                    contract=contract,
                    shape=case.shape,
                    dtype=dtype,
                    bytes_moved=case.bytes_moved[passes],
                    copy_gb_per_s=copy,
                    peak=None if contract == "graph" else peak_bytes(calls[name], device),
                )


def check(case: Case) -> None:
    """Raises RuntimeError where a provider's output is not the reference's."""
    expected = case.providers["eager"]().detach().double()
    for name, output in case.providers.items():
        error = (output().detach().double() - expected).norm() / expected.norm()
        if not error <= case.tolerance:
            raise RuntimeError(
                f"{case.operation} by {name}: off by {error.item():.2e} from the reference"
            )


def _variants(
    case: Case, device: torch.device
) -> list[tuple[str, str, dict[str, Callable[[], object]]]]:
    """(passes, timing contract, provider -> call)."""

    def full(output: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def call() -> None:
            for leaf in case.leaves:
                leaf.grad = None
            output().backward(case.upstream)

        return call

    forward: dict[str, Callable[[], object]] = dict(case.providers)
    found = [("forward", "hot", forward)]
    if case.leaves:
        backward = {name: full(output) for name, output in case.providers.items()}
        found.append(("forward+backward", "hot", backward))
    passes, _, calls = found[-1]
    if device.type == "cuda":
        graphs: dict[str, Callable[[], object]] = {}
        for name, call in calls.items():
            try:
                graphs[name] = captured(call)
            except RuntimeError as error:  # a host sync inside, as in some of Liger's losses
                torch.cuda.synchronize()
                print(f"{name}: no CUDA graph: {' '.join(str(error).split())[:100]}")
        found.append((passes, "graph", graphs))
    return found


def print_rows(rows: Sequence[Row]) -> None:
    """A table with the ratio of each provider's time to ours; GB/s of the least bytes moved."""
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


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """Shapes of an option.

    Raises:
        UsageError: Not two or four positive numbers each.
    """
    found = []
    for part in text.split(","):
        sizes = part.split("x")
        if len(sizes) not in (2, 4) or not all(n.isdecimal() and int(n) > 0 for n in sizes):
            raise UsageError(
                f"--shapes {part}: expected rows x classes (128x100), batch x channels x height "
                "x width (64x64x32x32) or batch x height x width x 3 (64x32x32x3)"
            )
        found.append(tuple(map(int, sizes)))
    return found


def main(args: Sequence[str]) -> int:
    """`dfptkd bench kernels`; returns the exit code."""
    parser = bench_parser("kernels")
    parser.add_argument(
        "--shapes",
        help="rows x classes for the losses, batch x channels x height x width for a prompt + "
        f"fusion pair, batch x height x width x 3 for images; CPU {CPU_SHAPES}, CUDA {CUDA_SHAPES}",
    )
    options = parser.parse_args(args)
    device = pick_device(RunConfig(device=options.device))
    shapes = parse_shapes(options.shapes or (CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for row in bench(shapes, device, dtype, rounds=options.rounds):
        append_rows([row], options.out)  # a run cut short keeps what it measured
        rows.append(row)
    print_rows(rows)
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
