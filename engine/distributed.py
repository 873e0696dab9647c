"""Many processes, one run: who this process is, and the few things that all of them do together.

torchrun starts the processes and tells each in RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* who it is;
a process that nobody told anything is a world of its own and communicates with nobody. Tensors of a
step go over NCCL (CUDA) or gloo (CPU); decisions, which rank 0 takes and the others follow, go over
a second group, always gloo, as JSON or safetensors: nothing that a rank sends can run code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import DataError, DfptkdError, NumericError, Stopped, StorageError, UsageError
from .files import first_line
from .preemption import StopRequest

Result = TypeVar("Result")
_connections = itertools.count()


class World:
    """The processes of a run, seen from one of them.

    Args:
        rank: Number of this process among all of them, from 0.
        size: How many there are.
        local_rank: Its number among those of this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.control: Any = None

    @classmethod
    def from_environment(cls) -> World:
        """The world that torchrun's variables describe; of size 1 without them.

        Raises:
            UsageError: There are several processes, and a variable is missing or no number.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        numbers = []
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            value = os.environ.get(name)
            if value is None or not value.isdecimal():
                raise UsageError(f"{name}={value!r}: expected a number, as torchrun sets it")
            numbers.append(int(value))
        if "MASTER_ADDR" not in os.environ:
            raise UsageError("MASTER_ADDR is not set: expected a host name, as torchrun sets it")
        return cls(*numbers[:3])

    @property
    def is_main(self) -> bool:
        """Whether this process decides, writes and speaks for all."""
        return self.rank == 0

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, size), as `train_batches` and `test_batches` take it."""
        return self.rank, self.size

    @contextmanager
    def connected(self, device: torch.device, timeout_s: float = 600.0) -> Iterator[None]:
        """The processes can talk to each other inside; entered twice, the outer one counts.

        Args:
            device: Of this process.
            timeout_s: How long a process waits for the others in one exchange: longer than the
                first step takes to compile, as rank 0 alone may be busy with it.
        """
        if self.size == 1 or self.control is not None:
            yield
            return
        limit = f"within --step.timeout {timeout_s:g} s"
        try:
            self._connect(device, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise DfptkdError(
                f"rank {self.rank}: the {self.size} processes of the run have not met at {place} "
                f"{limit} ({first_line(error)[:200]}): expected all of them started, and a free "
                "port"
            ) from error
        try:
            try:
                yield
            except Stopped:
                self.exchange(None)
                raise
            self.exchange(None)  # a launcher ends the others when one leaves: none before all can
        except RuntimeError as error:
            if not is_of_others(error):
                raise
            raise DfptkdError(
                f"rank {self.rank}: another process is gone, or has not answered {limit} "
                f"({first_line(error)[:200]}); what it said last is the cause"
            ) from error
        finally:  # after a failure too: the others then fail at once and do not wait
            self.control = None
            dist.destroy_process_group()

    def _connect(self, device: torch.device, timeout: timedelta) -> None:
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            self.size,
            is_master=self.is_main and not served,
            timeout=timeout,
        )
        # The store outlives a restart of the workers: without a name of their own they would read
        # addresses of processes that are dead.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        scoped = dist.PrefixStore(f"gen{attempt}.{next(_connections)}", store)
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=scoped,
            rank=self.rank,
            world_size=self.size,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
        self.control = dist.new_group(backend="gloo", timeout=timeout)

    # Tensors, on the run's device --------------------------------------------------------------

    def all_true(self, flags: Tensor) -> Tensor:
        """Bool [N]: which are true in every process; the host waits for nothing on a GPU."""
        least = flags.to(torch.int32)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return least.bool()

    def total(self, tensor: Tensor) -> Tensor:
        """Its sum over the processes, in memory of its own."""
        total = tensor.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def copy_from_main(self, tensor: Tensor) -> Tensor:
        """Overwrites a contiguous tensor with that of rank 0, and returns it."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def all_rows(self, rows: Tensor, count: int) -> Tensor:
        """The `count` rows of which each process holds those of its `torch.tensor_split`."""
        if self.size == 1:
            return rows
        sizes = [len(part) for part in torch.arange(count).tensor_split(self.size)]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    # Decisions ---------------------------------------------------------------------------------

    def exchange(self, value: Any) -> list[Any]:
        """JSON data of every process, by rank."""
        if self.size == 1:
            return [value]
        return [json.loads(found) for found in self._exchange_bytes(json.dumps(value).encode())]

    def gather_tensors(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Small tensors of every process, by rank, on the CPU."""
        if self.size == 1:
            return [tensors]
        from safetensors.torch import load, save

        own = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        return [load(found) for found in self._exchange_bytes(own)]

    def tensors_of_main(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Those of rank 0, on the CPU; what the others pass is not looked at."""
        if self.size == 1:
            assert tensors is not None
            return tensors
        from safetensors.torch import load, save

        found = self._bytes_of_main(save(tensors or {}) if self.is_main else b"")
        return load(found) if tensors is None else tensors

    def of_main(self, make: Callable[[], Result]) -> Result:
        """What `make` gives, or raises, in rank 0, where alone it is called; JSON data."""
        if self.size == 1:
            return make()
        message: dict[str, Any] = {}
        error: DfptkdError | None = None
        if self.is_main:
            try:
                message["value"] = make()
            except DfptkdError as raised:
                error, message = raised, {"error": _describe(raised)}
        message = json.loads(self._bytes_of_main(json.dumps(message).encode()))
        if "error" in message:
            raise error or _echo(message["error"])
        return message["value"]

    def everywhere(self, work: Callable[[], Result]) -> Result:
        """Does `work`, which must not communicate, in every process; fails in all if in one.

        The first process of a machine goes ahead, so that it alone fills a cache.
        """
        value: Any = None
        for first in (True, False):
            error: DfptkdError | None = None
            if (self.local_rank == 0) == first:
                try:
                    value = work()
                except DfptkdError as raised:
                    error = raised
            found = self.exchange(None if error is None else _describe(error))
            failures = [failure for failure in found if failure is not None]
            if failures:
                raise error or _echo(failures[0])
            if self.size == 1:
                break
        return value

    def _exchange_bytes(self, own: bytes) -> list[bytes]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self.control)
        longest = max(int(size) for size in sizes)
        padded = _tensor_of(own.ljust(longest, b"\0"))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.control)
        return [
            part.numpy().tobytes()[: int(size)] for part, size in zip(parts, sizes, strict=True)
        ]

    def _bytes_of_main(self, own: bytes) -> bytes:
        size = torch.tensor([len(own)])
        dist.broadcast(size, 0, group=self.control)
        found = _tensor_of(own) if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(found, 0, group=self.control)
        return found.numpy().tobytes()

    # Training ----------------------------------------------------------------------------------

    def replicate(self, method: nn.Module) -> nn.Module:
        """`method` with gradients averaged over the processes in every backward pass.

        Frozen parameters are left out, and all buffers: the step's gate copies those that move.
        """
        if self.size == 1:
            return method
        frozen = [name for name, p in method.named_parameters() if not p.requires_grad]
        buffers = [name for name, _ in method.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            method, [*frozen, *buffers]
        )
        # Compiled regions stay those of one process: torch would cut them at its buckets' edges.
        # Each region's gradients travel while those of the regions before it are computed.
        torch._dynamo.config.optimize_ddp = False
        # Of a 1x1 kernel row-major and channels_last are one layout under two names.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view", UserWarning)
        return DistributedDataParallel(method, gradient_as_bucket_view=True)

    def seed_of_rank(self, seed: int, step: int) -> int:
        """Where the random generator of a rank that has no state of its own starts."""
        digest = hashlib.sha256(f"rank {self.rank} seed {seed} step {step}".encode()).digest()
        return int.from_bytes(digest[:4], "little")


SINGLE = World()


def is_of_others(error: BaseException) -> bool:
    """Whether an error of torch's says that another process does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def accumulating(replicas: nn.Module, is_last: bool) -> AbstractContextManager:
    """Around forward and backward of a part of a batch; gradients travel with the last one."""
    if is_last or not isinstance(replicas, DistributedDataParallel):
        return nullcontext()
    return replicas.no_sync()


def synchronise_batch_norms(networks: Iterable[nn.Module]) -> None:
    """Make every BatchNorm normalise by the statistics of all processes' images; in place.

    Raises:
        UsageError: A network has BatchNorms that do more than torch's own.
    """
    for network in networks:
        for name, module in network.named_modules():
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if is_norm and not type(module).__module__.startswith("torch.nn."):
                raise UsageError(
                    f"step.sync_bn=True: {name} is a {type(module).__name__}: expected torch's own "
                    "BatchNorm"
                )
        nn.SyncBatchNorm.convert_sync_batchnorm(network)


class StopVote:
    """Whether any process was asked to stop, as all of them see it at the same step; and whether
    rank 0, whose clock counts, wants a checkpoint.

    Each step starts a vote on the host and reads the one that the step before has started, so that
    no step waits for it.
    """

    def __init__(self, request: StopRequest, world: World) -> None:
        self.request, self.world = request, world
        self._parent = os.getppid()
        self._running: tuple[Any, Tensor] | None = None
        self._decided = 0
        self.wants_save = False
        """Set by rank 0: a checkpoint is due. `take_save` is true once, in all processes alike."""
        self._save_decided = False

    @property
    def number(self) -> int:
        """The signal that stops the run; 0 for none."""
        if self.world.size > 1:
            return self._decided
        return self.request.number

    def __bool__(self) -> bool:
        return self.number != 0

    def take_save(self) -> bool:
        """Whether to write a checkpoint now."""
        if self.world.size == 1:
            self._save_decided, self.wants_save = self.wants_save, False
        decided, self._save_decided = self._save_decided, False
        return decided

    def after_step(self) -> None:
        """Read the last vote and start the next; to be called after every step, by all."""
        if self.world.size > 1 and not self._decided:
            self._finish()
            self._start()

    def now(self) -> None:
        """Vote and wait for what comes out; for the edges of epochs, by all."""
        if self.world.size > 1 and not self._decided:
            self._finish()
            if not self._decided:
                self._start()
                self._finish()

    def _start(self) -> None:
        if os.getppid() != self._parent:  # the launcher is gone, and nobody would end this process
            self.request.ask_for_hangup()
        vote = torch.tensor([self.request.number, int(self.wants_save)], dtype=torch.int32)
        self.wants_save = False
        work = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        self._running = work, vote

    def _finish(self) -> None:
        if self._running is not None:
            work, vote = self._running
            work.wait()
            self._decided, self._running = int(vote[0]), None
            self._save_decided |= bool(vote[1])


def _describe(error: DfptkdError) -> list[Any]:
    return [error.exit_code, str(error)]


def _echo(description: Sequence[Any]) -> DfptkdError:
    """The error of another process."""
    kinds = {kind.exit_code: kind for kind in (UsageError, DataError, NumericError, StorageError)}
    code, message = description
    error = kinds.get(code, DfptkdError)(message)
    error.is_echo = True
    return error


def _tensor_of(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
