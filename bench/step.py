"""`dfptkd bench step`: whole training steps, against the loop that an experienced user would write.

    plain              both teacher paths run in full, eager PyTorch's own operations and losses,
                       channels_last, autocast bf16 on a GPU and fp32 on a CPU, autograd's defaults,
                       fused SGD
    plain[compile]     the same, its networks and its losses under torch.compile
    ours[MODE]         a run's own step, one row for each execution mode
    ours[MODE+joint]   the later stages on both teacher paths as one batch (--step.joint-paths)
    ours[MODE]xN       a step of each of N seeds at once (--seeds N,N), on the same batch; of mode
                       graph as one graph, each on a batch of its own

Vanilla KD is timed by our step alone, for the ratio of the costs.

All in one process, on the same random images. One side is built after the other, its first loss is
checked against that of the first side, and it is timed interleaved with those that it is compared
with: plain, plain[compile], vanilla KD. Its row is written then: what comes later, and may take
minutes to compile, cannot take it away. Neither data nor weights are needed.

    dfptkd bench step [--pairs "cifar:resnet32x4>cifar:resnet8x4"] [--methods kd,dfpt,dfpt_plus]
                      [--providers plain,ours[eager]] [--seeds 3,6] [--batch 64] [--rounds 5]
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.cli import Parser
from ..engine.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    PromptConfig,
    RunConfig,
    StepConfig,
    TeacherConfig,
)
from ..engine.data import Batch, load_data, train_batches
from ..engine.errors import UsageError
from ..engine.joint_step import JointStep, join
from ..engine.memory import kept_bytes
from ..engine.metrics import Normalise, normaliser
from ..engine.models import PromptFusion, create_model, split_stages
from ..engine.stand_in import build_step, pair_cost
from ..engine.step import TrainStep
from ..engine.timing import time_interleaved
from ..kernels import use_backend
from .measure import (
    Failures,
    Row,
    bench_parser,
    keeper,
    make_row,
    peak_bytes,
    positive,
    prepared_device,
)

PAIR = "cifar:wrn_40_2>cifar:ShuffleV1"
METHODS = ("kd", "dfpt", "dfpt_plus")
PROVIDERS = (
    "plain", "plain[compile]", "ours[eager]", "ours[compile]", "ours[graph]",
    "ours[eager+joint]", "ours[graph+joint]",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all sides of one comparison share."""

    teacher: str
    student: str
    method: str
    batch: int
    image_size: int
    classes: int
    prompt: PromptConfig
    device: torch.device

    @property
    def label(self) -> str:
        """Method and pair, as the rows have it."""
        return f"step:{self.method}:{self.teacher}>{self.student}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, 3, H, W]."""
        return self.batch, 3, self.image_size, self.image_size

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of a run with precision "auto"."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def config(self, mode: str) -> RunConfig:
        """A run of this setting; mode is an execution mode, `+joint` behind it or not."""
        mode, _, joint = mode.partition("+")
        return RunConfig(
            method=self.method,  # type: ignore[arg-type]
            student=self.student,
            teacher=TeacherConfig(name=self.teacher),
            global_batch=self.batch,
            device=self.device.type,
            data=DataConfig(name="synthetic", num_classes=self.classes, image_size=self.image_size),
            prompt=self.prompt,
            optim=OptimConfig(lr=1e-3),
            step=StepConfig(mode=mode, joint_paths=bool(joint)),  # type: ignore[arg-type]
        )

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher, the same weights for every side."""
        torch.manual_seed(0)
        student, teacher = (
            create_model(name, num_classes=self.classes) for name in (self.student, self.teacher)
        )
        return student, teacher


class PlainDualPath(nn.Module):
    """Both teacher paths as the paper's figure draws them, nothing shared."""

    def __init__(self, teacher: nn.Module, prompt: PromptConfig, finetune: bool) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        path = copy.deepcopy(teacher)
        split = split_stages(path)
        self.stages, self.neck = nn.ModuleList(split.stages), split.neck
        self.head = copy.deepcopy(split.head).requires_grad_(True)
        for module in self.head.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.pairs = nn.ModuleList(
            PromptFusion(channels, prompt, post_relu=post_relu)
            for channels, post_relu in zip(split.channels, split.post_relu, strict=True)
        )
        self.stages.train(finetune).requires_grad_(finetune)
        self.neck.train(finetune).requires_grad_(finetune)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # [B, 3, H, W] -> teacher, prompt
        with torch.no_grad():
            teacher = self.teacher(images)
        x = images
        for stage, pair in zip(self.stages, self.pairs, strict=True):
            x = pair(stage(x))
        return teacher, self.head(self.neck(x))


def plain_losses(student: Tensor, prompt: Tensor | None, teacher: Tensor, y: Tensor) -> Tensor:
    """The objective in PyTorch's own functions; without a prompt path vanilla KD."""
    loss = LossConfig()

    def kl(learner: Tensor, supervisor: Tensor) -> Tensor:
        q = F.softmax(supervisor.detach().float() / loss.tau, dim=1)
        p = F.log_softmax(learner.float() / loss.tau, dim=1)
        return loss.tau**2 * F.kl_div(p, q, reduction="batchmean")

    if prompt is None:
        return loss.kd_ce * F.cross_entropy(student, y) + loss.kd_kl * kl(student, teacher)
    total = F.cross_entropy(student, y) + kl(student, teacher) + kl(student, prompt)
    return total + F.cross_entropy(prompt, y) + kl(prompt, teacher) + kl(prompt, student)


class PlainStep:
    """The loop body of a user who knows PyTorch."""

    def __init__(self, setting: Setting, *, compiled: bool) -> None:
        self.device = setting.device
        student, teacher = setting.networks()
        self.student = student.train()
        self.dual: nn.Module
        if setting.method == "kd":
            self.dual = teacher.eval().requires_grad_(False)
        else:
            self.dual = PlainDualPath(teacher, setting.prompt, setting.method == "dfpt_plus")
        for module in (self.student, self.dual):
            module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.losses: Callable[..., Tensor] = plain_losses
        if compiled:
            options = {"force_layout_optimization": True} if self.device.type == "cuda" else None
            self.student.compile(dynamic=False, options=options)
            self.dual.compile(dynamic=False, options=options)
            self.losses = torch.compile(plain_losses, dynamic=False, options=options)
        params = [*self.student.parameters(), *self.dual.parameters()]
        self.optimizer = torch.optim.SGD(
            [p for p in params if p.requires_grad],
            lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True,
        )  # fmt: skip
        self.dtype = setting.dtype

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step on normalised images; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        is_cuda = self.device.type == "cuda"
        with (
            use_backend("reference"),
            torch.autocast(self.device.type, self.dtype, enabled=is_cuda),
        ):
            if isinstance(self.dual, PlainDualPath):
                teacher, prompt = self.dual(images)
            else:
                prompt = None
                with torch.no_grad():
                    teacher = self.dual(images)
            total = self.losses(self.student(images), prompt, teacher, labels)
        total.backward()
        self.optimizer.step()
        return total.detach()


def our_step(setting: Setting, mode: str) -> TrainStep:
    """A run's own step."""
    config = setting.config(mode)
    return build_step(config, load_data(config.data, setting.device), setting.device)


def at_once(
    setting: Setting, mode: str, seeds: int, steps: Sequence[TrainStep] = ()
) -> tuple[list[TrainStep], JointStep | None]:
    """Steps of several seeds, which share what runs of several seeds share and do them as one where
    those do; `steps` are those that there are already."""
    found = [*steps, *(our_step(setting, mode) for _ in range(seeds - len(steps)))]
    joint = join(found) if seeds > 1 else None
    for step in found if seeds > 1 else ():
        step.share_batches(None if step is found[0] else found[0])
    return found, joint


@dataclass(frozen=True)
class Side:
    """One provider: a call makes a step."""

    call: Callable[[], object]
    modules: list[nn.Module]
    first_loss: float
    first_seconds: float
    """From nothing to the end of the first step: building, compiling, capturing."""

    def kept_bytes(self) -> int:
        """What the forward pass keeps for the backward, parameters and buffers not counted."""
        owned = (t for m in self.modules for t in (*m.parameters(), *m.buffers()))
        return kept_bytes(self.call, owned)


@dataclass(frozen=True)
class HostCalls:
    """What the host does in one step on a GPU."""

    launches: int
    """Kernels, copies and graphs."""
    syncs: int
    """Waits for the device."""


def host_calls(call: Callable[[], object]) -> HostCalls | None:
    """Count the runtime's calls in one step (CUDA); None where they cannot be counted."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    return count_host_calls({event.key: event.count for event in profile.key_averages()})


def count_host_calls(events: Mapping[str, int]) -> HostCalls | None:
    """Launches and waits among a profile's events, name -> how often.

    None where no call of the runtime is among them, not even the profiler's own wait at the end:
    CUPTI, which records them, is missing then, or may not be used.
    """
    calls = {name: count for name, count in events.items() if name.startswith("cu")}
    if not calls:
        return None
    launches = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")
    return HostCalls(
        sum(n for name, n in calls.items() if any(kind in name for kind in launches)),
        max(0, sum(n for name, n in calls.items() if "Synchronize" in name) - 1),
    )  # the profiler itself waits once


def build_sides(
    setting: Setting, provider: str, seeds: Sequence[int] = (1,)
) -> Iterator[tuple[str, Side]]:
    """One provider's step, warm, by its label; ours also for each number of `seeds` at once."""
    data = load_data(setting.config("eager").data, setting.device)
    batch = next(train_batches(data.train, batch_size=setting.batch, seed=0, epoch=0))
    started = time.perf_counter()
    if provider.startswith("plain"):
        normalise = normaliser(data)
        plain = PlainStep(setting, compiled=provider == "plain[compile]")
        loss = plain(normalise(batch), batch.labels).item()
        call = functools.partial(_plain_call, plain, normalise, batch)
        seconds = time.perf_counter() - started
        yield provider, Side(call, [plain.student, plain.dual], loss, seconds)
        return
    mode = provider.removeprefix("ours[").removesuffix("]")
    steps: list[TrainStep] = []
    for count in sorted(set(seeds)):
        steps, joint = at_once(setting, mode, count, steps)
        _ours_call(steps, joint, batch)
        loss = steps[-1].meter.read(False)["loss/total"]  # waits for the device
        call = functools.partial(_ours_call, steps, joint, batch)
        seconds = time.perf_counter() - started
        label = provider if count == 1 else f"{provider}x{count}"
        yield label, Side(call, [step.method for step in steps], loss, seconds)
        started = time.perf_counter()


def check_losses(setting: Setting, losses: Mapping[str, float]) -> None:
    """Side -> its first loss.

    Raises:
        RuntimeError: They differ.
    """
    tolerance = 1e-4 if setting.dtype == torch.float32 else 3e-2
    spread = max(losses.values()) - min(losses.values())
    if not spread <= tolerance * max(losses.values()):
        raise RuntimeError(f"{setting.label}: the first losses differ: {dict(losses)}")


def make_sides(setting: Setting, providers: Sequence[str], seeds: int = 1) -> dict[str, Side]:
    """Every provider's step, warm and on the same batch.

    Raises:
        RuntimeError: A provider's first loss is not that of the others.
    """
    sides: dict[str, Side] = {}
    for provider in providers:
        sides |= build_sides(setting, provider, (1, seeds))
    check_losses(setting, {name: side.first_loss for name, side in sides.items()})
    return sides


def _ours_call(steps: Sequence[TrainStep], joint: JointStep | None, batch: Batch) -> None:
    new = replace(batch)  # what seeds share is remembered for a batch, not for its values
    for step in steps:
        if joint is None:
            step(new, 1)
        else:
            joint.lay_down(step, replace(batch), 1)
    for step in steps:
        if joint is not None:
            joint.collect(step)
        step.join()
    if joint is not None and joint.failure is not None:
        raise RuntimeError(joint.failure)


def _plain_call(step: PlainStep, normalise: Normalise, batch: Batch) -> None:
    step(normalise(batch), batch.labels)


def _applies(provider: str, method: str) -> bool:
    """Plain vanilla KD is not measured; only DFPT-KD has paths that can be joined."""
    return method == "dfpt" or (
        "joint" not in provider and not (method == "kd" and "plain" in provider)
    )


@dataclass(frozen=True)
class Measured:
    """A row of bench/results.csv, and what only the table shows."""

    row: Row
    first_seconds: float
    """As `Side` has it."""
    beside: dict[str, float]
    """Microseconds of what was timed with it: "plain", "plain[compile]", "kd"."""
    kept_bytes: int
    host: HostCalls | None


@dataclass
class Comparison:
    """What sides are compared with, as far as it is there."""

    plain: dict[Setting, dict[str, Side]] = field(default_factory=dict)
    kd: dict[str, Side] = field(default_factory=dict)
    """Label -> vanilla KD's."""
    losses: dict[Setting, dict[str, float]] = field(default_factory=dict)

    def beside(self, setting: Setting, label: str) -> dict[str, Side]:
        """What a side is timed with."""
        found = dict(self.plain.get(setting, {}))
        if label in self.kd:
            found["kd"] = self.kd[label]
        return found

    def check(self, setting: Setting, label: str, side: Side) -> None:
        """Raises RuntimeError where the first loss is not that of the first side."""
        losses = self.losses.setdefault(setting, {label: side.first_loss})
        first = next(iter(losses))
        check_losses(setting, {first: losses[first], label: side.first_loss})

    def add(self, setting: Setting, label: str, side: Side) -> None:
        """Others are compared with it from now on, if it is one of those."""
        if label.startswith("plain"):
            self.plain.setdefault(setting, {})[label] = side
        elif setting.method == "kd":
            self.kd[label] = side


def measure(
    settings: Sequence[Setting],
    providers: Sequence[str],
    *,
    rounds: int,
    seeds: Sequence[int] = (1,),
    of_seeds: Sequence[str] = PROVIDERS,
    failures: Failures | None = None,
) -> Iterator[tuple[Side, Measured]]:
    """All methods of one pair, each side as it is done; vanilla KD by our own steps alone.

    A side's memory is free again once nobody holds it, unless others are compared with it.

    Args:
        settings: One for each method; what vanilla KD is compared with comes after it.
        providers: Names of sides.
        rounds: Timed steps of each.
        seeds: Numbers of seeds at once, of our sides.
        of_seeds: The providers of which more than one seed is measured.
        failures: Takes a side that fails, and the rest goes on; None: it is raised.
    """
    comparison = Comparison()
    wanted = [(p, s) for p in providers for s in settings if _applies(p, s.method)]
    for provider, setting in wanted:
        try:
            counts = seeds if provider in of_seeds else (1,)
            for label, side in build_sides(setting, provider, counts):
                comparison.check(setting, label, side)
                beside = comparison.beside(setting, label)
                yield side, _measure(setting, label, side, beside, rounds)
                comparison.add(setting, label, side)
        except Exception as error:
            if failures is None:
                raise
            failures.add(f"{setting.label} {provider}", error)


def _measure(
    setting: Setting, label: str, side: Side, beside: dict[str, Side], rounds: int
) -> Measured:
    device = setting.device
    calls = {name: other.call for name, other in beside.items()} | {label: side.call}
    timings = time_interleaved(calls, device, rounds=rounds, warmup=1)
    row = make_row(
        timings[label],
        device,
        kernel=setting.label,
        provider=label,
        passes="step",
        contract="hot",
        shape=setting.shape,
        dtype=setting.dtype,
        bytes_moved=None,
        copy_gb_per_s=None,
        peak=peak_bytes(side.call, device),
    )
    others = {name: timings[name].median for name in beside}
    host = host_calls(side.call) if device.type == "cuda" else None
    return Measured(row, side.first_seconds, others, side.kept_bytes(), host)


def print_rows(measured: Sequence[Measured], settings: Sequence[Setting]) -> None:
    """Images a second, each side against plain, and DFPT over KD against the ratio of the MACs."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("method", "side"):
        table.add_column(column)
    columns = ("images/s", "median ms", "p20..p80", "plain / it", "compile / it", "of KD", "MACs")
    for column in columns:
        table.add_column(column, justify="right")
    on_gpu = settings[0].device.type == "cuda"
    for column in ("peak MB", "launches", "syncs") if on_gpu else ("kept MB",):
        table.add_column(column, justify="right")
    macs = {setting.label: step_macs(setting) for setting in settings}
    kd_macs = next((macs[label] for label in macs if label.startswith("step:kd:")), None)
    for m in measured:
        r = m.row
        setting = next(s for s in settings if s.label == r.kernel)
        kd = r.median_us if setting.method == "kd" else m.beside.get("kd")
        table.add_row(
            setting.method, escape(r.provider), f"{images_per_second(r):,.0f}",
            f"{r.median_us / 1e3:,.1f}", f"{r.p20_us / 1e3:,.0f}..{r.p80_us / 1e3:,.0f}",
            _over(m, "plain"), _over(m, "plain[compile]"),
            "" if kd is None else f"{r.median_us / kd:.2f}x",
            f"{macs[r.kernel] / kd_macs:.2f}x" if kd_macs and kd else "", *_memory(m, on_gpu),
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 120).print(table)
    r = measured[0].row
    print(
        f"{r.kernel.split(':', 2)[2]}, batch {settings[0].batch}, {r.device}, {r.threads} threads, "
        f"torch {r.torch}, commit {r.commit}, n = {r.n}"
    )


def _over(m: Measured, name: str) -> str:
    """How many times as long another side takes that was timed with this one."""
    other = m.row.median_us if m.row.provider == name else m.beside.get(name)
    return "" if other is None else f"{other / m.row.median_us:.2f}x"


def _memory(m: Measured, on_gpu: bool) -> tuple[str, ...]:
    if not on_gpu:
        return (f"{m.kept_bytes / 1e6:,.0f}",)
    counts = ("", "") if m.host is None else (str(m.host.launches), str(m.host.syncs))
    return f"{(m.row.peak_bytes or 0) / 1e6:,.0f}", *counts


def images_per_second(row: Row) -> float:
    """Of a step, all its seeds counted."""
    return _seeds_of(row) * int(row.shape.partition("x")[0]) / row.median_us * 1e6


def _seeds_of(row: Row) -> int:
    _, is_several, seeds = row.provider.rpartition("]x")
    return int(seeds) if is_several else 1


@functools.cache
def step_macs(setting: Setting) -> int:
    """MACs of a step for one image, by the formulas of engine/models/cost.py."""
    config = setting.config("eager")
    return pair_cost(config, setting.classes, setting.shape[2:]).training_macs(setting.method)


def add_pair_options(parser: Parser) -> None:
    """What a pair is measured on."""
    parser.add_argument("--classes", type=positive, default=100)
    parser.add_argument("--image-size", type=positive, default=32, help="side in pixels")
    parser.add_argument("--batch", type=positive, default=64, help="images in a step")
    parser.add_argument("--r1", type=positive, default=PromptConfig().r1)
    parser.add_argument("--fusion-groups", type=positive, default=PromptConfig().fusion_groups)


def make_setting(
    options: argparse.Namespace, teacher: str, student: str, method: str, device: torch.device
) -> Setting:
    """The setting that the options of a bench ask for."""
    return Setting(
        teacher,
        student,
        method,
        options.batch,
        options.image_size,
        options.classes,
        PromptConfig(r1=options.r1, fusion_groups=options.fusion_groups),
        device,
    )


def parse_pairs(text: str) -> list[tuple[str, str]]:
    """Pairs of model names.

    Raises:
        UsageError: Not TEACHER>STUDENT.
    """
    pairs = [tuple(part.split(">")) for part in text.split(",")]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise UsageError(f"--pairs {'>'.join(pair)}: expected TEACHER>STUDENT")
    return pairs  # type: ignore[return-value]


def parse_names(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Names out of `known`, with commas between.

    Raises:
        UsageError: An unknown one.
    """
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UsageError(f"{option} {name}: expected some of {','.join(known)}")
    return names


def _numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def main(args: Sequence[str]) -> int:
    """`dfptkd bench step`; returns the exit code."""
    parser = bench_parser("step", rounds=5)
    parser.add_argument("--pairs", default=PAIR, help="TEACHER>STUDENT, names of models")
    parser.add_argument("--methods", default="kd,dfpt", help=",".join(METHODS))
    parser.add_argument(
        "--providers",
        help=f"{','.join(PROVIDERS)}; absent: all, on a CPU no graph and no joint",
    )
    parser.add_argument(
        "--seeds", type=_numbers, default="1", help="also so many seeds at once: 3, or 3,6"
    )
    add_pair_options(parser)
    options = parser.parse_args(args)
    device = prepared_device(options)
    known = [p for p in PROVIDERS if device.type == "cuda" or "graph" not in p]
    usual = [p for p in known if device.type == "cuda" or "joint" not in p]
    providers = parse_names("--providers", options.providers or ",".join(usual), known)
    methods = sorted(parse_names("--methods", options.methods, METHODS), key=METHODS.index)
    keep, failures = keeper(options.out), Failures()
    for teacher, student in parse_pairs(options.pairs):
        torch.compiler.reset()
        settings = [make_setting(options, teacher, student, name, device) for name in methods]
        found = []
        for _, measured in measure(
            settings, providers, rounds=options.rounds, seeds=(1, *options.seeds), failures=failures
        ):
            keep(measured.row)
            found.append(measured)
        if found:
            print_rows(found, settings)
    return failures.exit_code


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
