"""`dfptkd plan`: what a run will need, before it starts, and whether this machine has it.

Nothing of the run is needed: random weights, synthetic images of the recipe's size. FLOPs and
parameters are counted on meta tensors; memory comes from two small steps, traced allocation by
allocation (`run_memory`), since every moment of a step is linear in its images. `--probe` takes
real steps for at most 60 seconds (`probe`), and only then are the hours known. The verdict counts
the reserve of a CPU's allocator at its largest.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from .config import RunConfig
from .data import SOURCES, steps_per_epoch
from .data.facts import DataFacts, data_facts
from .distributed import SINGLE
from .errors import StorageError
from .log import clock, hardware
from .machine import check_related, demand_of, pick_device
from .memory import available_bytes
from .probe import Built, Failed, Probe, build, run_probe
from .run_memory import Memory, MemoryModel, traced_twin
from .stand_in import check_networks, pair_cost, stand_in
from .step import choose_mode
from .teacher import find_teacher, run_folder
from .teacher_logits import Outlook, outlook
from .train import end_step

PROBE_SECONDS = 60.0
# glibc then keeps nothing, and a step takes 2.6 times as long.
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_=65536"


# Disk and time -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """Bytes under the output root."""

    checkpoint: int
    student: int
    checkpoints: int
    """How many there are at once, of all seeds, the one that is being written among them."""
    students: int
    """Finished ones of all seeds, and their averages."""
    free: int
    where: str

    @property
    def need(self) -> int:
        """Checkpoints and finished students."""
        return self.checkpoint * self.checkpoints + self.student * self.students


def disk_need(config: RunConfig, built: Built, saved: list[Tensor]) -> Disk:
    """What the run (or one run a seed) leaves, at its largest."""
    seeds = len(config.seeds or (config.seed,))
    state = built.step.method.student.state_dict().values()
    where = _existing(run_folder(config))
    return Disk(
        checkpoint=sum(t.nbytes for t in saved),
        student=sum(t.nbytes for t in state),
        checkpoints=seeds * (config.keep_checkpoints + 1) + 1,
        students=seeds * (1 if config.optim.ema_decay is None else 2),
        free=shutil.disk_usage(where).free,
        where=str(where),
    )


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


@dataclass(frozen=True)
class Hours:
    """Time to finish."""

    step_seconds: float
    """One step of the run's batch."""
    evaluation_seconds: float
    """One evaluation."""
    run_hours: float
    """One run."""
    hours: float
    """All seeds."""
    measured: Probe


def finish_time(config: RunConfig, facts: DataFacts, steps: int, probe: Probe) -> Hours:
    """Hours from measured steps; a smaller batch is scaled linearly."""
    step = probe.step_seconds * config.global_batch / probe.batch
    evaluation = facts.test_images * (probe.evaluation or 0.0)
    teacher = facts.test_images * (probe.teacher or 0.0)
    seconds = steps * step + evaluations(config, facts, steps) * evaluation + teacher
    seeds = len(config.seeds or (config.seed,))
    return Hours(step, evaluation, seconds / 3600, seeds * seconds / 3600, probe)


def evaluations(config: RunConfig, facts: DataFacts, steps: int) -> int:
    """How often the run evaluates; the last epoch always counts."""
    epochs = math.ceil(steps / steps_per_epoch(facts.train_images, config.global_batch))
    return math.ceil(epochs / config.eval_every)


# The plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run needs and what there is; bytes, seconds, FLOPs (2 a MAC)."""

    config: RunConfig
    device: dict[str, Any]
    mode: str
    facts: DataFacts
    steps: int
    """Optimisation steps of one run."""
    student_params: int
    teacher_params: int
    added_params: int
    """Parameters of prompt blocks, fusion blocks and the new head."""
    new_head_params: int
    """Parameters of the new head alone."""
    trained_params: int
    step_flops: int
    memory: Memory
    memory_available: int
    largest_batch: int
    disk: Disk
    hours: Hours | None
    notes: list[str]
    logits: Outlook | None = None
    """Whether the teacher's are remembered; None: there is no teacher."""

    @property
    def lacking(self) -> list[tuple[str, int, int]]:
        """Resources that do not suffice: name, need, what there is."""
        found = [
            ("memory", self.memory.need, self.memory_available),
            ("disk", self.disk.need, self.disk.free),
        ]
        return [entry for entry in found if entry[1] > entry[2]]

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.lacking:
            return "fits: yes"
        needs = "; ".join(
            f"{name}: needs {size(need)}, has {size(there)}" for name, need, there in self.lacking
        )
        return f"fits: no, {needs}"

    @property
    def exit_code(self) -> int:
        """0, or that of a disk that refuses."""
        return StorageError.exit_code if self.lacking else 0

    def record(self) -> dict[str, Any]:
        """Everything as JSON data."""
        config, memory, hours = self.config, self.memory, self.hours
        return {
            "recipe": config.recipe,
            "method": config.method,
            "global_batch": config.global_batch,
            "epochs": config.epochs,
            "seeds": list(config.seeds or (config.seed,)),
            "hardware": self.device,
            "mode": self.mode,
            "data": dataclasses.asdict(self.facts),
            "steps": self.steps,
            "parameters": {
                "student": self.student_params,
                "teacher": self.teacher_params,
                "added": self.added_params,
                "new_head": self.new_head_params,
                "trained": self.trained_params,
            },
            "step_flops": self.step_flops,
            "memory": {
                **dataclasses.asdict(memory),
                "constant": memory.constant,
                "largest": memory.largest,
                "peak": memory.peak,
                "reserve": memory.reserve,
                "need": memory.need,
                "available": self.memory_available,
            },
            "teacher_logits": None if self.logits is None else dataclasses.asdict(self.logits),
            "largest_batch": self.largest_batch,
            "disk": {**dataclasses.asdict(self.disk), "need": self.disk.need},
            "hours": None if hours is None else dataclasses.asdict(hours),
            "notes": self.notes,
            "fits": not self.lacking,
            "limits": [name for name, _, _ in self.lacking],
            "verdict": self.verdict,
        }


def make_plan(config: RunConfig, *, probe: bool = False) -> Plan:
    """Count, trace and, where asked to, time a run.

    Raises:
        UsageError: The device, the execution mode or the size of the parts does not apply.
        DataError: The number of images is not known.
    """
    device = pick_device(config)
    mode, _ = choose_mode(config, device)
    facts = data_facts(config.data)
    check_related(config, min(config.global_batch, facts.train_images), SINGLE)
    check_networks(config, demand_of(config, facts))
    twin = stand_in(config, facts)
    built = build(traced_twin(twin), device)
    per_epoch = steps_per_epoch(facts.train_images, config.global_batch)
    steps, available = end_step(config, config.epochs * per_epoch), available_bytes(device)
    logits = None
    if config.method != "ce":
        logits = outlook(
            config,
            images=facts.train_images,
            forms=facts.forms(config.data),
            num_classes=facts.num_classes,
            steps=steps,
            steps_per_epoch=per_epoch,
            mode=mode,
            device=device,
            available=available,
        )
    remembered = 0 if logits is None or logits.obstacle is not None else logits.bytes
    model = MemoryModel(config, facts, built, remembered)
    memory = model.at(config.global_batch)
    largest = model.largest_batch(available)
    notes = list(_notes(config, facts, memory, available, mode))
    hours = None
    if probe:
        measured = _probe(twin, min(config.global_batch, largest))
        if isinstance(measured, Failed):
            notes.append(f"hours: not known, {measured.reason}")
        else:
            hours = finish_time(config, facts, steps, measured)
            notes += _probe_notes(config, measured)
    cost = pair_cost(config, facts.num_classes, (facts.image_size, facts.image_size))
    teacher = None if config.method == "ce" else cost.teacher
    method = "kd" if config.loss.mixture_control else config.method
    return Plan(
        config=config,
        device=hardware(device),
        mode=mode,
        facts=facts,
        steps=steps,
        student_params=cost.student_params,
        teacher_params=0 if teacher is None else teacher.teacher_params,
        added_params=cost.teacher.added_params if config.has_prompt_path else 0,
        new_head_params=cost.teacher.new_head_params if config.has_prompt_path else 0,
        trained_params=sum(p.numel() for p in built.step.params),
        step_flops=2 * cost.training_macs(method) * config.global_batch,
        memory=memory,
        memory_available=available,
        largest_batch=largest,
        disk=disk_need(config, built, model.saved_tensors()),
        hours=hours,
        notes=notes,
        logits=logits,
    )


def _probe(twin: RunConfig, images: int) -> Probe | Failed:
    images -= images % twin.accumulate
    if images < 1:
        return Failed("no batch fits into the memory")
    return run_probe(twin, images, PROBE_SECONDS)


def _notes(
    config: RunConfig, facts: DataFacts, memory: Memory, available: int, mode: str
) -> Iterator[str]:
    """What a reader must know beside the figures."""
    yield f"images: {facts.source}"
    if mode != "eager":
        yield f"memory: counted on eager steps; steps by {mode} are not traced"
    if memory.peak <= available < memory.need:
        yield (
            f"memory: {size(memory.peak)} without the reserve of the allocator, which {ALLOCATOR} "
            "in the environment avoids, at 2.6 times the time of a step where we measured it"
        )
    if len(config.seeds or ()) > 1:
        yield "memory: that of one seed; several share the frozen networks and the data alone"
    if config.loss.crd:
        yield "not counted in the FLOP of a step: CRD's products with its banks"
    if config.method != "ce" and config.teacher.weights is None and find_teacher(config) is None:
        yield f"not counted: the teacher's own training (dfptkd train-teacher {config.recipe})"


def _probe_notes(config: RunConfig, probe: Probe) -> Iterator[str]:
    if probe.batch < config.global_batch:
        yield (
            f"time: measured at batch {probe.batch} and scaled linearly to {config.global_batch}"
        )
    if len(probe.steps) < 4:
        yield f"time: the median of {len(probe.steps)} steps alone"
    if config.data.name in SOURCES:
        yield "time: without decoding, which runs beside the steps and must keep up with them"


def size(count: float) -> str:
    """Bytes for people, decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """A time for people: milliseconds, seconds, or h:mm:ss."""
    if seconds < 1:
        return f"{seconds * 1e3:,.1f} ms"
    return f"{seconds:,.2f} s" if seconds < 600 else clock(seconds)


def print_plan(plan: Plan) -> None:
    """A table, the notes, the verdict."""
    console = Console(width=None if Console().is_terminal else 120, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for row in _rows(plan):
        table.add_row(*row)
    console.print(table)
    for note in plan.notes:
        console.print(note, markup=False, highlight=False)
    console.print(plan.verdict, markup=False, highlight=False)


def _rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    config, memory, disk, hours = plan.config, plan.memory, plan.disk, plan.hours
    batch = config.global_batch
    yield "run", config.recipe, f"{config.method}, {plan.device['device']}, steps by {plan.mode}"
    yield (
        "images", f"{plan.facts.train_images:,}",
        f"+ {plan.facts.test_images:,} for testing, {plan.facts.image_size} pixels, "
        f"{plan.facts.num_classes} classes",
    )  # fmt: skip
    for name in ("student", "teacher", "added", "trained"):
        label = f"parameters, {name}" if name != "added" else "parameters, added to the teacher"
        head = f"of it new head {plan.new_head_params / 1e6:,.3f} M" if name == "added" else ""
        yield label, f"{getattr(plan, f'{name}_params') / 1e6:,.3f} M", head
    yield "a step", f"{plan.step_flops / 1e9:,.1f} GFLOP", f"{batch} images, 2 FLOP a MAC"
    yield "parameters and momentum", size(memory.parameters + memory.momentum), ""
    if memory.average:
        yield "moving average", size(memory.average), ""
    held = "folded weights, statistics" + (", CRD's banks" if config.loss.crd else "")
    yield "frozen networks", size(memory.frozen), held
    yield "data", size(memory.data), "resident images, test logits, batches decoded ahead"
    if plan.logits is not None and plan.logits.obstacle is None:
        kept = "in memory and a file" if plan.logits.file else "in memory"
        yield (
            "teacher logits", size(memory.logits),
            f"remembered {kept}: {plan.logits.forms} forms of an image, expected for "
            f"{100 * plan.logits.hits:.0f} % of all images",
        )  # fmt: skip
    elif plan.logits is not None:
        yield "teacher logits", "-", f"not remembered: {plan.logits.obstacle}"
    if memory.libraries:
        yield "libraries", size(memory.libraries), ""
    yield (
        "a step at its peak",
        size(memory.step),
        f"of it kept for the backward {size(memory.kept)}",
    )
    yield "an evaluation at its peak", size(memory.evaluation), f"{config.eval_batch} images"
    yield "memory in use", size(memory.peak), f"at most, with the {memory.largest}"
    if memory.reserve:
        yield "allocator's reserve", size(memory.reserve), "at most: freed blocks that glibc keeps"
    yield "memory", size(memory.need), f"of {size(plan.memory_available)}"
    yield "largest batch that fits", f"{plan.largest_batch:,}", f"of {batch} wanted"
    yield (
        "disk", size(disk.need),
        f"of {size(disk.free)}: {disk.checkpoints} checkpoints of {size(disk.checkpoint)}, "
        f"{size(disk.student * disk.students)} finished",
    )  # fmt: skip
    if hours is None:
        yield "hours", "unknown", "--probe measures for at most 60 seconds"
        return
    spread = f"n = {len(hours.measured.steps)} at batch {hours.measured.batch}"
    yield "a step takes", duration(hours.step_seconds), f"{batch} images, {spread}"
    yield "an evaluation takes", duration(hours.evaluation_seconds), ""
    seeds = len(config.seeds or (0,))
    of_seeds = f", {seeds} seeds, {hours.run_hours:,.2f} each" if seeds > 1 else ""
    yield "hours", f"{hours.hours:,.2f}", f"{plan.steps:,} steps{of_seeds}"


def run_plan(config: RunConfig, *, probe: bool, as_json: bool) -> int:
    """`dfptkd plan`; returns the exit code: 0 where the run fits, 5 where it does not."""
    plan = make_plan(config, probe=probe)
    if as_json:
        print(json.dumps(plan.record(), indent=1))
    else:
        print_plan(plan)
    return plan.exit_code
