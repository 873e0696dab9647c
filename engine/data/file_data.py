"""From image files to batches: which samples there are, how they are cut, what decodes them."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import DataError, UsageError
from ..memory import available_bytes
from .crops import CropRule, Crops, crop_rule, kind_of_images, sizes_in_words
from .cub200 import find_cub200
from .folder import find_folder
from .image_files import FileSet, ImageFiles
from .imagenet import find_imagenet
from .look import Look, look_into
from .quarantine import check_share, find_quarantine
from .source import (
    Augmentation,
    Batch,
    DataIdentity,
    ImageData,
    ResidentSplit,
    Split,
    digest_of_names,
    split_limits,
    spread_over_classes,
)
from .synthetic import SyntheticBank
from .tiny_imagenet import find_tiny_imagenet
from .torchvision_loader import TorchvisionSplit
from .webdataset import find_webdataset

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FIND = {
    "folder": find_folder,
    "imagenet": find_imagenet,
    "cub200": find_cub200,
    "tiny_imagenet": find_tiny_imagenet,
    "webdataset": find_webdataset,
}
SOURCES = tuple(_FIND)
_RESIDENT_BYTES = 4 << 30  # of small images that `auto` keeps on the device as a whole
_KEPT_SHARE = 0.25  # of the free memory that decoded test images may take
_DECODE_BATCH = 256


def load_files(config: DataConfig, device: torch.device) -> ImageData:
    """A data set of image files; batches land on `device`.

    Raises:
        DataError: Files, classes or labels are missing or contradict each other, or too many images
            are in quarantine.
        UsageError: A loader that is not there, or does not apply.
    """
    check_loader(config)
    found = find_files(config)
    looks = [look_into(files) for files in (found.train, found.test)]
    rule, rule_in_words = find_rule(config, looks)
    quarantine, path = find_quarantine(found, config.quarantine)
    train_limit, test_limit = split_limits(config)
    train = _limited(found.train, train_limit)
    listed = train.among(quarantine.images)
    check_share(listed, config.max_quarantined, path)
    wanted = _limited(found.test, test_limit)
    test = _sound_test_images(wanted, quarantine.images, config)
    skipped = len(wanted) - len(test)
    notes = []
    if listed.any():
        notes.append(
            f"{int(listed.sum())} of {len(train)} training images are in quarantine ({path}): "
            + _who_takes_their_places(listed, train.labels, found.class_names)
        )
    if skipped:
        notes.append(
            f"evaluated without {skipped} of {len(wanted)} test images, which are in quarantine"
        )
    loader = choose_loader(config, rule, len(train) + len(test))
    make = _Maker(config, rule, loader, device)
    splits = {"train": make.train(train, listed), "test": make.test(test)}
    if loader == "device" and not rule.is_fixed:
        rule_in_words += "; each epoch cuts the training images anew, the others stay on the device"
    if config.crop_padding is not None and rule.kind != "small":
        notes.append(
            f"data.crop_padding={config.crop_padding} is not used: images that are cut as "
            f"{rule.kind} are not shifted"
        )
    splits["train"].listed = listed if listed.any() else None
    contents = [look.content for look in looks]
    if loader == "synthetic":  # the labels are real, the images are made up
        side = config.image_size
        contents = [digest_of_names([c, f"synthetic images of {side} pixels"]) for c in contents]
        rule_in_words = "made up"
    return ImageData(
        name=config.name,
        train=splits["train"],
        test=splits["test"],
        num_classes=len(found.class_names),
        class_names=found.class_names,
        image_size=(config.image_size, config.image_size),
        mean=config.mean or IMAGENET_MEAN,  # type: ignore[arg-type]
        std=config.std or IMAGENET_STD,  # type: ignore[arg-type]
        pipeline={
            **splits["train"].describe(),
            "train_files": train.fingerprint()[:16],
            "quarantined": hashlib.sha256(np.packbits(listed.numpy()).tobytes()).hexdigest()[:16],
        },
        notes=notes,
        passed_over=found.passed_over,
        skipped_test=skipped,
        identity=DataIdentity(digest_of_names(found.class_names), *contents),
        preprocessing={
            "layout": found.layout,
            **rule.describe(config.image_size, config.flip),
            "in_words": f"images of {found.layout}: {rule_in_words}",
        },
    )


def find_files(config: DataConfig) -> FileSet:
    """The samples of a data set of image files, none of them read.

    Raises:
        DataError: Files, classes or labels are missing or contradict each other.
    """
    found = _FIND[config.name](config)
    labels = [files.labels.unique().tolist() for files in (found.train, found.test)]
    untrained = sorted(set(labels[1]) - set(labels[0]))
    if untrained:
        raise DataError(
            f"{found.root}: test images and no training image of {len(untrained)} of "
            f"{len(found.class_names)} classes, first {found.class_names[untrained[0]]!r}"
        )
    return found


def find_rule(config: DataConfig, looks: Sequence[Look]) -> tuple[CropRule, str]:
    """How the images are cut, and a line that says so and why.

    Args:
        config: What a user asks for.
        looks: Into both splits, as a whole: a limit changes nothing.
    """
    sizes = [size for look in looks for size in look.sizes]
    kind = kind_of_images(sizes) if config.crops == "auto" else config.crops
    rule = crop_rule(kind, config.image_size, config.crop_padding)
    why = f"by {len(sizes)} headers" if config.crops == "auto" else f"--data.crops {kind}"
    words = rule.in_words(config.image_size, config.flip)
    return rule, f"{sizes_in_words(sizes)}, cut as {kind} ({why}): {words}"


def check_loader(config: DataConfig) -> None:
    """Refuse a loader that no data could use.

    Raises:
        UsageError: DALI is asked for and not installed, or progressive resizing of images that
            stay on the device.
    """
    if config.loader == "dali" and not _has_dali():
        raise UsageError(
            "data.loader='dali': DALI is not installed: expected pip install 'dfptkd[dali]', or "
            "--data.loader torchvision"
        )
    if config.loader == "device" and config.start_size is not None:
        raise UsageError(_NO_RESIZING)


_NO_RESIZING = (
    "data.start_size with images that stay on the device: expected --data.loader dali or "
    "torchvision"
)


def choose_loader(config: DataConfig, rule: CropRule, num_images: int) -> str:
    """dali, torchvision, device or synthetic: `data.loader` after `auto` is resolved.

    Args:
        config: What a user asks for.
        rule: How the images are cut.
        num_images: Of both splits.

    Raises:
        UsageError: Progressive resizing of images that stay on the device.
    """
    if config.loader != "auto":
        return config.loader
    fits = num_images * config.image_size**2 * 3 <= _RESIDENT_BYTES
    if not (rule.kind == "small" and fits):
        return _decoder()
    if config.start_size is not None:
        raise UsageError(_NO_RESIZING)
    return "device"


def _has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and bool(
        importlib.util.find_spec("nvidia.dali")
    )


def _decoder() -> str:
    """The loader that decodes images anew in every epoch, unless a user chooses."""
    return "dali" if _has_dali() else "torchvision"


def _who_takes_their_places(listed: Tensor, labels: Tensor, class_names: list[str]) -> str:
    """Which images stand in for the listed ones, see `quarantine.replace_listed`."""
    gone = sorted(set(labels[listed].tolist()) - set(labels[~listed].tolist()))
    if not gone:
        return "others of their class take their places"
    lost = "1 class has" if len(gone) == 1 else f"{len(gone)} classes have"
    own = "" if set(labels[listed].tolist()) == set(gone) else "others of their class, or "
    return (
        f"{lost} no sound image left (first {class_names[gone[0]]!r}); {own}images of other "
        "classes take their places"
    )


@dataclass(frozen=True)
class _Maker:
    """Makes the splits of a run."""

    config: DataConfig
    rule: CropRule
    loader: str
    device: torch.device

    def train(self, files: ImageFiles, listed: Tensor) -> Split:
        """The training split; of images that each epoch cuts anew none can stay on the device."""
        config, rule = self.config, self.rule
        if self.loader == "synthetic":
            return SyntheticBank(files.labels, config.image_size, self.device, flip=config.flip)
        if self.loader == "device" and rule.is_fixed:
            shifts = Augmentation(len(files), rule.shift, config.flip, self.device)
            return self._resident(files, rule.train, ~listed, shifts)
        return self._decoding(files, rule.train, flip=config.flip, shift=rule.shift)

    def test(self, files: ImageFiles) -> Split:
        """The test split, whose images are decoded once where the device's memory holds them."""
        if self.loader == "synthetic":
            return SyntheticBank(files.labels, self.config.image_size, self.device, flip=False)
        if self.loader == "device":
            sound = torch.ones(len(files), dtype=torch.bool)
            return self._resident(files, self.rule.test, sound, None)
        split = self._decoding(files, self.rule.test, flip=False)
        if not self.config.keep_test:
            return split
        return KeptSplit(split, self.device, self.config.image_size)

    def _decoding(self, files: ImageFiles, crops: Crops, *, flip: bool, shift: int = 0) -> Split:
        loader = _decoder() if self.loader == "device" else self.loader
        side = self.config.image_size
        if loader == "dali":
            from .dali import DaliSplit

            return DaliSplit(files, crops, side, self.device, flip=flip, shift=shift)
        return TorchvisionSplit(files, crops, side, self.device, flip=flip, shift=shift)

    def _resident(
        self, files: ImageFiles, crops: Crops, sound: Tensor, shifts: Augmentation | None
    ) -> ResidentSplit:
        """All images decoded once; those that are not `sound` (bool [N]) stay black: nobody asks
        for them."""
        side, device = self.config.image_size, self.device
        need, free = len(files) * side * side * 3, available_bytes(device)
        if need > 0.8 * free:
            raise DataError(
                f"data.loader='device': {len(files)} images of {side}x{side} take "
                f"{need / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB free on {device}: expected "
                "--data.loader dali or torchvision"
            )
        decoding = TorchvisionSplit(files, crops, side, torch.device("cpu"), flip=False)
        images = torch.zeros(len(files), side, side, 3, dtype=torch.uint8, device=device)
        rows = sound.nonzero()[:, 0].split(_DECODE_BATCH)
        for batch in decoding.stream(rows, seed=0, epoch=0, workers=self.config.workers):
            images[batch.indices.to(device)] = batch.images.to(device)
        return ResidentSplit(images, files.labels.to(device), shifts)


class KeptSplit(Split):
    """A test split that is decoded once, where the device's free memory holds it.

    Args:
        decoding: The split that it stands for.
        device: Where batches land.
        side: Of the images, in pixels.
    """

    def __init__(self, decoding: Split, device: torch.device, side: int) -> None:
        self.decoding, self.device, self.side = decoding, device, side
        self.labels = decoding.labels
        self.samples: Tensor | None = None
        self.images: Tensor | None = None

    def batch(self, indices: Tensor, *, seed: int, epoch: int, side: int | None = None) -> Batch:
        """See `Split.batch`."""
        return self.decoding.batch(indices, seed=seed, epoch=epoch, side=side)

    def stream(
        self,
        rows: Sequence[Tensor],
        *,
        seed: int,
        epoch: int,
        workers: int = 0,
        side: int | None = None,
    ) -> Iterator[Batch]:
        """See `Split.stream`; the second time over the same samples nothing is decoded."""
        samples = torch.cat(list(rows)) if rows else torch.empty(0, dtype=torch.int64)
        if self.images is not None and torch.equal(samples, self.samples):  # type: ignore[arg-type]
            done = 0
            for indices in rows:
                images = self.images[done : done + len(indices)]
                done += len(indices)
                labels = self.labels[indices].to(self.device)
                yield Batch(images, labels, None, None, indices.to(self.device))
            return
        kept, done = self._room(len(samples)), 0
        for batch in self.decoding.stream(rows, seed=seed, epoch=epoch, workers=workers, side=side):
            if kept is not None:
                kept[done : done + len(batch.labels)] = batch.images
                done += len(batch.labels)
            yield batch
        if kept is not None:
            self.samples, self.images = samples, kept
            self.decoding.release()

    def describe(self) -> dict[str, Any]:
        """See `Split.describe`."""
        return self.decoding.describe()

    def _room(self, count: int) -> Tensor | None:
        self.samples = self.images = None
        shape = (count, self.side, self.side, 3)
        if count * self.side**2 * 3 > _KEPT_SHARE * available_bytes(self.device):
            return None
        return torch.empty(shape, dtype=torch.uint8, device=self.device)


def _limited(files: ImageFiles, limit: int | None) -> ImageFiles:
    if limit is None or limit >= len(files):
        return files
    return files.take(spread_over_classes(files.labels, limit))


def _sound_test_images(files: ImageFiles, listed: dict[str, str], config: DataConfig) -> ImageFiles:
    """The test images that can be evaluated.

    Raises:
        DataError: Some are in quarantine, and nobody said to skip them.
    """
    among = files.among(listed)
    bad = among.nonzero()[:, 0].tolist()
    if not bad:
        return files
    if not config.skip_quarantined:
        raise DataError(
            f"{files.where(bad[0])}: {len(bad)} of {len(files)} test images are in quarantine "
            f"({listed[files.name(bad[0])]}); a figure without them is another figure: expected "
            "sound files, or --data.skip-quarantined"
        )
    return files.take((~among).nonzero()[:, 0])
