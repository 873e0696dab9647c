"""`dfptkd bench first PART`: what is asked first of a GPU that this project has not run on.

    environment   what the machine has, and what it lacks
    kernels       every fused operator: distance from fp64 of outputs and gradients, beside eager's
    ceilings      what a copy and a matrix product reach
    modes         each execution mode on small networks: works, agrees with eager, waits for nothing
    cifar         WRN-40-2 -> ShuffleNetV1: our step with 1, 3 and 6 seeds, the plain loop, the same
                  compiled; which kernels the time goes to
    pairs         prompt + fusion pairs by stage: eager, Inductor and Triton, as CUDA graphs
    grouped       ShuffleNetV1's grouped 1x1 convolutions: cuDNN, one batched matrix product
    imagenet      ResNet-34 -> ResNet-18 at 224 pixels, batch 256; which kernels the time goes to

`bench/on_gpu.sh first` runs all of them within nine minutes, each in a process of its own: what one
does to a process, or to a device that has seen a faulty kernel, harms no other. A line is printed,
and a row is written, as soon as it is known. What fails is said (FAILED) and the rest goes on; the
exit code is 1 then.

    dfptkd bench first PART [--small] [--operators frozen_relu,...] [--device cuda] [--out FILE]

`--small` takes tiny networks and shapes: to try the parts out, and for compute-sanitizer.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..engine.config import PromptConfig
from ..engine.data import load_data, train_batches
from ..engine.log import commit, versions
from ..engine.stand_in import build_step
from ..engine.timing import time_interleaved
from ..kernels.backend import BACKENDS, unavailable
from .cases import AS_A_RUN, OPERATORS, Case, cases, disagreement, grouped_case, pair_case
from .kernels import bench_case, parse_operators
from .measure import Failures, Keep, Row, bench_parser, keeper, make_row, prepared_device
from .step import Measured, Setting, Side, images_per_second, measure

AGREES = 0.1
"""Of the way that the parameters go in a few steps: how far another mode's may be from eager's, as
in tests/engine/test_step_gpu.py. Rounding grows on that way; a wrong gradient is beyond it."""


@dataclass(frozen=True)
class Pair:
    """Teacher and student on images of a size."""

    teacher: str
    student: str
    batch: int
    image_size: int
    classes: int
    prompt: PromptConfig = field(default_factory=PromptConfig)

    def setting(self, method: str, device: torch.device) -> Setting:
        """As `dfptkd bench step` has it."""
        return Setting(
            self.teacher,
            self.student,
            method,
            self.batch,
            self.image_size,
            self.classes,
            self.prompt,
            device,
        )


@dataclass(frozen=True)
class Sizes:
    """What the parts are measured on; the most telling first, where time may run out."""

    checked: tuple[tuple[int, ...], ...]
    """Shapes of the kernels' check, as `cases` takes them."""
    copied: int
    """Numbers of a copy."""
    side: int
    """Of the matrices that are multiplied."""
    modes: Pair
    methods: tuple[str, ...]
    """Whose execution modes are checked."""
    cifar: Pair
    seeds: tuple[int, ...]
    imagenet: Pair
    stages: tuple[tuple[int, int, int, int], ...]
    """Outputs [B, C, H, W] of stages."""
    grouped: tuple[tuple[int, int, int, int], ...]
    """Batch, channels in and out, side in pixels."""
    rounds: int


FULL = Sizes(
    checked=(
        (7, 10), (64, 100), (256, 1000), (5, 9, 7, 3), (64, 32, 32, 3), (3, 33, 7, 5),
        (64, 32, 32, 32), (256, 256, 14, 14), (32, 64, 56, 56),
    ),
    copied=1 << 28,
    side=8192,
    modes=Pair("cifar:resnet14", "cifar:resnet8", 64, 32, 10),
    methods=("kd", "dfpt", "dfpt_plus"),
    cifar=Pair("cifar:wrn_40_2", "cifar:ShuffleV1", 64, 32, 100),
    seeds=(1, 3, 6),
    imagenet=Pair("torchvision:resnet34", "torchvision:resnet18", 256, 224, 1000),
    stages=(
        (256, 64, 56, 56), (64, 32, 32, 32), (256, 256, 14, 14), (64, 64, 16, 16),
        (256, 128, 28, 28), (64, 128, 8, 8), (256, 512, 7, 7),
    ),
    grouped=(
        (64, 240, 60, 16), (64, 60, 240, 16), (64, 480, 120, 8), (64, 120, 480, 8),
        (64, 960, 240, 4), (64, 240, 960, 4),
    ),
    rounds=30,
)  # fmt: skip
# One partial convolution a block: three take Triton half a minute to compile.
_TINY = Pair("cifar:resnet8", "cifar:resnet8", 8, 16, 10, PromptConfig(kernels=(3,)))
SMALL = replace(
    FULL,
    checked=((7, 10), (33, 1001), (5, 9, 7, 3), (3, 33, 7, 5), (2, 64, 8, 8)),
    copied=1 << 16,
    side=64,
    modes=_TINY,
    methods=("kd", "dfpt"),
    cifar=_TINY,
    imagenet=replace(_TINY, batch=16, image_size=32),
    stages=((4, 32, 8, 8),),
    grouped=((4, 24, 12, 8),),
    rounds=3,
)


class Report:
    """The voice of one part, and where its rows go."""

    def __init__(self, keep: Keep) -> None:
        self.keep, self.failures = keep, Failures()
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """One line, with the seconds since the part began."""
        print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)

    def require(self, holds: bool, text: str) -> None:
        """A line that says whether something is as it should be."""
        self.say(f"{'ok' if holds else 'FAILED'}  {text}")
        if not holds:
            self.failures.names.append(text)

    @contextmanager
    def going_on(self, name: str) -> Iterator[None]:
        """What fails inside is said, and what follows is done all the same."""
        try:
            yield
        except Exception as error:
            self.failures.add(name, error)

    def row(self, row: Row, more: str = "") -> None:
        """A measurement: to the file, and in a line."""
        self.keep(row)
        self.say(
            f"{row.kernel} {row.shape} {row.passes} by {row.provider}: {_ms(row.median_us)} ms "
            f"({_ms(row.p20_us)}..{_ms(row.p80_us)}){more}"
        )


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3f}"


# The parts ---------------------------------------------------------------------------------------


def environment(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Nothing is measured; what is missing is said before it is missed."""
    found = versions()
    report.say(", ".join(f"{name} {version}" for name, version in found.items()))
    report.say(f"commit {commit() or 'not known'}, {platform.platform()}, {os.cpu_count()} cores")
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        report.say(
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, "
            f"{facts.multi_processor_count} multiprocessors, {facts.total_memory / 2**30:.0f} GiB, "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
        asked = "name,driver_version,power.limit,clocks.max.sm,clocks.sm,temperature.gpu"
        report.say(_output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"))
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    report.say(
        f"C compiler {compiler or 'none: Triton and Inductor need one'}, Python.h "
        f"{'there' if header.is_file() else 'not there'}, compute-sanitizer "
        f"{shutil.which('compute-sanitizer') or 'not there'}"
    )
    for backend in BACKENDS:
        report.say(f"backend {backend}: {unavailable(backend) or 'can be used'}")


def _output(*command: str) -> str:
    """What a program prints, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return " ".join((done.stdout or done.stderr).split())


@contextmanager
def fp32_as_fp32() -> Iterator[None]:
    """Convolutions in full precision: what eager is held to is rounding, not TF32's."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


@fp32_as_fp32()
def check_kernels(
    report: Report, device: torch.device, sizes: Sizes, operators: Sequence[str] = OPERATORS
) -> None:
    """Each dtype that a run computes in; an operator without a fused backend here has no line."""
    dtypes = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,)
    for dtype in dtypes:
        for case in cases(sizes.checked, device, dtype, operators, auto=False):
            if case.ours is None:
                continue
            name = f"{case.operation} {'x'.join(map(str, case.shape))} {dtype} {case.ours}"
            with report.going_on(name):
                found = disagreement(case)
                distance = (
                    "compared with eager bit by bit"
                    if case.exact is None
                    else f"{found.ours:.1e} from fp64, eager {found.eager:.1e}, "
                    f"allowed {found.allowed:.1e}"
                )
                report.require(found.holds, f"{name}: {distance}")


def ceilings(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Random values: zeros cost a GPU less power, and it then runs faster than it ever will."""
    source = torch.randn(sizes.copied, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(sizes.side, sizes.side, device=device).to(torch.bfloat16) for _ in range(2))
    moved = 2 * source.numel() * source.element_size()
    flops = 2 * sizes.side**3
    for kernel, call, shape, dtype, size in (
        ("copy", lambda: target.copy_(source), (sizes.copied,), torch.float32, moved),
        ("matmul", lambda: a @ b, (sizes.side,) * 3, torch.bfloat16, None),
    ):
        with report.going_on(kernel):
            calls: dict[str, Callable[[], object]] = {"torch": call}
            timing = time_interleaved(calls, device, rounds=sizes.rounds, warmup=3)["torch"]
            row = make_row(
                timing,
                device,
                kernel=kernel,
                provider="torch",
                passes="forward",
                contract="hot",
                shape=shape,
                dtype=dtype,
                bytes_moved=size,
                copy_gb_per_s=None,
                peak=None,
            )
            speed = f"{flops / timing.median / 1e6:.1f} TFLOP/s" if size is None else ""
            report.row(row, f", {speed or f'{row.gb_per_s} GB/s'}")


@fp32_as_fp32()
def modes(report: Report, device: torch.device, sizes: Sizes) -> None:
    """A few steps in fp32 from the same start, on the same batches."""
    names = ("eager", "compile", "graph") if device.type == "cuda" else ("eager", "compile")
    for method in sizes.methods:
        eager: torch.Tensor | None = None
        for mode in names:
            with report.going_on(f"{method} {mode}"):
                found = _way(sizes.modes.setting(method, device), mode)
                eager = found.way if mode == "eager" else eager
                assert eager is not None, "eager, which it is compared with, has failed"
                away = ((found.way - eager).norm() / eager.norm()).item()
                report.require(
                    found.skipped == 0 and away < AGREES,
                    f"{method} {mode}: first step after {found.first_seconds:.1f} s, waits for "
                    f"nothing, {found.skipped} steps skipped, way {away:.1e} from eager's",
                )


@dataclass(frozen=True)
class _Way:
    way: torch.Tensor
    """[parameters]: how far each has gone."""
    first_seconds: float
    skipped: int


def _way(setting: Setting, mode: str, steps: int = 6) -> _Way:
    """Steps in one mode; RuntimeError where one after the first waits for the device."""
    device = setting.device
    started = time.perf_counter()
    config = replace(setting.config(mode), precision="fp32")
    data = load_data(config.data, device)
    step = build_step(config, data, device)
    batches = train_batches(data.train, batch_size=setting.batch, seed=0, epoch=0)
    rest = [batch for _, batch in zip(range(steps), batches, strict=False)]
    before = [p.detach().clone() for p in step.params]
    step(rest[0], 0)
    skipped = step.gate.read().skipped  # waits for the device
    first_seconds = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for i, batch in enumerate(rest[1:], start=1):
            step(batch, i)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    step.join()
    skipped = step.gate.read().skipped
    way = [(p.detach() - b).flatten() for p, b in zip(step.params, before, strict=True)]
    return _Way(torch.cat(way), first_seconds, skipped)


def cifar(report: Report, device: torch.device, sizes: Sizes) -> None:
    """The step that is bound by the number of its kernels, and how far seeds at once take it."""
    ours = _fastest(device)
    dfpt, kd = (sizes.cifar.setting(method, device) for method in ("dfpt", "kd"))
    _steps(report, dfpt, ("plain", ours, "plain[compile]", "ours[eager]"), sizes, table=ours)
    _steps(report, kd, (ours,), sizes)


def imagenet(report: Report, device: torch.device, sizes: Sizes) -> None:
    """The step that is bound by arithmetic and memory."""
    ours = _fastest(device)
    dfpt, kd = (sizes.imagenet.setting(method, device) for method in ("dfpt", "kd"))
    alone = replace(sizes, seeds=(1,), rounds=max(3, sizes.rounds // 3))
    _steps(report, dfpt, ("plain", ours, "ours[eager]"), alone, table=ours)
    _steps(report, kd, (ours,), alone)


def _fastest(device: torch.device) -> str:
    return "ours[graph]" if device.type == "cuda" else "ours[compile]"


def _steps(
    report: Report, setting: Setting, providers: Sequence[str], sizes: Sizes, table: str = ""
) -> None:
    """Steps of one method; `table`: the side whose kernels are listed."""
    found = measure(
        [setting],
        providers,
        rounds=sizes.rounds,
        seeds=sizes.seeds,
        of_seeds=[_fastest(setting.device)],
        failures=report.failures,
    )
    for side, measured in found:
        report.row(measured.row, _circumstances(measured))
        if measured.row.provider == table:
            with report.going_on(f"kernels of {setting.label} {table}"):
                kernel_table(report, side)


def _circumstances(measured: Measured) -> str:
    speed = images_per_second(measured.row)
    parts = [f"{speed:,.0f} images/s"]
    if "plain" in measured.beside:
        its_row = replace(measured.row, provider="plain", median_us=measured.beside["plain"])
        parts.append(f"{speed / images_per_second(its_row):.2f}x those of plain")
    parts.append(f"first after {measured.first_seconds:.0f} s")
    if measured.host is not None:
        parts.append(f"{measured.host.launches} launches, {measured.host.syncs} waits")
    if torch.cuda.is_initialized():
        parts.append(f"{torch.cuda.memory_reserved() / 1e6:,.0f} MB reserved")
    return ", " + ", ".join(parts)


def kernel_table(report: Report, side: Side, rows: int = 15) -> None:
    """Where a step's time on the device goes, kernel by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    side.call()
    with torch.profiler.profile(activities=activities) as profile:
        side.call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total]
    events.sort(key=lambda event: -event.self_device_time_total)
    if not events:
        report.say("which kernels dominate: not known, no kernel was recorded (CUPTI is missing)")
        return
    total = sum(event.self_device_time_total for event in events)
    count = sum(event.count for event in events)
    report.say(f"which kernels dominate: {count} in {_ms(total)} ms of the device's time")
    for event in events[:rows]:
        share = 100 * event.self_device_time_total / total
        report.say(
            f"    {_ms(event.self_device_time_total):>9} ms {share:5.1f} % {event.count:5} x "
            f"{event.key[:90]}"
        )


def pairs(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Forward and backward; Inductor as a run takes it, not tuned for minutes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape in sizes.stages:
        with report.going_on(f"pair {shape}"):
            torch.compiler.reset()
            _case(
                report,
                pair_case(*shape, dtype, device, compile_options=AS_A_RUN),
                dtype,
                device,
                sizes,
            )


def grouped(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Forward and backward of each."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape in sizes.grouped:
        with report.going_on(f"grouped {shape}"):
            _case(report, grouped_case(*shape, dtype, device), dtype, device, sizes)


def _case(
    report: Report, case: Case, dtype: torch.dtype, device: torch.device, sizes: Sizes
) -> None:
    rows = bench_case(
        case,
        device,
        dtype,
        copy=None,
        rounds=sizes.rounds,
        failures=report.failures,
        contracts=("graph",) if device.type == "cuda" else ("hot",),
    )
    for row in rows:
        report.row(row, f", {row.gb_per_s} GB/s of the least that it can move")


PARTS: dict[str, Callable[[Report, torch.device, Sizes], None]] = {
    "environment": environment,
    "kernels": check_kernels,
    "ceilings": ceilings,
    "modes": modes,
    "cifar": cifar,
    "pairs": pairs,
    "grouped": grouped,
    "imagenet": imagenet,
}


def main(args: Sequence[str]) -> int:
    """`dfptkd bench first`; returns the exit code."""
    parser = bench_parser("first")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="tiny networks and shapes")
    parser.add_argument(
        "--operators", default="all", help=f"of kernels: all, or some of {','.join(OPERATORS)}"
    )
    options = parser.parse_args(args)
    operators = parse_operators(options.operators)
    device = prepared_device(options)
    report = Report(keeper(options.out))
    sizes = SMALL if options.small else FULL
    if options.part == "kernels":
        check_kernels(report, device, sizes, operators)
    else:
        PARTS[options.part](report, device, sizes)
    return report.failures.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
