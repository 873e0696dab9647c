"""`dfptkd study`: a declared set of runs, done as far as the machine allows, and put on record.

Its runs are ordinary ones, in folders that studies with a cell in common share; whatever ends a
study, the same command goes on. study_record.py has what is kept of them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from .config import Configure, RunConfig, Study, to_dict
from .errors import DataError, Stopped
from .lock import RunLock
from .log import Terminal, clock, write_json
from .preemption import StopRequest, stop_on_signal
from .study_record import archived_run, on_record, opened, put_on_record
from .teacher import find_teacher, run_folder, teacher_run

POLL_S = 0.2
KILL_AFTER_S = 60.0  # a run that was asked to stop saves within this time
PR_SET_PDEATHSIG = 1  # linux/prctl.h
OUT = Terminal(lambda _: None)


class Slot(NamedTuple):
    """What one run at a time has to itself."""

    device: str
    environment: dict[str, str]


class Job(NamedTuple):
    """What one process does: a run, or those of several seeds together."""

    name: str
    config: RunConfig


@dataclass
class Worker:
    """A job under way."""

    job: Job
    slot: Slot
    process: subprocess.Popen[bytes]
    started: float
    asked_to_stop: float | None = None

    @property
    def failed(self) -> bool:
        """Of one that has ended: neither finished, nor stopped by us."""
        stopped = self.asked_to_stop is not None
        return self.process.returncode not in ((0, Stopped.exit_code) if stopped else (0,))

    def stop(self) -> None:
        """Ask the run to save and leave, and insist if it does not."""
        now = time.monotonic()
        if self.asked_to_stop is None:
            self.asked_to_stop = now
            self.process.terminate()
        elif now - self.asked_to_stop > KILL_AFTER_S:
            self.process.kill()

    def end(self) -> None:
        """The same, until it has left."""
        while self.process.poll() is None:
            self.stop()
            time.sleep(POLL_S)


def slots(device: str | None, workers: int | None) -> list[Slot]:
    """What there is to run on: every GPU, or the cores of the CPU, a thread each.

    Args:
        device: cuda or cpu; None: GPUs where there are any.
        workers: Runs at a time; None: one a GPU, one a core. More than GPUs share them.
    """
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if len(visible) == gpus else [str(i) for i in range(gpus)]
        count = gpus if workers is None else workers
        return [Slot("cuda", {"CUDA_VISIBLE_DEVICES": names[i % gpus]}) for i in range(count)]
    if device == "cuda":
        raise DataError("--device cuda: no CUDA device found: expected --device cpu")
    cores = len(os.sched_getaffinity(0))
    count = cores if workers is None else workers
    # A small network gets more done on one thread a run than one run does on all of them.
    return [Slot("cpu", {"OMP_NUM_THREADS": str(max(1, cores // count))})] * count


def run_study(
    study: Study,
    configure: Configure,
    places: Sequence[Slot],
    *,
    results: Path,
    minutes: float | None = None,
) -> None:
    """Do what is missing of a study, and put on record what is finished.

    Args:
        study: The study.
        configure: Configuration of a cell, with its folders and data.
        places: What to run on, one job each at a time.
        results: Folder of the record.
        minutes: Stop by then, as if asked to.

    Raises:
        DataError: A folder, or the record, holds a run of other options, and nothing was begun; or
            runs ended in an error, and all others are done (no student, if it was a teacher).
        Stopped: A signal, or the time, asked to stop; every run under way is saved.
        StorageError: The record cannot be written.
        UsageError: Another study is at work in the same folders.
    """
    on_gpu = places[0].device == "cuda"
    until = None if minutes is None else time.monotonic() + 60 * minutes
    root = Path(configure(study.cells[0]).out_root)
    say(f"{study.name}, {study.budget}: runs in {root}, record in {results}")
    with RunLock(root), RunLock(results), stop_on_signal() as stop:
        done = on_record(study, configure, results)
        students = student_jobs(study, configure, on_gpu, done)
        teachers = teacher_jobs(job.config for job in students)
        if students:
            say(
                f"to do: {len(teachers)} teachers, {len(students)} jobs, {len(places)} at a time; "
                f"what each says: {root}/jobs/*.log"
            )
        failed: list[str] = []
        try:
            failed += work_through(teachers, places, stop, until)
            if not failed:
                failed += work_through(students, places, stop, until)
        finally:
            runs = put_on_record(study, configure, results)
            total = len(study.cells) * len(study.seeds)
            say(f"{runs} of {total} runs on record")
    if failed:
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise DataError(
            f"{len(failed)} of the runs ended in an error: {'; '.join(failed[:3])}{more}"
        )


def say(text: str) -> None:
    """Print a line; the runs go on when nobody listens any more."""
    print(text, file=OUT, flush=True)


def student_jobs(
    study: Study, configure: Configure, on_gpu: bool, done: Container[str] = ()
) -> list[Job]:
    """One a run, seed by seed, so that pairs are soon complete; on a GPU one for all seeds of a
    cell, which fill it together, in the order of the table.

    Args:
        study: The study.
        configure: Configuration of a cell.
        on_gpu: Whether seeds go together.
        done: Names of runs that are on record.

    Raises:
        DataError: A run's folder holds a run of other options.
    """
    jobs = []
    for seeds in [study.seeds] if on_gpu else [(seed,) for seed in study.seeds]:
        for cell in study.cells:
            config = study.config(cell, configure)
            runs = [replace(config, seed=seed) for seed in seeds]
            missing = [run for run in runs if not is_done(run, done)]
            if not missing:
                continue
            own = missing[0]
            if len(missing) > 1:
                own = replace(config, seeds=tuple(run.seed for run in missing))
            jobs.append(Job(run_folder(own).name, own))
    return jobs


def is_done(config: RunConfig, done: Container[str]) -> bool:
    """Whether a run is on record, or has left what goes there."""
    return run_folder(config).name in done or archived_run(config) is not None


def teacher_jobs(students: Iterable[RunConfig]) -> list[Job]:
    """One for each teacher that runs need and that is not there yet."""
    jobs: dict[str, Job] = {}
    for config in students:
        if config.method == "ce" or config.teacher.weights:
            continue
        if find_teacher(config, opened(config.data)) is not None:
            continue
        teacher = teacher_run(config)
        name = run_folder(teacher).name
        jobs.setdefault(name, Job(name, teacher))
    return list(jobs.values())


def work_through(
    jobs: Sequence[Job], places: Sequence[Slot], stop: StopRequest, until: float | None
) -> list[str]:
    """Do jobs, as many at a time as there are places; returns a line for each that failed.

    Raises:
        Stopped: Asked to, by a signal or because it is `until` (of the monotonic clock).
    """
    waiting, free = list(jobs), list(places)
    active: list[Worker] = []
    failed: list[str] = []
    times: list[float] = []
    try:
        while waiting or active:
            late = until is not None and time.monotonic() > until
            if stop or late:
                waiting.clear()
                for worker in active:
                    worker.stop()
            while waiting and free:
                active.append(start(waiting.pop(0), free.pop(0)))
            time.sleep(POLL_S)
            for worker in ended(active):
                free.append(worker.slot)
                times.append(time.monotonic() - worker.started)
                left = clock(len(waiting) * statistics.fmean(times) / len(places))
                count = f"{len(jobs) - len(waiting) - len(active)}/{len(jobs)}"
                said = last_line(log_of(worker.job))
                say(f"{count} {worker.job.name}: {said} · {left} left")
                if worker.failed:
                    code = worker.process.returncode
                    failed.append(f"{worker.job.name} (exit code {code}): {said}")
            if (stop or late) and not active:
                why = f"stopped by {stop.signal.name}" if stop.signal else "the time is over"
                raise Stopped(f"{why}: the same command goes on from here")
    finally:
        for worker in active:  # an error of ours
            worker.end()
    return failed


def start(job: Job, slot: Slot) -> Worker:
    """Start a job, its output going to a file of its own."""
    config = replace(job.config, device=slot.device)
    file = log_of(job).with_suffix(".json")
    write_json(file, to_dict(config))
    verb = "train-teacher" if config.role == "teacher" else "train"
    command = [sys.executable, "-m", f"{__package__}.cli", verb, "--config", str(file)]
    with open(log_of(job), "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot.environment},
            start_new_session=True,  # Ctrl-C reaches it through us alone, once
            preexec_fn=_end_with_parent,
        )
    return Worker(job, slot, process, time.monotonic())


def _end_with_parent() -> None:
    """In a child: be asked to stop when the study's process is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def ended(active: list[Worker]) -> Iterator[Worker]:
    """Take out of `active` the workers that have left."""
    for worker in list(active):
        if worker.process.poll() is not None:
            active.remove(worker)
            yield worker


def log_of(job: Job) -> Path:
    """What a job prints."""
    return Path(job.config.out_root) / "jobs" / f"{job.name}.log"


def last_line(path: Path) -> str:
    """The last line of a log that says something of the result."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    told = [line for line in lines if line and not line.startswith("finished: ")]
    return told[-1] if told else "nothing said"


def list_study(study: Study, configure: Configure, results: Path) -> None:
    """Print the study's runs, as commands, and how many of them are finished."""
    print(f"{study.question}\n")
    done = on_record(study, configure, results)
    for cell in study.cells:
        config = study.config(cell, configure)
        finished = sum(is_done(replace(config, seed=seed), done) for seed in study.seeds)
        command = study.command(cell, study.seeds[0])
        print(f"{finished}/{len(study.seeds)}  {cell.label}: {command}")
