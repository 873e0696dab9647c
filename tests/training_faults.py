"""Faults in a run that trains, added to those of injectors.py; also one rank under a launcher:

training_faults.py CONFIG.json '[["Signal", {"step": 5, ...}], ...]'
"""

from __future__ import annotations

import faulthandler
import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import torch
from injectors import TIMEOUT_S, Ended, Fault, Kill, Refuse, _child, start, train

from dfptkd.engine import checkpoint as checkpoint_module
from dfptkd.engine import log as log_module
from dfptkd.engine import run_state as run_state_module
from dfptkd.engine import train as train_module
from dfptkd.engine.cli import main
from dfptkd.engine.config import RunConfig, from_dict
from dfptkd.engine.data import torchvision_loader
from dfptkd.engine.errors import DataError, DfptkdError
from dfptkd.engine.export import export_student
from dfptkd.engine.together import SharedBatches
from dfptkd.engine.train import run_seeds

LONG_S = 600.0
HERE = Path(__file__).parent


# Processes ---------------------------------------------------------------------------------------


def rank_of(rank: int, size: int, port: int, config: RunConfig, *faults: Fault) -> int:
    """`train` as one of several processes, without a launcher."""
    _join(rank, size, port)
    faulthandler.register(signal.SIGUSR2)  # where it hangs, if it does
    return train(config, *faults)


def _join(rank: int, size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    """One that nobody listens on yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_ranks(
    config: RunConfig, *faults: Fault, folder: Path, size: int = 2, wait_s: float = TIMEOUT_S
) -> list[Ended]:
    """`train` in several processes; those that have not ended after `wait_s` get the code 1000."""
    port = free_port()
    said = [folder / f"rank{rank}-output.txt" for rank in range(size)]
    ranks = [
        start(_child, rank_of, (rank, size, port, config, *faults), str(said[rank]))
        for rank in range(size)
    ]
    end = time.monotonic() + wait_s
    found = []
    for process in ranks:
        process.join(max(end - time.monotonic(), 0))
    stuck = [process.is_alive() for process in ranks]
    for process, hangs in zip(ranks, stuck, strict=True):
        if hangs:  # both say where before either is gone
            os.kill(process.pid, signal.SIGUSR2)
    time.sleep(0.5 if any(stuck) else 0)
    for process, file, hangs in zip(ranks, said, stuck, strict=True):
        process.kill()
        process.join()
        found.append(Ended(1000 if hangs else process.exitcode, file.read_text(errors="replace")))
    return found


def train_with_workers(config: RunConfig, *faults: Fault) -> int:
    """`train` in a child that may have children, forked as those of any process are."""
    multiprocessing.current_process()._config["daemon"] = False
    multiprocessing.set_start_method("fork", force=True)
    return train(config, *faults)


def program(config: RunConfig, *faults: Fault, launcher: tuple[str, ...] = ()) -> Popen[str]:
    """`train` in a process that Python has started as ever, or that torchrun starts."""
    file = Path(config.out).with_suffix(".config.json")
    file.write_text(json.dumps(train_module.to_dict(config)))
    named = json.dumps([[type(fault).__name__, asdict(fault)] for fault in faults])
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return Popen(
        [sys.executable, *launcher, __file__, str(file), named],
        env={**os.environ, "PYTHONPATH": path},
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
    )


def end_of(process: Popen[str]) -> Ended:
    """How it ends."""
    said = process.communicate(timeout=TIMEOUT_S)[0]
    return Ended(process.returncode, said)


def train_all_seeds(config: RunConfig, *faults: Fault) -> int:
    """A run for each of `config.seeds` in one process."""
    for fault in faults:
        fault.install()
    try:
        run_seeds(config)
    except DfptkdError as error:
        print(error)
        return error.exit_code
    return 0


def stop_and_go_on(config: RunConfig, cycles: int, result: str) -> int:
    """Stop a run by SIGTERM after every second step and go on, all in this process.

    Writes, for each cycle, the numbers of open descriptors, threads and children into `result`.
    """
    at = [-1]
    original = train_module.TrainStep.__call__

    def call(step: Any, batch: Any, number: int) -> None:
        original(step, batch, number)
        if number == at[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    train_module.TrainStep.__call__ = call
    counts = []
    file = Path(config.out).with_suffix(".json")
    file.write_text(json.dumps({"config": train_module.to_dict(config)}))
    for cycle in range(cycles):
        at[0] = 2 * cycle + 1
        assert main(["train", "--config", str(file)]) == 75
        children = len(multiprocessing.active_children())
        counts.append([len(os.listdir("/proc/self/fd")), threading.active_count(), children])
    Path(result).write_text(json.dumps(counts))
    return 0


def copy_run(source: str, out: Path) -> None:
    """For `crash_everywhere`: a finished run to start from."""
    shutil.copytree(source, out)


def export_weights(out: Path) -> None:
    """Replace an export by another one."""
    export_student(out, formats=["safetensors"], overwrite=True, say=lambda _: None)


def export_weights_in_place(out: Path) -> None:
    """Negative control: the file is written under its own name."""
    target = out / "export/student.safetensors"
    target.write_bytes((out / "student.safetensors").read_bytes())


# Faults ------------------------------------------------------------------------------------------


def around_step(act: Callable[[Any, int, Callable[[], None]], None]) -> None:
    """`act(trainer step, number from 0, do the step)` in the place of every step."""
    original = train_module.TrainStep.__call__

    def call(step: Any, batch: Any, number: int) -> None:
        act(step, number, lambda: original(step, batch, number))

    train_module.TrainStep.__call__ = call


@dataclass(frozen=True)
class AtStep(Fault):
    """Something that happens after a step (from 0) in one rank, or in all (-1)."""

    step: int
    rank: int = -1

    def install(self) -> None:
        def act(step: Any, number: int, run: Callable[[], None]) -> None:
            run()
            if number == self.step and self.rank in (-1, step.world.rank):
                self.happen(step)

        around_step(act)

    def happen(self, step: Any) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Signal(AtStep):
    """A signal to this process, its launcher, or this process and its data workers; a second one
    some time later."""

    number: int = signal.SIGTERM
    to: str = "self"
    again_after: float | None = None

    def happen(self, step: Any) -> None:
        if self.to == "group":
            pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
            assert len(pids) > 1
            if os.fork() == 0:  # a worker knows who sends
                time.sleep(0.3)  # the run waits for the next batch then
                for pid in pids[::-1]:
                    os.kill(pid, self.number)
                os._exit(0)
            return
        pid = os.getppid() if self.to == "launcher" else os.getpid()
        os.kill(pid, self.number)
        if self.to == "launcher":
            time.sleep(0.5)
        if self.again_after is not None:
            timer = threading.Timer(self.again_after, os.kill, (pid, self.number))
            timer.daemon = True
            timer.start()


@dataclass(frozen=True)
class DefaultSignals(Fault):
    """For negative controls: nobody handles a signal."""

    def install(self) -> None:
        train_module.stop_on_signal = functools.partial(_no_handler)


class _no_handler:
    def __enter__(self) -> Any:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return train_module.StopRequest()

    def __exit__(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class PatientSignals(Fault):
    """For negative controls: a second signal is taken as one more request."""

    def install(self) -> None:
        def handle(request: Any, number: int, frame: Any) -> None:
            request.signal = signal.Signals(number)

        train_module.StopRequest.handle = handle


@dataclass(frozen=True)
class SlowDisk(Fault):
    """Writing the tensors of a checkpoint of this step or later takes so long."""

    seconds: float
    step: int = 0

    def install(self) -> None:
        original = checkpoint_module.save_file

        def slow(tensors: Any, path: Path, *args: Any) -> None:
            original(tensors, path, *args)
            if int(path.parent.name.split(".")[1].removeprefix("step-")) >= self.step:
                time.sleep(self.seconds)

        checkpoint_module.save_file = slow


@dataclass(frozen=True)
class SlowRefusal(Refuse):
    """A disk that refuses takes its time."""

    def install(self) -> None:
        super().install()
        original = checkpoint_module.save_file

        def slow(tensors: Any, path: Path, *args: Any) -> None:
            if self.path in str(path):
                time.sleep(0.7)
            original(tensors, path, *args)

        checkpoint_module.save_file = slow


@dataclass(frozen=True)
class RankKill(Kill):
    """In rank 1 alone."""

    def install(self) -> None:
        if os.environ["RANK"] == "1":
            super().install()


@dataclass(frozen=True)
class NoRetries(Fault):
    """A save that is refused is not tried again at once."""

    def install(self) -> None:
        writer = train_module.CheckpointWriter
        train_module.CheckpointWriter = functools.partial(writer, retry_after=())


@dataclass(frozen=True)
class UntriedStorage(Fault):
    """For negative controls: nobody tries the disk before the first step."""

    def install(self) -> None:
        train_module.Trainer.try_storage = lambda trainer: None


@dataclass(frozen=True)
class SynchronousPoll(Fault):
    """For negative controls: a save that is under way is not waited for before the next one."""

    def install(self) -> None:
        def poll(trainer: Any) -> None:
            error = trainer.writer.poll()
            if error is not None:
                trainer.log.warn("checkpoint_failed", str(error))

        train_module.Trainer.settle_last_save = poll


@dataclass(frozen=True)
class Spoil(Fault):
    """The images of these steps hold NaN, in one rank or in all (-1), and so do those that are
    looked at again afterwards."""

    first: int
    last: int
    rank: int = -1

    def install(self) -> None:
        trainer_step = train_module.TrainStep
        plain, number = trainer_step._image_parts, [0]

        def spoilt(step: Any, batch: Any) -> Any:
            parts = plain(step, batch)
            bad = self.first <= number[0] <= self.last and self.rank in (-1, step.world.rank)
            return tuple(part * math.nan for part in parts) if bad else parts

        def act(step: Any, at: int, run: Callable[[], None]) -> None:
            number[0] = at
            run()

        trainer_step._image_parts = spoilt
        around_step(act)


@dataclass(frozen=True)
class Forgetful(Fault):
    """For negative controls: a run that goes on has lost its optimiser's momentum."""

    def install(self) -> None:
        restored = run_state_module.restore_optimizer

        def forget(optimizer: Any, tensors: Any) -> None:
            restored(optimizer, tensors)
            for value in checkpoint_module.optimizer_tensors(optimizer).values():
                value.zero_()

        run_state_module.restore_optimizer = forget


@dataclass(frozen=True)
class OrderOfRank(Fault):
    """For negative controls: each rank shuffles by a seed of its own."""

    def install(self) -> None:
        original = SharedBatches.__init__

        def init(batches: Any, *args: Any, **options: Any) -> None:
            original(batches, *args, **options)
            batches.seed += batches.options["shard"][0]

        SharedBatches.__init__ = init


@dataclass(frozen=True)
class DrawsOfWorker(Fault):
    """For negative controls: a process that decodes draws crops by a seed of its own."""

    def install(self) -> None:
        original = torchvision_loader.TorchvisionSplit.decode

        def decode(split: Any, samples: Any, seed: int, epoch: int, side: Any = None) -> Any:
            worker = torch.utils.data.get_worker_info()
            own = seed if worker is None else seed + 1 + worker.id
            return original(split, samples, own, epoch, side)

        torchvision_loader.TorchvisionSplit.decode = decode


@dataclass(frozen=True)
class BlackForLost(Fault):
    """For negative controls: a picture that is gone is a black one."""

    def install(self) -> None:
        original = torchvision_loader.TorchvisionSplit.open

        def opened(split: Any, sample: int) -> Any:
            try:
                return original(split, sample)
            except DataError:
                return torchvision_loader.Image.new("RGB", (32, 32))

        torchvision_loader.TorchvisionSplit.open = opened


@dataclass(frozen=True)
class NeverBack(Fault):
    """For negative controls: skipped steps are nobody's business."""

    def install(self) -> None:
        train_module.Trainer.are_too_many = lambda trainer, counts: False
        train_module.Trainer.check_skips = lambda trainer: None


@dataclass(frozen=True)
class Record(Fault):
    """The samples that this rank takes in each step, one JSON line each."""

    path: str

    def install(self) -> None:
        original = train_module.TrainStep.__call__

        def call(step: Any, batch: Any, number: int) -> None:
            pixels = batch.images.double().mul(torch.arange(batch.images[0].numel()).view(
                batch.images[0].shape)).sum().item()  # fmt: skip
            line = [number, batch.indices.tolist(), pixels]
            with open(f"{self.path}-rank{step.world.rank}", "a") as file:
                file.write(json.dumps(line) + "\n")
            original(step, batch, number)

        train_module.TrainStep.__call__ = call


@dataclass(frozen=True)
class HangInLoader(Fault):
    """The batch of a step never comes in one rank."""

    step: int
    rank: int = 0

    def install(self) -> None:
        original = SharedBatches._get

        def get(batches: Any, epoch: int, step: int) -> Any:
            at = epoch * batches.steps + step
            if at == self.step and batches.options["shard"][0] == self.rank:
                time.sleep(LONG_S)
            return original(batches, epoch, step)

        SharedBatches._get = get


@dataclass(frozen=True)
class HangInWorker(Fault):
    """A data worker never decodes a sample; the workers' process ids go into a file."""

    sample: int
    pids: str

    def install(self) -> None:
        original = torchvision_loader.TorchvisionSplit.open
        parent = os.getpid()

        def opened(split: Any, sample: int) -> Any:
            if os.getpid() != parent:
                with open(self.pids, "a") as file:
                    file.write(f"{os.getpid()}\n")
                if sample == self.sample:
                    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                    time.sleep(LONG_S)
            return original(split, sample)

        torchvision_loader.TorchvisionSplit.open = opened


@dataclass(frozen=True)
class SlowPictures(Fault):
    """Decoding an image takes so long."""

    seconds: float

    def install(self) -> None:
        original = torchvision_loader.TorchvisionSplit.open

        def opened(split: Any, sample: int) -> Any:
            time.sleep(self.seconds)
            return original(split, sample)

        torchvision_loader.TorchvisionSplit.open = opened


@dataclass(frozen=True)
class HangInStep(AtStep):
    """A rank stays in a step, before it votes on whether to stop."""

    def happen(self, step: Any) -> None:
        time.sleep(LONG_S)


@dataclass(frozen=True)
class DieAtModel(Fault):
    """A rank is gone when it makes its networks."""

    rank: int

    def install(self) -> None:
        if os.environ["RANK"] == str(self.rank):
            train_module.create_model = lambda *args, **options: os._exit(9)


@dataclass(frozen=True)
class ShortGrace(Fault):
    """A hanging process ends itself soon after the others; or not at all."""

    seconds: float

    def install(self) -> None:
        train_module.STEP_GRACE_S = self.seconds


@dataclass(frozen=True)
class NoWatchdog(Fault):
    """For negative controls: nobody watches."""

    def install(self) -> None:
        train_module.Watchdog._watch = lambda watchdog: None


@dataclass(frozen=True)
class HungStatus(Fault):
    """status.json cannot be written for ever once a step is done: its disk hangs."""

    step: int

    def install(self) -> None:
        hangs = [False]
        original = log_module.write_json

        def write(path: Path, value: Any) -> None:
            if hangs[0] and path.name == "status.json":
                time.sleep(LONG_S)
            original(path, value)

        def act(step: Any, number: int, run: Callable[[], None]) -> None:
            run()
            hangs[0] |= number == self.step

        log_module.write_json = write
        around_step(act)


@dataclass(frozen=True)
class KillWorker(AtStep):
    """SIGKILL to a data worker."""

    def happen(self, step: Any) -> None:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


@dataclass(frozen=True)
class Unexplained(Fault):
    """For negative controls: what torch raises goes out as it is."""

    def install(self) -> None:
        train_module.explained = lambda error, *_: error


@dataclass(frozen=True)
class TermEndsWorker(Fault):
    """For negative controls: a data worker ends at anybody's SIGTERM."""

    def install(self) -> None:
        torchvision_loader._leave_for_parent_alone = None


@dataclass(frozen=True)
class Vanish(AtStep):
    """Files are deleted."""

    paths: tuple[str, ...] = ()

    def happen(self, step: Any) -> None:
        for path in self.paths:
            os.unlink(path)


@dataclass(frozen=True)
class LittleMemory(Fault):
    """The device holds so many images in a step, and so many in an evaluation."""

    step: int = 1 << 30
    evaluation: int = 1 << 30

    def install(self) -> None:
        forward = train_module.create_model

        def check(model: Any, inputs: tuple[Any, ...]) -> None:
            limit = self.step if model.training else self.evaluation
            if len(inputs[0]) > limit:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"
                )

        def made(name: str, **options: Any) -> Any:
            model = forward(name, **options)
            model.register_forward_pre_hook(check)
            return model

        train_module.create_model = made


@dataclass(frozen=True)
class Drift(AtStep):
    """A weight of the frozen teacher moves by one bit."""

    def happen(self, step: Any) -> None:
        weight = next(step.method.frozen_teacher().parameters())
        with torch.no_grad():
            weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(math.inf))


@dataclass(frozen=True)
class AtRandom(Fault):
    """A signal at a moment between now and so many seconds later, or counted from the first step.

    `at` in 0..1 says where.
    """

    number: int
    at: float
    startup: bool
    span_s: float

    def install(self) -> None:
        if self.startup:
            self._start()
            return
        started = [False]

        def act(step: Any, number: int, run: Callable[[], None]) -> None:
            if not started[0]:
                started[0] = True
                self._start()
            run()

        around_step(act)

    def _start(self) -> None:
        timer = threading.Timer(self.at * self.span_s, os.kill, (os.getpid(), self.number))
        timer.daemon = True
        timer.start()


def random_moment(rng: random.Random, span_s: float) -> AtRandom:
    """SIGKILL in two cases of three, now and then before the run has begun."""
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    return AtRandom(int(number), rng.random(), rng.random() < 0.15, span_s)


def on_pictures(config: RunConfig, root: Path, workers: int) -> RunConfig:
    """The same run on an image folder."""
    data = replace(
        config.data, name="folder", root=str(root), loader="torchvision", workers=workers,
        limit=None,
    )  # fmt: skip
    return replace(config, data=data, global_batch=8)


if __name__ == "__main__":
    torch.set_num_threads(1)
    values = json.loads(Path(sys.argv[1]).read_text())
    chosen = [globals()[name](**options) for name, options in json.loads(sys.argv[2])]
    sys.exit(train(from_dict(RunConfig, values), *chosen))
