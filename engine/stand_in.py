"""A run without its data and its weights, for those who measure before there is anything to train:
plan, profile and the benches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .config import DataConfig, RunConfig
from .data import ImageData
from .data.facts import DataFacts, data_facts
from .data.file_data import IMAGENET_MEAN, IMAGENET_STD, SOURCES
from .distributed import World
from .errors import DataError, DfptkdError, UsageError
from .machine import demand_of
from .methods import build_method
from .models import create_model
from .models.cost import TeacherCost, count_macs, count_params, teacher_cost, training_macs
from .models.fit import (
    Demand,
    check_step,
    check_student,
    check_teacher,
    meta_twin,
    same_random_numbers,
)
from .models.input_norm import InputNorm, InputNorms, given_norm, stated_norm
from .models.parts import channels_last
from .step import TrainStep


def stand_in(config: RunConfig, facts: DataFacts) -> RunConfig:
    """The same run on synthetic images of its data's shape, without weights."""
    padding = config.data.crop_padding
    data = DataConfig(
        name="synthetic",
        image_size=facts.image_size,
        num_classes=facts.num_classes,
        crop_padding=facts.crop_padding if padding is None else padding,
        flip=config.data.flip,
        # CRD holds something of each; of more than there are here, `run_memory` adds it.
        train_limit=max(facts.train_images, config.global_batch) if config.loss.crd else None,
    )
    norm = _own_norm(config, facts)
    mean, std = (None, None) if norm is None else (norm.mean, norm.std)
    teacher = dataclasses.replace(config.teacher, weights=None, mean=mean, std=std)
    return dataclasses.replace(config, data=data, teacher=teacher, student_weights=None)


def _own_norm(config: RunConfig, facts: DataFacts) -> InputNorm | None:
    """That of the teacher, if it is not the data's as far as that is known without them."""
    teacher, data = config.teacher, config.data
    found = given_norm(teacher.mean, teacher.std)
    found = found or stated_norm(teacher.name, teacher.weights, facts.num_classes)
    if data.name not in SOURCES:
        return found
    own = InputNorm(data.mean or IMAGENET_MEAN, data.std or IMAGENET_STD)  # type: ignore[arg-type]
    return None if found is None or found.equals(own) else found


def build_step(
    config: RunConfig,
    data: ImageData,
    device: torch.device,
    *,
    total_steps: int = 1000,
    steps_per_epoch: int = 100,
) -> TrainStep:
    """The step of a run, in training mode, around networks with random weights.

    Args:
        config: The run; its weights are not read.
        data: For classes, mean and standard deviation.
        device: Where it lives.
        total_steps: Length of the schedule.
        steps_per_epoch: For warm-ups.
    """
    torch.manual_seed(config.seed)
    student = create_model(config.student, num_classes=data.num_classes)
    teacher = None
    if config.method != "ce":
        teacher = create_model(config.teacher.name, num_classes=data.num_classes)
    own, wanted = InputNorm(data.mean, data.std), config.teacher
    norms = InputNorms.of(own, None, given_norm(wanted.mean, wanted.std), teacher is not None)
    method = build_method(config, student, teacher, data.train.labels, norms.entry())
    channels_last(method, device).train()
    return TrainStep(
        method,
        config,
        data,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        device=device,
    )


@dataclass(frozen=True)
class PairCost:
    """Parameters and MACs of a teacher-student pair; MACs for one image."""

    student_params: int
    student_macs: int
    teacher: TeacherCost

    def training_macs(self, method: str) -> int:
        """Of a training step, by the formulas of models/cost.py."""
        return training_macs(method, self.student_macs, self.teacher)


def pair_cost(config: RunConfig, num_classes: int, image_size: tuple[int, int]) -> PairCost:
    """Count the networks that `config` names; nothing is allocated, unless their code needs values.

    Args:
        config: The run, of any method; one without a prompt path may have a teacher that cannot be
            cut, of which then no prompt path is counted.
        num_classes: Classes of its data.
        image_size: H, W in pixels.

    Raises:
        UsageError: The run has a prompt path, and the teacher cannot be cut.
    """
    try:
        with torch.device("meta"):
            return _pair_cost(config, num_classes, image_size)
    except DfptkdError:
        raise
    except Exception:  # of foreign code
        with same_random_numbers():
            return _pair_cost(config, num_classes, image_size)


def _pair_cost(config: RunConfig, num_classes: int, image_size: tuple[int, int]) -> PairCost:
    student, teacher = (
        create_model(name, num_classes=num_classes)
        for name in (config.student, config.teacher.name)
    )
    try:
        cost = teacher_cost(teacher, config.prompt, image_size, at=config.teacher.stages)
    except UsageError:
        if config.has_prompt_path:
            raise
        cost = teacher_cost(teacher, None, image_size)
    macs = count_macs(student, (1, 3, *image_size))
    return PairCost(count_params(student), macs, cost)


def check_networks(
    config: RunConfig, demand: Demand, beside: Sequence[RunConfig] = ()
) -> dict[str, str]:
    """Refuse networks that do not fit a run, by their names alone: with random weights, before
    there is anything else.

    Args:
        config: The run.
        demand: Its own.
        beside: The same pair by other methods.

    Returns:
        Those methods of `beside` that these networks do not fit, and why.

    Raises:
        UsageError: They do not fit the run itself.
    """
    labels = torch.arange(2)  # of two images, for a method that keeps something of each
    left_out: dict[str, str] = {}
    with same_random_numbers():
        student = create_model(config.student, num_classes=demand.num_classes)
        check_student(config.student, student, demand)
        if config.method == "ce" and not beside:
            return left_out
        teacher = create_model(config.teacher.name, num_classes=demand.num_classes)
        check_teacher(config.teacher.name, teacher, demand)
        for other in beside:
            twins = meta_twin(student), meta_twin(teacher)
            try:
                check_step(other, build_method(other, *twins, labels), demand)
            except UsageError as error:
                left_out[other.method] = str(error)
        if config.method != "ce":
            check_step(config, build_method(config, student, teacher, labels), demand)
    return left_out


def check_before_teacher(config: RunConfig, world: World) -> None:
    """Refuse what a run would refuse only after its teacher has been trained.

    Raises:
        UsageError: Its networks do not fit.
        DataError: The student's weights cannot be loaded.
    """
    try:
        facts = data_facts(config.data)
    except DataError:
        return  # the teacher's run reads the same data, and says what is missing
    if config.student_weights is not None:
        with same_random_numbers():
            create_model(
                config.student, num_classes=facts.num_classes, weights=config.student_weights
            )
    check_networks(config, demand_of(config, facts, world))
