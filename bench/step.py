"""`dfptkd bench step`: whole training steps, against the loop that an experienced user would write.

    plain              both teacher paths run in full, eager PyTorch's own operations and losses,
                       channels_last, autocast bf16 on a GPU and fp32 on a CPU, autograd's defaults,
                       fused SGD
    plain[compile]     the same, its networks and its losses under torch.compile
    ours[MODE]         a run's own step, one row for each execution mode
    ours[MODE+joint]   the later stages on both teacher paths as one batch (--step.joint-paths)
    ours[MODE]xN       a step of each of N seeds at once, on the same batch (--seeds N)

Vanilla KD is timed by our step alone, for the ratio of the costs.

All in one process, interleaved, on the same random images; every side's first loss is checked
against plain's before anything is timed. Neither data nor weights are needed.

    dfptkd bench step [--pairs "cifar:resnet32x4>cifar:resnet8x4"] [--methods kd,dfpt,dfpt_plus]
                      [--providers plain,ours[eager]] [--seeds 3] [--batch 64] [--rounds 5]
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
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
from ..engine.machine import pick_device
from ..engine.memory import kept_bytes
from ..engine.metrics import Normalise, normaliser
from ..engine.models import PromptFusion, create_model, split_stages
from ..engine.stand_in import build_step, pair_cost
from ..engine.step import TrainStep
from ..engine.timing import time_interleaved
from ..kernels import use_backend
from .measure import (
    Row,
    append_rows,
    bench_parser,
    make_row,
    peak_bytes,
    positive,
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


def at_once(setting: Setting, mode: str, seeds: int) -> list[TrainStep]:
    """Steps of several seeds, which share what runs of several seeds share."""
    steps = [our_step(setting, mode) for _ in range(seeds)]
    for step in steps if seeds > 1 else ():
        step.method.share_teacher(steps[0].method)
        step.run_beside_others()
        step.share_batches(None if step is steps[0] else steps[0])
    return steps


@dataclass(frozen=True)
class Side:
    """One provider: a call makes a step."""

    call: Callable[[], object]
    modules: list[nn.Module]

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


def host_calls(call: Callable[[], object]) -> HostCalls:
    """Count the runtime's calls in one step (CUDA)."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    found = {event.key: event.count for event in profile.key_averages()}
    launches = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")
    return HostCalls(
        sum(n for key, n in found.items() if key[:2] == "cu" and any(x in key for x in launches)),
        sum(n for key, n in found.items() if key[:2] == "cu" and "Synchronize" in key) - 1,
    )  # the profiler itself waits once


def make_sides(setting: Setting, providers: Sequence[str], seeds: int = 1) -> dict[str, Side]:
    """Every provider's step, warm and on the same batch.

    Raises:
        RuntimeError: A provider's first loss is not that of the others.
    """
    data = load_data(setting.config("eager").data, setting.device)
    batch = next(train_batches(data.train, batch_size=setting.batch, seed=0, epoch=0))
    normalise = normaliser(data)
    sides: dict[str, Side] = {}
    losses: dict[str, float] = {}
    for name in providers:
        if name.startswith("plain"):
            plain = PlainStep(setting, compiled=name == "plain[compile]")
            losses[name] = plain(normalise(batch), batch.labels).item()
            call = functools.partial(_plain_call, plain, normalise, batch)
            sides[name] = Side(call, [plain.student, plain.dual])
        else:
            mode = name.removeprefix("ours[").removesuffix("]")
            for count in sorted({1, seeds}):
                steps = at_once(setting, mode, count)
                label = name if count == 1 else f"{name}x{count}"
                _ours_call(steps, batch)
                losses[label] = steps[-1].meter.read(False)["loss/total"]
                call = functools.partial(_ours_call, steps, batch)
                sides[label] = Side(call, [step.method for step in steps])
    tolerance = 1e-4 if setting.dtype == torch.float32 else 3e-2
    spread = (max(losses.values()) - min(losses.values())) / max(losses.values())
    if not spread <= tolerance:
        raise RuntimeError(f"{setting.label}: the first losses differ: {losses}")
    return sides


def _ours_call(steps: Sequence[TrainStep], batch: Batch) -> None:
    new = replace(batch)  # what seeds share is remembered for a batch, not for its values
    for step in steps:
        step(new, 1)
    for step in steps:
        step.join()


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
    kept_bytes: int
    host: HostCalls | None


def measure(
    settings: Sequence[Setting], providers: Sequence[str], *, rounds: int, seeds: int = 1
) -> list[Measured]:
    """All methods of one pair, interleaved; vanilla KD by our own steps alone."""
    sides: dict[tuple[Setting, str], Side] = {}
    for setting in settings:
        wanted = [p for p in providers if _applies(p, setting.method)]
        found = make_sides(setting, wanted, seeds)
        sides |= {(setting, name): side for name, side in found.items()}
    device = settings[0].device
    calls = {f"{setting.label} {name}": side.call for (setting, name), side in sides.items()}
    timings = time_interleaved(calls, device, rounds=rounds, warmup=1)
    return [
        Measured(
            make_row(
                timings[f"{setting.label} {name}"],
                device,
                kernel=setting.label,
                provider=name,
                passes="step",
                contract="hot",
                shape=setting.shape,
                dtype=setting.dtype,
                bytes_moved=None,
                copy_gb_per_s=None,
                peak=peak_bytes(side.call, device),
            ),
            side.kept_bytes(),
            host_calls(side.call) if device.type == "cuda" else None,
        )
        for (setting, name), side in sides.items()
    ]


def print_rows(measured: Sequence[Measured], settings: Sequence[Setting]) -> None:
    """Images a second, each side against plain, and DFPT over KD against the ratio of the MACs."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("method", "side"):
        table.add_column(column)
    columns = ("images/s", "median ms", "p20..p80", "plain / it", "compile / it", "of KD", "MACs")
    for column in columns:
        table.add_column(column, justify="right")
    on_gpu = measured[0].host is not None
    for column in ("peak MB", "launches", "syncs") if on_gpu else ("kept MB",):
        table.add_column(column, justify="right")
    rows = [m.row for m in measured]
    median = {(r.kernel, r.provider): r.median_us for r in rows}
    kd = {r.provider: r.median_us for r in rows if r.kernel.startswith("step:kd:")}
    macs = {setting.label: step_macs(setting) for setting in settings}
    kd_macs = next((macs[label] for label in macs if label.startswith("step:kd:")), None)
    for m in measured:
        r = m.row
        setting = next(s for s in settings if s.label == r.kernel)

        def over(name: str, r: Row = r) -> str:
            other = median.get((r.kernel, name))
            return "" if other is None else f"{other / r.median_us:.2f}x"

        images = _seeds_of(r) * setting.batch / r.median_us * 1e6
        of_kd = f"{r.median_us / kd[r.provider]:.2f}x" if r.provider in kd else ""
        of_macs = f"{macs[r.kernel] / kd_macs:.2f}x" if kd_macs and r.provider in kd else ""
        table.add_row(
            setting.method, escape(r.provider), f"{images:,.0f}",
            f"{r.median_us / 1e3:,.1f}", f"{r.p20_us / 1e3:,.0f}..{r.p80_us / 1e3:,.0f}",
            over("plain"), over("plain[compile]"), of_kd, of_macs, *_memory(m),
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 120).print(table)
    r = rows[0]
    print(
        f"{r.kernel.split(':', 2)[2]}, batch {settings[0].batch}, {r.device}, {r.threads} threads, "
        f"torch {r.torch}, commit {r.commit}, n = {r.n}"
    )


def _memory(m: Measured) -> tuple[str, ...]:
    if m.host is None:
        return (f"{m.kept_bytes / 1e6:,.0f}",)
    return f"{(m.row.peak_bytes or 0) / 1e6:,.0f}", str(m.host.launches), str(m.host.syncs)


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


def make_setting(options: argparse.Namespace, teacher: str, student: str, method: str) -> Setting:
    """The setting that the options of a bench ask for."""
    return Setting(
        teacher,
        student,
        method,
        options.batch,
        options.image_size,
        options.classes,
        PromptConfig(r1=options.r1, fusion_groups=options.fusion_groups),
        pick_device(RunConfig(device=options.device)),
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
        "--seeds", type=positive, default=1, help="also steps of this many seeds at once"
    )
    add_pair_options(parser)
    options = parser.parse_args(args)
    device = pick_device(RunConfig(device=options.device))
    known = [p for p in PROVIDERS if device.type == "cuda" or "graph" not in p]
    usual = [p for p in known if device.type == "cuda" or "joint" not in p]
    providers = parse_names("--providers", options.providers or ",".join(usual), known)
    methods = parse_names("--methods", options.methods, METHODS)
    for teacher, student in parse_pairs(options.pairs):
        torch.compiler.reset()
        settings = [make_setting(options, teacher, student, method) for method in methods]
        found = measure(settings, providers, rounds=options.rounds, seeds=options.seeds)
        append_rows([m.row for m in found], options.out)
        print_rows(found, settings)
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
