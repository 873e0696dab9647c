"""The memory of a run as a function of its batch, out of two small steps.

Memory is that of the device. On a CPU it is the growth of the process over what it holds after its
imports, and a reserve comes on top: glibc keeps freed blocks, 24 to 53 % more in our measurements.
On CUDA it is what torch.cuda.max_memory_allocated gives, without what the caching allocator
reserves beyond.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import optimizer_tensors
from .config import RunConfig, StepConfig
from .data import SOURCES, Batch
from .data.facts import DataFacts
from .memory import Growth, kept_bytes, measure_growth, storage_bytes
from .methods.crd import IMAGE_BYTES, PRODUCT_BYTES, SAVED_BYTES
from .metrics import normaliser, path_divergence
from .models.parts import eval_mode
from .probe import Built

TRACED = (2, 4)  # images of the traced steps, for each of the two traced parts of a batch
TRACED_ROWS = (64, 128)  # of logits, in the traced end of an evaluation
RESERVE_SHARE = 0.55  # of everything but the data, which is few large blocks
# What oneDNN, autograd and Python's own objects take on a CPU whatever the networks: 29 to 33 MB.
LIBRARY_BYTES = 30_000_000
BATCH_UNIT = 8


@dataclass(frozen=True)
class Memory:
    """Bytes on the device. What holds all the time, and what comes on top from time to time."""

    parameters: int
    """Of everything that is trained."""
    momentum: int
    average: int
    """Moving average of the student."""
    frozen: int
    """Folded weights, statistics, CRD's banks."""
    data: int
    """Resident images, batches decoded ahead, the teacher's test logits."""
    libraries: int
    kept: int
    """What autograd keeps for the backward: part of `step`."""
    gradients: int
    """Of everything that is trained: part of `step` from the backward on."""
    step: int
    """Most that a step holds beyond what holds all the time."""
    evaluation: int
    """The same of an evaluation."""
    saving: int
    """The same of a checkpoint that is being written."""
    loading: int
    """The same of the data while it is read."""
    reserve_share: float = 0.0
    """What the allocator may hold of freed blocks, over what is in use, large blocks that stay
    apart: the data and the teacher's logits."""
    logits: int = 0
    """The teacher's, of the training images: when every form of each has been met."""

    @property
    def constant(self) -> int:
        """What holds all the time."""
        return (
            self.parameters
            + self.momentum
            + self.average
            + self.frozen
            + self.data
            + self.libraries
            + self.logits
        )

    @property
    def largest(self) -> str:
        """What takes most on top."""
        return max(
            ("step", "evaluation", "saving", "loading"), key=lambda name: getattr(self, name)
        )

    @property
    def peak(self) -> int:
        """Most that the run has in use."""
        return self.constant + getattr(self, self.largest)

    @property
    def reserve(self) -> int:
        """What the allocator may hold beyond."""
        return round(self.reserve_share * (self.peak - self.data - self.logits))

    @property
    def need(self) -> int:
        """What must be there."""
        return self.peak + self.reserve


def traced_twin(twin: RunConfig) -> RunConfig:
    """A `stand_in` whose steps can be traced: eager, and of two parts where there are more."""
    parts = min(twin.accumulate, 2)  # the others repeat the second
    return dataclasses.replace(
        twin, step=StepConfig(mode="eager"), accumulate=parts, global_batch=parts
    )


class MemoryModel:
    """The memory of a run as a function of its batch.

    Args:
        config: The run.
        facts: Its data.
        built: What `traced_twin` gives.
        logits: Bytes of the teacher's logits that are remembered.
    """

    def __init__(self, config: RunConfig, facts: DataFacts, built: Built, logits: int = 0) -> None:
        self.config, self.facts, self.built, self.logits = config, facts, built, logits
        self.device = built.step.device
        self.parts = config.accumulate
        absent = facts.train_images - len(built.data.train)
        self.absent = max(absent, 0) if config.loss.crd else 0  # images of which CRD holds more
        self.traced_parts = built.step.config.accumulate
        self.step = self._trace_step()
        self.forward = self._trace_forward()
        self.tail = self._trace_tail()
        small, large = (self._kept(images) for images in TRACED)
        self.kept_slope = (large - small) / (TRACED[1] - TRACED[0])
        self.kept_fixed = small - self.kept_slope * TRACED[0]
        self.fixed = self._constant()  # last: constants in the compute dtype are made on first use

    def at(self, batch: int) -> Memory:
        """The need at a batch of so many images."""
        part = batch / self.parts
        beyond = (batch - part * self.traced_parts) * self._image_bytes()
        products = part * self.absent * PRODUCT_BYTES
        beyond += 1.5 * products  # the gradient of half of them on top
        fixed = dict(self.fixed, data=self.fixed["data"] + self._decoded(batch))
        return Memory(
            **fixed,
            kept=round(self.kept_fixed + self.kept_slope * part + products),
            step=self.step.peak(part * self.traced_parts) + round(beyond),
            evaluation=self._evaluation(),
            reserve_share=RESERVE_SHARE if self.device.type == "cpu" else 0.0,
            logits=self.logits,
        )

    def largest_batch(self, budget: int) -> int:
        """Most images of a run within `budget` bytes, a multiple of 8 and of `accumulate`."""
        unit = math.lcm(BATCH_UNIT, self.parts)

        def fits(units: int) -> bool:
            return self.at(units * unit).need <= budget

        low, high = 0, 1
        while fits(high):
            low, high = high, 2 * high
            if high * unit > 1 << 24:
                break
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * unit

    def _constant(self) -> dict[str, int]:
        step, method = self.built.step, self.built.step.method
        momentum = list(optimizer_tensors(step.optimizer).values())
        average = [] if step.ema is None else [*step.ema.parameters(), *step.ema.buffers()]
        everything = [*method.parameters(), *method.buffers()]
        for module in method.modules():  # constants in the dtype of mixed precision
            for copies in getattr(module, "copies", {}).values():
                everything += [t for t in copies if t is not None]
        trained = storage_bytes(step.params, self.device)
        saved = sum(t.nbytes for t in self.saved_tensors())
        held = storage_bytes([*everything, *momentum, *average], self.device)
        on_cpu = self.device.type == "cpu"
        beside = 0 if on_cpu else max(torch.cuda.memory_allocated(self.device) - held, 0)
        return {
            "parameters": trained,
            "gradients": trained,
            "momentum": storage_bytes(momentum, self.device),
            "average": storage_bytes(average, self.device),
            "frozen": storage_bytes(everything, self.device) - trained + self.absent * IMAGE_BYTES,
            "data": self._resident() + self._logits() * (self.config.method != "ce"),
            "libraries": LIBRARY_BYTES if on_cpu else beside,
            # Copies of the tensors, and the bytes of the file.
            "saving": 2 * saved if on_cpu else 0,
            # The file, its arrays, the images that are chosen: the last of them stay.
            "loading": 2 * self._resident() if on_cpu else 0,
        }

    def saved_tensors(self) -> list[Tensor]:
        """What a checkpoint holds, as `RunState` has it."""
        step = self.built.step
        average = [] if step.ema is None else list(step.ema.state_dict().values())
        state = step.method.trained_state().values()
        more = torch.empty(self.absent, SAVED_BYTES, dtype=torch.uint8, device="meta")
        optimizer = optimizer_tensors(step.optimizer).values()
        return [*state, *optimizer, *average, step.meter.sums, more]

    def _resident(self) -> int:
        facts = self.facts
        if not facts.resident:
            return 0
        images = facts.train_images + facts.test_images
        # Label; and for a training image its number, two offsets of the crop, the flip.
        return images * (3 * facts.image_size**2 + 8) + facts.train_images * (8 + 16 + 1)

    def _logits(self) -> int:
        """Test logits of one path, fp32."""
        return 4 * self.facts.test_images * self.facts.num_classes

    def _image_bytes(self) -> int:
        """One image of a batch, raw and normalised."""
        return (1 + 4) * 3 * self.facts.image_size**2

    def _decoded(self, batch: int) -> int:
        """Raw batches that the decoding processes have ready: two each, in the CPU's memory."""
        if self.config.data.name not in SOURCES or self.device.type != "cpu":
            return 0
        return 2 * self.config.data.workers * batch * 3 * self.facts.image_size**2

    def _evaluation(self) -> int:
        """Student (and prompt) logits beside the last batch, or beside the figures made of them."""
        rows = self._logits() * (2 if self.config.has_prompt_path else 1)
        images = min(self.config.eval_batch, self.facts.test_images)
        # The last path's logits stand there twice while its batches are joined.
        forward = max(self.forward.peak(images), self._logits())
        return rows + max(forward, self.tail.peak(self.facts.test_images) if self.tail else 0)

    def _batch(self, images: int) -> Batch:
        return self.built.data.train.batch(torch.arange(images), seed=0, epoch=0)

    def _trace_step(self) -> Growth:
        step = self.built.step
        batches = {n * self.traced_parts: self._batch(n * self.traced_parts) for n in TRACED}

        def call(images: int) -> None:
            held = batches[images].clone()
            step(held, 0)
            step.optimizer.zero_grad(set_to_none=True)

        sizes = tuple(batches)
        return measure_growth(call, (sizes[0], sizes[1]), self.device)

    def _trace_forward(self) -> Growth:
        """The path of an evaluation that holds most."""
        step, normalise = self.built.step, normaliser(self.built.data)
        method = step.method
        batches = {n: self._batch(n) for n in TRACED}
        networks: list[Callable[[Tensor], Any]] = [method.student, method.teacher_logits]
        networks += [method.prompt_logits] if self.config.has_prompt_path else []

        def trace(network: Callable[[Tensor], Any]) -> Growth:
            return measure_growth(
                lambda n: network(normalise(batches[n].clone())), TRACED, self.device
            )

        in_force = step.kernels.in_force()
        with torch.no_grad(), eval_mode(method), step.autocast(), in_force:
            found = [trace(network) for network in networks]
        images = min(self.config.eval_batch, self.facts.test_images)
        return max(found, key=lambda growth: growth.peak(images))

    def _trace_tail(self) -> Growth | None:
        """What an evaluation makes of all paths' logits."""
        if self.config.method == "ce":
            return None
        paths = 3 if self.config.has_prompt_path else 2
        shape = (TRACED_ROWS[1], self.facts.num_classes)
        logits = [torch.randn(shape, device=self.device) for _ in range(paths)]
        labels = torch.randint(shape[1], shape[:1], device=self.device)

        @torch.no_grad()
        def call(rows: int) -> None:
            student, teacher, *prompt = (z[:rows] for z in logits)
            tau = self.config.loss.tau
            path_divergence(student, prompt[0] if prompt else None, teacher, labels[:rows], tau)

        return measure_growth(call, TRACED_ROWS, self.device)

    def _kept(self, images: int) -> int:
        step = self.built.step
        batch = self._batch(images)
        normalised = normaliser(self.built.data)(batch)
        method = step.method

        def forward() -> Tensor:
            with step.autocast(), step.kernels.in_force():
                return method(normalised, batch.labels, 1.0, *step.samples(batch.indices)).total

        return kept_bytes(forward, [*method.parameters(), *method.buffers()])
