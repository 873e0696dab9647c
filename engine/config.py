"""Everything a run can be told, as frozen dataclasses; the command line is generated from them.

Defaults that the paper does not give are *our reading* (method reference, sections 2.2 and 3.4);
options.py says which, and what else there is to know of each option. A value that no run could use
is refused here, before any data is read.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UsageError

MethodName = Literal["ce", "kd", "dkd", "dist", "dfpt", "dfpt_plus"]
EmaChoice = Literal["auto", "yes", "no"]
# Longest name of a file, and longest path, that Linux takes, in bytes.
NAME_MAX, PATH_MAX = 255, 4095


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise UsageError(f"{name}={value!r}: expected {expected}")


def _check_statistics(
    part: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> None:
    for name, value, low in (("mean", mean, -0.001), ("std", std, 0.0)):
        _require(
            value is None or (len(value) == 3 and all(low < v <= 1 for v in value)),
            f"{part}.{name}", value, "three numbers, pixels in 0..1",
        )  # fmt: skip


def _clean_values(config: Any, prefix: str = "") -> None:
    """Refuse numbers that are not finite and texts that no path can be, in every option.

    From Python a path may come as a Path, and several values as a list: they are kept as the text
    and the tuple that a record holds.
    """
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        if isinstance(value, (os.PathLike, list)):
            value = tuple(value) if isinstance(value, list) else os.fspath(value)
            object.__setattr__(config, field_.name, value)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, float):
                _require(
                    math.isfinite(part), prefix + field_.name, value,
                    "a finite number" if part is value else "finite numbers",
                )  # fmt: skip
            elif isinstance(part, str):
                fault = _fault_of_text(part)
                if fault is not None:
                    raise UsageError(f"{prefix}{field_.name}={_short(part)}: {fault}")


def _fault_of_text(text: str) -> str | None:
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        return "holds a character that no file name can have"
    if b"\0" in encoded:
        return "holds a NUL character, which no file name can have"
    if len(encoded) > PATH_MAX or any(len(part) > NAME_MAX for part in encoded.split(b"/")):
        return f"too long: expected at most {NAME_MAX} bytes a name and {PATH_MAX} in all"
    return None


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    name: Literal[
        "cifar10", "cifar100", "fashion_mnist", "folder", "imagenet", "cub200", "tiny_imagenet",
        "webdataset", "synthetic",
    ] = "cifar100"  # fmt: skip
    """Data set; folder: train/<class>/ and val/<class>/; webdataset: train-*.tar and val-*.tar."""
    root: str | None = None
    """Folder that holds the data; absent: the environment variable DFPTKD_DATA."""
    limit: int | None = None
    """Use at most this many images of each split, drawn evenly over the classes."""
    train_limit: int | None = None
    """At most this many training images, drawn evenly over the classes: a user with few labels."""
    image_size: int = 224
    """Side of the images in pixels (image files and synthetic data; the others have their own)."""
    num_classes: int = 100
    """Number of classes of synthetic data; the others count their own."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, pixels in 0..1 (image files); absent: ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, pixels in 0..1 (image files); absent: ImageNet's."""
    crops: Literal["auto", "photographs", "small", "stretched"] = "auto"
    """How image files are cut. photographs: random crops of 8 to 100 % of the area in training, the
    middle of the image in evaluation; small: whole images, shifted in training; stretched: to a
    square first, whatever the shape (CUB-200's protocol); auto: small where nearly all images are
    of about one size of at most 96 pixels, else photographs."""
    crop_padding: int | None = None
    """Zero padding in pixels, out of which small images are cut at random in training (a shift);
    absent: 4, Fashion-MNIST 2, image files an eighth of their side."""
    flip: bool = True
    """Flip half of the training images left to right."""
    workers: int = 2
    """Decoding processes, of DALI threads (image files only)."""
    loader: Literal["auto", "dali", "torchvision", "device", "synthetic"] = "auto"
    """The decoder of image files. device: images that each epoch cuts alike are decoded once and
    stay there (small ones, and all test images); synthetic: none is, images are made up (what a
    run would do if decoding cost nothing); auto: device for small images, else DALI where it is
    installed, torchvision elsewhere."""
    quarantine: str | None = None
    """List of images that cannot be decoded, by verify-data; absent: the one in the data folder or
    in the folder below it that holds the images."""
    max_quarantined: float = 0.001
    """Largest share of the training images that may be on that list and be replaced by others."""
    skip_quarantined: bool = False
    """Evaluate without the test images on that list, in place of an error."""
    start_size: int | None = None
    """Side of the training images at first, in pixels; it grows to image_size (image files)."""
    ramp: tuple[float, float] = (0.35, 0.85)
    """Shares of the run between which the side grows, in steps of 32 pixels."""
    timeout: float = 300.0
    """Seconds to wait for a batch before the run ends and names the files; 0: for ever."""
    keep_test: bool = True
    """Keep the decoded test images on the device, where a quarter of its free memory holds them."""
    order_seed: int | None = None
    """Seed of sample order and augmentation; absent: the run's. Runs of several seeds that have it
    in common share each batch and the frozen teacher's work on it."""

    def __post_init__(self) -> None:
        _clean_values(self, "data.")
        for name in ("limit", "train_limit"):
            value = getattr(self, name)
            _require(
                value is None or value > 0, f"data.{name}", value, "a positive number of images"
            )
        _require(
            self.crop_padding is None or self.crop_padding >= 0,
            "data.crop_padding", self.crop_padding, "0 or more pixels",
        )  # fmt: skip
        _require(
            self.image_size > 0, "data.image_size", self.image_size, "a positive number of pixels"
        )
        _check_statistics("data", self.mean, self.std)
        _require(self.num_classes > 1, "data.num_classes", self.num_classes, "at least 2 classes")
        _require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        _require(self.timeout >= 0, "data.timeout", self.timeout, "0 or more seconds")
        _require(
            0 <= self.max_quarantined <= 1,
            "data.max_quarantined", self.max_quarantined, "a share in [0, 1]",
        )  # fmt: skip
        _require(
            self.start_size is None or 0 < self.start_size <= self.image_size,
            "data.start_size", self.start_size, f"1..data.image_size={self.image_size}",
        )  # fmt: skip
        _require(
            len(self.ramp) == 2 and 0 <= self.ramp[0] < self.ramp[1] <= 1,
            "data.ramp", self.ramp, "two ascending shares of the run, each in [0, 1]",
        )  # fmt: skip
        _require(
            self.order_seed is None or self.order_seed >= 0,
            "data.order_seed", self.order_seed, "0 or more",
        )  # fmt: skip


@dataclass(frozen=True)
class PromptConfig:
    """Shape of the prompt and fusion blocks (*our reading* unless said otherwise)."""

    r1: int = 4
    """Channel reduction of the first 1x1 convolution: inner width m = max(C / r1, min_width)."""
    r2: float = 0.25
    """Share of the m channels that a partial convolution touches (FasterNet's; 1 = ordinary)."""
    kernels: tuple[int, ...] = (3, 5, 7)
    """Kernel sizes of the partial convolutions, odd."""
    arrangement: Literal["sequential", "parallel"] = "sequential"
    """Scales one after the other, or summed."""
    min_width: int = 8
    """Floor of the inner width m; 1 switches it off."""
    prompt_norm: Literal["bn", "none"] = "bn"
    """Normalisation after each 1x1 convolution of the prompt block."""
    prompt_act: Literal["relu", "none"] = "relu"
    """Activation after each normalisation but the last."""
    fusion: bool = True
    """Off: the next stage reads x + P(x) itself. The paper's summary calls this a failure."""
    fusion_norm: Literal["bn", "none"] = "bn"
    """Normalisation after the fusion convolution."""
    fusion_act: Literal["auto", "relu", "none"] = "auto"
    """auto: ReLU where the teacher's stage ends in one."""
    fusion_groups: int = 1
    """Groups of the fusion convolution; 8 keep wide teachers under the 10 % line."""
    init: Literal["random", "identity"] = "random"
    """identity makes the prompt path equal the teacher at step 0, which the method must not do."""
    insert_stages: tuple[int, ...] | Literal["all"] = "all"
    """Stages (from 1) that get a prompt and a fusion block."""
    bn_mode: Literal["auto", "train", "eval"] = "auto"
    """BatchNorm of the prompt path's backbone: auto = eval when frozen, train when fine-tuned."""

    def __post_init__(self) -> None:
        _clean_values(self, "prompt.")
        _require(self.r1 >= 1, "prompt.r1", self.r1, "an integer of at least 1")
        _require(0 < self.r2 <= 1, "prompt.r2", self.r2, "a share in (0, 1]")
        _require(
            len(self.kernels) > 0 and all(k > 0 and k % 2 == 1 for k in self.kernels),
            "prompt.kernels", self.kernels, "one or more odd sizes",
        )  # fmt: skip
        _require(
            self.min_width >= 1, "prompt.min_width", self.min_width, "an integer of at least 1"
        )
        _require(self.fusion_groups >= 1, "prompt.fusion_groups", self.fusion_groups, "at least 1")
        stages = self.insert_stages
        _require(
            stages == "all" or (len(set(stages)) == len(stages) > 0 and min(stages) >= 1),
            "prompt.insert_stages", stages, "'all' or different stage numbers from 1",
        )  # fmt: skip


@dataclass(frozen=True)
class TeacherConfig:
    """The pre-trained network."""

    name: str = "cifar:wrn_40_2"
    """Model name: cifar:..., torchvision:..., timm:..., imagenet:..."""
    weights: str | None = None
    """File, `package:NAME` for the file in an installed package, torchvision weights enum or
    `pretrained` for timm; absent: the train-teacher run under `out_root` that was trained to its
    end on these data, of several that of the most epochs, then the newest."""
    ema: EmaChoice = "auto"
    """Whether to take the exponential moving average (EMA) where a file holds one, or has one
    beside it: yes the EMA; no the raw weights; auto the raw ones, or an EMA that is alone."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel by which its images are normalised, pixels in 0..1; absent: what its
    weights are known to want (timm, torchvision, a run of ours), else the data's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, likewise."""
    stages: tuple[str, ...] | None = None
    """Module paths whose outputs end a stage, for a model that has no stages of its own."""
    fold_bn: bool = True
    """Run the frozen network with its BatchNorms multiplied into the convolutions."""
    expected_top1: float | None = None
    """Top-1 accuracy in percent that the recipe counts on; 2 points less gives a warning."""
    expected_of: tuple[str, ...] | None = None
    """Teacher and data set that `expected_top1` is of, which says nothing of others; absent: those
    of the run."""
    epochs: int = 240
    """train-teacher: passes over the training set."""
    lr: float = 0.05
    """train-teacher: learning rate at `global_batch`."""
    global_batch: int = 64
    """train-teacher: images in an optimisation step."""
    remember: Literal["auto", "memory", "file", "off"] = "auto"
    """Keep the logits that the frozen teacher gives each form (crop, flip) of each training image:
    memory: for this run (all its seeds); file: beside the data too (or in the user's cache), for
    later runs; auto: where hits are expected and memory allows, with a file where it is small."""
    train_if_missing: bool = False
    """Train the teacher first where there is none, in place of an error (the quick start)."""

    def __post_init__(self) -> None:
        _clean_values(self, "teacher.")
        _require(self.epochs >= 1, "teacher.epochs", self.epochs, "an integer of at least 1")
        _require(self.lr > 0, "teacher.lr", self.lr, "a learning rate above 0")
        _require(self.global_batch >= 1, "teacher.global_batch", self.global_batch, "at least 1")
        _check_statistics("teacher", self.mean, self.std)
        _require(
            (self.mean is None) == (self.std is None),
            "teacher.mean", self.mean, f"both or none of it and teacher.std={self.std!r}",
        )  # fmt: skip
        _require(
            self.expected_top1 is None or 0 <= self.expected_top1 <= 100,
            "teacher.expected_top1", self.expected_top1, "percent",
        )  # fmt: skip
        _require(
            self.expected_of is None or len(self.expected_of) == 2,
            "teacher.expected_of", self.expected_of, "the names of a teacher and of a data set",
        )  # fmt: skip


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms (the paper's values are not known to us)."""

    tau: float = 4.0
    """Temperature of every KL term."""
    student_ce: float = 1.0
    """w_ce: labels to student."""
    student_teacher: float = 1.0
    """alpha: original path to student."""
    student_prompt: float = 1.0
    """beta: prompt path to student."""
    prompt_ce: float = 1.0
    """v_ce: labels to prompt path."""
    prompt_teacher: float = 1.0
    """lambda_T: original path to prompt path."""
    prompt_student: float = 1.0
    """lambda_S: student to prompt path ("reversed supervision")."""
    mixture_control: bool = False
    """Control arm: no prompt modules; the student learns from the mixture that an unconstrained
    prompt path would reach, (lambda_T p_T + lambda_S p_S) / (lambda_T + lambda_S)."""
    kd_ce: float = 0.1
    """kd: weight of the cross-entropy (mdistiller, RepDistiller)."""
    kd_kl: float = 0.9
    """kd: weight of the KL term (mdistiller, RepDistiller)."""
    dkd_ce: float = 1.0
    """dkd: weight of the cross-entropy."""
    dkd_alpha: float = 1.0
    """dkd: weight of the target-class part."""
    dkd_beta: float = 8.0
    """dkd: weight of the non-target part."""
    dist_ce: float = 1.0
    """dist: weight of the cross-entropy."""
    dist_inter: float = 2.0
    """dist: weight of the inter-class (row) correlation."""
    dist_intra: float = 2.0
    """dist: weight of the intra-class (column) correlation."""
    decoupled: bool = False
    """dfpt, dfpt_plus: the student's two KL terms in DKD's parts, dkd_alpha times the target class
    and dkd_beta times the others, in the place of the whole."""
    rkd_distance: float = 0.0
    """dfpt, dfpt_plus: weight of RKD's distances between images, as the prompt path has them to
    the student (25 in mdistiller)."""
    rkd_angle: float = 0.0
    """dfpt, dfpt_plus: weight of RKD's angles of three images (50 in mdistiller)."""
    crd: float = 0.0
    """dfpt, dfpt_plus: weight of CRD's contrast of student and prompt path (0.8 as published)."""
    crd_negatives: int = 16384
    """crd: images of other classes that each image is contrasted with."""
    label_smoothing: float = 0.0
    """Label smoothing of every cross-entropy."""
    reverse_kl: bool = False
    """KL(learner || supervisor) in place of KL(supervisor || learner)."""
    warmup_epochs: float = 0.0
    """Distillation terms grow linearly, step by step, from 0 over this many epochs."""
    update: Literal["simultaneous", "alternating"] = "simultaneous"
    """dfpt, dfpt_plus: alternating: even steps move the student, odd steps the prompt path."""

    def __post_init__(self) -> None:
        _clean_values(self, "loss.")
        _require(self.tau > 0, "loss.tau", self.tau, "a temperature above 0")
        _require(
            0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "in [0, 1)"
        )
        _require(self.warmup_epochs >= 0, "loss.warmup_epochs", self.warmup_epochs, "0 or more")
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, (int, float)):  # bools are 0 or 1 and pass
                _require(value >= 0, f"loss.{name}", value, "0 or more")
        _require(self.crd_negatives >= 1, "loss.crd_negatives", self.crd_negatives, "at least 1")
        _require(
            not self.mixture_control or self.prompt_teacher + self.prompt_student > 0,
            "loss.mixture_control", True, "prompt_teacher or prompt_student above 0",
        )  # fmt: skip
        _require(
            not (self.decoupled and self.reverse_kl),
            "loss.decoupled with loss.reverse_kl", True,
            "one of them: DKD's parts are those of KL(supervisor || learner)",
        )  # fmt: skip

    @property
    def added(self) -> tuple[str, ...]:
        """Options that are on and add to DFPT-KD's objective, or change it, with another method's
        terms (M49)."""
        names = ("decoupled", "rkd_distance", "rkd_angle", "crd")
        return tuple(name for name in names if getattr(self, name))

    def of_any_method(self) -> LossConfig:
        """Without what DFPT-KD alone has."""
        return dataclasses.replace(
            self,
            mixture_control=False,
            decoupled=False,
            rkd_distance=0.0,
            rkd_angle=0.0,
            crd=0.0,
            update="simultaneous",
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule; learning rates refer to the global batch."""

    name: Literal["sgd", "adamw", "apex-sgd", "apex-lamb"] = "sgd"
    """sgd, adamw: torch's fused ones; apex-sgd, apex-lamb: those of NVIDIA apex, where its CUDA
    extension has been built."""
    lr: float = 0.05
    """Learning rate of the student; see `lr_batch`."""
    lr_batch: int | None = None
    """The learning rates are for a batch of this many images: the run's are lr * global_batch /
    lr_batch. Absent: they are used as they stand."""
    momentum: float = 0.9
    """sgd, apex-sgd: momentum."""
    nesterov: bool = False
    """sgd, apex-sgd: Nesterov momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw, apex-lamb: decay of the running averages of the gradient and of its square."""
    eps: float = 1e-8
    """adamw, apex-lamb: added to the root of the averaged square."""
    weight_decay: float = 5e-4
    """sgd, apex-sgd: L2 penalty, part of the gradient. adamw: decoupled, takes lr * weight_decay of
    a parameter off it in every step. apex-lamb: decoupled too, but part of the update whose length
    is then scaled to the parameter's."""
    decay_norm_and_bias: bool = True
    """Off: no weight decay on parameters of one dimension, the scales and shifts of normalisations
    and the biases of convolutions and linear layers."""
    schedule: Literal["step", "cosine", "linear", "constant"] = "step"
    """step: times `gamma` after each milestone; linear: in a line to 0 from the end of the
    warm-up."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Shares of the run after which the learning rate falls: epochs 150, 180, 210 of 240."""
    gamma: float = 0.1
    """Factor at a milestone."""
    warmup_epochs: float = 0.0
    """Linear warm-up of the learning rate, in epochs."""
    prompt_lr_scale: float = 1.0
    """Learning rate of prompt, fusion and head over the student's. *Our reading*."""
    backbone_lr_scale: float = 0.01
    """dfpt_plus: learning rate of the copied backbone over that of the prompt blocks. *Our reading*
    of the paper's "minimal"."""
    clip_grad_norm: float | None = None
    """Largest gradient norm over all trained parameters together, so that student and prompt path
    then do influence each other."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the student, which is then evaluated beside it and
    written to student_ema.safetensors."""

    def __post_init__(self) -> None:
        _clean_values(self, "optim.")
        _require(self.lr > 0, "optim.lr", self.lr, "a learning rate above 0")
        _require(
            self.lr_batch is None or self.lr_batch >= 1,
            "optim.lr_batch", self.lr_batch, "a positive number of images",
        )  # fmt: skip
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optim.betas", self.betas, "two numbers in [0, 1)",
        )  # fmt: skip
        _require(self.eps > 0, "optim.eps", self.eps, "above 0")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "in [0, 1)")
        _require(
            not self.nesterov or self.momentum > 0,
            "optim.nesterov", self.nesterov, "optim.momentum above 0",
        )  # fmt: skip
        _require(0 < self.gamma <= 1, "optim.gamma", self.gamma, "in (0, 1]")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(
            list(self.milestones) == sorted(m for m in self.milestones if 0 < m < 1),
            "optim.milestones", self.milestones, "ascending shares of the run, each in (0, 1)",
        )  # fmt: skip
        _require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        _require(self.prompt_lr_scale > 0, "optim.prompt_lr_scale", self.prompt_lr_scale, "above 0")
        _require(
            self.backbone_lr_scale > 0, "optim.backbone_lr_scale", self.backbone_lr_scale, "above 0"
        )
        _require(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            "optim.clip_grad_norm", self.clip_grad_norm, "above 0",
        )  # fmt: skip
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "optim.ema_decay", self.ema_decay, "in (0, 1)",
        )  # fmt: skip


@dataclass(frozen=True)
class StepConfig:
    """How a step is executed; the results are the same within rounding."""

    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """eager: PyTorch's own; compile: teacher, student and loss as compiled regions; graph: these
    and everything else of a step in one CUDA graph; auto: the fastest that applies."""
    joint_paths: bool = False
    """dfpt: the later stages run on both teacher paths as one batch of twice the size. Measured on
    CPUs only, where it is slower."""
    sync_bn: bool = False
    """BatchNorms of student and prompt path normalise by the images of all processes, not by
    those of their own (CUDA only)."""
    max_skips: int = 10
    """Steps of an epoch that may be skipped because their loss or gradients are not finite."""
    max_skips_in_a_row: int = 5
    """Of these, one after the other; beyond either, the run goes back to a checkpoint."""
    max_rewinds: int = 1
    """Times that a run may go back to its last good checkpoint, passing over the data since then;
    beyond, it ends with exit code 4."""
    timeout: float = 600.0
    """Seconds that a process waits for another in one exchange."""

    def __post_init__(self) -> None:
        _clean_values(self, "step.")
        for name in ("max_skips", "max_skips_in_a_row", "max_rewinds"):
            _require(getattr(self, name) >= 0, f"step.{name}", getattr(self, name), "0 or more")
        _require(self.timeout > 0, "step.timeout", self.timeout, "seconds above 0")


@dataclass(frozen=True)
class RunConfig:
    """One run, complete."""

    recipe: str = "custom"
    """Name of the recipe, part of the output folder's name."""
    arm: str | None = None
    """Named variation of the recipe that this is (`--arm`); part of the output folder's name."""
    role: Literal["student", "teacher"] = "student"
    """What the trained network is for: `teacher` in the runs of train-teacher."""
    method: MethodName = "dfpt"
    """ce: labels only; kd, dkd, dist: the usual rivals; dfpt, dfpt_plus: dual-path teacher."""
    student: str = "cifar:ShuffleV1"
    """Model name of the student."""
    student_weights: str | None = None
    """Weights that the student starts from, named as those of the teacher."""
    seed: int = 0
    """Seed of initialisation, sample order and augmentation."""
    seeds: tuple[int, ...] | None = None
    """Several runs in one process, step by step in turn, one for each seed."""
    epochs: int = 240
    """Passes over the training set."""
    global_batch: int = 64
    """Images in an optimisation step, whatever the number of devices and of accumulated parts."""
    accumulate: int = 1
    """Parts that a batch is cut into to save memory. BatchNorms, RKD's terms and DIST's columns see
    the images of one part."""
    eval_batch: int = 256
    """Images in an evaluation step."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    max_steps: int | None = None
    """Stop after this many steps, evaluate and save."""
    device: str | None = None
    """cpu or cuda; absent: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 on CPU; fp16 with gradient scaling."""
    deterministic: bool = False
    """Deterministic algorithms only: two runs give the same bits."""
    kernels: Literal["auto", "reference", "native", "triton"] = "auto"
    """Backend of the fused operations. auto: what is measured to be faster than eager PyTorch (or
    what it is compiled to) on this machine, call by call, and remembered; reference: PyTorch alone;
    native (CPU), triton (CUDA): wherever it can serve. Each serves only where it agrees with fp64
    on the first batch."""
    out: str | None = None
    """Output folder; absent: <output root>/<recipe>-<method>-seed<N>."""
    out_root: str = "runs"
    """Output root."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint in the output folder; extend: the same, for more
    `epochs` than the run was planned for, whose schedule then holds, as its record says; never:
    refuse a folder that holds one; a path: go on from that checkpoint."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints within an epoch; absent: by `checkpoint_minutes` alone."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints within an epoch; 0: none but at its end."""
    on_storage_error: Literal["continue", "stop"] = "continue"
    """A checkpoint that cannot be written: continue warns and tries again at the next one; stop
    ends the run with exit code 5. The last one of a run must succeed in either case."""
    keep_checkpoints: int = 2
    """Checkpoints kept beside the best one."""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    step: StepConfig = field(default_factory=StepConfig)

    def __post_init__(self) -> None:
        _clean_values(self)
        for name in (
            "epochs", "global_batch", "accumulate", "eval_batch", "eval_every", "checkpoint_every",
            "keep_checkpoints",
        ):  # fmt: skip
            _require(
                getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1"
            )
        for name in ("max_steps", "checkpoint_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(
            self.checkpoint_minutes >= 0,
            "checkpoint_minutes", self.checkpoint_minutes, "0 or more",
        )  # fmt: skip
        _require(
            self.global_batch % self.accumulate == 0,
            "accumulate", self.accumulate, f"a divisor of global_batch={self.global_batch}",
        )  # fmt: skip
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        if self.seeds is not None:
            _require(
                len(set(self.seeds)) == len(self.seeds) > 0 and min(self.seeds) >= 0,
                "seeds", self.seeds, "different numbers of 0 or more",
            )  # fmt: skip
        if self.loss.mixture_control:
            _require(
                self.method == "dfpt",
                "loss.mixture_control with method",
                self.method,
                "method 'dfpt'",
            )
        for name in self.loss.added:
            _require(
                self.has_prompt_path,
                f"loss.{name} with method", self.method,
                "method 'dfpt' or 'dfpt_plus', with prompt modules",
            )  # fmt: skip
        if self.loss.update == "alternating":
            # A student alone would rest in every other step, and do half of its training.
            _require(
                self.has_prompt_path,
                "loss.update='alternating' with method", self.method,
                "method 'dfpt' or 'dfpt_plus', with prompt modules",
            )  # fmt: skip
            # Its kernel takes no group without gradients, and every other step rests one.
            _require(
                self.optim.name != "apex-lamb",
                "optim.name with loss.update='alternating'",
                self.optim.name,
                "sgd, adamw or apex-sgd",
            )
        if self.step.joint_paths:
            _require(
                self.method == "dfpt" and self.has_prompt_path and self.prompt.bn_mode != "train",
                "step.joint_paths", True, "method 'dfpt' with a backbone in eval mode",
            )  # fmt: skip
            _require(
                not set(self.loss.added) - {"decoupled"},
                "step.joint_paths", True, "no loss.rkd_distance, loss.rkd_angle or loss.crd",
            )  # fmt: skip

    @property
    def has_prompt_path(self) -> bool:
        """Whether the run trains prompt blocks."""
        return self.method in ("dfpt", "dfpt_plus") and not self.loss.mixture_control


# Studies ------------------------------------------------------------------------------------------

Budget = Literal["full", "short", "cpu"]


@dataclass(frozen=True)
class Cell:
    """A line of a study's table: runs that differ in their seed alone."""

    label: str
    """As it stands in the table; unique in its group."""
    recipe: str
    method: str
    arm: str | None = None
    group: str | None = None
    """Cells of one group share a table, and are compared with each other; absent: the recipe's."""

    @property
    def heading(self) -> str:
        """Of its table, where a study has several."""
        return self.group or self.recipe


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it."""

    name: str
    budget: Budget
    question: str
    """One sentence."""
    scope: str
    """One sentence: what the answer does not say."""
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    epochs: int | None = None
    """Of every run; None: as the recipe has it."""
    against: tuple[str, ...] = ("KD",)
    """Labels of the cells that the others of the same group are compared with, seed by seed."""
    curves: tuple[str, ...] = ()
    """Columns of metrics.csv to draw over the epochs, a figure each."""

    def config(self, cell: Cell, configure: Configure) -> RunConfig:
        """The configuration of a cell's runs, without their seed."""
        config = configure(cell)
        return config if self.epochs is None else dataclasses.replace(config, epochs=self.epochs)

    def command(self, cell: Cell, seed: int) -> str:
        """What makes one of its runs again."""
        arm = "" if cell.arm is None else f" --arm {cell.arm}"
        epochs = "" if self.epochs is None else f" --epochs {self.epochs}"
        method = f"--method {cell.method}"
        return f"dfptkd train {cell.recipe} {method}{arm}{epochs} --seed {seed}"


Configure = Callable[[Cell], RunConfig]
"""A cell's recipe, with its method and arm."""


# JSON ---------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON data."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """The dataclass `cls` out of JSON data; an unknown key or a wrong type is a `UsageError`."""
    if not isinstance(values, dict):
        what = where.rstrip(".") or "configuration"
        raise UsageError(f"{what}: expected an object, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise UsageError(
                f"unknown configuration key {where + key!r}: expected one of {sorted(known)}"
            )
    return cls(**{k: _coerce(hints[k], v, where + k) for k, v in values.items()})


def known_keys(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """JSON data without the keys that `cls` has not: options of another version."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            continue
        is_section = dataclasses.is_dataclass(hints[key]) and isinstance(value, dict)
        found[key] = known_keys(hints[key], value) if is_section else value
    return found


def _coerce(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, name + ".")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            try:
                return _coerce(arg, value, name)
            except UsageError:
                continue
    elif origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(args[0], v, name) for v in value)
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        # Larger whole numbers have no float.
        if isinstance(value, float) or (type(value) is int and abs(value) < 1 << 1023):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, hint):
        return value
    # Of Literal, Union and tuple[...] the name alone would not say what is expected.
    expected = str(hint).replace("typing.", "") if origin else hint.__name__
    raise UsageError(f"{name}={value!r}: expected {expected}")
