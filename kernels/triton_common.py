"""What several Triton kernels share: launch parameters of row kernels, row alignment, and the
description of a kernel for ahead-of-time compilation.

Imports no Triton, so that the tables can be read where it is not installed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

TRITON_NAME = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class RowLaunch:
    """How one program walks over one row."""

    block: int
    """Values of a row that the program holds at a time, a power of two."""
    num_warps: int
    max_registers: int
    """A thread; the gate on the compiled kernel. Of the 65,536 registers of a multiprocessor 144
    leave room for 14 programs of one warp, 7 of two, 3 of four, 1 of eight; 128 is the most that 16
    warps of one program may use at all, and 80 leaves room for 3 programs of eight warps."""


# Largest row -> launch. Eight values a thread are one 16-byte load of bf16 or fp16 and two of fp32;
# the arithmetic is fp32 for all three, so that the dtype has no say. Not tuned on a GPU yet.
_ROW_LAUNCHES = {
    32: RowLaunch(32, 1, 128),
    64: RowLaunch(64, 1, 128),
    128: RowLaunch(128, 1, 128),
    256: RowLaunch(256, 1, 144),
    512: RowLaunch(512, 2, 144),
    1024: RowLaunch(1024, 4, 144),
    2048: RowLaunch(2048, 8, 144),
    4096: RowLaunch(4096, 16, 128),
}
# Longer rows do not fit in registers: the program loops over them, and the loop needs some too.
_LONG_ROW = RowLaunch(512, 8, 80)
_HEAVY_ROW = RowLaunch(1024, 8, 128)


def row_launch(length: int, *, is_heavy: bool = False) -> RowLaunch:
    """Launch parameters for rows of this many values.

    Args:
        length: Values in a row.
        is_heavy: The kernel holds more than three rows at a time, which spills on sm_100 where a
            program of 16 warps has a row of 4096: such a row is looped over too.
    """
    launch = next((launch for most, launch in _ROW_LAUNCHES.items() if length <= most), _LONG_ROW)
    return _HEAVY_ROW if is_heavy and launch.num_warps == 16 else launch


def shared_alignment(*strides: int) -> int:
    """Largest power of two up to 16 that divides all strides.

    A kernel that gets `stride // alignment` at run time and multiplies by a constexpr alignment
    loads 16 bytes at a time also from rows of 1000: Triton itself looks for multiples of 16 only.
    """
    return math.gcd(16, *strides)


def widest_load(length: int, launch: RowLaunch, dtype: torch.dtype) -> str | None:
    """The load of a contiguous row in PTX: as wide as row length and values a thread allow.

    None where that is too narrow to be told from the loads of other arguments.
    """
    values_a_thread = launch.block // (32 * launch.num_warps)
    size = min(16, dtype.itemsize * math.gcd(16, length, values_a_thread or 1))
    return {16: "v4.b32", 8: "v2.b32"}.get(size)


@dataclass(frozen=True)
class AotCase:
    """One kernel as one launch would compile it, and what the compiled binary must keep to."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    """Argument name -> Triton type; "constexpr" where `constexprs` has the value."""
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...]
    """Arguments that are multiples of 16: what the JIT infers from real ones."""
    options: Mapping[str, Any]
    max_registers: int = 255
    load: str | None = None
    """Shape of the global load that there must be, such as "v4.b32"; None: any."""
    store: str | None = None
    """The same for the global store."""
    mma: bool = False
    """Whether there must be matrix instructions."""


def aot_case(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    launch: Mapping[str, Any],
    max_registers: int = 255,
    load: str | None = None,
    store: str | None = None,
    mma: bool = False,
) -> AotCase:
    """An `AotCase` from what a launch has at hand.

    Args:
        name: Says which variant it is.
        kernel: The `@triton.jit` function, not interpreted.
        types: Argument name -> Triton type ("*bf16"), where its annotation does not say it.
        launch: Keyword arguments of the launch, constants and options mixed; an absent tensor
            is None.
        max_registers: Ceiling for a thread.
        load, store, mma: As in `AotCase`.
    """
    annotated = {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
    types = {**annotated, **types}
    constexprs = {key: launch[key] for key in kernel.arg_names if key in launch}
    signature = {key: "constexpr" if key in constexprs else types[key] for key in kernel.arg_names}
    return AotCase(
        name,
        kernel,
        signature,
        constexprs,
        tuple(key for key, type_name in signature.items() if type_name.startswith("*")),
        {key: value for key, value in launch.items() if key not in constexprs},
        max_registers,
        load,
        store,
        mma,
    )
