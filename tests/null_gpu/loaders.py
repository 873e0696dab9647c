"""Where batches lie, on a GPU that finishes nothing before the host waits for it.

    python tests/null_gpu/loaders.py PHOTOGRAPHS       in a process that sees it (build.py)

PHOTOGRAPHS is an image folder. A line of JSON comes back for each way of handing over a batch to
another stream: addresses of the batches' images, and how often the host waited.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable

import null_device
import torch
from steps import CUDA, Case, compiling_by, configuration

from dfptkd.engine.config import DataConfig
from dfptkd.engine.data import Batch, load_data, train_batches
from dfptkd.engine.stand_in import build_step


def report(name: str, batches: Iterable[Batch], use: Callable[[Batch], object]) -> None:
    """Use one batch after the other, as a training loop does, and say where they lay."""
    addresses, before = [], null_device.counts()
    for batch in batches:
        addresses.append(batch.images.data_ptr())
        use(batch)
        del batch  # the loop's own name would keep it until the next one is there
    waits = null_device.since(before)
    found = {
        "name": name,
        "addresses": addresses,
        "waits": waits["syncs"] + waits["pageable"],
        "copies": waits["to_device"],
    }
    print(json.dumps(found), flush=True)


def from_worker_processes(root: str) -> None:
    """Copied on the loader's stream, used on the current one."""
    config = DataConfig(name="folder", root=root, loader="torchvision", image_size=32)
    split = load_data(config, CUDA).train
    batches = train_batches(split, batch_size=16, seed=0, epoch=0, workers=2)
    report("loader", batches, lambda batch: batch.images.float())


def to_a_seed_beside_others() -> None:
    """Made on the current stream, used on that of a step which replays beside others."""
    config = configuration(Case("kd", "graph"))
    data = load_data(config.data, CUDA)
    with compiling_by("none"):
        step = build_step(config, data, CUDA)
    step.run_beside_others()
    batches = train_batches(data.train, batch_size=16, seed=0, epoch=0)
    step(next(batches), 0)
    report("seed", batches, lambda batch: step(batch, 1))


if __name__ == "__main__":
    torch.cuda.init()
    from_worker_processes(sys.argv[1])
    to_a_seed_beside_others()
