"""The device of a process, and what it cannot run: refused before anything is read."""

from __future__ import annotations

import torch

from .config import RunConfig
from .data import ImageData
from .data.facts import DataFacts
from .distributed import SINGLE, World
from .errors import UsageError
from .kernel_choice import check_kernels
from .models.fit import Demand
from .options import related_terms
from .step import choose_mode

# With two, every distance is the mean one, and every correlation is 1 or -1: no gradient is left.
LEAST_RELATED = 3


def check_machine(config: RunConfig, world: World) -> torch.device:
    """The device of this process; refuses, before anything is read, what cannot run here.

    Raises:
        UsageError: No such device, execution mode, backend, or way to cut a batch.
    """
    device = pick_device(config, world)
    choose_mode(config, device, world.size)
    check_kernels(config.kernels, device)
    parts = world.size * config.accumulate
    if config.global_batch % parts:
        raise UsageError(
            f"global_batch={config.global_batch} over {world.size} processes and accumulate="
            f"{config.accumulate}: expected a multiple of {parts}"
        )
    check_related(config, config.global_batch, world)
    return device


def check_related(config: RunConfig, images: int, world: World) -> None:
    """Refuse to cut batches into parts in which terms that relate images are constant.

    Args:
        config: The run.
        images: Of a batch, of all processes together.
        world: The processes that share it.

    Raises:
        UsageError: It names the terms and the size of a part.
    """
    terms = related_terms(config)
    _, last = part_sizes(config, images, world)
    if terms and last < LEAST_RELATED:
        raise UsageError(
            f"accumulate={config.accumulate} with {world.size} processes: parts of {last} images, "
            f"and loss terms compare the images of a part ({', '.join(terms)}): expected at least "
            f"{LEAST_RELATED} (a smaller --accumulate, or a larger --global-batch)"
        )


def part_sizes(config: RunConfig, images: int, world: World) -> tuple[int, int]:
    """Images of the parts of a batch in one process, and of the last one, which may be smaller."""
    share = images // world.size
    part = max(-(-share // config.accumulate), 1)
    return part, share % part or part


def check_sizes(config: RunConfig, data: ImageData, world: World) -> None:
    """Refuse splits of which a process would get no equal share.

    Raises:
        UsageError: It names the split and what would do.
    """
    num_train, num_test = len(data.train), len(data.test)
    if num_train < config.global_batch and num_train % world.size:
        raise UsageError(
            f"global_batch={config.global_batch} with {num_train} training images, which are one "
            f"batch and no multiple of {world.size} processes: expected --global-batch of at most "
            f"{num_train}"
        )
    if num_test < world.size:
        raise UsageError(f"{num_test} test images: expected at most {num_test} processes")
    check_related(config, min(config.global_batch, num_train), world)


def demand_of(config: RunConfig, data: ImageData | DataFacts, world: World = SINGLE) -> Demand:
    """The demands of a run on its networks, with the smallest parts that any process meets."""
    if isinstance(data, DataFacts):
        train_images, test_images = data.train_images, data.test_images
        image_size = (data.image_size, data.image_size)
    else:
        train_images, test_images = len(data.train), len(data.test)
        image_size = data.image_size
    _, part = part_sizes(config, min(config.global_batch, train_images), world)
    if config.step.sync_bn:  # BatchNorms see the images of all processes
        part *= world.size
    blocks = {max(n // world.size, 1) for n in (test_images, test_images + world.size - 1)}
    start = config.data.start_size
    return Demand(
        data.num_classes,
        image_size,
        part,
        min(_last(block, config.eval_batch) for block in blocks),
        None if start is None else (start, start),
    )


def _last(images: int, batch: int) -> int:
    """Images of the last of the batches that they are cut into."""
    return images % batch or batch if images > batch else images


def pick_device(config: RunConfig, world: World = SINGLE) -> torch.device:
    """The device asked for, or the best there is; of several processes each has its own GPU."""
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"device={name!r}: expected cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device={name!r}: this machine has no usable CUDA device; expected cpu")
    if config.precision == "fp16" and name == "cpu":
        raise UsageError("precision='fp16' on cpu: expected fp32 or bf16")
    if world.size == 1 or name == "cpu":
        return torch.device(name)
    if name != "cuda":
        raise UsageError(f"device={name!r} with {world.size} processes: expected cuda or cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"process {world.local_rank} of this machine, which has {torch.cuda.device_count()} "
            "CUDA devices: expected at most one process for each (--nproc-per-node)"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def prepare_torch(config: RunConfig) -> None:
    """Process-wide switches."""
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:
        torch.use_deterministic_algorithms(config.deterministic)  # imports torch's compiler: 2 s
    torch.backends.cudnn.benchmark = not config.deterministic
