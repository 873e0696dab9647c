"""What a run does, top to bottom.

data -> student -> teacher -> method -> epochs (steps, evaluation, checkpoint) -> student file
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..kernels.backend import Site, fast_backend, unavailable
from .alarms import (
    chance_warning,
    fusion_warning,
    loss_spike,
    overhead_warnings,
    relation_warning,
    saturates_early,
    saturation_warning,
    teacher_warning,
)
from .checkpoint import Checkpoint, CheckpointWriter, newest_checkpoint, seconds_to_write
from .config import RunConfig, to_dict
from .data import Batch, ImageData, load_data, steps_per_epoch
from .data.crops import side_of_epoch
from .data.facts import published_classes
from .distributed import SINGLE, StopVote, World, synchronise_batch_norms
from .errors import DataError, DfptkdError, NumericError, Stopped, StorageError, UsageError
from .explain import EVALUATION, explained
from .files import save_file, write_atomically
from .identity import (
    STUDENT_FILE,
    WEIGHTS_FILE,
    DataRecord,
    NetworkRecord,
    extension_text,
    extensions_of,
    fingerprint,
    network_of,
    same_model,
)
from .joint_step import JointStep, join
from .log import ProgressLine, RunLog, SilentLog, clock, versions, write_json
from .machine import check_machine, check_sizes, demand_of, part_sizes, prepare_torch
from .memory import available_bytes
from .methods import Method, build_method
from .metrics import Evaluator
from .models import create_model
from .models.cost import teacher_cost
from .models.fit import check_step, check_student, check_teacher
from .models.input_norm import InputNorm, InputNorms, given_norm, stated_norm
from .models.parts import channels_last
from .models.weights import EMA_METADATA, ema_beside
from .optim import learning_rates
from .options import related_terms
from .preemption import StopRequest, stop_on_signal
from .resume import (
    check_finished,
    check_same_data,
    check_same_start,
    check_same_teacher,
    crops_of_before,
    extensions,
    recorded_teacher,
    start_of_main,
)
from .run_record import run_record
from .run_state import RunState
from .step import SkipCounts, TrainStep, choose_mode
from .teacher import TeacherChoice, choose_teacher, run_folder
from .teacher_logits import TeacherLogits, outlook
from .together import RandomState, SharedBatches, take_turns
from .watchdog import Watchdog

# A process that hangs in a step ends itself so much later than those that wait for it give up.
STEP_GRACE_S = 5.0
# Steps in which fp16 may look for its scale before an epoch that counts nothing is a failure.
SCALE_SEARCH_STEPS = 32
GLANCE_STEPS = 16  # between two looks at how many were skipped
SLOW_STORAGE_S = 30.0  # for a checkpoint; more is said
STORAGE_TRIALS = 3


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    out: Path
    step: int
    last: dict[str, float]
    """Accuracies of the last evaluation in percent: student_top1, prompt_top1, ..."""
    best: dict[str, float]
    """Best student_top1 and its epoch."""


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """The student's mean cross-entropy, epoch by epoch."""
    rewinds: int = 0
    """Times that the run has gone back."""
    replaced: int = 0
    """Training images so far that stood in for one in quarantine."""
    prompt_top1: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Stretch:
    """Steps of an epoch, done without a break."""

    first: int
    """Number of the first of them."""
    started: float
    """On the monotonic clock, less the turns of other runs."""


def run(config: RunConfig, world: World | None = None) -> RunResult:
    """Train one network, from data to the finished student on disk.

    Args:
        config: A complete configuration; `seeds` is for `run_seeds`.
        world: The processes that share the work; absent: those that torchrun has started, or this
            one alone.

    Raises:
        UsageError, DataError, NumericError, StorageError: As the exit codes say.
        Stopped: A signal asked to stop; the state is saved.
    """
    return run_seeds(dataclasses.replace(config, seeds=(config.seed,)), world)[0]


def run_seeds(config: RunConfig, world: World | None = None) -> list[RunResult]:
    """A run for each of `config.seeds` (or for `config.seed`), all in this process, step by step.

    `world` as in `run`.

    Raises:
        As `run`; of several runs that fail, the first one's error, when all have ended.
    """
    seeds = (config.seed,) if config.seeds is None else config.seeds
    if config.out is not None and len(seeds) > 1:
        raise UsageError(f"out={config.out!r} with {len(seeds)} seeds: expected --out-root")
    world = World.from_environment() if world is None else world
    device = check_machine(config, world)
    with (
        stop_on_signal() as stop,
        world.connected(device, config.step.timeout),
        ExitStack() as locks,
    ):
        prepare_torch(config)
        folders = [run_folder(dataclasses.replace(config, seed=s, seeds=None)) for s in seeds]
        crops = world.of_main(lambda: crops_of_before(config, folders))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, crops=crops))
        data = world.everywhere(lambda: load_data(config.data, device))
        check_sizes(config, data, world)
        if choose_mode(config, device, world.size)[0] != "eager":
            # Each traced teacher is a class of its own, for which compiled code is made anew; what
            # earlier runs of this process have left would count against Dynamo's limit.
            torch.compiler.reset()
        made = []
        for seed in seeds:
            own = dataclasses.replace(config, seed=seed, seeds=None)
            prefix = f"seed {seed}: " if len(seeds) > 1 else ""
            made.append(prepare(own, data, device, stop, locks, prefix, world, config.seeds))
        pending = [m for m in made if isinstance(m, Pending)]
        if len(pending) > 1:
            share(pending)
        turns = [p.trainer.train(p.checkpoint, p.record) for p in pending]
        # Of several processes all must fail alike for the others' runs to go on.
        waiting = (Exception,) if world.size == 1 else (Stopped, NumericError, StorageError)
        results = iter(take_turns(turns, [p.random for p in pending], waiting))
        return [next(results) if isinstance(m, Pending) else m for m in made]


@dataclass(frozen=True)
class Pending:
    """A run that is ready to start."""

    trainer: Trainer
    checkpoint: Checkpoint | None
    record: dict[str, Any]
    random: RandomState


def prepare(
    config: RunConfig,
    data: ImageData,
    device: torch.device,
    stop: StopRequest,
    locks: ExitStack,
    prefix: str = "",
    world: World = SINGLE,
    seeds: tuple[int, ...] | None = None,
) -> Pending | RunResult:
    """Student, teacher and method of one run, or the result of one that is finished already.

    Args:
        config: The run, of one seed.
        data: Its data set.
        device: Where it runs.
        stop: The request that it listens to.
        locks: Takes the lock of its folder.
        prefix: Put before its lines on the terminal, where several runs talk.
        world: The processes that share the work.
        seeds: Of all runs of this process, this one among them.
    """
    out = run_folder(config)
    total_steps = config.epochs * steps_per_epoch(len(data.train), config.global_batch)
    said: list[str] = []

    def warn(message: str) -> None:
        said.append(message)
        print(f"{prefix}warning: {message}")

    end = end_step(config, total_steps)
    checkpoint, finished = start_of_main(config, out, end, world, locks, warn)
    if checkpoint is not None and finished:
        said_of_teacher = world.of_main(lambda: check_finished(config, checkpoint, data))
        return already_done(out, checkpoint, said_of_teacher, world)

    torch.manual_seed(config.seed)  # the student first: equal under every method (T2)
    notes: list[str] = []
    student = world.everywhere(
        lambda: create_model(
            config.student,
            num_classes=data.num_classes,
            weights=config.student_weights,
            say=notes.append,
        )
    )
    if config.student_weights is not None and world.is_main:
        known = network_of(Path(config.student_weights)).model
        if known is not None and not same_model(known, config.student):
            warn(f"student {config.student_weights}: says that it is {known}, not {config.student}")
    begun = None if config.student_weights is None else fingerprint(student)
    demand = demand_of(config, data, world)
    world.everywhere(lambda: check_student(config.student, student, demand))
    cost = None
    teacher, teacher_record, choice = None, None, None
    if config.method != "ce":
        choice = choice_of_main(config, data, checkpoint, world)
        with torch.random.fork_rng(devices=[]):
            teacher = world.everywhere(
                lambda: create_model(
                    config.teacher.name,
                    num_classes=data.num_classes,
                    weights=choice.weights,
                    ema=config.teacher.ema,
                    say=notes.append,
                )
            )
        world.everywhere(lambda: check_teacher(config.teacher.name, teacher, demand))
        prompt = config.prompt if config.has_prompt_path else None
        cost = teacher_cost(teacher, prompt, data.image_size, at=config.teacher.stages)
        teacher_record = {
            "name": config.teacher.name,
            "weights": choice.weights,
            "sha256": fingerprint(teacher),
            "expected_top1": expected_top1(config, data),
            "trained": choice.trained,
        }
        check_equal_teachers(teacher_record, world)
    for note in notes if world.is_main else ():
        print(f"{prefix}{note}")
    found = world.of_main(
        lambda: norms_of(config, data, teacher_record, checkpoint, warn).to_json()
    )
    norms = InputNorms.from_json(InputNorm(data.mean, data.std), found)
    method = build_method(config, student, teacher, data.train.labels, norms.entry())
    if teacher is not None:
        world.everywhere(lambda: check_step(config, method, demand))
    record = run_record(config, data, student, cost, teacher_record, device, world)
    for name, norm in norms.by_network.items():
        record[name] = (record.get(name) or {}) | norm.to_json()
    if begun is not None:
        record["student"]["initial_sha256"] = begun
    record["warnings"] += said
    record["extended"] = extensions(checkpoint, config)
    if config.step.sync_bn and world.size > 1:
        synchronise_batch_norms(method.trained_networks())
    channels_last(method, device)
    trainer = Trainer(config, out, data, method, device, total_steps, stop, prefix, world, norms)
    trainer.choice, trainer.initial_sha256 = choice, begun
    if teacher_record is not None:
        trainer.remember_logits(teacher_record["sha256"], seeds)
    if not world.is_main:  # from here on dropout and the like draw differently in every process
        torch.manual_seed(world.seed_of_rank(config.seed, 0))
    return Pending(trainer, checkpoint, record, RandomState(device))


def norms_of(
    config: RunConfig,
    data: ImageData,
    teacher: dict[str, Any] | None,
    checkpoint: Checkpoint | None,
    warn: Callable[[str], None],
) -> InputNorms:
    """Mean and std of each network's images: new, or those that the run was begun with.

    Args:
        config: The run.
        data: Its data set.
        teacher: What run.json says of the teacher; None: there is none.
        checkpoint: What the run goes on from.
        warn: Gets a line where a new run would do otherwise.
    """
    own = InputNorm(data.mean, data.std)
    student = stated_norm(config.student, config.student_weights, data.num_classes)
    found = None
    if teacher is not None:
        found = given_norm(config.teacher.mean, config.teacher.std)
        found = found or stated_norm(teacher["name"], teacher["weights"], data.num_classes)
    now = InputNorms.of(own, student, found, teacher is not None)
    if checkpoint is None:
        return now
    # A run that is older than this did as the data says.
    begun = checkpoint.state.get("norms") or dict.fromkeys(now.by_network)
    then = InputNorms.from_json(own, begun)
    for name, norm in then.by_network.items():
        other = now.by_network.get(name, norm)
        if not norm.equals(other):
            warn(
                f"{checkpoint.path}: the {name}'s images have been normalised by {norm}, and go on "
                f"so; by {other} ({other.source}) in a new run (--out)"
            )
    return then


def choice_of_main(
    config: RunConfig, data: ImageData, checkpoint: Checkpoint | None, world: World
) -> TeacherChoice:
    """The weights of the teacher, which rank 0 chooses; of a run that goes on its own ones."""

    def choose() -> dict[str, Any]:
        own = None if checkpoint is None else recorded_teacher(checkpoint)
        return dataclasses.asdict(choose_teacher(config, DataRecord.of(data), own))

    return TeacherChoice(**world.of_main(choose))


def expected_top1(config: RunConfig, data: ImageData) -> float | None:
    """The accuracy that a recipe expects of its teacher; None: of another, or on other data."""
    of = config.teacher.expected_of
    if of is not None and of != (config.teacher.name, data.name):
        return None
    if published_classes(data.name) not in (None, data.num_classes):
        return None  # a part of the set
    return config.teacher.expected_top1


def check_equal_teachers(record: dict[str, Any], world: World) -> None:
    """Refuse to train with teachers that differ between the processes."""
    ours = record["sha256"]
    theirs = world.exchange(ours)[0]
    if theirs != ours:
        raise DataError(
            f"{record['weights']}: SHA-256 {ours[:12]} of the teacher here, {theirs[:12]} in rank "
            "0: expected the same file on every machine"
        )


def share(runs: Sequence[Pending]) -> None:
    """Let runs that differ in their seed alone hold and compute once what is the same for all.

    One that was begun with images that are normalised otherwise has nothing in common with them.
    """
    if any(run.trainer.norms.figures != runs[0].trainer.norms.figures for run in runs):
        return
    groups: dict[tuple[int, int], Trainer] = {}
    new = [run.trainer.step for run in runs if run.checkpoint is None]
    for step in new:
        step.kernels = new[0].kernels  # the first one measures; what is resumed has its own
    joint = join([run.trainer.step for run in runs])
    for run in runs:
        trainer = run.trainer
        trainer.joint = joint
        trainer.share_logits(runs[0].trainer)
        start = 0 if run.checkpoint is None else run.checkpoint.step
        first = groups.setdefault((trainer.batches.seed, start), trainer)
        if first is trainer:
            trainer.step.share_batches()
        else:
            trainer.batches = first.batches
            trainer.step.share_batches(first.step)


class Trainer:
    """The loop and its state."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        data: ImageData,
        method: Method,
        device: torch.device,
        total_steps: int,
        stop: StopRequest,
        prefix: str = "",
        world: World = SINGLE,
        norms: InputNorms | None = None,
    ) -> None:
        own = InputNorm(data.mean, data.std)
        self.norms = norms or InputNorms(own, own, None if method.frozen_teacher() is None else own)
        self.data_record = DataRecord.of(data)
        # From here on the data's statistics are those by which the student's images are normalised.
        data = dataclasses.replace(data, mean=self.norms.student.mean, std=self.norms.student.std)
        self.config, self.out, self.data, self.method = config, out, data, method
        self.device, self.total_steps, self.world = device, total_steps, world
        self.stop = StopVote(stop, world)
        self.per_epoch = steps_per_epoch(len(data.train), config.global_batch)
        self.end_step = end_step(config, total_steps)
        self.prefix = prefix
        self.batches = SharedBatches(
            data.train,
            batch_size=config.global_batch,
            seed=config.seed if config.data.order_seed is None else config.data.order_seed,
            workers=config.data.workers,
            shard=world.shard,
            side_of=self.side_of,
        )
        self.step = TrainStep(
            method,
            config,
            data,
            total_steps=total_steps,
            steps_per_epoch=self.per_epoch,
            device=device,
            world=world,
        )
        self.state = RunState(self.step, world)
        self.evaluator = Evaluator(
            method,
            data,
            batch_size=config.eval_batch,
            workers=config.data.workers,
            captured=self.step.mode == "graph",
            world=world,
        )
        self.writer = CheckpointWriter(
            out / "checkpoints", config.keep_checkpoints, warn=self.warn_of_storage
        )
        self.last_save = time.monotonic()
        self.watchdog = Watchdog(world.rank, lambda phase: self.log.beat(phase))
        self.progress = Progress()
        self.joint: JointStep | None = None
        self.last_step = time.monotonic()  # when the last stretch of steps ended
        self.stretch: Stretch | None = None
        self.line: ProgressLine
        self.teacher_sha256: str | None = None
        self.initial_sha256: str | None = None
        """The student's fingerprint before the first step, where it starts from a file."""
        self.teacher_top1: float | None = None
        self.choice: TeacherChoice | None = None
        self.alarmed = False
        self.logits: TeacherLogits | None = None
        self.kernel_note: str | None = None
        self.noted_kernels: set[Site] = set()
        self.record: dict[str, Any] = {}
        self.saved_step: int | None = None
        self.save_asked = False

    def remember_logits(self, teacher_sha256: str, seeds: tuple[int, ...] | None) -> None:
        """Keep what the frozen teacher says of each form of an image, where that pays.

        Args:
            teacher_sha256: The teacher's fingerprint.
            seeds: Of all runs that share it.

        Raises:
            UsageError: It is asked for and cannot be.
        """
        config = dataclasses.replace(self.config, seeds=seeds)
        need = outlook(
            config,
            images=len(self.data.train),
            forms=self.data.train.num_forms,
            num_classes=self.data.num_classes,
            steps=self.end_step,
            steps_per_epoch=self.per_epoch,
            mode=self.step.mode,
            device=self.device,
            available=available_bytes(self.device) // self.world.size,
        )
        norm = self.norms.teacher if self.norms.entry() else None
        self.logits = TeacherLogits(self.method, config, self.data, need, teacher_sha256, norm)
        if need.obstacle is None:
            self.step.remember_logits(self.logits)

    def share_logits(self, other: Trainer) -> None:
        """Use the logits that `other` remembers, of an equal teacher."""
        if self.step.remembers and other.step.remembers:
            self.logits = other.logits
            assert self.logits is not None
            self.step.remember_logits(self.logits)

    def train(
        self, checkpoint: Checkpoint | None, record: dict[str, Any]
    ) -> Generator[None, None, RunResult]:
        """Measure the teacher, go on from `checkpoint` if there is one, and train to the end.

        Yields after every step, so that several runs can take turns.
        """
        self.last_step = time.monotonic()  # what others do before its first turn is theirs
        if record["teacher"] is not None:
            self.teacher_sha256 = record["teacher"]["sha256"]
        if checkpoint is not None:
            self.restore(checkpoint)
            if self.progress.step > self.end_step:
                raise UsageError(
                    f"max_steps={self.config.max_steps}: {checkpoint.path} is at step "
                    f"{self.progress.step}: expected as many, or more"
                )
        resumed = None if checkpoint is None else self.progress.step
        self.log: RunLog = SilentLog()
        if self.world.is_main:
            self.log = RunLog(self.out, self.columns(), resumed, prefix=self.prefix)
        for message in record["warnings"]:
            self.log.event("checkpoint_fallback", message, self.progress.step)
        frozen = self.method.frozen_teacher()
        before = None if frozen is None else fingerprint(frozen)
        with self.watchdog:
            try:
                yield from self.work(record)
                if frozen is not None and fingerprint(frozen) != before:
                    drift = "the frozen teacher has changed: a defect"
                    self.log.warn("teacher_drift", drift, self.progress.step)
                self.write_student()
                self.status("finished")
                self.log.say(f"finished: {self.out}")
            except Stopped:
                raise
            except BaseException as error:
                with suppress(Exception):  # what is being written is to be whole all the same
                    self.writer.finish()
                explanation = explained(error, self.watchdog.latest, self.config, self.world)
                self.status("failed", getattr(explanation, "exit_code", DfptkdError.exit_code))
                if explanation is not error:
                    raise explanation from error
                raise
            finally:
                if self.joint is not None and self.stretch is None:  # its last evaluation
                    self.joint.aside += time.monotonic() - self.last_step
                self.log.close()
        return RunResult(self.out, self.progress.step, self.progress.last, self.progress.best)

    def work(self, record: dict[str, Any]) -> Iterator[None]:
        """All that is done before the student is finished, or the run is stopped and saved."""
        self.record = record
        try:
            self.method.train()
            with self.watchdog.phase("trying the storage"):
                self.world.of_main(self.try_storage)
            with self.watchdog.phase("measuring the teacher"):
                self.announce(record)
            self.log.record(record)
            self.status("running")
            yield from self.epochs()
            self.finish_saving()
        except Stopped as stopped:
            self.save()
            self.finish_saving()
            self.keep_logits()
            self.status("stopped")
            self.log.event("stopped", str(stopped), self.progress.step)
            raise

    def try_storage(self) -> None:
        """Find out, in rank 0, whether checkpoints can be written, before there is one to lose.

        Raises:
            StorageError: They cannot.
        """
        size, seconds = sum(t.nbytes for t in self.state.tensors().values()), math.inf
        for _ in range(STORAGE_TRIALS):  # once it may just be busy
            if seconds > SLOW_STORAGE_S:
                seconds = min(seconds, seconds_to_write(self.writer.folder, size))
        if seconds > SLOW_STORAGE_S:
            self.log.warn(
                "slow_storage",
                f"{self.out}: a checkpoint of {size / 1e6:,.0f} MB takes about {seconds:,.0f} s "
                "there; it is written beside the steps, but the next one waits for it: expected "
                "--out on a faster disk",
                self.progress.step,
            )

    def announce(self, record: dict[str, Any]) -> None:
        """Say what is about to run, measure the teacher, and warn of what looks wrong already."""
        config, log, cost = self.config, self.log, record["cost"]
        log.say(
            f"{config.recipe} · {config.method} · seed {config.seed} · {self.data.name}: "
            f"{len(self.data.train):,} training, {len(self.data.test):,} test images · "
            f"{config.student} {cost['student_params'] / 1e6:.3f} M parameters, "
            f"{cost['student_macs'] / 1e6:.1f} M MACs · {record['hardware']['device']}, "
            f"{self.processes()}{self.step.precision}, steps by {self.step.mode} "
            f"({self.step.mode_reason})"
        )
        if in_words := self.data.preprocessing.get("in_words"):
            log.say(in_words)
        for note in self.data.passed_over:
            record["warnings"].append(note)
            log.warn("passed_over", note, self.progress.step)
        log.say(str(self.norms))
        for note in self.data.notes:
            record["warnings"].append(note)
            log.warn("quarantine", note, self.progress.step)
        if config.step.sync_bn and self.world.size == 1:
            log.warn("sync_bn", "step.sync_bn does nothing in a single process")
        if self.progress.step:
            log.say(f"resumed from step {self.progress.step} of {self.end_step}")
            log.event("resumed", f"from step {self.progress.step}", self.progress.step)
        self.tell_extensions(record)
        self.tell_choice(record)
        self.choose_kernels(record)
        with self.step.autocast(), self.step.plainly(), self.step.kernels.in_force():
            teacher = self.evaluator.teacher()
        if teacher is None:
            return
        record["teacher"] |= teacher
        self.teacher_top1 = teacher["top1"]
        log.say(
            f"teacher {config.teacher.name}: top-1 {teacher['top1']:.2f} %, top-5 "
            f"{teacher['top5']:.2f} % on the test images ({record['teacher']['weights']})"
        )
        if self.logits is not None:
            log.say(str(self.logits.need))
        if config.has_prompt_path:
            log.say(prompt_path_line(cost))
        for kind, warning in self.early_warnings(cost):
            record["warnings"].append(warning)
            log.warn(kind, warning, self.progress.step)

    def tell_extensions(self, record: dict[str, Any]) -> None:
        """Say of a run that it is longer than it was planned; that stays on its record."""
        for entry in record["extended"]:
            text = extension_text(**entry)
            record["warnings"].append(text)
            if entry["step"] == self.progress.step:
                self.log.warn("extended", text, self.progress.step)

    def tell_choice(self, record: dict[str, Any]) -> None:
        """Say which teachers were passed over, and what is known against the one that was taken."""
        if self.choice is None:
            return
        for line in self.choice.said:
            self.log.say(line)
            self.log.event("teacher_choice", line, self.progress.step)
        for warning in self.choice.warnings:
            record["warnings"].append(warning)
            self.log.warn("teacher", warning, self.progress.step)

    def processes(self) -> str:
        """What the first line says of them."""
        return f"{self.world.size} processes, " if self.world.size > 1 else ""

    def early_warnings(self, cost: dict[str, Any]) -> list[tuple[str, str]]:
        """Failure signatures that are visible before the first step (M45, M46)."""
        config = self.config
        top1, expected = self.teacher_top1, self.record["teacher"]["expected_top1"]
        found = [
            ("teacher_at_chance", chance_warning(top1, self.data.test.labels.bincount().tolist())),
            ("teacher_below_expectation", teacher_warning(top1, expected)),
        ]
        batch = min(config.global_batch, len(self.data.train))
        part, _ = part_sizes(config, batch, self.world)
        found.append(("cut_batches", relation_warning(related_terms(config), part, batch)))
        if config.has_prompt_path:
            found += [("overhead", line) for line in overhead_warnings(cost)]
            found.append(("fusion_missing", None if config.prompt.fusion else fusion_warning()))
        return [(kind, warning) for kind, warning in found if warning is not None]

    def epochs(self) -> Iterator[None]:
        """The loop: steps, evaluation, checkpoint."""
        progress, meter = self.progress, self.step.meter
        with self.log.progress(self.end_step, progress.step) as line:
            self.line = line
            while True:
                at_edge = progress.step % self.per_epoch == 0 or progress.step >= self.end_step
                # A run may also have been stopped right at the edge, its epoch not yet evaluated.
                never = progress.step >= self.end_step and not progress.last
                if at_edge and (meter.num_images() or never):
                    self.end_of_epoch(meter.read(self.config.has_prompt_path))
                if progress.step >= self.end_step:
                    return
                yield from self.steps_of_epoch(line)
                self.check_skips()
                self.stop_if_asked()

    def steps_of_epoch(self, line: ProgressLine) -> Iterator[None]:
        """Steps up to the end of the epoch, of the run, or up to a request to stop."""
        config, progress = self.config, self.progress
        epoch, done_in_epoch = divmod(progress.step, self.per_epoch)
        first, self.stretch = progress.step, Stretch(progress.step, time.monotonic())
        if self.joint is not None:
            self.joint.aside += self.stretch.started - self.last_step
        batches = iter(self.batches.epoch(epoch, done_in_epoch))
        while (batch := self.next_batch(batches)) is not None:
            with self.phase_of_step():
                if turn_is_over := self.joint is not None:
                    yield from self.joint_step(batch)
                else:
                    self.step(batch, progress.step)
                progress.step += 1
                self.stop.wants_save |= self.is_time_to_save()
                self.stop.after_step()
            if self.step.fallback is not None:
                self.log.warn("fallback", self.step.fallback, progress.step)
                self.evaluator.captured = False
                self.step.fallback = None
            if self.step.kernels.table.keys() != self.noted_kernels:  # images that have grown
                self.note_kernels(self.record)
                with suppress(StorageError):  # the checkpoints have them too
                    self.log.record(self.record)
            if self.step.remembers and self.logits is not None:
                self.logits.open(self.step, batch, self.log)
            if progress.step % GLANCE_STEPS == 0:
                self.check_streak(self.step.glance())
            if self.saves_within_epoch():
                self.save()
            if not turn_is_over:
                yield from self.turns_of_others()
            if line.due():
                self.step.join()
                means = self.step.meter.read(config.has_prompt_path, own=True)
                line.update(progress.step / self.per_epoch, progress.step, means, self.speed())
            if self.stop or progress.step >= self.end_step:
                break
        self.step.join()
        self.step.meter.num_images()  # waits for the device
        now, self.stretch = self.with_stretch(), None
        self.last_step = time.monotonic()
        seconds = now.seconds - progress.seconds
        progress.seconds, progress.replaced = now.seconds, now.replaced
        progress.speeds.append(self.images_per_second(progress.step - first, seconds))

    def speed(self) -> float:
        """Images a second of the steps under way, as the epoch's line will say it of all."""
        assert self.stretch is not None
        steps = self.progress.step - self.stretch.first
        return self.images_per_second(steps, self.with_stretch().seconds - self.progress.seconds)

    def images_per_second(self, steps: int, seconds: float) -> float:
        """Images a second: so many steps in so many seconds of this run's own."""
        return steps * self.config.global_batch / max(seconds, 1e-9)

    def turns_of_others(self) -> Iterator[None]:
        """What they take is not this run's time; of joint steps each has an equal share, whichever
        run waits for the device."""
        assert self.stretch is not None
        joint, paused = self.joint, time.monotonic()
        aside = 0.0 if joint is None else joint.aside
        yield
        not_ours = time.monotonic() - paused if joint is None else joint.aside - aside
        self.stretch.started += not_ours

    def joint_step(self, batch: Batch) -> Iterator[None]:
        """A step together with the others' runs: done when this run's turn comes again."""
        assert self.joint is not None
        self.joint.lay_down(self.step, batch, self.progress.step)
        yield from self.turns_of_others()
        self.joint.collect(self.step)
        if not self.joint.is_over:
            return
        if self.joint.failure is not None:
            self.log.warn("fallback", self.joint.failure, self.progress.step)
            self.joint.failure = None
        self.joint = None

    def with_stretch(self) -> Progress:
        """The progress, with what belongs to the steps under way."""
        progress, stretch = self.progress, self.stretch
        if stretch is None or stretch.first == progress.step:
            return progress
        share = 1 if self.joint is None else self.joint.size
        epoch, start = divmod(stretch.first, self.per_epoch)
        stop = start + progress.step - stretch.first
        return dataclasses.replace(
            progress,
            seconds=progress.seconds + (time.monotonic() - stretch.started) / share,
            replaced=progress.replaced + self.batches.num_replaced(epoch, start, stop),
        )

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """The next one; None at the end of the epoch."""
        with self.watchdog.phase("waiting for data", self.config.data.timeout, self.awaited_files):
            return next(batches, None)

    def phase_of_step(self) -> AbstractContextManager[None]:
        """Where others wait, a process that hangs ends when they no longer do."""
        limit = self.config.step.timeout + STEP_GRACE_S if self.world.size > 1 else 0.0
        step = self.progress.step
        hint = "expected processes that answer, or a longer --step.timeout"
        return self.watchdog.phase(f"step {step}", limit, lambda: hint, DfptkdError.exit_code)

    def awaited_files(self) -> str:
        """What the next batch is made of."""
        step = self.progress.step
        rows = self.batches.rows(*divmod(step, self.per_epoch))
        names = [self.data.train.where(int(sample)) for sample in rows[:3]]
        return (
            f"the batch of step {step} ({', '.join(names)}, ...): expected storage that answers, "
            "or a longer --data.timeout"
        )

    def is_time_to_save(self) -> bool:
        """Whether rank 0 finds that the last checkpoint is long ago."""
        minutes = self.config.checkpoint_minutes
        due = minutes > 0 and time.monotonic() - self.last_save >= 60 * minutes
        if due and self.world.is_main:
            self.last_save = time.monotonic()  # asked for once
            return True
        return False

    def saves_within_epoch(self) -> bool:
        """Whether to save now; at the epoch's end that is done after the evaluation."""
        progress, steps = self.progress, self.config.checkpoint_steps
        self.save_asked |= self.stop.take_save()
        self.save_asked |= steps is not None and progress.step % steps == 0
        at_edge = progress.step % self.per_epoch == 0 or progress.step >= self.end_step
        if not self.save_asked or at_edge or self.stop:
            return False
        self.step.join()
        # Those of bad steps would push out the one that the run may have to go back to.
        return not self.step.gate.read().in_a_row

    def choose_kernels(self, record: dict[str, Any]) -> None:
        """Choose the backends of this run's fused calls on its next batch, and say how."""
        kernels, number = self.step.kernels, self.progress.step
        kernels.cache.warn = lambda message: self.log.warn("kernel_cache", message, number)
        if self.kernel_note is not None:
            self.log.warn("kernels", self.kernel_note, number)
        batches = self.batches.epoch(*divmod(min(number, self.end_step - 1), self.per_epoch))
        before = kernels.measured_s
        batch = self.next_batch(batches)
        assert batch is not None
        with self.watchdog.phase("choosing kernels"):
            self.step.choose_kernels(batch)
        took = kernels.measured_s - before
        if took:
            self.log.say(f"{kernels.summary()}; measured on the first batch in {took:.1f} s")
        self.note_kernels(record)

    def note_kernels(self, record: dict[str, Any]) -> None:
        """Put the choices of kernels on record, and say of the new ones which are wrong here."""
        kernels, number = self.step.kernels, self.progress.step
        new = [c for site, c in kernels.table.items() if site not in self.noted_kernels]
        self.noted_kernels |= kernels.table.keys()
        record["kernels"] = kernels.record()
        self.log.event("kernels", kernels.summary(), number)
        for choice in new:
            certificate = choice.certificate
            if choice.complaint:
                self.log.warn("certificate_failed", choice.complaint, number)
            elif certificate is not None and choice.site.operation == self.method.operation:
                said = f"loss[{certificate.backend}] on the first batch: {certificate}"
                self.log.event("certificate", said, number)

    def bind_kernels(self, checkpoint: Checkpoint) -> None:
        """Take over the backends that the run had so far.

        Raises:
            DataError: One of them cannot be used here.
        """
        record, asked = checkpoint.state.get("kernels"), self.config.kernels
        if record is None:  # of a version that recorded none
            return
        if asked != "auto":
            if checkpoint.state["config"].get("kernels") != asked:
                self.kernel_note = f"kernels={asked}, whatever {checkpoint.path} was made with"
            return
        if not record:  # nothing was measured: the reference was asked for, or all that there was
            self.step.kernels.asked = "reference"
            fast = fast_backend(self.device.type)
            if fast is not None and unavailable(fast) is None:
                self.kernel_note = (
                    f"{checkpoint.path}: made with the reference alone, which serves on "
                    f"(--kernels {fast} changes that)"
                )
            return
        try:
            self.step.kernels.bind(record)
        except ValueError as error:
            raise DataError(f"{checkpoint.path}: {error}") from error
        missing = self.step.kernels.missing(self.device.type)
        if missing is not None:
            name, reason = missing
            raise DataError(
                f"{checkpoint.path}: made with {name} kernels, which cannot be used here "
                f"({reason}): expected them, or --kernels reference to go on without"
            )

    def end_of_epoch(self, means: dict[str, float]) -> None:
        """Evaluate, log and save, where it is time to; an epoch cut by max_steps counts as one."""
        progress, config = self.progress, self.config
        epoch, at_end = progress.step / self.per_epoch, progress.step >= self.end_step
        is_best = False
        if at_end or round(epoch) % config.eval_every == 0:
            with (
                self.watchdog.phase(EVALUATION),
                self.step.autocast(),
                self.step.plainly(),
                self.step.kernels.in_force(),
            ):
                found = self.evaluator(self.step.ema)
            test = self.world.of_main(lambda: found)  # one verdict on what is the best
            is_best = self.note(epoch, test)
            row = {
                "epoch": epoch,
                "step": progress.step,
                "lr": self.learning_rate(),
                **means,
                **test,
            }
            row |= {"seconds": progress.seconds, "images_per_second": progress.speeds[-1]}
            self.log.row(row)
            self.log.say(self.summary(epoch, row))
            self.check_saturation(epoch)
        self.check_spike(means[f"loss/{self.method.term_names[0]}"])
        self.keep_logits()
        self.step.meter.reset()
        self.step.gate.forget(streak=False)
        if at_end or is_best or self.save_asked or round(epoch) % config.checkpoint_every == 0:
            self.save(is_best)
        self.status("running")
        self.stop_if_asked()

    def keep_logits(self) -> None:
        """Add the teacher logits that are new to their file."""
        if self.logits is not None:
            self.logits.keep(self.method, self.log, self.progress.step)

    def note(self, epoch: float, test: dict[str, float]) -> bool:
        """Remember an evaluation; whether the student is the best so far."""
        progress = self.progress
        progress.last = {
            k.removeprefix("test/"): v for k, v in test.items() if k.startswith("test/")
        }
        if "prompt_top1" in progress.last:
            progress.prompt_top1.append((epoch, progress.last["prompt_top1"]))
        if progress.last["student_top1"] <= progress.best.get("student_top1", -1.0):
            return False
        progress.best = {"student_top1": progress.last["student_top1"], "epoch": epoch}
        return True

    def summary(self, epoch: float, row: dict[str, float]) -> str:
        """The line of one epoch."""
        parts = [f"epoch {epoch:.4g}/{self.config.epochs}", f"loss {row['loss/total']:.3f}"]
        parts += [
            f"{path} {row[f'test/{path}_top1']:.2f} %"
            for path in ("student", "ema", "prompt", "teacher")
            if f"test/{path}_top1" in row
        ]
        if self.data.skipped_test:
            parts.append(f"(without {self.data.skipped_test} test images in quarantine)")
        speed = row["images_per_second"]
        left = self.line.left(self.progress.step, speed / self.config.global_batch)
        return "  ".join([*parts, f"{speed:,.0f} images/s", f"{clock(left)} left"])

    def check_spike(self, cross_entropy: float) -> None:
        """Warn of an epoch that was far worse than those before; it is no reason to stop."""
        warning = loss_spike(self.progress.losses, cross_entropy)
        if warning is not None:
            self.log.warn("loss_spike", warning, self.progress.step)
        self.progress.losses.append(cross_entropy)

    def check_saturation(self, epoch: float) -> None:
        """Warn once if the prompt path copies the teacher (M44)."""
        if self.alarmed or not self.progress.prompt_top1 or self.teacher_top1 is None:
            return
        early = saturates_early(self.progress.prompt_top1, self.teacher_top1, self.config.epochs)
        if early is not None:
            self.alarmed = True
            warning = saturation_warning(early, self.config.epochs)
            self.log.warn("saturation", warning, self.progress.step)

    def check_skips(self) -> None:
        """Say how many steps of the epoch were skipped; go back, or stop, where they are too many.

        Raises:
            NumericError: As `go_back`; or fp16 has found no scale.
        """
        counts, counted = self.step.gate.read(), self.step.meter.num_images()
        if not counts.skipped and not counted and self.progress.step >= SCALE_SEARCH_STEPS:
            error = NumericError(
                f"no step of this epoch counts by step {self.progress.step}: gradients overflow at "
                "any scale; expected --precision bf16 or fp32; the last checkpoint is intact"
            )
            raise self.said_once(error)
        if not counts.skipped:
            return
        if self.are_too_many(counts) or not (counted or self.stop):
            self.go_back(counts)
        else:
            self.log.warn("skipped", self.skips(counts), self.progress.step)

    def check_streak(self, counts: SkipCounts | None) -> None:
        """Within an epoch: as `check_skips`, without waiting for the device."""
        if counts is not None and self.are_too_many(counts):
            self.step.join()
            self.go_back(self.step.gate.read())

    def are_too_many(self, counts: SkipCounts) -> bool:
        """Whether either budget of skipped steps is spent."""
        limits = self.config.step
        return counts.skipped > limits.max_skips or counts.in_a_row > limits.max_skips_in_a_row

    def skips(self, counts: SkipCounts) -> str:
        """What there is to say of them."""
        return (
            f"{counts.skipped} steps of this epoch skipped by step {self.progress.step}: loss or "
            f"gradients not finite, the last in step {counts.last}"
        )

    def go_back(self, counts: SkipCounts) -> None:
        """Take the networks back to the last checkpoint from before the steps that were skipped,
        and go on with the data of the next step: what came between is passed over.

        Raises:
            NumericError: There is no such checkpoint, or the run has gone back too often; what was
                seen of the last bad step is on disk.
        """
        progress = self.progress
        first_bad = progress.step - max(counts.in_a_row, 1)
        checkpoint = None
        if progress.rewinds < self.config.step.max_rewinds and progress.step < self.end_step:
            checkpoint = self.checkpoint_before(first_bad + 1)
        if checkpoint is None:
            seen = self.dump(counts)
            error = NumericError(
                f"{self.skips(counts)}; expected at most --step.max-skips "
                f"{self.config.step.max_skips}, and {self.config.step.max_skips_in_a_row} in a row "
                f"(a lower --optim.lr, or --optim.clip-grad-norm); {seen}; the last checkpoint is "
                "intact"
            )
            raise self.said_once(error)
        self.state.restore_networks(checkpoint)
        self.step.restore(progress.step)
        self.step.gate.forget()
        progress.rewinds += 1
        message = f"{self.skips(counts)}; networks back to those of step {checkpoint.step}"
        self.log.warn("rewind", message, progress.step)

    def checkpoint_before(self, step: int) -> Checkpoint | None:
        """The newest sound checkpoint of this run with fewer steps, the same in every process."""
        found: list[Checkpoint] = []

        def find() -> str | None:
            with suppress(StorageError):  # polled, and said, at the next save
                self.writer.finish()
            with suppress(DataError):  # none is sound
                newest = newest_checkpoint(self.out / "checkpoints", self.warn_of_storage, step)
                found.extend([] if newest is None else [newest])
            return str(found[0].path) if found else None

        path = self.world.of_main(find)
        if path is None:
            return None
        state = self.world.of_main(lambda: found[0].state)
        tensors = self.world.tensors_of_main(found[0].tensors if found else None)
        return Checkpoint(Path(path), tensors, state)

    def dump(self, counts: SkipCounts) -> str:
        """Write down the last bad step: its images, and every loss term on them as it is now.

        Returns where that is, or why it is nowhere: whatever fails here is not what ends the run.
        """
        epoch, place = divmod(counts.last, self.per_epoch)
        rows = self.batches.rows(epoch, place)
        seeds = {"seed": self.config.seed, "order_seed": self.batches.seed}
        own = {
            "samples": rows.tolist(),
            "names": [self.data.train.where(int(sample)) for sample in rows],
            "terms": self.terms(rows, epoch),
        }
        found = {
            "step": counts.last, "epoch": epoch, **counts._asdict(), **seeds,
            "learning_rate": learning_rates(self.step.schedule, counts.last)[0],
            "by_rank": self.world.exchange(own),
        }  # fmt: skip
        path = self.out / f"numeric-{counts.last}.json"
        try:
            if self.world.is_main:
                write_json(path, found)
        except StorageError as error:
            return str(error)
        return f"{path} says what was seen"

    def terms(self, rows: torch.Tensor, epoch: int) -> dict[str, Any]:
        """Every loss term on these images; JSON knows no NaN, so as text where not finite."""
        side = self.side_of(epoch)
        try:
            batch = self.data.train.batch(rows, seed=self.batches.seed, epoch=epoch, side=side)
        except DataError as error:
            return {"error": str(error)}
        terms = self.step.examine(batch)
        return {k: v if math.isfinite(v) else str(v) for k, v in terms.items()}

    def stop_if_asked(self) -> None:
        """Leave, in all processes at this step, if any was asked to.

        Raises:
            Stopped: It was.
        """
        self.stop.now()
        if self.stop:
            name = signal.Signals(self.stop.number).name
            stopped = Stopped(f"stopped by {name} at step {self.progress.step}")
            raise self.said_once(stopped)

    def said_once(self, error: DfptkdError) -> DfptkdError:
        """An error that all processes raise alike, for rank 0 to say."""
        error.is_echo = not self.world.is_main
        return error

    def learning_rate(self) -> float:
        """Of the student, in the step just done."""
        return learning_rates(self.step.schedule, max(self.progress.step - 1, 0))[0]

    def side_of(self, epoch: int) -> int | None:
        """Of the training images of an epoch, in pixels; None: as the data has it."""
        data = self.config.data
        if data.start_size is None:
            return None
        return side_of_epoch(epoch, self.config.epochs, data.start_size, data.ramp, data.image_size)

    def columns(self) -> list[str]:
        """Columns of metrics.csv for this method."""
        paths = ["student"]
        if self.config.method != "ce":
            paths = (
                ["student", "prompt", "teacher"]
                if self.config.has_prompt_path
                else ["student", "teacher"]
            )
        columns = ["epoch", "step", "lr", "loss/total"]
        columns += [f"loss/{name}" for name in self.method.term_names]
        columns += [f"train/{p}_top1" for p in paths if p != "teacher"]
        columns += [f"test/{p}_top{k}" for p in paths for k in (1, 5)]
        columns += ["test/ema_top1"] if self.step.ema is not None else []
        for supervisor in [p for p in ("teacher", "prompt") if p in paths]:
            columns += [f"kl/{supervisor}_student{part}" for part in ("", "_target", "_nontarget")]
            columns.append(f"prob/{supervisor}_target")
        if "prompt" in paths:
            columns.append("kl/teacher_prompt")
            columns += [f"prompt_norm/{stage}" for stage in self.method.teacher.pairs]  # type: ignore
        return [*columns, "seconds", "images_per_second"]

    def status(self, state: str, exit_code: int | None = None) -> None:
        """Write status.json; `exit_code`: with which a run that has failed is about to leave."""
        progress = self.progress
        self.log.status(
            state=state,
            epoch=progress.step / self.per_epoch,
            step=progress.step,
            total_steps=self.end_step,
            last=progress.last,
            best=progress.best,
            seconds=progress.seconds,
            replaced_images=progress.replaced,
            images_per_second=statistics.median(progress.speeds) if progress.speeds else None,
            **({} if exit_code is None else {"exit_code": exit_code}),
        )

    # What a checkpoint holds
    # ------------------------------------------------------------------------

    def save(self, is_best: bool = False) -> None:
        """Write a checkpoint of everything that the next step depends on.

        Rank 0 writes; of the others it needs what differs between processes.
        """
        if self.saved_step == self.progress.step:
            return
        tensors = self.state.whole()
        state = {
            "step": self.progress.step,
            "progress": dataclasses.asdict(self.with_stretch()),
            "scaler": self.step.scaler.state_dict(),
            "alarmed": self.alarmed,
            "teacher_sha256": self.teacher_sha256,
            "initial_sha256": self.initial_sha256,
            "data": self.data_record.record() | self.data.pipeline,
            "norms": self.norms.to_json(),
            "extended": self.record.get("extended", []),
            "kernels": self.step.kernels.record(),
            "config": to_dict(self.config),
            "versions": versions(),
            "world_size": self.world.size,
        }
        self.world.of_main(self.settle_last_save)
        if self.world.is_main:
            self.writer.save(tensors, state, is_best=is_best)
        self.saved_step, self.last_save = self.progress.step, time.monotonic()
        self.save_asked = False

    def settle_last_save(self) -> None:
        """Wait, in rank 0, for the checkpoint before; say if it could not be written.

        One that fails while the next is begun must not count as the last.

        Raises:
            StorageError: The run is to stop then.
        """
        try:
            self.writer.finish()
        except StorageError as error:
            if self.config.on_storage_error == "stop":
                raise
            self.log.warn("checkpoint_failed", f"{error}; the run goes on", self.progress.step)

    def finish_saving(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            StorageError: It could not be written.
        """
        self.world.of_main(self.writer.finish)

    def warn_of_storage(self, message: str) -> None:
        """What went wrong on the disk without harm."""
        self.log.warn("storage", message, self.progress.step)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `save`.

        Raises:
            DataError: The checkpoint is another model's, another teacher's or another data set's.
        """
        check_same_data(checkpoint, self.data_record, self.data.pipeline)
        check_same_start(checkpoint, self.initial_sha256)
        weights = None if self.choice is None else self.choice.weights
        check_same_teacher(checkpoint, self.teacher_sha256, weights)
        self.world.everywhere(lambda: self.bind_kernels(checkpoint))
        self.state.restore(checkpoint)
        self.progress = checkpoint.part("progress", Progress)
        self.alarmed = checkpoint.state["alarmed"]
        # An epoch that was saved at its edge is still to be evaluated, and then saved again.
        is_complete = checkpoint.path.parent.parent == self.out and not self.step.meter.num_images()
        self.saved_step = self.progress.step if is_complete else None

    def write_student(self) -> None:
        """The finished network: plain architecture, plain names; its average in a file beside it,
        and before it, as the run counts as finished where the network is there."""
        if not self.world.is_main:
            return
        path = self.out / (WEIGHTS_FILE if self.config.role == "teacher" else STUDENT_FILE)
        if self.step.ema is not None:
            self.write_network(self.step.ema.module, ema_beside(path), "ema", EMA_METADATA)
        self.write_network(self.method.student, path, "student", {})

    def write_network(
        self, network: torch.nn.Module, path: Path, name: str, more: dict[str, str]
    ) -> None:
        """Its weights, with what says which they are; `name` as in the columns of metrics.csv."""
        tensors = {
            k: v.detach().cpu().contiguous().clone() for k, v in network.state_dict().items()
        }
        norm = {key: json.dumps(list(getattr(self.norms.student, key))) for key in ("mean", "std")}
        metadata = self.identity(name).metadata() | norm | more
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    def identity(self, name: str) -> NetworkRecord:
        """Who the trained network is by now; `name` as in the columns of metrics.csv."""
        return NetworkRecord(
            model=self.config.student,
            data=self.data_record,
            epochs=self.progress.step / self.per_epoch,
            planned_epochs=self.config.epochs,
            top1=self.progress.last[f"{name}_top1"],
            extended=extensions_of(self.record),
        )


def prompt_path_line(cost: dict[str, Any]) -> str:
    """A line about the prompt path's size beside the teacher's, the new head apart."""
    parts = []
    for key, what in (("params", "parameters"), ("macs", "MACs")):
        head, whole = cost[f"new_head_{key}"], cost[f"added_{key}"]
        shares = [100 * count / cost[f"teacher_{key}"] for count in (whole - head, head)]
        parts.append((f"{shares[0]:.1f} % {what}", f"{shares[1]:.1f} %"))
    blocks, heads = zip(*parts, strict=True)
    return (
        f"prompt path adds {' and '.join(blocks)} to the teacher, its new head "
        f"{' and '.join(heads)}"
    )


def end_step(config: RunConfig, total_steps: int) -> int:
    """Number of steps after which the run ends."""
    return total_steps if config.max_steps is None else min(config.max_steps, total_steps)


def already_done(
    out: Path, checkpoint: Checkpoint, teacher: str = "", world: World = SINGLE
) -> RunResult:
    """Report a finished run, and what there is to say of its teacher; nothing is written."""
    progress = checkpoint.part("progress", Progress)
    top1 = progress.last.get("student_top1", math.nan)
    if world.is_main:
        print(f"{out}: already finished at step {progress.step}, top-1 {top1:.2f} %{teacher}")
    return RunResult(out, progress.step, progress.last, progress.best)
