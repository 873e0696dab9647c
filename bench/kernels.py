"""`dfptkd bench kernels`: the fused losses, the prompt + fusion pair and `normalize_images` against
eager PyTorch, torch.compile and, for the losses on CUDA, Liger-Kernel.

Same process, same tensors, interleaved; random values, never zeros; `dynamic=False`. Every
provider's output is checked against the reference before it is timed. A loss's "forward" of ours
holds the gradients already; compare forward+backward. `ours[...]` is the fused backend, `auto[...]`
what a run in eager mode would choose here by its own measurement, forward and backward.

    dfptkd bench kernels [--shapes 128x100,64x64x32x32] [--operators dual_path_loss,frozen_relu]
                         [--device cuda] [--rounds 50] [--out FILE]

A shape is rows x classes for the losses, batch x channels x height x width for a pair and the
operators of activations, and batch x height x width x 3 for images. `--operators all` measures each
fused operator by itself too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..engine.errors import UsageError
from ..engine.timing import copy_bandwidth, time_interleaved
from .cases import OPERATORS, USUAL, Case, cases, tensors_of
from .measure import (
    Failures,
    Row,
    append_rows,
    bench_parser,
    captured,
    make_row,
    peak_bytes,
    prepared_device,
)

# The last three: the stages of resnet32x4; the last four: of ResNet-34 at 224 pixels.
CPU_SHAPES = "128x100,256x1000,64x32x32x3,64x64x32x32,64x128x16x16,64x256x8x8"
CUDA_SHAPES = (
    "128x100,256x1000,2048x1000,16384x1000,64x32x32x3,256x224x224x3,"
    "256x64x56x56,256x128x28x28,256x256x14x14,256x512x7x7"
)


def bench(
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int,
    operators: Sequence[str] = USUAL,
    failures: Failures | None = None,
) -> Iterator[Row]:
    """Measure every shape, pass and provider; rows as they are done.

    Args:
        shapes: As `cases` takes them.
        device: Where.
        dtype: Of logits and activations.
        rounds: Timed calls of each.
        operators: Names of operators.
        failures: Takes what fails, and the rest goes on; None: it is raised.
    """
    copy = copy_bandwidth(device)
    for case in cases(shapes, device, dtype, operators):
        yield from bench_case(case, device, dtype, copy=copy, rounds=rounds, failures=failures)


def bench_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    *,
    copy: float | None,
    rounds: int,
    failures: Failures | None = None,
    contracts: Sequence[str] = ("hot", "graph"),
) -> Iterator[Row]:
    """Rows of one case, by the providers whose output is that of the reference.

    Args:
        case: What is measured.
        device: Where.
        dtype: Of the row.
        copy: Measured bandwidth of a copy in 1e9 bytes/s, if known.
        rounds: Timed calls of each provider.
        failures: Takes what fails, and the rest goes on; None: it is raised.
        contracts: Those of `hot` and `graph` that are wanted.
    """
    providers = checked(case, failures)
    for passes, contract, calls in _variants(case, providers, device, failures):
        if contract not in contracts:
            continue
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


def checked(case: Case, failures: Failures | None = None) -> list[str]:
    """The providers whose output is the reference's.

    Raises:
        RuntimeError: One's is not, and nobody takes failures.
    """
    expected = [t.detach().double() for t in tensors_of(case.providers["eager"]())]
    found = []
    for name, output in case.providers.items():
        try:
            for value, truth in zip(tensors_of(output()), expected, strict=True):
                error = (value.detach().double() - truth).norm().item()
                norm = truth.norm().item()
                if not error <= case.tolerance * norm:
                    raise RuntimeError(
                        f"{case.operation} by {name}: off by {error / norm if norm else error:.2e} "
                        "from the reference"
                    )
            found.append(name)
        except Exception as error:
            if failures is None:
                raise
            failures.add(f"{case.operation} {'x'.join(map(str, case.shape))} {name}", error)
    return found


def _variants(
    case: Case, providers: Sequence[str], device: torch.device, failures: Failures | None
) -> Iterator[tuple[str, str, dict[str, Callable[[], object]]]]:
    """(passes, timing contract, provider -> call), each when it is asked for."""
    calls: dict[str, Callable[[], object]] = {name: case.providers[name] for name in providers}
    passes = "forward"
    yield passes, "hot", calls
    if case.leaves:
        calls, passes = _with_backward(case, providers, failures), "forward+backward"
        yield passes, "hot", calls
    if device.type == "cuda":
        graphs: dict[str, Callable[[], object]] = {}
        for name, call in calls.items():
            try:
                graphs[name] = captured(call)
            except RuntimeError as error:  # a host sync inside, as in some of Liger's losses
                torch.cuda.synchronize()
                print(f"{name}: no CUDA graph: {' '.join(str(error).split())[:100]}")
        yield passes, "graph", graphs


def _with_backward(
    case: Case, providers: Sequence[str], failures: Failures | None
) -> dict[str, Callable[[], object]]:
    """Forward and backward of each provider, those that work."""

    def full(name: str) -> Callable[[], object]:
        learned, output = case.learned(name), case.providers[name]

        def call() -> None:
            for leaf in learned:
                leaf.grad = None
            case.backward(output())

        return call

    found = {}
    for name in providers:
        call = full(name)
        try:
            call()  # compiled code fails here, where the others are not yet under way
        except Exception as error:
            if failures is None:
                raise
            failures.add(f"{case.operation} {'x'.join(map(str, case.shape))} {name}", error)
            continue
        found[name] = call
    return found


def print_rows(rows: Sequence[Row]) -> None:
    """A table with the ratio of each provider's time to ours; GB/s of the least bytes moved."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

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


def parse_operators(text: str) -> Sequence[str]:
    """Names of operators, "all" for every one.

    Raises:
        UsageError: An unknown one.
    """
    if text == "all":
        return OPERATORS
    for name in text.split(","):
        if name not in OPERATORS:
            raise UsageError(f"--operators {name}: expected all, or some of {','.join(OPERATORS)}")
    return text.split(",")


def main(args: Sequence[str]) -> int:
    """`dfptkd bench kernels`; returns the exit code."""
    parser = bench_parser("kernels")
    parser.add_argument(
        "--shapes",
        help="rows x classes for the losses, batch x channels x height x width for a prompt + "
        f"fusion pair, batch x height x width x 3 for images; CPU {CPU_SHAPES}, CUDA {CUDA_SHAPES}",
    )
    parser.add_argument(
        "--operators", default=",".join(USUAL), help=f"all, or some of {','.join(OPERATORS)}"
    )
    options = parser.parse_args(args)
    device = prepared_device(options)
    operators = parse_operators(options.operators)
    shapes = parse_shapes(options.shapes or (CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, failures = [], Failures()
    found = bench(
        shapes, device, dtype, rounds=options.rounds, operators=operators, failures=failures
    )
    for row in found:
        append_rows([row], options.out)  # a run cut short keeps what it measured
        rows.append(row)
    print_rows(rows)
    return failures.exit_code


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
