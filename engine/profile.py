"""`dfptkd profile`: where the time, the memory and the arithmetic of a run's steps go.

    parts      one row a component: time in both directions, FLOPs, bytes, memory, parameters and
               the distance from the roofline; instrumented steps alternate with plain ones
    methods    whole steps of no distillation, KD, DFPT-KD and DFPT-KD+ on the same pair
    overhead   what the prompt path adds to the teacher, its blocks against the 10 % line (M45)

Neither data nor weights are needed: images are random and lie on the device, the teacher is not
trained. On a CPU the batch shrinks until everything takes about a minute.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .alarms import overhead_warnings
from .config import RunConfig
from .counting import StepWork, Work, count_work
from .data import SOURCES, Batch, ImageData, steps_per_epoch, train_batches
from .data.facts import KNOWN, DataFacts
from .data.source import Augmentation, ResidentSplit
from .errors import UsageError
from .files import write_atomically
from .log import RunLog, commit, hardware, versions
from .machine import demand_of, pick_device, prepare_torch
from .memory import kept_bytes
from .methods import Method
from .methods.base import FrozenTeacherMethod
from .methods.dfpt import DualPathDistillation
from .models import create_model, split_stages
from .models.cost import TeacherCost, count_params
from .spans import span
from .stand_in import PairCost, build_step, check_networks, pair_cost
from .step import DTYPES, TrainStep, choose_mode, compute_precision
from .timeline import (
    COPY,
    DATA_WAIT,
    HEAD,
    LOGGING,
    ORIGINAL,
    SHARED,
    STUDENT,
    Part,
    Slice,
    Timeline,
    borders,
    components,
    fusion_name,
    prompt_name,
    seconds_of,
    stage_name,
)
from .timing import copy_bandwidth, matmul_peak, time_call, time_interleaved

PROMPTED = ("dfpt", "dfpt_plus")
METHODS = ("ce", "kd", *PROMPTED)
LIMIT_PERCENT = 10.0  # A14: denser prompt blocks are a failure
TOLERANCE_PERCENT = 5.0  # between the sum of the parts and the step
BUDGET_S = 35.0  # of timed steps on a CPU; roofs, counting and imports take about as long again
_RESIDENT_BATCHES = 4


@dataclass(frozen=True)
class Roofs:
    """What the device reached in this very process."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, work: Work) -> tuple[float, float]:
        """Least time for the arithmetic and for the memory traffic."""
        return work.flops / self.flops_per_second, work.bytes / self.bytes_per_second


@dataclass(frozen=True)
class Component:
    """One row; times in seconds a step."""

    name: str
    forward_s: float
    backward_s: float
    share_percent: float
    """Of the step."""
    forward: Work
    backward: Work
    memory_bytes: int
    """Kept for the backward pass; on CUDA the most that was allocated while it ran."""
    params: int
    """Of its own: a stage that both paths share counts where it comes first."""
    roof_percent: float | None
    """Least time on this device over measured time."""
    bound: str
    """What the least time is made of: compute or memory."""


@dataclass(frozen=True)
class MethodCost:
    """A whole step of one method."""

    method: str
    step_s: float
    images_per_second: float
    time_of_kd: float
    macs_per_image: int
    macs_of_kd: float
    kept_bytes: int
    trained_params: int
    steps: int
    """Timed steps that `step_s` is the median of."""


@dataclass(frozen=True)
class Overhead:
    """What a part of the prompt path adds to the teacher, in percent of the teacher's own."""

    name: str
    params_percent: float
    flops_percent: float
    time_percent: float | None
    """Of the original path's forward pass; None where the profiled method has no prompt path."""
    has_limit: bool = True
    """Whether the 10 % line is about it: classes and teacher give the new head its size."""


@dataclass(frozen=True)
class Profile:
    """All that one call measures."""

    recipe: str
    method: str
    teacher: str
    student: str
    image_size: int
    num_classes: int
    batch: int
    steps: int
    precision: str
    mode: str
    mode_reason: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    roofs: Roofs
    memory: str
    """What `memory_bytes` is: kept or peak."""
    components: list[Component]
    parts_sum_s: float
    step_s: float
    """Median of the eager steps without instruments, data and logging included."""
    own_step_s: float
    """Median of steps in the run's own execution mode; without data, unless that is eager."""
    work: Work
    """Of the whole step."""
    left_out_flops: int
    methods: list[MethodCost]
    overhead: list[Overhead]
    warnings: list[str]
    notes: list[str]

    @property
    def difference_percent(self) -> float:
        """The sum of the parts over the step measured without them."""
        return 100 * (self.parts_sum_s / self.step_s - 1)

    def to_json(self) -> str:
        """Everything as one object."""
        values = dataclasses.asdict(self) | {"difference_percent": self.difference_percent}
        return json.dumps(values, indent=1)


def profile(config: RunConfig, *, steps: int | None = None, trace: Path | None = None) -> Profile:
    """Profile the steps of `config`.

    Args:
        config: Any run; its data and its weights are not read.
        steps: Timed steps of each kind; absent: 5 on a CPU, 20 on CUDA.
        trace: File for a Chrome trace of two steps.

    Raises:
        UsageError: Nothing can be written at `trace`, or a model or an option does not apply.
    """
    if trace is not None and (trace.is_dir() or not trace.absolute().parent.is_dir()):
        raise UsageError(f"--trace {trace}: expected a file in a folder that exists")
    device = pick_device(config)
    prepare_torch(config)
    choose_mode(config, device)
    rounds = steps or (20 if device.type == "cuda" else 5)
    setting, notes = make_setting(config, device, rounds)
    # A machine that others use can be far slower than it just was.
    patience_s = BUDGET_S / 2 if steps is None and device.type == "cpu" else math.inf
    step = setting.step(setting.config.method, "eager")
    batches = setting.batches()
    numbers = past_warmup(step)
    slices, plain = alternate(step, batches, numbers, rounds, patience_s)
    memory = memory_by_part(step, batches, numbers)
    logging_s = logging_seconds(step, setting.steps_per_epoch)
    if trace is not None:
        write_trace(trace, step, batches, numbers)
        notes.append(f"trace of 2 steps: {trace}")
    work = count_work(step.method, setting.config, setting.data, device)
    roofs = Roofs(
        1e9 * matmul_peak(device, DTYPES.get(step.precision, torch.float32)),
        1e9 * copy_bandwidth(device),
    )
    seconds = median_seconds(slices)
    seconds[Part(LOGGING)] = seconds.get(Part(LOGGING), 0.0) + logging_s
    step_s = statistics.median(plain) + logging_s
    rows = component_rows(step, seconds, with_copy(work, next(batches)), memory, roofs, step_s)
    rows = with_params(rows, setting.params(step.method))
    del step
    methods = compare(setting, method_rounds(rounds), patience_s)
    mode, reason = choose_mode(setting.config, device)
    own = next(m for m in methods if m.method == setting.config.method)
    return Profile(
        recipe=config.recipe,
        method=config.method,
        teacher=config.teacher.name,
        student=config.student,
        image_size=setting.data.image_size[0],
        num_classes=setting.data.num_classes,
        batch=setting.config.global_batch,
        steps=len(plain),
        precision=compute_precision(config, device),
        mode=mode,
        mode_reason=reason,
        hardware=hardware(device),
        versions=versions(),
        commit=commit(),
        roofs=roofs,
        memory="peak" if device.type == "cuda" else "kept",
        components=rows,
        parts_sum_s=sum(row.forward_s + row.backward_s for row in rows),
        step_s=step_s,
        own_step_s=step_s if mode == "eager" else own.step_s,
        work=Work(work.flops, sum(part.bytes for part in work.parts.values())),
        left_out_flops=work.left_out_flops,
        methods=methods,
        overhead=overhead(setting.cost.teacher, rows),
        warnings=overhead_warnings(setting.cost.teacher.record(), LIMIT_PERCENT),
        notes=notes,
    )


# What is profiled ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A run without its data: what every step of the profile is made from."""

    config: RunConfig
    device: torch.device
    data: ImageData
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Methods of the comparison that this pair of networks does not fit, and why."""

    def step(self, method: str, mode: str | None = None) -> TrainStep:
        """A step of `method`; `mode` absent: the run's own."""
        config = of_method(self.config, method)
        if mode is not None:
            config = replace(config, step=replace(config.step, mode=mode))  # type: ignore[arg-type]
        return build_step(
            config,
            self.data,
            self.device,
            total_steps=config.epochs * self.steps_per_epoch,
            steps_per_epoch=self.steps_per_epoch,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Of the real data set as far as its size is known without it, else of 50,000 images."""
        data, whole = self.config.data, facts_of(self.config).train_images
        limits = (data.limit, data.train_limit, whole)
        return steps_per_epoch(min(n for n in limits if n is not None), self.config.global_batch)

    @functools.cached_property
    def cost(self) -> PairCost:
        """Parameters and MACs of the pair and of what the prompt path adds."""
        return pair_cost(self.config, self.data.num_classes, self.data.image_size)

    def meta_teacher(self) -> nn.Module:
        """The teacher's shape."""
        with torch.device("meta"):
            return create_model(self.config.teacher.name, num_classes=self.data.num_classes)

    def batches(self) -> Iterator[Batch]:
        """Training batches without end, by the run's own loader."""
        for epoch in itertools.count():
            yield from train_batches(
                self.data.train,
                batch_size=self.config.global_batch,
                seed=self.config.seed,
                epoch=epoch,
            )

    def params(self, method: Method) -> dict[str, int]:
        """Parameters of each component."""
        found = {STUDENT: count_params(method.student)}
        if isinstance(method, FrozenTeacherMethod):
            return found | {ORIGINAL: count_params(self.meta_teacher())}
        if not isinstance(method, DualPathDistillation):
            return found
        dual, teacher = method.teacher, self.meta_teacher()
        stages = split_stages(teacher, self.config.teacher.stages).stages
        shared = sum(count_params(stage) for stage in stages[: dual.shared_stages])
        found |= {SHARED: shared, ORIGINAL: count_params(teacher) - shared}
        found[HEAD] = count_params(dual.head)
        for i in dual.inserted:
            pair: Any = dual.pairs[f"stage{i}"]
            found[prompt_name(i)] = count_params(pair.prompt)
            found[fusion_name(i)] = count_params(pair.fusion)
        if dual.copied is not None and dual.finetune_backbone:
            found[HEAD] += count_params(dual.copied.neck)
            for i, stage in enumerate(dual.copied.stages, start=1):
                found[stage_name(i)] = count_params(stage)
        return found


def of_method(config: RunConfig, method: str) -> RunConfig:
    """The same run by another method."""
    if method == config.method:
        return config
    loss = config.loss.of_any_method()
    step = replace(config.step, joint_paths=False)
    return replace(config, method=method, loss=loss, step=step)  # type: ignore[arg-type]


class _Resident(ResidentSplit):
    """Images on the device, as small data sets lie there; the gather is a step's copy."""

    def batch(self, indices: Tensor, *, seed: int, epoch: int, side: int | None = None) -> Batch:
        with span(COPY):
            return super().batch(indices, seed=seed, epoch=epoch, side=side)


def facts_of(config: RunConfig) -> DataFacts:
    """The run's data as far as it is known without it, else 50,000 images as configured."""
    data = config.data
    others = DataFacts(50_000, 10_000, data.num_classes, data.image_size, False, "not known")
    return KNOWN.get(data.name, others)


def random_images(config: RunConfig, device: torch.device) -> ImageData:
    """A few batches of noise of the size that the run's data has."""
    data, facts = config.data, facts_of(config)
    classes, side = facts.num_classes, facts.image_size
    padding = facts.crop_padding if data.crop_padding is None else data.crop_padding
    count = _RESIDENT_BATCHES * config.global_batch
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, side, side, 3), dtype=torch.uint8, generator=generator).to(
        device
    )
    labels = torch.randint(classes, (count,), generator=generator).to(device)
    split = _Resident(images, labels, Augmentation(count, padding, data.flip, device))
    return ImageData(
        name=data.name,
        train=split,
        test=split,
        num_classes=classes,
        class_names=[str(i) for i in range(classes)],
        image_size=(side, side),
        mean=(0.5, 0.5, 0.5),
        std=(0.29, 0.29, 0.29),
    )


def make_setting(config: RunConfig, device: torch.device, rounds: int) -> tuple[Setting, list[str]]:
    """The run with a batch that the device can afford, and what there is to say about that."""
    notes = []
    kind = "JPEG decoding is no part of it" if config.data.name in SOURCES else "nothing is read"
    notes.append(f"data: random images that lie on the device, {kind}; the weights are random")
    if config.loss.added:
        names = ", ".join(f"loss.{name}" for name in config.loss.added)
        notes.append(f"without {names}: the components are those of the plain method")
        config = replace(config, loss=config.loss.of_any_method())
    others = [of_method(config, method) for method in PROMPTED if method != config.method]
    left_out = check_networks(config, demand_of(config, facts_of(config)), others)
    notes += [f"without {method}: {reason}" for method, reason in left_out.items()]
    wanted = config.global_batch
    batch = wanted
    if device.type != "cuda":
        batch = affordable_batch(config, device, rounds, left_out)
    if batch != wanted:
        notes.append(
            f"batch {batch} in place of the recipe's {wanted}: on a CPU the whole profile is to "
            "take about a minute"
        )
    config = with_batch(config, batch)
    return Setting(config, device, random_images(config, device), left_out), notes


def with_batch(config: RunConfig, batch: int) -> RunConfig:
    """The run with another batch."""
    return replace(config, global_batch=batch, accumulate=math.gcd(config.accumulate, batch))


def affordable_batch(
    config: RunConfig, device: torch.device, rounds: int, left_out: Container[str] = ()
) -> int:
    """The recipe's batch, halved until the timed steps fit into `BUDGET_S`; at least 2 images.

    `left_out`: methods that are not compared.
    """
    data = random_images(with_batch(config, 2), device)
    macs = Setting(config, device, data).cost.training_macs
    others = sum(map(macs, compared(config, left_out))) / macs(config.method)
    # Plain and instrumented steps, their warm-ups, those for memory; the same of each method.
    in_all = 2 * rounds + 4 + (method_rounds(rounds) + 2) * others
    sizes = [config.global_batch]
    while sizes[0] >= 4:
        sizes.insert(0, sizes[0] // 2)
    # From below: a step of a batch is timed only where one of half of it was cheap enough.
    step = None
    for size in sizes:
        smaller = with_batch(config, size)
        setting = Setting(smaller, device, random_images(smaller, device))
        batch = next(setting.batches())
        if step is None:
            step = setting.step(config.method, "eager")
            step(batch, 0)
        call = functools.partial(step, batch, 1)
        seconds = min(time_call(call, device) for _ in range(2)) / 1e6
        if 2 * seconds * in_all > BUDGET_S:
            return size
    return config.global_batch


def method_rounds(rounds: int) -> int:
    """Timed steps of each method of the second table."""
    return max(3, rounds // 2)


def past_warmup(step: TrainStep) -> Iterator[int]:
    """Numbers of steps in which every loss term has its full weight."""
    return itertools.count(math.ceil(step.warmup_steps))


# Measured on one step -----------------------------------------------------------------------------


def alternate(
    step: TrainStep,
    batches: Iterator[Batch],
    numbers: Iterator[int],
    rounds: int,
    patience_s: float = math.inf,
) -> tuple[list[list[Slice]], list[float]]:
    """Steps with instruments and without, in turn: the slices of the first, seconds of the others.

    Both fetch their batch. After `patience_s` seconds two rounds are enough.
    """

    def plainly() -> None:
        step(next(batches), next(numbers))

    for _ in range(3 if step.device.type == "cuda" else 1):
        plainly()
    slices: list[list[Slice]] = []
    plain: list[float] = []
    started = time.monotonic()
    while len(plain) < rounds and (len(plain) < 2 or time.monotonic() - started < patience_s):
        plain.append(time_call(plainly, step.device) / 1e6)
        slices.append(timed_step(step, batches, numbers))
    return slices, plain


def timed_step(step: TrainStep, batches: Iterator[Batch], numbers: Iterator[int]) -> list[Slice]:
    """One step with a border at every component."""
    timeline = Timeline(step.device)
    with borders(step, timeline.enter):
        timeline.enter(Part(DATA_WAIT))
        batch = next(batches)
        step(batch, next(numbers))
        return timeline.stop()


def median_seconds(slices: list[list[Slice]]) -> dict[Part, float]:
    """Median time of every part over several steps."""
    found = [seconds_of(one) for one in slices]
    parts = dict.fromkeys(part for one in found for part in one)
    return {part: statistics.median(one.get(part, 0.0) for one in found) for part in parts}


def memory_by_part(
    step: TrainStep, batches: Iterator[Batch], numbers: Iterator[int]
) -> dict[str, int]:
    """Bytes of each component in one more step: peak on CUDA, else kept for the backward."""
    if step.device.type != "cuda":
        return kept_by_component(step, next(batches), next(numbers))
    peaks: dict[str, int] = {}
    current = [DATA_WAIT]

    def enter(part: Part) -> None:
        peak = torch.cuda.max_memory_allocated(step.device)
        peaks[current[0]] = max(peaks.get(current[0], 0), peak)
        torch.cuda.reset_peak_memory_stats(step.device)
        current[0] = part.component

    torch.cuda.reset_peak_memory_stats(step.device)
    with borders(step, enter):
        step(next(batches), next(numbers))
        enter(Part(DATA_WAIT))
    return peaks


def kept_by_component(step: TrainStep, batch: Batch, number: int) -> dict[str, int]:
    """Bytes of the storages that the graph keeps, each charged to whoever kept it first."""
    constants = itertools.chain(step.method.parameters(), step.method.buffers())
    known = {t.untyped_storage().data_ptr() for t in constants}
    owners: dict[int, tuple[str, int]] = {}
    current = [DATA_WAIT]

    def enter(part: Part) -> None:
        current[0] = part.component

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            owners.setdefault(storage.data_ptr(), (current[0], storage.nbytes()))
        return tensor

    with borders(step, enter), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(batch, number)
    kept: dict[str, int] = {}
    for component, size in owners.values():
        kept[component] = kept.get(component, 0) + size
    return kept


def logging_seconds(step: TrainStep, per_epoch: int) -> float:
    """What reading the meter and writing one row of metrics cost, spread over an epoch's steps."""
    has_prompt_path = step.config.has_prompt_path
    row = {"epoch": 1.0, "step": 1, **step.meter.read(has_prompt_path)}
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(Path(folder), row, None)
        started = time.perf_counter()
        log.row({"epoch": 1.0, "step": 1, **step.meter.read(has_prompt_path)})
        seconds = time.perf_counter() - started
        log.close()
    return seconds / per_epoch


def write_trace(
    path: Path, step: TrainStep, batches: Iterator[Batch], numbers: Iterator[int]
) -> None:
    """A Chrome trace of two steps, the components on a track of their own.

    torch's ranges must nest on one thread; components do not (the backward of one begins inside a
    node of autograd, on CUDA in a thread of its own), hence the track.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # on a CPU it reports GPUs that it misses
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    steps = []
    with torch.profiler.profile(activities=activities) as recorded:
        for i in range(2):
            if step.device.type == "cuda":
                torch.cuda.synchronize(step.device)  # its time starts with the range
            with torch.profiler.record_function(f"dfptkd step {i}"):
                steps.append(timed_step(step, batches, numbers))

    def write(file: Path) -> None:
        recorded.export_chrome_trace(str(file))
        whole = json.loads(file.read_text())
        whole["traceEvents"] += track(whole["traceEvents"], steps)
        file.write_text(json.dumps(whole))

    write_atomically(path, write)


def track(events: list[dict[str, Any]], steps: list[list[Slice]]) -> list[dict[str, Any]]:
    """Trace events of all slices, on the clock of the ranges recorded around the steps."""
    # Times are in microseconds.
    ranges = {e["name"]: e["ts"] for e in events if str(e.get("name")).startswith("dfptkd step")}
    place = {"ph": "X", "cat": "component", "pid": "dfptkd", "tid": "components"}
    return [
        {
            **place,
            "name": label(piece.part),
            "ts": ranges[f"dfptkd step {i}"] + 1e6 * piece.start,
            "dur": 1e6 * piece.seconds,
        }
        for i, slices in enumerate(steps)
        for piece in slices
    ]


def label(part: Part) -> str:
    """A part's name in a trace."""
    return f"{part.component}, backward" if part.backward else part.component


# Rows ---------------------------------------------------------------------------------------------


def with_copy(work: StepWork, batch: Batch) -> dict[Part, Work]:
    """The parts' work, and that of the gather: a read and a write of the batch."""
    moved = sum(
        t.nbytes
        for t in (batch.images, batch.labels, batch.flip, batch.crop and batch.crop[1])
        if isinstance(t, Tensor)
    )
    return work.parts | {Part(COPY): Work(0, 2 * moved)}


def component_rows(
    step: TrainStep,
    seconds: dict[Part, float],
    work: dict[Part, Work],
    memory: dict[str, int],
    roofs: Roofs,
    step_s: float,
) -> list[Component]:
    """One row for each component that a step of this method has."""
    rows = []
    for name in components(step):
        parts = Part(name), Part(name, True)
        times = [seconds.get(part, 0.0) for part in parts]
        works = [work.get(part, Work()) for part in parts]
        least = [roofs.seconds(one) for one in works]
        arithmetic, traffic = (sum(column) for column in zip(*least, strict=True))
        reached = sum(max(pair) for pair in least)
        has_work = reached > 0 and sum(times) > 0
        rows.append(
            Component(
                name=name,
                forward_s=times[0],
                backward_s=times[1],
                share_percent=100 * sum(times) / step_s,
                forward=works[0],
                backward=works[1],
                memory_bytes=memory.get(name, 0),
                params=0,
                roof_percent=100 * reached / sum(times) if has_work else None,
                bound=("compute" if arithmetic > traffic else "memory") if has_work else "",
            )
        )
    return rows


def with_params(rows: list[Component], params: dict[str, int]) -> list[Component]:
    """The rows with their parameters."""
    return [replace(row, params=params.get(row.name, 0)) for row in rows]


def compared(config: RunConfig, left_out: Container[str] = ()) -> list[str]:
    """The methods of the second table: the usual four but `left_out`, and the run's own."""
    usual = [method for method in METHODS if method not in left_out]
    return [*usual, *([] if config.method in METHODS else [config.method])]


def compare(setting: Setting, rounds: int, patience_s: float = math.inf) -> list[MethodCost]:
    """Whole steps of every method in the run's own execution mode, interleaved.

    Of `rounds` as many as `patience_s` seconds hold, but one at least.
    """
    batch = next(setting.batches())
    steps = {method: setting.step(method) for method in compared(setting.config, setting.left_out)}
    kept = {method: kept_bytes_of(step, batch) for method, step in steps.items()}

    def call(step: TrainStep) -> Callable[[], None]:
        numbers = past_warmup(step)
        return lambda: step(batch, next(numbers))

    calls = {method: call(step) for method, step in steps.items()}
    started = time.monotonic()
    for warm in calls.values():
        for _ in range(3 if setting.device.type == "cuda" else 1):
            warm()
    once_s = time.monotonic() - started
    rounds = int(max(1, min(rounds, patience_s // once_s)))
    timings = time_interleaved(calls, setting.device, rounds=rounds, warmup=0)
    macs = {method: setting.cost.training_macs(method) for method in steps}
    return [
        MethodCost(
            method=method,
            step_s=timings[method].median / 1e6,
            images_per_second=setting.config.global_batch / timings[method].median * 1e6,
            time_of_kd=timings[method].median / timings["kd"].median,
            macs_per_image=macs[method],
            macs_of_kd=macs[method] / macs["kd"],
            kept_bytes=kept[method],
            trained_params=sum(p.numel() for p in step.params),
            steps=rounds,
        )
        for method, step in steps.items()
    ]


def kept_bytes_of(step: TrainStep, batch: Batch) -> int:
    """What the forward pass of a whole batch keeps; eager, whatever the mode."""
    constants = [*step.method.parameters(), *step.method.buffers()]
    images = step.normalise(batch)
    step.choose_kernels(batch)
    with step.autocast(), step.plainly(), step.kernels.in_force():
        return kept_bytes(lambda: step.method(images, batch.labels), constants)


def overhead(cost: TeacherCost, rows: list[Component]) -> list[Overhead]:
    """Pairs, new head and both, over the teacher's own parameters and forward pass."""
    if not cost.has_prompt_path:
        return []
    times = {row.name: row.forward_s for row in rows}
    teacher_s = times.get(SHARED, 0.0) + times.get(ORIGINAL, 0.0)
    pairs_s = sum(s for name, s in times.items() if name.startswith(("prompt block", "fusion")))
    added = (
        ("prompt and fusion blocks", cost.block_params, cost.block_macs, pairs_s),
        ("new head", cost.new_head_params, cost.head_macs, times.get(HEAD, 0.0)),
        ("together", cost.added_params, cost.added_macs, pairs_s + times.get(HEAD, 0.0)),
    )
    return [
        Overhead(
            name=name,
            params_percent=100 * params / cost.teacher_params,
            flops_percent=100 * macs / cost.teacher_macs,
            time_percent=100 * seconds / teacher_s if HEAD in times else None,
            has_limit=i == 0,
        )
        for i, (name, params, macs, seconds) in enumerate(added)
    ]
