"""What run.json says of a run."""

from __future__ import annotations

from typing import Any

import torch

from .config import RunConfig, to_dict
from .data import ImageData
from .distributed import SINGLE, World
from .identity import DataRecord
from .log import commit, hardware, versions
from .models.cost import TeacherCost, count_macs, count_params, training_macs
from .options import NOT_KNOWN_FROM_PAPER, unmet
from .records import RUN_FORMAT
from .resume import flat


def run_record(
    config: RunConfig,
    data: ImageData,
    student: torch.nn.Module,
    cost: TeacherCost | None,
    teacher: dict[str, Any] | None,
    device: torch.device,
    world: World = SINGLE,
) -> dict[str, Any]:
    """Contents of run.json."""
    shape = (1, 3, *data.image_size)
    student_macs = count_macs(student, shape)
    settings = flat(to_dict(config))
    costs: dict[str, Any] = {
        "student_params": count_params(student),
        "student_macs": student_macs,
        "train_macs_per_image": training_macs(
            config.method if not config.loss.mixture_control else "kd", student_macs, cost
        ),
    }
    if cost is not None:
        costs |= cost.record()
    return {
        "format": RUN_FORMAT,
        "config": to_dict(config),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(device),
        "world_size": world.size,
        "data": DataRecord.of(data).record(),
        "teacher": teacher,
        "cost": costs,
        "not_known_from_paper": {
            name: settings[name]
            for name in NOT_KNOWN_FROM_PAPER
            if config.has_prompt_path and unmet(name, config) is None
        },
        "warnings": [],
    }
