"""Quick start: a teacher that has seen all of Fashion-MNIST, a student with a hundred labels a
class."""

from __future__ import annotations

import torch

from ..engine.config import DataConfig, LossConfig, OptimConfig, RunConfig, TeacherConfig


def quickstart(method: str = "dfpt") -> RunConfig:
    """Minutes on two CPU cores; on a GPU more data and longer training. Trains and keeps its own
    teacher.

    It shows that everything works and what came out; it is too small to rank methods.
    """
    gpu = torch.cuda.is_available()
    return RunConfig(
        recipe="quickstart",
        method=method,  # type: ignore[arg-type]
        student="cifar:resnet8_s2",
        epochs=40 if gpu else 10,
        eval_every=1 if gpu else 2,
        global_batch=64,
        data=DataConfig(name="fashion_mnist", train_limit=10_000 if gpu else 1_000),
        teacher=TeacherConfig(
            name="cifar:resnet20_s2",
            epochs=20 if gpu else 2,
            lr=0.1,
            global_batch=128,
            train_if_missing=True,
        ),
        loss=LossConfig(warmup_epochs=2 if method == "dkd" else 0),
        optim=OptimConfig(lr=0.05, schedule="cosine"),
    )
