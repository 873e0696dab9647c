"""Decoding by NVIDIA DALI, in threads: whole batches on the GPU, or regions of images on the CPU.

The order, the boxes and the bytes are ours; DALI is given what to decode and where to cut, and has
no state of its own. So a batch is the same bits whatever came before it, and a run resumes at any
step. Images that decoders treat differently (CMYK, 16 bits, animations) are decoded by Pillow and
handed over as pixels, so that every loader sees the same picture.

On the CPU, DALI decodes only the rows and columns of the box, and PyTorch resizes: its vectorised
kernel takes a sixth of the time of DALI's and agrees with Pillow's to a rounding. On the GPU, DALI
decodes whole images (no decoder of regions: DALI 2.3 and 2.4 crash in them on some GPUs), cuts and
resizes.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError, UsageError
from .header import plain_size
from .source import Batch
from .torchvision_loader import FileSplit, cut, decode_rgb

_READERS = 4  # threads that read files, a batch each
_READ_AHEAD = 4  # batches read before a decoder is free
_DECODE_AHEAD = 2  # batches in the decoder
_RESIZE_AHEAD = 1  # batches made before one is asked for
_NAMED = 3  # files of a batch that a message names


@dataclass
class _Work:
    """A batch on its way."""

    step: int
    indices: Tensor
    """int64 [B]."""
    side: int
    encoded: list[np.ndarray]
    """uint8 [bytes] each."""
    sizes: np.ndarray
    """int32 [B, 2]: height and width of the source images."""
    boxes: np.ndarray
    """float64 [B, 4]: top, left, height and width of what is cut out of them."""
    images: Tensor | None = None
    """uint8 [B, side, side, 3]."""
    pending: list[Future] = field(default_factory=list)
    """What still writes to them."""

    def finished(self) -> _Work:
        """The same, with all pixels in place."""
        for task in self.pending:
            task.result()
        return self


class _DecodeError(Exception):
    """DALI failed on the batch of a step."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step


class DaliSplit(FileSplit):
    """A split whose images DALI decodes; on a CUDA device there."""

    @cached_property
    def resize_in_dali(self) -> bool:
        """Whether DALI also resizes, on the device; on a CPU torch does."""
        return self.device.type == "cuda"

    @cached_property
    def _idle(self) -> list[_Decoder]:
        """Decoders that are not in use: a stream borrows one, so that several seeds take turns."""
        return []

    def batch(self, indices: Tensor, *, seed: int, epoch: int, side: int | None = None) -> Batch:
        """See `Split.batch`."""
        (batch,) = self.stream([indices], seed=seed, epoch=epoch, side=side)
        return batch

    def stream(
        self,
        rows: Sequence[Tensor],
        *,
        seed: int,
        epoch: int,
        workers: int = 0,
        side: int | None = None,
    ) -> Iterator[Batch]:
        """See `Split.stream`; `workers` are DALI's threads, 0: as many as it has.

        Raises:
            DataError: A file cannot be read or decoded.
        """
        rows, side = [row.cpu() for row in rows], side or self.side
        by_pillow: dict[int, str] = {}  # step -> what went wrong without
        done = 0
        while done < len(rows):
            steps = range(done, len(rows))
            try:
                for work in self._decoded(rows, steps, by_pillow, seed, epoch, workers, side):
                    done += 1
                    if work.step in by_pillow:
                        warnings.warn(by_pillow[work.step], stacklevel=2)
                    yield self._batch(work, seed, epoch)
            except _DecodeError as error:
                message = self._failure(rows[error.step], error)
                if error.step in by_pillow:
                    raise DataError(message) from error
                # Pillow names the culprit if there is one, and is as good as DALI if there is none.
                by_pillow[error.step] = message

    def release(self) -> None:
        """See `Split.release`."""
        self._idle.clear()

    def describe(self) -> dict[str, Any]:
        """See `Split.describe`."""
        return {
            "loader": "dali",
            "crops": repr(self.crops),
            "side": self.side,
            **self.describe_shift(),
            "decoder": "nvjpeg" if self.resize_in_dali else "libjpeg-turbo",
            "resize": "dali" if self.resize_in_dali else "torch",
        }

    def _decoded(
        self,
        rows: Sequence[Tensor],
        steps: Sequence[int],
        by_pillow: Container[int],
        seed: int,
        epoch: int,
        workers: int,
        side: int,
    ) -> Iterator[_Work]:
        """Finished batches of `steps`; several are under way at any time."""
        decoder = self._borrow(workers, max(len(rows[step]) for step in steps))
        left = iter(steps)
        reading: deque[Future[_Work]] = deque()
        resizing: deque[_Work] = deque()
        # what DALI resized is on the stream of whoever asked for it, and goes to nobody else
        ahead = 0 if decoder.resize else _RESIZE_AHEAD
        readers = ThreadPoolExecutor(_READERS, "dfptkd-read")
        resizers = ThreadPoolExecutor(max(workers, 1), "dfptkd-resize")

        def read_next() -> None:
            if (step := next(left, None)) is not None:
                args = (step, rows[step], step in by_pillow, seed, epoch, side)
                reading.append(readers.submit(self._read, *args))

        try:
            for _ in range(_READ_AHEAD):
                read_next()
            while True:
                while reading and len(decoder.busy) < _DECODE_AHEAD:
                    decoder.feed(reading.popleft().result())
                    read_next()
                if decoder.busy and len(resizing) <= ahead:
                    resizing.append(decoder.take(resizers))
                elif resizing:
                    yield resizing.popleft().finished()
                else:
                    break
        finally:
            for pool in (readers, resizers):
                pool.shutdown(cancel_futures=True)
            if decoder.drain():
                self._idle.append(decoder)

    def _read(
        self, step: int, indices: Tensor, by_pillow: bool, seed: int, epoch: int, side: int
    ) -> _Work:
        encoded, sizes = [], []
        for sample in indices.tolist():
            data = self.files.read(sample)
            size = None if by_pillow else plain_size(data)
            if size is None:
                image = decode_rgb(data, self.files.where(sample))
                data, size = _as_ppm(image), (image.height, image.width)
            encoded.append(np.frombuffer(data, np.uint8))
            sizes.append(size)
        measured = torch.tensor(sizes)
        boxes = self.crops.boxes(indices, measured, seed=seed, epoch=epoch, side=side)
        return _Work(step, indices, side, encoded, measured.int().numpy(), boxes.numpy())

    def _batch(self, work: _Work, seed: int, epoch: int) -> Batch:
        crop, flip = self.augmentation(work.indices, seed, epoch)
        assert work.images is not None
        batch = Batch(work.images, self.labels[work.indices], crop, flip, work.indices)
        return batch.to(self.device)

    def _borrow(self, threads: int, largest_batch: int) -> _Decoder:
        """A decoder with so many threads; 0: any number."""
        while self._idle:
            decoder = self._idle.pop()
            if threads in (0, decoder.threads) and decoder.largest_batch >= largest_batch:
                return decoder
        cut_first, in_dali = self.crops.cut_first, self.resize_in_dali
        return _Decoder(max(threads, 1), largest_batch, self.device, in_dali, cut_first)

    def _failure(self, indices: Tensor, error: Exception) -> str:
        names = ", ".join(self.files.where(int(sample)) for sample in indices[:_NAMED])
        others = f" and {len(indices) - _NAMED} others" if len(indices) > _NAMED else ""
        return (
            f"{names}{others}: DALI cannot decode this batch, though Pillow can "
            f"({_one_line(error)}); dfptkd verify-data checks every file; --data.loader "
            "torchvision does without DALI"
        )


class _Decoder:
    """A DALI pipeline that is fed batches and gives them back in that order.

    Args:
        threads: Of DALI.
        largest_batch: Most images of a batch.
        device: Where the images go.
        resize: Whether DALI resizes; else it only decodes and threads of ours resize.
        cut_first: See `Crops`.
    """

    def __init__(
        self, threads: int, largest_batch: int, device: torch.device, resize: bool, cut_first: bool
    ) -> None:
        self.threads, self.largest_batch = threads, largest_batch
        self.device, self.resize, self.cut_first = device, resize, cut_first
        self.busy: deque[_Work] = deque()
        self.sound = True
        try:
            self.pipeline = _build_pipeline(threads, largest_batch, device, resize)
            self._fill()
        except Exception as error:
            raise UsageError(
                f"data.loader='dali': DALI does not start on {device} ({_one_line(error)}): "
                "expected a driver that fits it, or --data.loader torchvision"
            ) from error

    def feed(self, work: _Work) -> None:
        """Start with a batch; at most `_DECODE_AHEAD` are under way."""
        try:
            self._put(work)
            self.pipeline.schedule_run()
        except Exception as error:
            self.sound = False
            raise _DecodeError(work.step, str(error)) from error
        self.busy.append(work)

    def take(self, resizers: ThreadPoolExecutor) -> _Work:
        """The oldest batch, resized or being so."""
        work = self.busy.popleft()
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
        try:
            (output,) = self.pipeline.outputs(cuda_stream=stream)
        except Exception as error:  # DALI's are RuntimeErrors and others, of many lines
            self.sound = False
            raise _DecodeError(work.step, str(error)) from error
        if self.resize:
            # A copy, ordered on the caller's stream like all that reads it: the memory is torch's
            # then, and DALI's own is free again as soon as that stream has passed.
            work.images = torch.from_dlpack(output.as_tensor()).clone()
        else:
            self._resize(work, output, resizers)
        return work

    def drain(self) -> bool:
        """Throw away what is under way; whether the decoder can go on."""
        try:
            while self.sound and self.busy:
                self.busy.popleft()
                self.pipeline.outputs()
        except Exception:
            self.sound = False
        return self.sound

    def _fill(self) -> None:
        """Pass small images through: DALI's first call schedules as many batches as it holds, only
        later ones a single one."""
        for _ in range(_DECODE_AHEAD):
            self._put(_blank_work())
        self.pipeline.schedule_run()
        for _ in range(_DECODE_AHEAD):
            self.pipeline.outputs()

    def _put(self, work: _Work) -> None:
        """Set the inputs of the next run."""
        start, shape = np.zeros_like(work.sizes), work.sizes
        if self.cut_first:  # from whole pixels to whole pixels
            edges = np.rint(work.boxes + np.pad(work.boxes[:, :2], ((0, 0), (2, 0))))
            start = edges[:, :2].astype(np.int32)
            shape = edges[:, 2:].astype(np.int32) - start
        inputs = {"encoded": work.encoded, "start": start, "shape": shape}
        if self.resize:
            first, extent = work.boxes[:, :2], work.boxes[:, 2:]
            if self.cut_first:
                first, extent = np.zeros_like(first), shape
            inputs |= {
                "first": first.astype(np.float32),
                "last": (first + extent).astype(np.float32),
                "size": np.full(shape.shape, work.side, np.float32),
            }
        for name, value in inputs.items():
            self.pipeline.feed_input(name, value)

    def _resize(self, work: _Work, output: Any, resizers: ThreadPoolExecutor) -> None:
        count = len(output)
        images = work.images = torch.empty(count, work.side, work.side, 3, dtype=torch.uint8)

        def resize(rows: range) -> None:
            for row in rows:
                decoded = torch.from_dlpack(output[row])
                if self.cut_first:
                    _resize_to(decoded, images[row])
                else:
                    image, box = Image.fromarray(decoded.numpy()), work.boxes[row].tolist()
                    images[row].numpy()[:] = cut(image, box, work.side, cut_first=False)

        work.pending = [
            resizers.submit(resize, range(first, count, self.threads))
            for first in range(min(self.threads, count))
        ]


def _resize_to(image: Tensor, out: Tensor) -> None:
    """Antialiased and bilinear, both uint8 [H, W, 3].

    `torch.nn.functional.interpolate` is the same function without `out`, and twice as slow, as its
    result is in another memory format.
    """
    source, target = (tensor.permute(2, 0, 1)[None] for tensor in (image, out))
    torch.ops.aten._upsample_bilinear2d_aa.out(source, out.shape[:2], False, out=target)


def _one_line(error: Exception) -> str:
    """All of it: DALI says what happened in the last of its lines."""
    return " ".join(str(error).split())


def _as_ppm(image: Image.Image) -> bytes:
    """An RGB image in the plainest of formats."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


def _blank_work() -> _Work:
    one = np.ones((1, 2), np.int32)
    encoded = [np.frombuffer(_as_ppm(Image.new("RGB", (1, 1))), np.uint8)]
    return _Work(-1, torch.zeros(1, dtype=torch.int64), 1, encoded, one, np.array([[0.0, 0, 1, 1]]))


def _build_pipeline(threads: int, largest_batch: int, device: torch.device, resize: bool) -> Any:
    """Encoded images and boxes -> regions of the images, or these resized."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    on_gpu = device.type == "cuda"
    index = torch.cuda.current_device() if on_gpu and device.index is None else device.index
    pipeline = Pipeline(
        batch_size=largest_batch,
        num_threads=threads,
        device_id=index if on_gpu else None,
        prefetch_queue_depth=_DECODE_AHEAD,
        exec_dynamic=True,  # outputs own their memory: it outlives the next batches
    )

    def given(name: str, dtype: Any) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=1)

    with pipeline:
        encoded = given("encoded", types.UINT8)
        window = {"start": given("start", types.INT32), "shape": given("shape", types.INT32)}
        # as Pillow: pixels as they are stored, whatever a camera says of its orientation
        options = {"adjust_orientation": False, "output_type": types.RGB}
        if not resize:
            images = fn.decoders.image_slice(encoded, **window, axis_names="HW", **options)
        else:
            if on_gpu:  # chroma as libjpeg's default; threads bound to cores would pile up by rank
                options |= {"device": "mixed", "jpeg_fancy_upsampling": True, "affine": False}
            images = fn.decoders.image(encoded, **options)
            images = fn.slice(images, **window, axis_names="HW")
            images = fn.resize(
                images,
                size=given("size", types.FLOAT),
                roi_start=given("first", types.FLOAT),
                roi_end=given("last", types.FLOAT),
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline
