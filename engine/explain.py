"""What torch raises when it is not to blame, as errors that say what to do about it."""

from __future__ import annotations

import torch

from .config import RunConfig
from .data.torchvision_loader import worker_died
from .distributed import World, is_of_others
from .errors import DfptkdError, OutOfMemory
from .files import first_line

EVALUATION = "evaluation"
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory")


def explained(error: BaseException, doing: str, config: RunConfig, world: World) -> BaseException:
    """The error in our words, or itself where it is a defect.

    Args:
        error: What ended a run.
        doing: What the run was at then.
        config: The run.
        world: Its processes.
    """
    if isinstance(error, DfptkdError) or not isinstance(error, (RuntimeError, MemoryError)):
        return error
    if _is_of_memory(error):
        return OutOfMemory(
            f"rank {world.rank}: out of memory in {doing} ({_short(error)}): expected "
            f"{_smaller(doing, config, world)}; dfptkd plan names the largest batch that fits"
        )
    if "DataLoader worker" in str(error):
        return worker_died(error, config.data.workers)
    if world.size > 1 and is_of_others(error):
        return DfptkdError(
            f"rank {world.rank}: another process is gone, or has not answered within "
            f"--step.timeout {config.step.timeout:g} s, in {doing} ({_short(error)}); what it said "
            "last is the cause; the last checkpoint is intact"
        )
    return error


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in _NO_MEMORY)


def _smaller(doing: str, config: RunConfig, world: World) -> str:
    """The option that halves, or nearly, what the run holds at once."""
    if doing == EVALUATION:
        return f"--eval-batch {max(config.eval_batch // 2, 1)}"
    share = config.global_batch // world.size
    more = (n for n in range(2 * config.accumulate, share + 1, config.accumulate) if share % n == 0)
    parts = next(more, None)
    if parts is None:
        return f"--global-batch {max(config.global_batch // 2, world.size)}"
    return f"--accumulate {parts} (each step in {parts} parts of {share // parts} images)"


def _short(error: BaseException) -> str:
    line = first_line(error)
    return line if len(line) < 200 else line[:200] + "..."
