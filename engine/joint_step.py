"""The steps of several runs as one piece of work: one CUDA graph, in which each has a branch.

Runs that differ in their seed alone have the same frozen teacher. It runs once, on the batches of
all of them together; forward pass, backward pass and update of each run follow on a stream of its
own, beside those of the others:

    batches of all -> normalise -> frozen teacher -+-> run 1: forward, backward, update
                                                   +-> run 2: forward, backward, update
                                                   +-> ...

No image meets those of another run: the teacher is in eval mode, where each image is by itself.
What a run draws at random (dropout), it draws from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_graph import warm_up
from .data import Batch
from .errors import DfptkdError
from .files import first_line
from .models.dual_path import FrozenOutputs
from .optim import rates_to_device
from .spans import span
from .step import WARMUP_STEPS, TrainStep, record_step


class Part(NamedTuple):
    """One run's part of a joint step."""

    step: TrainStep
    batch: Batch
    number: int


class JointStep:
    """Does the steps of several runs together.

    In its turn a run calls for the step that it laid down in the turn before. The first one to call
    has all that were laid down done, so that a run which has ended or failed in between is left
    out, and the graph is made anew without it. A run that is left alone goes on by itself, and so
    do all where the joint step fails at first.

    On a CPU the body runs as it is written.

    Args:
        steps: Of runs that differ in their seed alone and share their frozen teacher.
    """

    def __init__(self, steps: Sequence[TrainStep]) -> None:
        first = steps[0]
        self.device, self.captured = first.device, first.mode == "graph"
        self.generators = {step: RunGenerator(first.device) for step in steps}
        self.waiting: dict[TrainStep, Part] = {}
        self.is_over = False
        self.failure: str | None = None
        """Why it is over, where it failed; whoever says so takes it away."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.made_for: tuple[list[TrainStep], list[int]] | None = None
        self.stream = torch.cuda.Stream(first.device) if self.captured else None

    def lay_down(self, step: TrainStep, batch: Batch, number: int) -> None:
        """A run's next step, number `number`, on `batch`; nothing of it moves anything yet."""
        step.choose_kernels_once(batch)
        self.generators[step].take_over()
        self.waiting[step] = Part(step, batch, number)

    def collect(self, step: TrainStep) -> None:
        """Have the step that a run has laid down done, unless it has been.

        Raises:
            As a step that the run does by itself.
        """
        try:
            if step in self.waiting and not self.is_over:
                self._do_all()
        finally:
            own = self.waiting.pop(step, None)
        self.generators[step].hand_back()
        if own is not None:
            step(own.batch, own.number)

    def _do_all(self) -> None:
        """All steps that wait, as one; where that cannot be, nothing has moved and it is over."""
        parts = [self.waiting[step] for step in self.generators if step in self.waiting]
        if len(parts) == 1:
            self._end()
            return
        is_new = self.made_for != _pattern(parts)
        before = [part.step.gate.remember() for part in parts] if is_new else []
        try:
            self._run(parts)
            self.waiting.clear()
            return
        except DfptkdError:
            raise
        except Exception as error:  # memory above all; what else it is, a step alone will say
            if not is_new:
                raise
            reason = first_line(error)
        self._end()
        for part, old in zip(parts, before, strict=True):
            part.step.gate.settle(torch.zeros_like(part.step.gate.is_open), old)
            part.step.run_beside_others()
        self.failure = f"steps of {len(parts)} runs as one failed, each does its own: {reason}"

    def _end(self) -> None:
        self.is_over, self.graph, self.made_for = True, None, None

    def _run(self, parts: list[Part]) -> None:
        for step, _, number in parts:
            step.set_distillation(number)
        pattern = _pattern(parts)
        batches = list({id(part.batch): part.batch for part in parts}.values())
        if not self.captured:
            self.body(Batch.joined(batches), parts, pattern[1])
        else:
            if self.made_for != pattern:
                self._capture(batches, parts)
            assert self.graph is not None
            Batch.copy_all_(self.inputs, batches)
            self.graph.replay()
        self.made_for = pattern
        for part in parts:
            part.step.schedule.step()

    def body(self, batch: Batch, parts: Sequence[Part], sources: Sequence[int]) -> None:
        """All of the step that runs on the device.

        Args:
            batch: The batches of the runs, one behind the other.
            parts: The runs; the batches that these hold are not looked at.
            sources: For each run, which of the batches it takes.
        """
        first, count = parts[0].step, max(sources) + 1
        with span("normalise"), first.kernels.in_force():
            images = first.normalise(batch)
        with span("forward"), first.autocast(), first.kernels.in_force():
            known = _frozen_outputs(first, images, count)
        batches, image_shares = batch.chunk(count), images.chunk(count)
        with self._branches([part.step for part in parts]) as branches:
            for (step, _, number), source, branch in zip(parts, sources, branches, strict=True):
                with branch, self.generators[step].installed(), step.kernels.in_force():
                    own = image_shares[source].chunk(step.config.accumulate)
                    step.learn(batches[source], own, number, known[source])

    @contextmanager
    def _branches(self, steps: Sequence[TrainStep]) -> Iterator[list[AbstractContextManager]]:
        """Contexts to do the parts of a step in: on a GPU a stream for each, forked from the
        current one, and joined again whatever happens, as no capture can end otherwise."""
        streams = [step.capture_stream for step in steps if step.capture_stream is not None]
        if not streams:
            yield [nullcontext() for _ in steps]
            return
        here = torch.cuda.current_stream(self.device)
        for stream in streams:
            stream.wait_stream(here)
        try:
            yield [torch.cuda.stream(stream) for stream in streams]
        finally:
            for stream in streams:
                here.wait_stream(stream)

    def _capture(self, batches: Sequence[Batch], parts: Sequence[Part]) -> None:
        """Make the graph, on inputs of its own; all gates are shut, so that nothing moves."""
        self.graph = None  # what it holds is to be free
        whole = Batch.joined(batches)
        self.inputs = whole.chunk(len(batches))
        steps, sources = _pattern(parts)
        generators = [self.generators[step].own for step in steps]
        states = [generator.get_state() for generator in generators]
        shut = [step.gate.is_open for step in steps]
        for step in steps:
            rates_to_device(step.optimizer, self.device)
        for is_open in shut:
            is_open.fill_(False)

        def call() -> None:
            self.body(whole, parts, sources)

        assert self.stream is not None
        try:
            warm_up(call, self.stream, WARMUP_STEPS)
            self.graph = record_step(call, self.stream, steps[0].config, generators)
        finally:
            torch.cuda.synchronize(self.device)  # nothing may still look at the gates
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            for is_open in shut:
                is_open.fill_(True)


def join(steps: Sequence[TrainStep]) -> JointStep | None:
    """Let runs that differ in their seed alone hold one frozen teacher, and do their steps as one
    where graphs would only replay side by side; None where each does its own."""
    for step in steps[1:]:
        step.method.share_teacher(steps[0].method)
    if steps[0].mode == "graph" and steps[0].method.frozen_teacher() is not None:
        return JointStep(steps)
    for step in steps:
        step.run_beside_others()
    return None


class RunGenerator:
    """The random numbers of one run, while the device's own generator serves the others.

    Args:
        device: Where they are drawn.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.own = torch.Generator(device)
        self.shared = torch.default_generator
        if self.is_cuda:
            torch.cuda.init()
            number = torch.cuda.current_device() if device.index is None else device.index
            self.shared = torch.cuda.default_generators[number]

    def take_over(self) -> None:
        """Go on from where the device's generator stands."""
        self.own.set_state(self.shared.get_state())

    def hand_back(self) -> None:
        """Let the device's generator go on from here."""
        self.shared.set_state(self.own.get_state())

    @contextmanager
    def installed(self) -> Iterator[None]:
        """What is drawn inside, or captured, is drawn from here."""
        if self.is_cuda:  # a capture allows no copies of a state, only another one in its place
            before = self.shared.graphsafe_get_state()
            self.shared.graphsafe_set_state(self.own)
            try:
                yield
            finally:
                self.shared.graphsafe_set_state(before)
            return
        state = self.shared.get_state()
        self.hand_back()
        try:
            yield
        finally:
            self.take_over()
            self.shared.set_state(state)


def _pattern(parts: Sequence[Part]) -> tuple[list[TrainStep], list[int]]:
    """The runs, and for each which of their different batches it takes."""
    batches = list(dict.fromkeys(id(part.batch) for part in parts))
    return [part.step for part in parts], [batches.index(id(part.batch)) for part in parts]


def _frozen_outputs(
    step: TrainStep, images: Tensor, count: int
) -> Sequence[Sequence[FrozenOutputs]]:
    """What the frozen teacher makes of the images of `count` batches: for each batch, and each of
    its parts that are accumulated. It sees as many images at once as it would in so many runs."""
    parts = step.config.accumulate
    found = [step.method.frozen_outputs(piece) for piece in images.chunk(parts)]
    known = [outputs for outputs in found if outputs is not None]
    if not known:
        return [()] * count
    return [own.chunk(parts) for own in FrozenOutputs.joined(known).chunk(count)]
