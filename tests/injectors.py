"""Faults for the tests in `faults/`, and the processes in which they happen.

A child starts from a fork server that has torch and dfptkd loaded already (0.1 s instead of 5 s).
What it runs and what goes wrong in it are named here, since a child imports this module alone.
"""

from __future__ import annotations

import builtins
import csv
import errno
import functools
import hashlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch._inductor  # use_deterministic_algorithms imports it
import torch.utils.tensorboard
import tyro  # noqa: F401  (as the two above: loaded once, not in every child)
from safetensors.torch import save_file

from dfptkd.engine import checkpoint as checkpoint_module
from dfptkd.engine import log as log_module
from dfptkd.engine import train as train_module
from dfptkd.engine.checkpoint import load_checkpoint
from dfptkd.engine.cli import main
from dfptkd.engine.config import DataConfig, OptimConfig, RunConfig, TeacherConfig, from_dict
from dfptkd.engine.errors import DfptkdError
from dfptkd.engine.lock import RunLock
from dfptkd.engine.log import RunLog
from dfptkd.engine.models import create_model

TIMEOUT_S = 120
STEPS_PER_EPOCH = 4


def tiny_config(out: Path, method: str = "ce", *, epochs: int = 2, **changes: Any) -> RunConfig:
    """Four steps an epoch; `kd` and `dfpt` find their teacher in `out.parent`."""
    config = RunConfig(
        recipe="tiny",
        method=method,
        student="cifar:resnet8_s2",
        epochs=epochs,
        global_batch=16,
        eval_batch=64,
        device="cpu",
        out=str(out),
        data=DataConfig(name="synthetic", image_size=16, num_classes=4, limit=64),
        teacher=TeacherConfig(
            name="cifar:resnet8_s2", weights=str(out.parent / "teacher.safetensors")
        ),
        optim=OptimConfig(lr=0.02, milestones=(0.5,), ema_decay=0.9),
    )
    return replace(config, **changes)


def write_teacher(folder: Path) -> None:
    """Random weights where `tiny_config` looks for them."""
    torch.manual_seed(7)
    model = create_model("cifar:resnet8_s2", num_classes=4)
    save_file(model.state_dict(), folder / "teacher.safetensors")


# Processes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a child ended: negative codes are signals."""

    code: int
    output: str


_context = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """Once a session. Python 3.11's server does not inherit sys.path, and then loads nothing."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    _context.set_forkserver_preload(["injectors"])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def in_child(function: Callable[..., object], *args: Any, folder: Path) -> Ended:
    """Run a function of this module in a process of its own; `folder` takes what it prints."""
    said = folder / "child-output.txt"
    process = start(_child, function, args, str(said))
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"child hangs: {said.read_text()}")
    return Ended(process.exitcode, said.read_text(errors="replace"))


def start(function: Callable[..., object], *args: Any) -> Any:
    """A child that runs beside the test; its `multiprocessing` process."""
    _start_server()
    process = _context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def _child(function: Callable[..., object], args: tuple[Any, ...], said: str) -> None:
    torch.set_num_threads(1)
    with open(said, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    try:
        code = function(*args)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            code = 120  # as Python leaves where the last flush fails
    os._exit(code if isinstance(code, int) else 0)


def train(config: RunConfig, *faults: Fault) -> int:
    """`dfptkd train --config` with faults; its exit code."""
    for fault in faults:
        fault.install()
    file = Path(config.out).parent / f"{Path(config.out).name}-config.json"
    file.write_text(json.dumps({"config": train_module.to_dict(config)}))
    return main(["train", "--config", str(file)])


def with_faults(act: Callable[[Path], None], out: Path, faults: tuple[Fault, ...]) -> int:
    """`act` with faults; the exit code that the command line would leave with."""
    for fault in faults:
        fault.install()
    try:
        act(out)
    except DfptkdError as error:
        lift_size_limit()  # what it says goes into a file too
        print(error)
        return error.exit_code
    return 0


# Faults ------------------------------------------------------------------------------------------


class Fault:
    """Something that goes wrong in the process where it is installed."""

    def install(self) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Kill(Fault):
    """SIGKILL at a step (of 1, 2, ...) and a point of it: what this process does then, undone."""

    step: int
    point: str
    """before or after the step; in its evaluation; before or after its checkpoint."""

    def install(self) -> None:
        trainer = train_module.Trainer

        def wrap(owner: type, name: str, before: str, after: str) -> None:
            original = getattr(owner, name)

            def call(this: Any, *args: Any, **kwargs: Any) -> Any:
                self._die_if(before, self._step(this, args))
                result = original(this, *args, **kwargs)
                self._die_if(after, self._step(this, args))
                return result

            setattr(owner, name, call)

        wrap(train_module.TrainStep, "__call__", "before", "after")
        wrap(trainer, "note", "in evaluation", "before the log")
        wrap(trainer, "save", "before saving", "after saving")

    def _step(self, this: Any, args: tuple[Any, ...]) -> int:
        return this.progress.step if hasattr(this, "progress") else args[1] + 1

    def _die_if(self, point: str, step: int) -> None:
        if (step, point) == (self.step, self.point):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class WholeSaves(Fault):
    """A checkpoint is on disk before the run goes on: which one a later kill leaves is certain."""

    def install(self) -> None:
        writer = train_module.CheckpointWriter
        begin = writer.save

        def save(this: Any, *args: Any, **kwargs: Any) -> None:
            begin(this, *args, **kwargs)
            this._wait()

        writer.save = save


KILL_POINTS = (
    "before",
    "after",
    "in evaluation",
    "before the log",
    "before saving",
    "after saving",
)


@dataclass(frozen=True)
class Refuse(Fault):
    """The disk refuses a kind of call on paths that contain a text, so many times."""

    call: str
    """A key of CALLS."""
    number: int
    """errno."""
    path: str = ""
    times: int = 1 << 30

    def install(self) -> None:
        left = [self.times]

        def refuse(path: object) -> None:
            if self.path in str(path) and left[0] > 0:
                left[0] -= 1
                raise OSError(self.number, os.strerror(self.number), str(path))

        wrap_calls({self.call}, lambda name, path, run: (refuse(path), run())[1])


@dataclass(frozen=True)
class SizeLimit(Fault):
    """No file of this process may grow beyond so many bytes (RLIMIT_FSIZE)."""

    size: int

    def install(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


def lift_size_limit() -> None:
    """Undo a SizeLimit."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@dataclass(frozen=True)
class NoSpace(Fault):
    """The disk says that it has so much room."""

    free: int

    def install(self) -> None:
        original = checkpoint_module.shutil.disk_usage
        checkpoint_module.shutil.disk_usage = lambda path: original(path)._replace(free=self.free)


@dataclass(frozen=True)
class Stdout(Fault):
    """Standard output is closed, absent, or a pipe that nobody reads, from the start on."""

    kind: str

    def install(self) -> None:
        if self.kind == "closed":
            sys.stdout.close()
        elif self.kind == "absent":
            sys.stdout = None
        else:
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, 1)


@dataclass(frozen=True)
class PlainConsole(Fault):
    """For negative controls: what is said goes to standard output as it is."""

    def install(self) -> None:
        log_module.Terminal = lambda _: sys.stdout


@dataclass(frozen=True)
class Surroundings(Fault):
    """Another time zone, locale, mask, working folder, and a clock that jumps."""

    zone: str = "UTC"
    encoding: str = "utf-8"
    umask: int = 0o022
    clock_s: float = 0.0

    def install(self) -> None:
        os.environ["TZ"] = self.zone
        time.tzset()
        os.umask(self.umask)
        sys.stdout = open(1, "w", closefd=False, encoding=self.encoding)  # noqa: SIM115
        original, calls = time.time, [0]

        def jumping() -> float:
            calls[0] += 1
            return original() + self.clock_s * calls[0]

        time.time = jumping


# File-system calls -------------------------------------------------------------------------------


def _writes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
    return any(letter in str(mode) for letter in "wax+")


# Name -> (module, attribute): every call through which our files reach the disk.
CALLS = {
    "mkdir": (os, "mkdir"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "unlink": (os, "unlink"),
    "rmdir": (os, "rmdir"),
    "fsync": (os, "fsync"),
    "truncate": (os, "truncate"),
    "open": (io, "open"),
    "write_text": (Path, "write_text"),
    "save_file": (checkpoint_module, "save_file"),
}


def wrap_calls(names: set[str], around: Callable[[str, object, Callable[[], Any]], Any]) -> None:
    """Put `around(name, path, run)` in the place of these calls; reading opens are left alone."""
    for name in names:
        owner, attribute = CALLS[name]
        original = getattr(owner, attribute)

        def call(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            if _name == "open" and not _writes(args, kwargs):
                return _original(*args, **kwargs)
            path = args[1] if _name == "save_file" else args[0]
            if _name == "fsync":
                path = os.readlink(f"/proc/self/fd/{path}")
            return around(_name, path, lambda: _original(*args, **kwargs))

        setattr(owner, attribute, call)
        if name == "open":
            builtins.open = call


def die_at_call(number: int, when: str) -> None:
    """This process ends at its `number`th file-system call: before, halfway through, or after."""
    seen = [0]

    def around(name: str, path: object, run: Callable[[], Any]) -> Any:
        seen[0] += 1
        if seen[0] != number:
            return run()
        if when == "before":
            os._exit(9)
        try:
            run()
        finally:
            if when == "halfway" and name in ("write_text", "save_file"):
                os.truncate(path, os.stat(path).st_size // 2)
            os._exit(9)

    wrap_calls(set(CALLS), around)


def crash_everywhere(
    prepare: Callable[[Path], None], act: Callable[[Path], None], root: str, result: str
) -> None:
    """Let `act` crash at every file-system call it makes, each time on a folder of its own.

    Runs in a child. Writes into `result`, as JSON, the folders of the crashes and the one where
    `act` ran through.
    """
    crashed: list[str] = []
    number, through = 0, ""
    prepare(Path(root) / "start")
    while not through:
        number += 1
        for when in ("before", "halfway", "after"):
            folder = Path(root) / f"{when}-{number}"
            shutil.copytree(Path(root) / "start", folder)
            child = os.fork()
            if child == 0:
                try:
                    die_at_call(number, when)
                    act(folder)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == 9:
                crashed.append(str(folder))
            elif code == 0:
                through = str(folder)
            else:
                raise AssertionError(f"{folder}: left with {code}")
    Path(result).write_text(json.dumps({"crashed": crashed, "through": through}))


def state_of_step(step: int, /, **more: Any) -> dict[str, Any]:
    """The least state that counts as one."""
    return {
        "step": step, "progress": {}, "scaler": {}, "alarmed": False, "data": {}, "config": {},
    } | more  # fmt: skip


def tensors_of(value: float) -> dict[str, torch.Tensor]:
    """Small tensors of several kinds, all of which tell the value."""
    return {
        "student.w": torch.full((4, 3), value, dtype=torch.float32),
        "meter": torch.full((), value, dtype=torch.float64),
        "rng.cpu": torch.full((5,), int(value), dtype=torch.uint8),
    }


def two_checkpoints(out: Path) -> None:
    """A run folder with the checkpoints 1 and 2."""
    for step in (1, 2):
        checkpoint_module.save_checkpoint(
            out / "checkpoints", tensors_of(step), state_of_step(step), keep=2, is_best=step == 1
        )


def save_third(out: Path) -> None:
    """One more, the best, on a worn disk: two are there and two are kept."""
    checkpoint_module.save_checkpoint(
        out / "checkpoints", tensors_of(3), state_of_step(3), keep=2, is_best=True
    )


def save_third_aside(out: Path) -> None:
    """As `save_third`, in the writer's thread."""
    writer = checkpoint_module.CheckpointWriter(out / "checkpoints", 2, retry_after=())
    writer.save(tensors_of(3), state_of_step(3), is_best=True)
    writer.finish()


def save_second_again(out: Path) -> None:
    """A step that has a checkpoint already."""
    checkpoint_module.save_checkpoint(
        out / "checkpoints", tensors_of(4), state_of_step(2, again=True), keep=2, is_best=False
    )


def save_second_again_carelessly(out: Path) -> None:
    """Negative control: the earlier one is deleted before the new one has its name."""

    def publish(partial: Path, final: Path) -> None:
        checkpoint_module.shutil.rmtree(final)
        partial.rename(final)

    checkpoint_module._publish = publish
    save_second_again(out)


def hold_lock(folder: str, ready: str) -> None:
    """Take the lock of a folder, say so, and hold it until killed, as `kill_holder` does."""
    with RunLock(Path(folder)):
        if os.fork() == 0:  # as a data worker does: the lock must not live as long as this one
            time.sleep(5)
            os._exit(0)
        Path(ready).touch()
        time.sleep(TIMEOUT_S)


def kill_holder(process: Any) -> None:
    """SIGKILL for the process, not for what it has forked."""
    process.kill()
    process.join()


def hang_up(terminal: str, out: str) -> None:
    """A progress bar on a terminal, for longer than the terminal lives."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handle = os.open(terminal, os.O_RDWR)
    os.dup2(handle, 1)
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    os.environ["TERM"] = "xterm"
    log = RunLog(Path(out), ["epoch", "step"], None)
    with log.progress(100, 0) as line:
        for step in range(100):
            time.sleep(0.01)
            line.update(step / 10, step, {"loss/total": 1.0}, 8.0)
    log.row({"epoch": 1, "step": 100})
    log.say("end")
    log.close()


# What is compared --------------------------------------------------------------------------------

CLOCKS = ("seconds", "images_per_second")


def metric_rows(out: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without what a clock says."""
    with open(out / "metrics.csv", newline="") as file:
        return [{k: v for k, v in r.items() if k not in CLOCKS} for r in csv.DictReader(file)]


def differences(a: Path, b: Path, step: int) -> list[str]:
    """Where the ends of two runs differ: tolerance 0 on every tensor, number and metric row."""
    ends = [load_checkpoint(out / "checkpoints" / f"step-{step}") for out in (a, b)]
    found = [f"tensor {n}" for n in ends[0].tensors.keys() ^ ends[1].tensors.keys()]
    for name in ends[0].tensors.keys() & ends[1].tensors.keys():
        x, y = (end.tensors[name] for end in ends)
        if x.dtype != y.dtype or not torch.equal(x, y):
            found.append(f"tensor {name}")
    states = []
    for end in ends:
        state = json.loads(json.dumps(end.state))
        for clock in ("seconds", "speeds"):
            state["progress"].pop(clock)
        for place in ("out", "max_steps"):
            state["config"].pop(place)
        state["config"]["teacher"].pop("weights")
        states.append(state)
    found += [f"state {k}" for k in states[0] if states[0][k] != states[1].get(k)]
    return found + (["metrics.csv"] if metric_rows(a) != metric_rows(b) else [])


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder -> SHA-256 of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def config_of(out: Path) -> RunConfig:
    """The configuration in a run.json."""
    return from_dict(RunConfig, json.loads((out / "run.json").read_text())["config"])


DISK_ERRORS = {"ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS, "EIO": errno.EIO}
