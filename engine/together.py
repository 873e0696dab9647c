"""Several runs in one process: they do a step each in turn, and share what is the same for all.

Shared are the data set, the frozen teacher's weights and, between runs whose sample order is the
same (`data.order_seed`), each batch, its normalised images and what the frozen teacher makes of
them. On a CPU every run ends with the bits that it would have had alone. On a GPU the steps of runs
of mode `graph` are one graph (joint_step.py), in which the teacher runs once on the batches of all;
where there is none, or no room for that, each run replays a graph of its own beside the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .data import Batch, Split, epoch_rows, num_replaced, steps_per_epoch, train_batches

Result = TypeVar("Result")


class SharedBatches:
    """An epoch's batches for runs that walk it in step: whoever asks first makes the batch."""

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        shard: tuple[int, int] = (0, 1),
        side_of: Callable[[int], int | None] = lambda epoch: None,
    ) -> None:
        self.split, self.seed, self.side_of = split, seed, side_of
        self.options: dict[str, Any] = {
            "batch_size": batch_size,
            "workers": workers,
            "shard": shard,
        }
        self.steps = steps_per_epoch(len(split), batch_size)
        self._batches: Iterator[Batch] = iter(())
        self._next = self._made = (-1, -1)  # (epoch, step)
        self._batch: Batch | None = None

    def epoch(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on."""
        for step in range(start_step, self.steps):
            yield self._get(epoch, step)

    def rows(self, epoch: int, step: int) -> Tensor:
        """int64 [B]: the samples of one batch."""
        options = {k: self.options[k] for k in ("batch_size", "shard")}
        return epoch_rows(self.split, seed=self.seed, epoch=epoch, **options)[step]

    def num_replaced(self, epoch: int, start: int, stop: int) -> int:
        """Images of these steps of an epoch that stand in for one in quarantine."""
        size = self.options["batch_size"]
        return num_replaced(
            self.split, batch_size=size, seed=self.seed, epoch=epoch, start=start, stop=stop
        )

    def _get(self, epoch: int, step: int) -> Batch:
        if self._made != (epoch, step):
            if self._next != (epoch, step):
                self._batches = train_batches(
                    self.split,
                    seed=self.seed,
                    epoch=epoch,
                    start_step=step,
                    side=self.side_of(epoch),
                    **self.options,
                )
            self._batch = next(self._batches)
            self._made, self._next = (epoch, step), (epoch, step + 1)
        assert self._batch is not None
        return self._batch


class RandomState:
    """The global random generators as one run sees them while others take turns with it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._read()

    def _read(self) -> None:
        self.cpu = torch.get_rng_state()
        if self.device.type == "cuda":
            self.cuda = torch.cuda.get_rng_state(self.device)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The generators stand where this run left them, inside the block."""
        torch.set_rng_state(self.cpu)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, self.device)
        try:
            yield
        finally:
            self._read()


def take_turns(
    runs: Sequence[Generator[None, None, Result]],
    states: Sequence[RandomState],
    waiting: tuple[type[Exception], ...] = (Exception,),
) -> list[Result]:
    """Advance every run by one step after the other, to their ends.

    A run that fails does not stop the others; the first failure is raised when all have ended.
    Failures that are not among `waiting` are raised at once.

    Args:
        runs: Each yields after a step and returns its result.
        states: The random generators of each.
        waiting: Failures after which the other runs go on.
    """
    results: dict[int, Result] = {}
    failures: list[Exception] = []
    active = dict(enumerate(runs))
    while active:
        for i, run in list(active.items()):
            try:
                with states[i].installed():
                    next(run)
            except StopIteration as end:
                results[i] = end.value
                del active[i]
            except waiting as error:
                failures.append(error)
                del active[i]
    if failures:
        raise failures[0]
    return [results[i] for i in range(len(runs))]
