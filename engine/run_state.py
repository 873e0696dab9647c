"""The tensors of a checkpoint: all that the next step of a run depends on, taken and put back."""

from __future__ import annotations

import torch

from .checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from .distributed import World
from .errors import DataError
from .step import TrainStep

METHOD_STATE = ("student.", "prompt.", "crd.")  # how names of what a method trains begin


class RunState:
    """What training moves: networks, optimiser, average, counts, random generators.

    Args:
        step: Holds it all.
        world: Each process has random generators, and counts of its own images.
    """

    def __init__(self, step: TrainStep, world: World) -> None:
        self.step, self.world = step, world

    def whole(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds; every process must call it."""
        tensors = self.tensors()
        for rank, own in enumerate(self.world.gather_tensors(self._own())):
            tensors |= {f"{_prefix(rank)}{name}": value for name, value in own.items()}
        return tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        """The same of one process."""
        step = self.step
        ema = {} if step.ema is None else step.ema.state_dict()
        return {
            **step.method.trained_state(),
            **optimizer_tensors(step.optimizer),
            **{f"ema.{name}": value for name, value in ema.items()},
            "skipped": step.gate.counts[:2],
            **self._own(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back what `whole` has taken, in any number of processes.

        Raises:
            DataError: The checkpoint is another model's or another optimiser's.
        """
        ranks = max(checkpoint.state.get("world_size", 1), self.world.size)
        optional = ("rng", "optimizer", *(f"rank{rank}" for rank in range(ranks)))
        checkpoint.check_tensors(self.tensors(), optional=optional)
        self.restore_networks(checkpoint)
        self.step.restore(checkpoint.state["step"])
        self.step.gate.counts[:2] = checkpoint.tensors["skipped"]
        self._restore_own(checkpoint)

    def restore_networks(self, checkpoint: Checkpoint) -> None:
        """What moves by learning alone: networks, optimiser, fp16's scale, average.

        Raises:
            DataError: The checkpoint is another model's or another optimiser's.
        """
        tensors, step = checkpoint.tensors, self.step
        own = {k: v for k, v in tensors.items() if k.startswith(METHOD_STATE)}
        try:
            step.method.load_trained_state(own)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{checkpoint.path}: another model's checkpoint: {reason}") from error
        restore_optimizer(step.optimizer, tensors)
        step.scaler.load_state_dict(checkpoint.state["scaler"])
        if step.ema is not None:
            step.ema.load_state_dict(
                {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
            )

    def _own(self) -> dict[str, torch.Tensor]:
        """What differs between the processes."""
        own = {"meter": self.step.meter.sums, "rng.cpu": torch.get_rng_state()}
        if self.step.device.type == "cuda":
            own["rng.cuda"] = torch.cuda.get_rng_state(self.step.device)
        return own

    def _restore_own(self, checkpoint: Checkpoint) -> None:
        """Inverse of `_own`; the counts of processes that are no more go to those that are."""
        tensors, then = checkpoint.tensors, checkpoint.state.get("world_size", 1)
        rank, now = self.world.shard
        meters = [tensors[f"{_prefix(r)}meter"] for r in range(rank, then, now)]
        self.step.meter.reset()
        for meter in meters:
            self.step.meter.sums += meter.to(self.step.device)
        if rank >= then:
            seed = self.step.config.seed
            torch.manual_seed(self.world.seed_of_rank(seed, checkpoint.step))
            return
        torch.set_rng_state(tensors[f"{_prefix(rank)}rng.cpu"])
        cuda = tensors.get(f"{_prefix(rank)}rng.cuda")
        if cuda is not None and self.step.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.step.device)


def _prefix(rank: int) -> str:
    """Before the names of a rank's own tensors in a checkpoint; rank 0's are a lone process's."""
    return f"rank{rank}." if rank else ""
