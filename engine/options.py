"""Traits of every option: what a change of it means, and when it has an effect at all.

One row an option. Resuming, grouping in reports, the record of a run and the refusal of options
that cannot have an effect are views of this table and of nothing else; a field of a configuration
without a row, or a row without a field, fails here, at import.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .config import RunConfig
from .errors import UsageError

IMAGE_FILES = ("folder", "imagenet", "cub200", "tiny_imagenet", "webdataset")
"""Data sets whose images are files, decoded by a loader; the others are arrays, or synthetic."""


@dataclass(frozen=True)
class Needs:
    """A condition for an option to have an effect."""

    expected: str
    """For the refusal: "method kd"."""
    looks_at: tuple[str, ...]
    """The options that decide it."""
    holds: Callable[[RunConfig], bool]


@dataclass(frozen=True)
class Traits:
    """The traits of one option."""

    may_change: bool
    """Between a checkpoint and the run that goes on from it."""
    counts: bool
    """Runs that differ in it stand in different groups of a report."""
    needs: tuple[Needs, ...] = ()
    """It has an effect where all of them hold."""
    is_our_reading: bool = False
    """The paper's summary leaves its value open: the record of a run names it (M20)."""
    relates_images: bool = False
    """Weight of a loss term that relates the images of a batch with each other, and so is another
    term where a batch is cut into parts."""
    sets: str | None = None
    """The option of the teacher's own run that it sets."""
    stands_for_data: bool = False
    """plan and profile take it in place of image files that are not there."""


# A change of the option makes ...
_binds = functools.partial(Traits, False, True)  # ... another run, of another group
_fixed = functools.partial(Traits, False, False)  # ... another run, of the same group
_changes = functools.partial(Traits, True, True)  # ... the same run go on, into another group
_keeps = functools.partial(Traits, True, False)  # ... no difference to what a run computes


def value_of(config: RunConfig, name: str) -> Any:
    """The value of an option by its dotted name."""
    return functools.reduce(getattr, name.split("."), config)


def _one_of(option: str, *values: Any) -> Needs:
    words = " or ".join(str(v) for v in values)
    return Needs(f"{option} {words}", (option,), lambda c: value_of(c, option) in values)


def _on(option: str, expected: str) -> Needs:
    """The other option is switched on: neither absent, nor 0, nor False."""
    return Needs(expected, (option,), lambda c: bool(value_of(c, option)))


def _off(option: str, expected: str) -> Needs:
    return Needs(expected, (option,), lambda c: not value_of(c, option))


_TEACHER = Needs("a method with a teacher", ("method",), lambda c: c.method != "ce")
_NO_MIXTURE = _off("loss.mixture_control", "prompt blocks, without loss.mixture_control")
_DUAL = _one_of("method", "dfpt", "dfpt_plus")
_PROMPT = (_DUAL, _NO_MIXTURE)
_FUSION = (*_PROMPT, _on("prompt.fusion", "prompt.fusion"))
_MIXES_LABELS = Needs(
    "a prompt path, or with loss.mixture_control loss.tau 1 and no loss.reverse_kl",
    ("loss.mixture_control", "loss.tau", "loss.reverse_kl"),
    lambda c: not c.loss.mixture_control or (c.loss.tau == 1 and not c.loss.reverse_kl),
)
_DKD_PARTS = Needs(
    "method dkd, or loss.decoupled", ("method", "loss.decoupled"),
    lambda c: c.method == "dkd" or c.loss.decoupled,
)  # fmt: skip
_MAKES_TEACHER = (
    _TEACHER,
    _off("teacher.weights", "no teacher.weights, which are taken as they are"),
    _on("teacher.train_if_missing", "train-teacher, or teacher.train_if_missing"),
)

_FILES = _one_of("data.name", *IMAGE_FILES)
_SIZED = _one_of("data.name", *IMAGE_FILES, "synthetic")
_DECODED = (
    _FILES,
    Needs("images that are decoded", ("data.loader",), lambda c: c.data.loader != "synthetic"),
)
_STREAMED = Needs(
    "data.loader dali or torchvision",
    ("data.loader",),
    lambda c: c.data.name not in IMAGE_FILES or c.data.loader not in ("device", "synthetic"),
)
_GROWS = Needs(
    "data.loader dali, torchvision or synthetic",
    ("data.loader",),
    lambda c: c.data.loader != "device",
)
# How `auto` cuts image files, the files say.
_SHIFTED = Needs(
    "images that are shifted: data.crops auto or small",
    ("data.name", "data.crops"),
    lambda c: c.data.name not in IMAGE_FILES or c.data.crops in ("auto", "small"),
)

_MOMENTUM = _one_of("optim.name", "sgd", "apex-sgd")
_MOMENTS = _one_of("optim.name", "adamw", "apex-lamb")
_STEPS_DOWN = _one_of("optim.schedule", "step")
_OUT_ROOT = Needs(
    "no out, which says where the run is",
    ("out",),
    lambda c: c.out is None or (c.method != "ce" and c.teacher.weights is None),
)

OPTIONS: dict[str, Traits] = {
    "recipe": _fixed(),
    "arm": _fixed(),  # a name: what it changes tells runs apart
    "role": _fixed(),
    "method": _fixed(),
    "student": _binds(),
    "student_weights": _binds(),
    "seed": _fixed((_off("seeds", "no seeds, which say it of each run"),)),
    "seeds": _keeps(),
    "epochs": _binds(is_our_reading=True),  # but for a run that is to be extended
    "global_batch": _binds(is_our_reading=True),
    "accumulate": _changes(),
    "eval_batch": _keeps(),
    "eval_every": _changes(),  # which epochs the best is chosen from
    "max_steps": _changes(),
    "device": _keeps(),
    "precision": _binds(),
    "deterministic": _fixed(),  # the bits, not the figure
    "kernels": _keeps(),
    "out": _keeps(),
    "out_root": _keeps((_OUT_ROOT,)),
    "resume": _keeps(),
    "checkpoint_every": _keeps(),
    "checkpoint_steps": _keeps(),
    "checkpoint_minutes": _keeps(),
    "on_storage_error": _keeps(),
    "keep_checkpoints": _keeps(),
    #
    "data.name": _binds(),
    "data.root": _keeps(
        (_one_of("data.name", "cifar10", "cifar100", "fashion_mnist", *IMAGE_FILES),)
    ),
    "data.limit": _binds(),
    "data.train_limit": _binds(),
    "data.image_size": _binds((_SIZED,)),
    "data.num_classes": _binds((_one_of("data.name", "synthetic"),), stands_for_data=True),
    "data.mean": _binds((_FILES,)),
    "data.std": _binds((_FILES,)),
    "data.crop_padding": _binds((_SHIFTED,)),
    "data.crops": _changes((_FILES,)),  # a run that goes on cuts as it was begun
    "data.flip": _binds(),
    "data.workers": _keeps(_DECODED),
    "data.loader": _changes(),  # its pixels differ; a checkpoint says which ones it was made with
    "data.quarantine": _keeps((_FILES,)),
    "data.max_quarantined": _keeps((_FILES,)),
    "data.skip_quarantined": _changes((_FILES,)),
    "data.start_size": _binds((_SIZED, _GROWS)),
    "data.ramp": _binds((_SIZED, _on("data.start_size", "data.start_size"))),
    "data.timeout": _keeps(),
    "data.keep_test": _keeps((_FILES, _STREAMED)),
    "data.order_seed": _binds(),
    #
    "teacher.name": _binds((_TEACHER,), sets="student"),
    "teacher.weights": _keeps((_TEACHER,)),  # what is in them counts, not where they lie
    "teacher.ema": _keeps((_TEACHER,)),
    "teacher.mean": _binds((_TEACHER,)),
    "teacher.std": _binds((_TEACHER,)),
    "teacher.stages": _binds(_PROMPT),
    "teacher.fold_bn": _fixed((_TEACHER,)),  # rounding
    "teacher.expected_top1": _keeps((_TEACHER,)),
    "teacher.expected_of": _keeps((_TEACHER,)),
    "teacher.epochs": _keeps(_MAKES_TEACHER, sets="epochs"),
    "teacher.lr": _keeps(_MAKES_TEACHER, sets="optim.lr"),
    "teacher.global_batch": _keeps(_MAKES_TEACHER, sets="global_batch"),
    "teacher.remember": _keeps((_TEACHER,)),
    "teacher.train_if_missing": _keeps(_MAKES_TEACHER[:2]),
    #
    "prompt.r1": _binds(_PROMPT, is_our_reading=True),
    "prompt.r2": _binds(_PROMPT, is_our_reading=True),
    "prompt.kernels": _binds(_PROMPT, is_our_reading=True),
    "prompt.arrangement": _binds(_PROMPT, is_our_reading=True),
    "prompt.min_width": _binds(_PROMPT, is_our_reading=True),
    "prompt.prompt_norm": _binds(_PROMPT, is_our_reading=True),
    "prompt.prompt_act": _binds(_PROMPT, is_our_reading=True),
    "prompt.fusion": _binds(_PROMPT),
    "prompt.fusion_norm": _binds(_FUSION, is_our_reading=True),
    "prompt.fusion_act": _binds(_FUSION, is_our_reading=True),
    "prompt.fusion_groups": _binds(_FUSION, is_our_reading=True),
    "prompt.init": _binds(_PROMPT, is_our_reading=True),
    "prompt.insert_stages": _binds(_PROMPT, is_our_reading=True),
    "prompt.bn_mode": _binds(_PROMPT, is_our_reading=True),
    #
    "loss.tau": _binds((_TEACHER,), is_our_reading=True),
    "loss.student_ce": _binds((_DUAL,), is_our_reading=True),
    "loss.student_teacher": _binds((_DUAL,), is_our_reading=True),
    "loss.student_prompt": _binds((_DUAL,), is_our_reading=True),
    "loss.prompt_ce": _binds((_DUAL, _MIXES_LABELS), is_our_reading=True),
    "loss.prompt_teacher": _binds((_DUAL,), is_our_reading=True),
    "loss.prompt_student": _binds((_DUAL,), is_our_reading=True),
    "loss.mixture_control": _binds((_one_of("method", "dfpt"),)),
    "loss.kd_ce": _binds((_one_of("method", "kd"),)),
    "loss.kd_kl": _binds((_one_of("method", "kd"),)),
    "loss.dkd_ce": _binds((_one_of("method", "dkd"),)),
    "loss.dkd_alpha": _binds((_DKD_PARTS,)),
    "loss.dkd_beta": _binds((_DKD_PARTS,)),
    "loss.dist_ce": _binds((_one_of("method", "dist"),)),
    "loss.dist_inter": _binds((_one_of("method", "dist"),)),
    "loss.dist_intra": _binds((_one_of("method", "dist"),), relates_images=True),
    "loss.decoupled": _binds(_PROMPT),
    "loss.rkd_distance": _binds(_PROMPT, relates_images=True),
    "loss.rkd_angle": _binds(_PROMPT, relates_images=True),
    "loss.crd": _binds(_PROMPT),
    "loss.crd_negatives": _binds((*_PROMPT, _on("loss.crd", "loss.crd above 0"))),
    "loss.label_smoothing": _binds(),
    "loss.reverse_kl": _binds((_one_of("method", "kd", "dfpt", "dfpt_plus"),), is_our_reading=True),
    "loss.warmup_epochs": _binds((_TEACHER,), is_our_reading=True),
    "loss.update": _binds(_PROMPT, is_our_reading=True),
    #
    "optim.name": _binds(),
    "optim.lr": _binds(is_our_reading=True),
    "optim.lr_batch": _binds(),
    "optim.momentum": _binds((_MOMENTUM,)),
    "optim.nesterov": _binds((_MOMENTUM,)),
    "optim.betas": _binds((_MOMENTS,)),
    "optim.eps": _binds((_MOMENTS,)),
    "optim.weight_decay": _binds(),
    "optim.decay_norm_and_bias": _binds((_on("optim.weight_decay", "optim.weight_decay above 0"),)),
    "optim.schedule": _binds(is_our_reading=True),
    "optim.milestones": _binds((_STEPS_DOWN,), is_our_reading=True),
    "optim.gamma": _binds((_STEPS_DOWN, _on("optim.milestones", "optim.milestones"))),
    "optim.warmup_epochs": _binds(),
    "optim.prompt_lr_scale": _binds(_PROMPT, is_our_reading=True),
    "optim.backbone_lr_scale": _binds((_one_of("method", "dfpt_plus"),), is_our_reading=True),
    "optim.clip_grad_norm": _binds(),
    "optim.ema_decay": _binds(),
    #
    "step.mode": _keeps(),
    "step.joint_paths": _keeps((_one_of("method", "dfpt"), _NO_MIXTURE)),
    "step.sync_bn": _binds(),
    "step.max_skips": _keeps(),
    "step.max_skips_in_a_row": _keeps(),
    "step.max_rewinds": _keeps(),
    "step.timeout": _keeps(),
}


def fields_of(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted name of every option of a configuration class."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields_of(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def check_table(cls: type, table: Iterable[str]) -> None:
    """Refuse a table of traits that is not of just these options.

    Raises:
        TypeError: It names them.
    """
    fields, rows = set(fields_of(cls)), set(table)
    if fields != rows:
        raise TypeError(
            f"options without traits: {sorted(fields - rows)}; traits without an option: "
            f"{sorted(rows - fields)}"
        )


check_table(RunConfig, OPTIONS)

MAY_CHANGE = frozenset(name for name, traits in OPTIONS.items() if traits.may_change)
"""Options that may differ between a checkpoint and the run that goes on from it."""
NOT_KNOWN_FROM_PAPER = tuple(name for name, traits in OPTIONS.items() if traits.is_our_reading)
"""Options whose value the paper's summary leaves open: each run record lists those it used."""
OF_TEACHER_RUN = {name: traits.sets for name, traits in OPTIONS.items() if traits.sets is not None}
"""Option of a recipe -> the option of its teacher's own run that it sets."""


def unmet(name: str, config: RunConfig) -> Needs | None:
    """Why an option has no effect on a run; None: it has one."""
    return next((needs for needs in OPTIONS[name].needs if not needs.holds(config)), None)


def counts(name: str, config: RunConfig | None) -> bool:
    """Whether runs that differ in an option stand in different groups of a report.

    Args:
        name: The option; one that is not known, of another version, counts.
        config: A run that has it; None: it cannot be read, and may have an effect.
    """
    traits = OPTIONS.get(name)
    if traits is None:
        return True
    return traits.counts and (config is None or unmet(name, config) is None)


def refuse_without_effect(
    typed: Iterable[str], configs: Sequence[RunConfig], verb: str, *, without_data: bool = False
) -> None:
    """Refuse an option that somebody has set and that cannot have an effect.

    Args:
        typed: Options that are on the command line: what a recipe sets for all methods is not
            among them. One that is None there takes back what the recipe sets.
        configs: The run; or several, of which one must take the option.
        verb: For the message.
        without_data: Nothing is read: an option may stand for image files that are not there.

    Raises:
        UsageError: It names the first one, what makes it idle, and what would not.
    """
    for name in typed:
        if value_of(configs[0], name) is None:
            continue
        if without_data and OPTIONS[name].stands_for_data and configs[0].data.name in IMAGE_FILES:
            continue
        found = [unmet(name, config) for config in configs]
        if None not in found:
            raise UsageError(f"{verb}: {as_typed(name)} {_idle(name, configs[0])}")


def refuse_idle_arm(
    arm: str, before: RunConfig, after: RunConfig, changes: Iterable[str], verb: str
) -> None:
    """Refuse a named variation none of whose changes has an effect on the run.

    Args:
        arm: Its name.
        before: The run without it.
        after: The run with it.
        changes: What it sets in the recipe.
        verb: For the message.

    Raises:
        UsageError: It names what the arm changes.
    """
    names = list(changes)
    if not names or any(unmet(name, after) is None for name in differing(before, after)):
        return
    idle = [name for name in names if unmet(name, after) is not None]
    why = _idle(idle[0], after) if idle else "has no effect on this run"
    raise UsageError(f"{verb}: --arm {arm}, which sets {', '.join(names)}, {why}")


def differing(a: RunConfig, b: RunConfig) -> list[str]:
    """The options, but for the arm's name, in which two configurations differ."""
    return [n for n in OPTIONS if n != "arm" and value_of(a, n) != value_of(b, n)]


def _idle(name: str, config: RunConfig) -> str:
    """Why an option has no effect, and what would give it one."""
    needs = unmet(name, config)
    assert needs is not None
    if config.role == "teacher" and name in OF_TEACHER_RUN:
        own = as_typed(OF_TEACHER_RUN[name])
        return f"has no effect on a run that is the teacher's own: expected {own}"
    if config.role == "teacher" and "method" in needs.looks_at:
        return "has no effect on a run that is the teacher's own, and learns from labels alone"
    given = ", ".join(f"{name}={value_of(config, name)}" for name in needs.looks_at)
    return f"has no effect with {given}: expected {needs.expected}"


def as_typed(name: str) -> str:
    """An option as it is on the command line."""
    return f"--{name.replace('_', '-')}"


def related_terms(config: RunConfig) -> list[str]:
    """The loss terms of a run that relate the images of a batch with each other, by their
    weights."""
    return [
        name
        for name, traits in OPTIONS.items()
        if traits.relates_images and unmet(name, config) is None and value_of(config, name) > 0
    ]
