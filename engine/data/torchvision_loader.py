"""Decoding by Pillow, cropping and resizing as torchvision's v2 transforms do, in worker processes.

Batches are bit-equal for any number of workers: each draw is a function of (seed, epoch, sample).
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..files import first_line
from .crops import Crops
from .image_files import ImageFiles
from .order import crop_offsets, flips
from .source import Batch, Split

# Pillow refuses pictures above 179 megapixels as bombs; verify-data reports them as huge instead.
Image.MAX_IMAGE_PIXELS = None


class FileSplit(Split):
    """A split of image files; a loader subclasses it.

    Args:
        files: The encoded images.
        crops: Where they are cut.
        side: Of the squares that come out, in pixels, unless asked for another.
        device: Where batches land.
        flip: Whether half of the images are to be mirrored.
        shift: Padding in pixels, out of which each image is to be cut at random; 0: none.
    """

    def __init__(
        self,
        files: ImageFiles,
        crops: Crops,
        side: int,
        device: torch.device,
        *,
        flip: bool,
        shift: int = 0,
    ) -> None:
        self.files, self.crops, self.side = files, crops, side
        self.labels = files.labels  # on the CPU, where workers choose
        self.device, self.flip, self.shift = device, flip, shift

    def where(self, sample: int) -> str:
        """See `Split.where`."""
        return self.files.where(sample)

    def augmentation(
        self, indices: Tensor, seed: int, epoch: int
    ) -> tuple[tuple[int, Tensor] | None, Tensor | None]:
        """`Batch.crop` and `Batch.flip` of the samples `indices` (int64 [B], on the CPU)."""
        crop = None
        if self.shift:
            crop = (self.shift, crop_offsets(seed, epoch, indices, self.shift))
        return crop, flips(seed, epoch, indices) if self.flip else None

    def describe_shift(self) -> dict[str, Any]:
        """The part of `describe` that only shifted images have."""
        return {"shift": self.shift} if self.shift else {}


class TorchvisionSplit(FileSplit):
    """A split whose images are decoded when a batch asks for them."""

    def batch(self, indices: Tensor, *, seed: int, epoch: int, side: int | None = None) -> Batch:
        """See `Split.batch`."""
        return self.decode(indices.cpu(), seed, epoch, side).to(self.device)

    def stream(
        self,
        rows: Sequence[Tensor],
        *,
        seed: int,
        epoch: int,
        workers: int = 0,
        side: int | None = None,
    ) -> Iterator[Batch]:
        """See `Split.stream`."""
        if not workers:
            yield from super().stream(rows, seed=seed, epoch=epoch, side=side)
            return
        loader = DataLoader(
            _DecodedBatches(self, rows, seed, epoch, side),
            batch_size=None,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_for_parent_alone,
            # its own generator: the loader would else advance the global one, which checkpoints
            # record
            generator=torch.Generator(),
        )
        try:
            yield from on_device(_workers(loader), self.device)
        except (OSError, EOFError) as error:  # a batch that its maker did not live to hand over
            raise worker_died(error, workers) from error

    def decode(self, indices: Tensor, seed: int, epoch: int, side: int | None = None) -> Batch:
        """`batch` on the CPU; touches no GPU, so that a forked process may run it."""
        side = side or self.side
        images = np.empty((len(indices), side, side, 3), np.uint8)
        for row, sample in enumerate(indices):
            image = self.open(int(sample))
            size = torch.tensor([[image.height, image.width]])
            box = self.crops.boxes(sample[None], size, seed=seed, epoch=epoch, side=side)
            images[row] = cut(image, box[0].tolist(), side, self.crops.cut_first)
        crop, flip = self.augmentation(indices, seed, epoch)
        return Batch(torch.from_numpy(images), self.labels[indices], crop, flip, indices)

    def open(self, sample: int) -> Image.Image:
        """The source image as 8-bit RGB.

        Raises:
            DataError: It is gone or cannot be decoded.
        """
        return decode_rgb(self.files.read(sample), self.files.where(sample))

    def describe(self) -> dict[str, Any]:
        """See `Split.describe`."""
        shift = self.describe_shift()
        return {"loader": "torchvision", "crops": repr(self.crops), "side": self.side, **shift}


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """An encoded image as 8-bit RGB.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise DataError(
            f"{name}: cannot be decoded as an image ({why_undecodable(error)}); dfptkd verify-data "
            "finds every such file"
        ) from error


def why_undecodable(error: Exception) -> str:
    """A decoder's error in words; Pillow's own for an unknown format names a buffer in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "its bytes are of no format of images"
    return first_line(error)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, the first frame of an animation; 16-bit grey is scaled, not clipped."""
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def cut(image: Image.Image, box: Sequence[float], side: int, cut_first: bool) -> np.ndarray:
    """The box (top, left, height, width) of an image, resized: uint8 [side, side, 3]."""
    top, left, height, width = box
    edges = (left, top, left + width, top + height)
    size = (side, side)
    if cut_first:
        whole = tuple(round(edge) for edge in edges)
        return np.asarray(image.crop(whole).resize(size, Image.Resampling.BILINEAR))  # type: ignore[arg-type]
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=edges))


def on_device(batches: Iterable[Batch | DataError], device: torch.device) -> Iterator[Batch]:
    """Batches on `device`; a GPU's copy of the next one runs while the last one is worked on."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead: Batch | None = None
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        if stream is None:
            yield batch.to(device)
            continue
        with torch.cuda.stream(stream):
            moved = batch.to(device)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(stream)
        moved.record_stream(torch.cuda.current_stream(device))
        ahead = moved
    if ahead is not None:
        yield ahead


def _workers(loader: DataLoader) -> Iterator[Batch | DataError]:
    """The loader's batches; that a worker has died shows where one is awaited, and nowhere else.

    torch's handler of SIGCHLD raises in the midst of whatever the process is at, be it a save.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)  # torch sets no handler either
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return batches


def worker_died(error: BaseException, workers: int) -> DataError:
    """What to say where one of `workers` processes is no more."""
    return DataError(
        f"a process that decodes images has died ({first_line(error)}): expected memory for "
        f"--data.workers {workers}, or fewer of them"
    )


def _leave_for_parent_alone(_worker: int) -> None:
    """Runs in a worker: a SIGTERM ends it if its parent sends it, and nobody else's does.

    A cluster that stops a job tells every process; the parent still needs its batch then, and ends
    the worker when it has saved. SIGINT and SIGUSR1 are the parent's, too.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _DecodedBatches(Dataset):
    """Batch number -> decoded batch, in a worker process."""

    def __init__(
        self,
        split: TorchvisionSplit,
        rows: Sequence[Tensor],
        seed: int,
        epoch: int,
        side: int | None,
    ) -> None:
        self.split, self.rows, self.seed, self.epoch, self.side = split, rows, seed, epoch, side

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self.split.decode(self.rows[step], self.seed, self.epoch, self.side)
        except DataError as error:
            # as a value: the loader would bury a raised error's one line in a traceback
            return error
