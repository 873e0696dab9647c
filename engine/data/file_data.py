"""From image files to batches: which samples there are, which are replaced, what decodes them."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import DataError, UsageError
from ..memory import available_bytes
from .crops import CenterCrop, Crops, RandomResizedCrop, StretchedCrop, WholeImage
from .cub200 import find_cub200
from .folder import find_folder
from .image_files import FileSet, ImageFiles
from .imagenet import find_imagenet
from .quarantine import Quarantine, check_share, find_quarantine
from .source import (
    Augmentation,
    Batch,
    ImageData,
    ResidentSplit,
    Split,
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
_SMALL = ("tiny_imagenet",)  # `auto` keeps these on the device as a whole
_KEPT_SHARE = 0.25  # of the free memory that decoded test images may take
_DECODE_BATCH = 256


def load_files(config: DataConfig, device: torch.device) -> ImageData:
    """A data set of image files; batches land on `device`.

    Raises:
        DataError: Files, classes or labels are missing or contradict each other, or too many images
            are in quarantine.
        UsageError: A loader that is not there, or does not apply.
    """
    loader = choose_loader(config)
    found = find_files(config)
    quarantine, path = find_quarantine(found.root, config.quarantine)
    train_limit, test_limit = split_limits(config)
    train = _limited(found.train, train_limit)
    _check_names(quarantine, path, found, config)
    listed = train.among(quarantine.images)
    check_share(listed, config.max_quarantined, path)
    wanted = _limited(found.test, test_limit)
    test = _sound_test_images(wanted, quarantine.images, config)
    skipped = len(wanted) - len(test)
    notes = []
    if listed.any():
        notes.append(
            f"{int(listed.sum())} of {len(train)} training images are in quarantine ({path}): "
            "others of their class take their places"
        )
    if skipped:
        notes.append(
            f"evaluated without {skipped} of {len(wanted)} test images, which are in quarantine"
        )
    if config.crop_padding is not None and loader != "device":
        notes.append(
            f"data.crop_padding={config.crop_padding} is not used: data.loader {loader} cuts "
            "images out of their files"
        )
    splits = {}
    for name, files in (("train", train), ("test", test)):
        bad = listed if name == "train" else None
        splits[name] = _split(loader, files, config, device, bad, training=name == "train")
    splits["train"].listed = listed if listed.any() else None
    if loader not in ("device", "synthetic") and config.keep_test:
        splits["test"] = KeptSplit(splits["test"], device, config.image_size)
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
        skipped_test=skipped,
    )


def find_files(config: DataConfig) -> FileSet:
    """The samples of a data set of image files, none of them read.

    Raises:
        DataError: Files, classes or labels are missing or contradict each other.
    """
    return _FIND[config.name](config)


def choose_loader(config: DataConfig) -> str:
    """dali, torchvision, device or synthetic: `data.loader` after `auto` is resolved.

    Raises:
        UsageError: DALI is asked for and not installed, or progressive resizing of images that
            stay on the device.
    """
    loader = config.loader
    has_dali = importlib.util.find_spec("nvidia") is not None and bool(
        importlib.util.find_spec("nvidia.dali")
    )
    if loader == "dali" and not has_dali:
        raise UsageError(
            "data.loader='dali': DALI is not installed: expected pip install 'dfptkd[dali]', or "
            "--data.loader torchvision"
        )
    if loader == "auto":
        loader = "device" if config.name in _SMALL else "dali" if has_dali else "torchvision"
    if loader == "device" and config.start_size is not None:
        raise UsageError(
            "data.start_size with images that stay on the device: expected --data.loader dali or "
            "torchvision"
        )
    return loader


def crops_of(config: DataConfig, training: bool) -> Crops:
    """How a data set's images are cut."""
    if config.name == "cub200":
        return StretchedCrop(random=training)
    return RandomResizedCrop() if training else CenterCrop()


def _split(
    loader: str,
    files: ImageFiles,
    config: DataConfig,
    device: torch.device,
    listed: Tensor | None,
    *,
    training: bool,
) -> Split:
    crops, side, flip = crops_of(config, training), config.image_size, config.flip and training
    if loader == "synthetic":
        return SyntheticBank(files.labels, side, device, flip=flip)
    if loader == "device":
        return _resident(files, config, device, listed, training)
    if loader == "dali":
        from .dali import DaliSplit

        return DaliSplit(files, crops, side, device, flip=flip)
    return TorchvisionSplit(files, crops, side, device, flip=flip)


def _resident(
    files: ImageFiles,
    config: DataConfig,
    device: torch.device,
    listed: Tensor | None,
    training: bool,
) -> ResidentSplit:
    """All images decoded once, each stretched to a square; training then crops out of a padding.

    Those that are `listed` (bool [N]) stay black: nobody asks for them.
    """
    side = config.image_size
    need, free = len(files) * side * side * 3, available_bytes(device)
    if need > 0.8 * free:
        raise DataError(
            f"data.loader='device': {len(files)} images of {side}x{side} take "
            f"{need / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB free on {device}: expected "
            "--data.loader dali or torchvision"
        )
    decoding = TorchvisionSplit(files, WholeImage(), side, torch.device("cpu"), flip=False)
    images = torch.zeros(len(files), side, side, 3, dtype=torch.uint8, device=device)
    sound = torch.arange(len(files)) if listed is None else (~listed).nonzero()[:, 0]
    rows = sound.split(_DECODE_BATCH)
    for batch in decoding.stream(rows, seed=0, epoch=0, workers=config.workers):
        images[batch.indices.to(device)] = batch.images.to(device)
    augmentation = None
    if training:
        padding = side // 8 if config.crop_padding is None else config.crop_padding
        augmentation = Augmentation(len(files), padding, config.flip, device)
    return ResidentSplit(images, files.labels.to(device), augmentation)


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


def _check_names(
    quarantine: Quarantine, path: Path | None, found: FileSet, config: DataConfig
) -> None:
    """Refuse a list that was named and speaks of other files.

    Raises:
        DataError: None of its images is in either split.
    """
    names = quarantine.images
    if config.quarantine is None or not names:
        return
    if not (found.train.among(names).any() or found.test.among(names).any()):
        raise DataError(
            f"{path}: {next(iter(names))!r} and the others are not below {found.root}: expected a "
            f"list by dfptkd verify-data {found.root}"
        )
