"""Ahead-of-time compilation of the Triton kernels, and the gate on what comes out of it.

Needs neither a GPU nor a CUDA toolkit: Triton brings ptxas and cuobjdump. Cannot run where
TRITON_INTERPRET is set, since that turns kernels into Python at import.

    python -m dfptkd.bench.aot                               every kernel, dtype and architecture
    python -m dfptkd.bench.aot --caps 90 --dtypes bf16       what the tests ask for
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..kernels.triton_common import AotCase

# Files of ..kernels with an `aot_cases(dtype)`.
KERNEL_FILES = (
    "dual_path_loss_triton",
    "frozen_relu_triton",
    "normalize_images_triton",
    "partial_pointwise_conv_triton",
)
CAPABILITIES = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_KB = 1024
# Shared memory that one block may use, by architecture: CUDA programming guide, table of technical
# specifications.
SHARED_BYTES = {80: 163 * _KB, 90: 227 * _KB, 100: 227 * _KB, 120: 99 * _KB}


@dataclass(frozen=True)
class Report:
    """What the compiled binary of one kernel says of itself."""

    registers: int
    """A thread."""
    stack_bytes: int
    """A thread: spilled registers and local arrays; 0 in every shipped kernel."""
    shared_bytes: int
    """A block."""
    mma: str
    """Widest matrix instruction in the PTX, or "none"."""
    loads: tuple[str, ...]
    """Kinds of global load in the PTX, such as "ld.global.v4.b32"."""
    load_count: int
    """Number of global loads in the PTX."""
    stores: tuple[str, ...]
    """Kinds of global store in the PTX."""
    barriers: int
    """Number of block-wide barriers in the PTX."""
    asserts: bool
    """Whether a device-side assertion is left in."""


def report(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    capability: int,
    aligned: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Compiles one kernel for one architecture and reads the binary.

    Args:
        kernel: A `@triton.jit` function.
        signature: Argument name -> Triton type ("*bf16", "i64"), "constexpr" for the constants.
        constexprs: Argument name -> constant.
        capability: 80, 90, 100 or 120.
        aligned: Arguments that are multiples of 16. Without them the compiler emits narrow loads.
        options: num_warps and other options of the launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: (i,) for i, name in enumerate(signature)}
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={position[name]: value for name, value in constexprs.items()},
            attrs={position[name]: [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    usage = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    loads = re.findall(r"ld\.global[\w.:]*", ptx)
    return Report(
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        shared_bytes=compiled.metadata.shared,
        mma=next((m for m in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if m in ptx), "none"),
        loads=tuple(sorted(set(loads))),
        load_count=len(loads),
        stores=tuple(sorted(set(re.findall(r"st\.global[\w.:]*", ptx)))),
        barriers=len(re.findall(r"\bbar(?:rier)?\.sync", ptx)),
        asserts="__assertfail" in ptx,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}


def case_report(case: AotCase, capability: int) -> Report:
    """`report` of one case of a kernel file."""
    return report(
        case.kernel,
        dict(case.signature),
        dict(case.constexprs),
        capability,
        case.aligned,
        **case.options,
    )


def faults(case: AotCase, capability: int, found: Report) -> list[str]:
    """What the compiled kernel does not keep to, one phrase each."""
    limit = SHARED_BYTES[capability]
    checks = (
        (found.stack_bytes > 0, f"{found.stack_bytes} bytes of stack: registers spill"),
        (
            found.registers > case.max_registers,
            f"{found.registers} registers, at most {case.max_registers} allowed",
        ),
        (found.shared_bytes > limit, f"{found.shared_bytes} bytes of shared memory of {limit}"),
        (
            case.load is not None and not any(load.endswith(case.load) for load in found.loads),
            f"no {case.load} load among {', '.join(found.loads)}",
        ),
        (
            case.store is not None and not any(s.endswith(case.store) for s in found.stores),
            f"no {case.store} store among {', '.join(found.stores)}",
        ),
        (case.mma and found.mma == "none", "no matrix instruction"),
    )
    return [text for failed, text in checks if failed]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kernel: str
    dtype: str
    capability: int
    report: Report
    faults: list[str]


def compile_all(
    capabilities: Iterable[int], dtypes: Iterable[str], processes: int = 2
) -> Iterator[Row]:
    """Every case of every kernel file, in the order of the files."""
    jobs = [
        (file, dtype, index, capability)
        for file in KERNEL_FILES
        for dtype in dtypes
        for index in range(len(_cases(file, dtype)))
        for capability in capabilities
    ]
    # Spawned: the parent has threads of torch.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_one, jobs, chunksize=4)


def _cases(file: str, dtype: str) -> list[AotCase]:
    module = import_module(f"..kernels.{file}", __package__)
    return list(module.aot_cases(DTYPES[dtype]))


def _compile_one(job: tuple[str, str, int, int]) -> Row:
    file, dtype, index, capability = job
    case = _cases(file, dtype)[index]
    found = case_report(case, capability)
    return Row(case.name, dtype, capability, found, faults(case, capability, found))


def _line(row: Row) -> str:
    r = row.report
    widest = r.loads[-1].removeprefix("ld.global.") if r.loads else "none"
    return (
        f"{row.kernel:32} {row.dtype:5} sm_{row.capability:<4} {r.registers:4} {r.stack_bytes:5} "
        f"{r.shared_bytes:6} {widest:8} {r.load_count:5} {r.barriers:5}  {'; '.join(row.faults)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if any kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m dfptkd.bench.aot")
    parser.add_argument("--caps", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 turns kernels into Python: unset it")
    if not options.json:
        print(f"{'kernel':32} dtype arch     regs stack shared load     loads  bars  faults")
    failed = 0
    for row in compile_all(options.caps, options.dtypes):
        failed += bool(row.faults)
        print(json.dumps(asdict(row)) if options.json else _line(row), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
