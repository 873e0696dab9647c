"""Logits of the frozen teacher, kept for each form of each training image.

A small image comes in finitely many forms: the offsets of its crop, flipped or not. What a frozen
teacher makes of one is always the same, and a run meets a form again: in later epochs, in another
seed, in another run. So the logits are filled into a table [places, C] as the images are met, and
of a batch only the images that are not known go through the teacher: all of it for kd, dkd, dist
and dfpt_plus; for dfpt the stages after those that both paths share.

A run ends with the bits that it would have without. The bits of an image's logits may depend on how
many images are computed together, as libraries choose their algorithms by the size; so they are
computed in those sizes alone that a comparison on real images has shown to agree with the whole
batch, and where not even the whole batch gives each image the same bits in any place, nothing is
remembered. Rows that are computed again, to fill up such a size, are compared with what was known.

The table lives in memory, one for all seeds of a run, and what is known may be kept in a
`logits_file`. Its key names the teacher's and the images' SHA-256, all that happens to an image
before the teacher sees it, and the SHA-256 of the logits of the first images: another machine,
precision, library or kernel that gives other bits is another file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.backend import cache_folder, in_force
from .config import RunConfig
from .data import Batch, ImageData
from .errors import UsageError
from .files import first_line
from .log import RunLog, hardware, versions
from .logits_file import SUFFIX, LogitsFile, Rows
from .methods import Method
from .models.dual_path import FrozenOutputs
from .models.input_norm import InputNorm
from .step import TrainStep, compute_precision

FREE_SHARE = 0.25  # of the free memory that the table may take
LEAST_HITS = 0.05  # of all images, for `auto`
AUTO_FILE_BYTES = 256_000_000  # largest file that `auto` leaves without being asked
# Sizes to compute together, in shares of a batch.
SIZES = (1.0, 0.75, 0.5, 0.25, 0.125)
ORDERS = 2  # in which each size is compared


# Whether it pays ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outlook:
    """What remembering a run's teacher logits takes, and what it gives."""

    obstacle: str | None
    """Why they are not remembered; None: they are."""
    images: int = 0
    forms: int = 0
    """In which each image may come."""
    bytes: int = 0
    """Of the table, in memory: what it takes when all forms have been met."""
    hits: float = 0.0
    """Share of the images of the run whose logits are expected to be known, if none are before."""
    file: bool = False
    """Whether they are kept beside the data, or in the user's cache."""

    def __str__(self) -> str:
        if self.obstacle is not None:
            return f"teacher logits are not remembered: {self.obstacle}"
        where = "in memory and in a file" if self.file else "in memory"
        return (
            f"teacher logits are remembered {where}: {self.images:,} images in {self.forms} forms, "
            f"at most {self.bytes / 1e6:,.1f} MB; expected for {100 * self.hits:.0f} % of the "
            "images of this run"
        )


def outlook(
    config: RunConfig,
    *,
    images: int,
    forms: int | None,
    num_classes: int,
    steps: int,
    steps_per_epoch: int,
    mode: str,
    device: torch.device,
    available: int,
) -> Outlook:
    """Decide whether a run of a method with a teacher remembers its logits.

    Args:
        config: The run, or those of all its seeds.
        images: Training images.
        forms: In which each may come; None: there is no fixed number.
        num_classes: Classes.
        steps: Of one run.
        steps_per_epoch: Of it.
        mode: How steps are executed.
        device: Where.
        available: Bytes of memory that are free there, for this process.

    Raises:
        UsageError: `teacher.remember` asks for what this run cannot have.
    """
    asked = config.teacher.remember
    if asked == "off":
        return Outlook("--teacher.remember off")
    obstacle = _obstacle(config, forms, mode, device)
    if obstacle is not None:
        if asked != "auto":
            raise UsageError(f"teacher.remember={asked!r}: expected auto or off: {obstacle}")
        return Outlook(obstacle)
    assert forms is not None
    value_bytes = 4 if compute_precision(config, device) == "fp32" else 2
    # Two marks a place: whether it is known, and whether the file has it.
    need = images * forms * (num_classes * value_bytes + 2)
    # Runs whose sample order is the same meet an image in the same form.
    seeds = 1 if config.data.order_seed is not None else len(config.seeds or (config.seed,))
    hits = expected_hits(forms, seeds * steps / steps_per_epoch)
    small = config.data.name != "synthetic" and need <= AUTO_FILE_BYTES
    found = Outlook(None, images, forms, need, hits, asked == "file" or (asked == "auto" and small))
    if need > FREE_SHARE * available:
        obstacle = (
            f"{need / 1e6:,.1f} MB, and a quarter of the free memory is "
            f"{FREE_SHARE * available / 1e6:,.1f} MB"
        )
    elif asked == "auto" and config.data.name == "synthetic":
        obstacle = "synthetic images stand for others (--teacher.remember memory remembers them)"
    elif asked == "auto" and hits < LEAST_HITS and not (found.file and _has_files(config)):
        obstacle = (
            f"expected for {100 * hits:.1f} % of the images of this run alone "
            "(--teacher.remember file keeps them for later ones)"
        )
    return dataclasses.replace(found, obstacle=obstacle)


def _obstacle(config: RunConfig, forms: int | None, mode: str, device: torch.device) -> str | None:
    """What rules it out whatever is asked for."""
    if forms is None or config.data.start_size is not None:
        return "augmentation gives an image no fixed number of forms"
    if config.step.joint_paths:
        return "step.joint_paths computes both paths as one batch"
    if device.type != "cpu":
        return "a step on a GPU does not wait for the host, which would decide what is known"
    if mode != "eager" and config.has_prompt_path and config.method == "dfpt":
        return f"steps by {mode} run the original path of dfpt as one region"
    return None


def expected_hits(forms: int, draws: float) -> float:
    """Share of `draws` out of `forms`, each as likely, that have come up before."""
    if draws <= 0:
        return 0.0
    hits = 1 - forms * (1 - (1 - 1 / forms) ** draws) / draws
    return max(0.0, hits)  # below one draw an image, the formula's share is negative


def folders(config: RunConfig) -> list[Path]:
    """Where files of logits may lie, the best first: beside the data, in the user's cache."""
    root = config.data.root or os.environ.get("DFPTKD_DATA")
    found = [cache_folder() / "teacher-logits"]
    if root and config.data.name != "synthetic" and Path(root).expanduser().is_dir():
        found.insert(0, Path(root).expanduser() / ".dfptkd" / "teacher-logits")
    return found


def _has_files(config: RunConfig) -> bool:
    return any(any(folder.glob(f"*{SUFFIX}")) for folder in folders(config))


# The table ---------------------------------------------------------------------------------------


class TeacherLogits:
    """A method's `frozen_outputs`, with logits that are remembered; of all seeds of a run.

    Until `open` has found that it can be done, and for batches of another size or a run by other
    kernels, everything is computed.

    Args:
        method: The method, or one of several that hold the same teacher.
        config: The run.
        data: Its data set.
        need: What was foreseen.
        teacher_sha256: The teacher's fingerprint.
        norm: By what its images are normalised, if not as the student's.
    """

    def __init__(
        self,
        method: Method,
        config: RunConfig,
        data: ImageData,
        need: Outlook,
        teacher_sha256: str,
        norm: InputNorm | None = None,
    ) -> None:
        self.method, self.config, self.data, self.need = method, config, data, need
        self.teacher_sha256, self.norm = teacher_sha256, norm
        self.sizes: tuple[int, ...] = ()
        """Numbers of images that may be computed together, descending; empty: nothing is kept."""
        self.batch = 0
        self.kernels: tuple[str | None, str | None] = None, None
        self.table = self.known = self.kept = torch.empty(0)
        self.file: LogitsFile | None = None
        self.is_open = False
        self.asked = self.hits = 0
        self._trouble: str | None = None

    def __call__(self, images: Tensor, places: Tensor) -> FrozenOutputs | None:
        """`Method.frozen_outputs` of images [B, 3, H, W], whose `Batch.places` are int64 [B]."""
        if not self.sizes or len(images) != self.batch or in_force() != self.kernels:
            return self.method.frozen_outputs(images)
        start = self.method.frozen_start(images)
        assert start is not None
        known = self.known[places]
        if not known.all() and not self._fill(start, places, known):
            return self.method.frozen_outputs(images)
        self.asked += len(places)
        self.hits += int(known.sum())
        return FrozenOutputs(start, self.table.index_select(0, places))

    def _fill(self, start: Tensor, places: Tensor, known: Tensor) -> bool:
        """Compute the images that are not known; False where others turn out to be wrong."""
        # Stable: unknown ones first, and the rest fills up the size.
        rows = torch.argsort(known, stable=True)
        count = int((~known).sum())
        size = min(size for size in self.sizes if size >= count)
        if size < len(rows):
            rows = rows[:size]
            logits = self.method.frozen_logits(_take(start, rows))
        else:
            rows = torch.arange(len(rows))
            logits = self.method.frozen_logits(start)
        again = known[rows]
        if not _same_bits(logits[again], self.table[places[rows[again]]]):
            self._give_up("the teacher gives other logits than before to the same image")
            return False
        self.table[places[rows]] = logits
        self.known[places[rows]] = True
        return True

    def _give_up(self, reason: str) -> None:
        self.sizes, self.file, self._trouble = (), None, reason
        self.table = self.known = self.kept = torch.empty(0)

    # Opening ---------------------------------------------------------------------------------

    def open(self, step: TrainStep, batch: Batch, log: RunLog) -> None:
        """Find out which sizes give the same bits, and read what is known already.

        To be called once the mode and the kernels of a run are settled: after its first step.

        Args:
            step: Of a run that uses this.
            batch: One of its batches.
            log: Is told what came out.
        """
        if self.is_open:
            return
        self.is_open = True
        self.batch = len(batch.labels.chunk(self.config.accumulate)[0])
        samples = torch.arange(self.batch, device=batch.indices.device) % len(self.data.train)
        first = self.data.train.batch(samples, seed=0, epoch=0)
        with torch.no_grad(), step.training_forward(), step.kernels.in_force():
            self.kernels = in_force()
            images = step.normalise(first)
            found = self.method.frozen_outputs(images)
            start = self.method.frozen_start(images)
            assert found is not None
            assert start is not None
            self.sizes = self._agreeing_sizes(start, found, step.mode)
        if not self.sizes:
            message = "not remembered: here an image's logits depend on its place in the batch"
            log.warn("teacher_logits", f"teacher logits are {message}")
            return
        logits = found.logits
        num_places = self.need.images * self.need.forms
        # Not zeros: of a table that is never filled the system then gives no memory.
        self.table = torch.empty(num_places, logits.shape[1], dtype=logits.dtype)
        self.known = torch.zeros(num_places, dtype=torch.bool)
        self.kept = torch.zeros(num_places, dtype=torch.bool)
        where = self._open_file(step, first, logits, log) if self.need.file else ""
        log.say(
            f"teacher logits: {int(self.known.sum()):,} of {num_places:,} known{where}; computed "
            f"{' or '.join(str(size) for size in self.sizes)} together"
        )
        log.event("teacher_logits", f"{int(self.known.sum())} of {num_places} known{where}")

    def _agreeing_sizes(self, start: Tensor, found: FrozenOutputs, mode: str) -> tuple[int, ...]:
        """The sizes in which every image gets the bits that it has in the whole batch."""
        if found.shared is not None and not _same_bits(start, found.shared):
            return ()
        orders = [
            torch.randperm(self.batch, generator=torch.Generator().manual_seed(i))
            for i in range(ORDERS)
        ]
        sizes: list[int] = []
        # A compiled region would be made anew for every size.
        shares = SIZES if mode == "eager" else SIZES[:1]
        for size in sorted({max(int(share * self.batch), 1) for share in shares}, reverse=True):
            if not all(self._agrees(start, found.logits, order, size) for order in orders):
                break
            sizes.append(size)
        return tuple(sizes)

    def _agrees(self, start: Tensor, logits: Tensor, order: Tensor, size: int) -> bool:
        for rows in order.to(start.device).split(size):
            if len(rows) < size:  # filled up with others
                rows = torch.cat([rows, order[: size - len(rows)]])
            if not _same_bits(self.method.frozen_logits(_take(start, rows)), logits[rows]):
                return False
        return True

    # The file ----------------------------------------------------------------------------------

    def _open_file(self, step: TrainStep, first: Batch, logits: Tensor, log: RunLog) -> str:
        """Take over what a file knows; says where it is."""
        key = self._key(step, first, logits)
        row_bytes = logits.shape[1] * logits.element_size()
        refusals = []
        for folder in folders(self.config):
            try:
                self.file = LogitsFile(folder, key, len(self.table), row_bytes)
                self._exchange(log)
                return f" ({self.file.path})"
            except OSError as error:
                refusals.append(f"{folder}: {first_line(error)}")
                self.file = None
        log.warn("teacher_logits", f"teacher logits are in memory alone: {'; '.join(refusals)}")
        return ""

    def _key(self, step: TrainStep, first: Batch, logits: Tensor) -> dict[str, Any]:
        data = self.data
        return {
            "teacher": self.teacher_sha256,
            "images": data.train.content(),
            "number": len(data.train),
            "crop_padding": None if first.crop is None else first.crop[0],
            "flip": first.flip is not None,
            "mean": list(data.mean),
            "std": list(data.std),
            **({} if self.norm is None else {"teacher_norm": [self.norm.mean, self.norm.std]}),
            "precision": step.precision,
            "fold_bn": self.config.teacher.fold_bn,
            "together": self.batch,
            "mode": step.mode,
            "machine": [hardware(step.device)[name] for name in ("device", "cpu")],
            "torch": versions()["torch"],
            "logits": [str(logits.dtype), logits.shape[1], _sha256(logits)],
        }

    def _exchange(self, log: RunLog) -> None:
        assert self.file is not None
        complaint = self.file.exchange(self._install, self._new_rows)
        if complaint is not None:
            log.warn("teacher_logits", f"{self.file.path}: {complaint}")
        self.kept |= self.known

    def _install(self, rows: Rows) -> None:
        places = torch.from_numpy(rows[0])
        logits = torch.from_numpy(rows[1].copy()).view(self.table.dtype)
        self.table[places] = logits
        self.known[places] = self.kept[places] = True

    def _new_rows(self) -> Rows:
        places = (self.known & ~self.kept).nonzero()[:, 0]
        return places.numpy(), _bytes(self.table[places])

    def keep(self, method: Method, log: RunLog, step: int) -> None:
        """Say what is to be said at the end of an epoch, and add to the file what is new.

        Args:
            method: Of the run whose epoch has ended; of several the first speaks for all.
            log: Of that run.
            step: Where it stands.
        """
        if self._trouble is not None:
            message = f"teacher logits are no longer remembered: {self._trouble}"
            log.warn("teacher_logits", message, step)
            self._trouble = None
        if self.asked and method is self.method:
            share = 100 * self.hits / self.asked
            log.event("teacher_logits", f"{share:.1f} % of {self.asked} images were known", step)
            self.asked = self.hits = 0
        if self.file is None:
            return
        try:
            self._exchange(log)
        except OSError as error:
            path, self.file = self.file.path, None
            log.warn(
                "teacher_logits",
                f"{path}: could not be written ({first_line(error)}): teacher logits are in memory "
                "alone",
            )


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of images, or of what stages make of them, in the layout of all."""
    taken = x.index_select(0, rows)
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return taken.contiguous(memory_format=torch.channels_last) if is_last else taken


def _bytes(x: Tensor) -> np.ndarray:
    """uint8 [R, row bytes] of rows [R, C]."""
    return x.contiguous().view(torch.uint8).numpy()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """As numbers would not do: NaN is no NaN, and 0 is -0."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def _sha256(x: Tensor) -> str:
    return hashlib.sha256(_bytes(x).tobytes()).hexdigest()
