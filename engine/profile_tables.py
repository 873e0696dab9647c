"""What `dfptkd profile` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .profile import LIMIT_PERCENT, TOLERANCE_PERCENT, Component, Profile


def print_profile(found: Profile) -> None:
    """Three tables, each with what its figures mean."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    machine = found.hardware
    device = machine["device"] if machine["device"] != "cpu" else f"cpu: {machine['cpu']}"
    say = [
        f"{found.recipe} · {found.method} · {found.teacher} > {found.student} · "
        f"{found.image_size} px, {found.num_classes} classes, batch {found.batch}, "
        f"{found.precision} · {device}, {machine['threads']} threads, "
        f"torch {found.versions.get('torch')}, commit {found.commit or 'not known'}",
        *found.notes,
    ]
    for line in say:
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    console.print(parts_table(found))
    for line in parts_lines(found):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    console.print(methods_table(found))
    console.print(
        f"medians of {found.methods[0].steps} interleaved steps by {found.mode} "
        f"({found.mode_reason}), data not included; "
        "MACs by the formulas of models/cost.py; kept MB: what a forward pass keeps, eager",
        markup=False,
        soft_wrap=True,
    )
    if found.overhead:
        console.print()
        console.print(overhead_table(found))
    for line in found.warnings:
        console.print(f"warning: {line}", markup=False, soft_wrap=True)


def parts_table(found: Profile) -> Table:
    """One row a component, and their sum."""
    table = _table(
        "component",
        ("forward ms", "backward ms", "step %", "GFLOP", "MB moved", f"{found.memory} MB"),
        ("params", "of roof %", "bound by"),
    )
    for row in found.components:
        flops = row.forward.flops + row.backward.flops
        moved = row.forward.bytes + row.backward.bytes
        table.add_row(
            row.name,
            *(_number(1e3 * s, 2) for s in (row.forward_s, row.backward_s)),
            _number(row.share_percent, 1),
            *(_number(value, 2) for value in (flops / 1e9, moved / 1e6)),
            _number(row.memory_bytes / 1e6, 1),
            f"{row.params:,}" if row.params else "",
            _number(row.roof_percent or 0.0, 0),
            row.bound,
        )
    rows = found.components
    memory = [row.memory_bytes for row in rows]
    table.add_row(
        "sum of the parts",
        *(_number(1e3 * s, 2) for s in map(sum, zip(*map(_times, rows), strict=True))),
        _number(100 * found.parts_sum_s / found.step_s, 1),
        _number(found.work.flops / 1e9, 2),
        _number(sum(r.forward.bytes + r.backward.bytes for r in rows) / 1e6, 2),
        _number((sum(memory) if found.memory == "kept" else max(memory)) / 1e6, 1),
        f"{sum(row.params for row in rows):,}",
        style="bold",
    )
    return table


def parts_lines(found: Profile) -> list[str]:
    """What the figures of the first table mean."""
    memory = {
        "kept": "kept MB: what the graph keeps for the backward, charged to whoever keeps it first",
        "peak": "peak MB: most device memory allocated while the component ran",
    }
    own = f"a run's own mode here is {found.mode} ({found.mode_reason})"
    if found.mode != "eager":
        own += f", its step {1e3 * found.own_step_s:,.1f} ms, data not included"
    busy = ""
    if abs(found.difference_percent) > TOLERANCE_PERCENT:
        busy = f"; above {TOLERANCE_PERCENT:g} %: steps vary, something else uses this machine"
    return [
        f"parts {1e3 * found.parts_sum_s:,.1f} ms, the eager step without instruments "
        f"{1e3 * found.step_s:,.1f} ms: {found.difference_percent:+.1f} % (medians of "
        f"{found.steps}, in turn){busy}",
        f"{own}: {_speed(found.batch / found.own_step_s)} images/s",
        "FLOPs: 2 a MAC, convolutions and matrix products of the eager reference by torch's "
        f"FlopCounterMode; {found.left_out_flops / 1e9:.2g} GFLOP of input gradients that nothing "
        "asks for are not in it",
        "MB moved: reads and writes of the unfused eager reference, an upper bound: above 100 % "
        "of the roof a fused kernel or a cache saved some",
        f"roof, measured here: {found.roofs.flops_per_second / 1e9:,.0f} GFLOP/s (matrix product), "
        f"{found.roofs.bytes_per_second / 1e9:,.1f} GB/s (copy)",
        memory[found.memory],
        "data wait: the loader, a batch being there already; copy: the gather of resident images; "
        "logging: sums of the meter, and an epoch's row spread over its steps",
    ]


def methods_table(found: Profile) -> Table:
    """One row a method."""
    columns = ("step ms", "images/s", "time / KD", "MACs / KD", "M MACs/image", "kept MB")
    table = _table("method", columns, ("trained params",))
    for row in found.methods:
        table.add_row(
            row.method,
            f"{1e3 * row.step_s:,.1f}",
            _speed(row.images_per_second),
            f"{row.time_of_kd:.2f}",
            f"{row.macs_of_kd:.2f}",
            f"{row.macs_per_image / 1e6:,.0f}",
            f"{row.kept_bytes / 1e6:,.1f}",
            f"{row.trained_params:,}",
        )
    return table


def overhead_table(found: Profile) -> Table:
    """Shares, those of the blocks with the side of the line that they are on."""
    table = _table(
        f"prompt path over teacher, {LIMIT_PERCENT:g} % line",
        ("params %", "FLOP %", "forward time %"),
    )
    for row in found.overhead:
        shares = (row.params_percent, row.flops_percent, row.time_percent)
        table.add_row(row.name, *(_share(percent, row.has_limit) for percent in shares))
    return table


def _share(percent: float | None, has_limit: bool) -> str:
    if percent is None:
        return "not in this method"
    side = "exceeded" if percent > LIMIT_PERCENT else "kept"
    return f"{percent:.1f} {side if has_limit else ''}".rstrip()


def _times(row: Component) -> tuple[float, float]:
    return row.forward_s, row.backward_s


def _table(first: str, *groups: tuple[str, ...]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first)
    for group in groups:
        for column in group:
            table.add_column(column, justify="right")
    return table


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _number(value: float, digits: int) -> str:
    """Nothing for zero: most cells of a column that does not apply."""
    return f"{value:,.{digits}f}" if value else ""
