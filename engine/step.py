"""One optimisation step: normalise, forward, backward, update. One body, three ways to run it.

    eager     the body as it stands
    compile   teacher, student and loss are compiled regions of the body, without graph breaks
    graph     the whole body, regions compiled, is one CUDA graph; a step copies its batch and
              replays it

The body reads nothing back from the device, and every write in it passes a gate: a step whose loss
or gradients are not finite changes no parameter, no statistic, no average and no count.

Of several processes each does the body on its share of the batch; gradients are averaged in the
backward pass, and the gate opens in all of them or in none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .checkpoint import optimizer_tensors
from .config import RunConfig
from .cuda_graph import capture, warm_up
from .data import Batch, ImageData
from .distributed import SINGLE, World, accumulating
from .errors import DfptkdError, UsageError
from .files import first_line
from .kernel_choice import KernelChoices
from .methods import Method, StepOutput
from .methods.base import BankRows, Samples
from .metrics import EpochMeter, normaliser
from .models.dual_path import FrozenOutputs
from .models.parts import Remembered
from .models.per_module_work import BatchCounters, CastWeights
from .optim import (
    build_ema,
    build_optimizer,
    build_schedule,
    check_optimizer,
    graph_obstacle,
    learning_rates,
    rates_to_device,
    rates_to_numbers,
    skips_by_itself,
    update_ema,
)
from .spans import span

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WARMUP_STEPS = 3  # before a capture: compilation, cuDNN's search and the allocator settle in them


def choose_mode(config: RunConfig, device: torch.device, processes: int = 1) -> tuple[str, str]:
    """The execution mode of a run of `processes` processes, and why.

    Raises:
        UsageError: A mode is asked for, synchronised BatchNorms, or an optimiser, where they cannot
            be.
    """
    check_optimizer(config.optim, device)
    asked = config.step.mode
    obstacle = graph_obstacle(config.optim)
    if config.step.sync_bn and device.type != "cuda":
        raise UsageError(f"step.sync_bn=True on {device.type}: expected --device cuda")
    if config.step.sync_bn and processes > 1:
        if asked not in ("auto", "eager"):
            raise UsageError(
                f"step.mode={asked!r} with step.sync_bn: expected eager or auto: the forward pass "
                "then waits for other processes, which is not compiled"
            )
        return "eager", "step.sync_bn communicates in the forward pass, which is not compiled"
    if processes > 1:
        obstacle = "steps of several processes are not captured yet"
    if device.type != "cuda":
        obstacle = f"a CUDA graph needs a CUDA device, this is {device.type}"
    elif config.precision == "fp16":
        obstacle = "fp16's gradient scaling is not captured yet"
    elif config.loss.update == "alternating":
        obstacle = "alternating updates are two different steps"
    elif config.data.start_size is not None:
        obstacle = "progressive resizing changes the images' size"
    if asked == "graph" and obstacle is not None:
        raise UsageError(f"step.mode='graph': expected eager, compile or auto: {obstacle}")
    if asked != "auto":
        return asked, "asked for"
    if device.type != "cuda":
        return "eager", "on a CPU compiling pays in long runs alone: --step.mode compile"
    if obstacle is not None:
        return "compile", obstacle
    return "graph", "one CUDA device"


def compute_precision(config: RunConfig, device: torch.device) -> str:
    """fp32, bf16 or fp16: the run's precision after `auto` is resolved."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" else "fp32"


class SkipCounts(NamedTuple):
    """How many steps the gate did not let pass."""

    skipped: int
    """Of the epoch, or since the run went back."""
    in_a_row: int
    """Up to now."""
    seen: int
    """Steps at all, skipped or not: the number of the next one."""
    last: int
    """Number of the last one that was skipped."""


class Gate:
    """Lets the writes of a step pass only if its loss and its gradients are finite.

    Args:
        statistics: What the forward pass writes before anybody knows: buffers of BatchNorms.
        device: Where all of it lies; nothing is read back.
        world: The processes that pass together. Each takes over the statistics of rank 0, as
            torch's DistributedDataParallel has it, though after a step and not before the next:
            evaluation, averages and checkpoints then find them equal everywhere.
        others: What is written whatever the verdict: all that an optimiser moves which does not
            skip a step by itself.
    """

    def __init__(
        self,
        statistics: Sequence[Tensor],
        device: torch.device,
        world: World = SINGLE,
        others: Sequence[Tensor] = (),
    ) -> None:
        self.world = world
        self.is_open = torch.ones((), dtype=torch.bool, device=device)
        # as `SkipCounts`: on the device, and on their way from there
        self.counts = torch.zeros(len(SkipCounts._fields), dtype=torch.int64, device=device)
        self.skipped = self.counts[0]
        self._on_the_way: tuple[torch.cuda.Event, Tensor] | None = None
        shared = _by_dtype(statistics)
        self.groups, self.num_shared = [*shared, *_by_dtype(others)], len(shared)

    @torch.no_grad()
    def remember(self) -> list[Tensor]:
        """All of it as it is: one flat copy for each group of one dtype."""
        return [torch.cat([b.reshape(-1) for b in group]) for group in self.groups]

    def judge(self, total: Tensor, norm: Tensor, scaled: bool) -> Tensor:
        """Whether the step may write, 0-d bool; counts it as skipped if not.

        Args:
            total: The loss, 0-d.
            norm: Norm of all gradients, 0-d.
            scaled: Gradients come from a scaled fp16 loss: that they overflow now and then is how
                the scale is found, and only a loss that is not finite counts.
        """
        both = torch.stack([total, norm]).isfinite()
        if self.world.size > 1:
            both = self.world.all_true(both)
        passes = both.all() & self.is_open
        failed = self.is_open & ~(both[0] if scaled else passes)
        skipped, in_a_row, seen, last = self.counts.unbind()
        counts = [skipped + failed, (in_a_row + failed) * ~passes, seen + self.is_open]
        self.counts.copy_(torch.stack([*counts, torch.where(failed, seen, last)]))
        return passes

    def read(self) -> SkipCounts:
        """The counts; waits for the device."""
        return SkipCounts(*self.counts.tolist())

    def glance(self) -> SkipCounts | None:
        """The counts, without waiting for work under way: on a GPU those of the glance before."""
        if not self.counts.is_cuda:
            return self.read()
        before, copied = self._on_the_way, torch.cuda.Event()
        values = torch.empty(len(self.counts), dtype=torch.int64, pin_memory=True)
        values.copy_(self.counts, non_blocking=True)
        copied.record()
        self._on_the_way = copied, values
        if before is None:
            return None
        before[0].synchronize()
        return SkipCounts(*before[1].tolist())

    def forget(self, *, streak: bool = True) -> None:
        """Begin to count anew: where the run went back, or (without the streak, which an epoch's
        end does not end) after an epoch."""
        self.counts[: 2 if streak else 1] = 0
        self._on_the_way = None

    @torch.no_grad()
    def settle(self, passes: Tensor, before: Sequence[Tensor]) -> None:
        """Take everything back to `before` where the step does not pass."""
        for i, (group, old) in enumerate(zip(self.groups, before, strict=True)):
            now = torch.cat([b.reshape(-1) for b in group])
            kept = torch.where(passes, now, old)
            if i < self.num_shared:
                self.world.copy_from_main(kept)
            parts = kept.split([b.numel() for b in group])
            # In the shape of each: a parameter may lie in memory channels last.
            torch._foreach_copy_(
                group, [part.view(b.shape) for part, b in zip(parts, group, strict=True)]
            )


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


class TrainStep:
    """Everything that a step reads and writes.

    Args:
        method: Student, teacher and losses, on the device.
        config: The run.
        data: For mean and standard deviation, and the number of images.
        total_steps: Length of the schedule.
        steps_per_epoch: For warm-ups, which are given in epochs.
        device: Where the method lives.
        world: The processes that do each step together.

    Raises:
        UsageError: The execution mode that was asked for does not apply.
    """

    def __init__(
        self,
        method: Method,
        config: RunConfig,
        data: ImageData,
        *,
        total_steps: int,
        steps_per_epoch: int,
        device: torch.device,
        world: World = SINGLE,
    ) -> None:
        self.method, self.config, self.device, self.world = method, config, device, world
        self.data = data
        self.mode, self.mode_reason = choose_mode(config, device, world.size)
        self.precision = compute_precision(config, device)
        self.optimizer = build_optimizer(method, config.optim, config.global_batch)
        self.schedule = build_schedule(self.optimizer, config.optim, total_steps, steps_per_epoch)
        self.ema = build_ema(method.student, config.optim.ema_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.meter = EpochMeter(method.term_names, device, world)
        self.normalise = normaliser(data, DTYPES.get(self.precision, torch.float32))
        self.image_parts = self._image_parts
        self.frozen_outputs: Callable[..., FrozenOutputs | None] = method.frozen_outputs
        self.remembers = False
        self.warmup_steps = config.loss.warmup_epochs * steps_per_epoch
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        moved: list[Tensor] = []
        if not skips_by_itself(self.optimizer):
            moved = [*self.params, *optimizer_tensors(self.optimizer).values()]
        self.counters = BatchCounters(method.trained_networks())
        self.weights = CastWeights(method.trained_networks(), DTYPES.get(self.precision))
        statistics = [b for b in method.trained_buffers() if not self.counters.owns(b)]
        self.gate = Gate(statistics, device, world, moved)
        self.replicas = world.replicate(method)
        self.distillation: float | Tensor = 1.0
        self.is_proven = False
        self.fallback: str | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None
        self.capture_stream: torch.cuda.Stream | None = None
        if self.mode == "graph":
            self.capture_stream = torch.cuda.Stream(device)
        # Inductor of torch 2.13 and 2.14 forgets channels_last in backward graphs otherwise.
        options = {"force_layout_optimization": True} if device.type == "cuda" else None
        self.compiling = {"fullgraph": True, "dynamic": False, "options": options}
        self.kernels = KernelChoices(config.kernels, self.mode, self.compiling)
        self.measured: set[torch.Size] = set()
        if self.mode != "eager":
            self._compile()

    def autocast(self) -> AbstractContextManager:
        """Casts convolutions and matrix products to the compute precision."""
        # A graph that is captured must not hold casts that were cached outside of it.
        return torch.autocast(
            self.device.type,
            DTYPES.get(self.precision),
            enabled=self.precision in DTYPES,
            cache_enabled=self.mode != "graph",
        )

    @contextmanager
    def training_forward(self) -> Iterator[None]:
        """Around forward passes in training mode; their counters of batches do not move."""
        with self.autocast(), self.counters.apart(), self.weights.applied():
            yield

    def plainly(self) -> AbstractContextManager:
        """Runs compiled regions as they were written: for evaluation, whose shapes differ."""
        return nullcontext() if self.mode == "eager" else torch.compiler.set_stance("force_eager")

    def choose_kernels_once(self, batch: Batch) -> None:
        """`choose_kernels`, if no batch of this shape has been measured on."""
        if batch.images.shape not in self.measured and not is_in_torch_dispatch_mode():
            self.choose_kernels(batch)

    def choose_kernels(self, batch: Batch) -> None:
        """Measure, on a batch, each fused call of a step that is not known yet, and choose its
        backend; nothing of the run's state moves. Rank 0 measures, and all processes follow."""
        self.measured.add(batch.images.shape)
        if self.kernels.asked == "reference":
            return
        before = self.gate.remember()
        if not self.world.is_main and self.config.step.sync_bn:  # rank 0's BatchNorms wait for it
            with self.kernels.in_force():
                self._look(batch)
        self.kernels.adopt(self.world.of_main(lambda: self._measure(batch)))
        for missing in self.world.exchange(self.kernels.missing(self.device.type)):
            if missing is not None:
                self.kernels.do_without(missing[0])
        self.gate.settle(torch.zeros_like(self.gate.is_open), before)

    def _measure(self, batch: Batch) -> list[dict[str, Any]]:
        with self.kernels.deciding():
            self._look(batch)
            normaliser(self.data)(replace(batch, crop=None, flip=None))  # as an evaluation does
        return self.kernels.record()

    def _look(self, batch: Batch) -> None:
        """One forward pass, uncompiled."""
        cuda = [self.device] if self.device.type == "cuda" else []
        # What is measured copies its modules, with weights of their own.
        with (
            torch.random.fork_rng(cuda),
            self.autocast(),
            self.plainly(),
            self.counters.apart(),
        ):
            # Images of its own: what is remembered for the run's must be made as the run makes it.
            images, labels = self._image_parts(batch)[0], self._label_parts(batch)[0]
            self.method(images, labels, 1.0, *self._sample_parts(batch)[0])

    def __call__(self, batch: Batch, step: int) -> None:
        """Do step number `step` (from 0) on `batch`."""
        self.choose_kernels_once(batch)
        with self._own_stream(batch), self.kernels.in_force():
            self.set_distillation(step)
            if self.is_proven:
                self._run(batch, step)
            else:
                self._first(batch, step)
            self.schedule.step()

    def _run(self, batch: Batch, step: int) -> None:
        if self.mode == "graph":
            self._replay(batch)
        else:
            self.body(batch, step)

    def _first(self, batch: Batch, step: int) -> None:
        """A mode that `auto` chose may turn out not to work here: eager then does the step."""
        self.is_proven = True
        if self.world.size > 1:
            self._rehearse(batch)
            self._run(batch, step)
            return
        before = self.gate.remember()
        try:
            self._run(batch, step)
        except (torch.OutOfMemoryError, DfptkdError):  # eager would need no less memory
            raise
        except Exception as error:  # of Dynamo, of Triton, of a C compiler, of a capture
            if self.mode == "eager" or self.config.step.mode != "auto":
                raise
            # Nothing else has moved: a step fails before it updates, a capture with the gate shut.
            self.gate.is_open.fill_(True)
            self.gate.settle(torch.zeros_like(self.gate.is_open), before)
            self._fall_back(first_line(error))
            self._run(batch, step)

    def _rehearse(self, batch: Batch) -> None:
        """Compile, each process by itself and nothing moves: one that failed in the midst of a step
        would leave the others waiting. If it fails in one, all fall back."""
        if self.mode == "eager":
            return
        before, failure = self.gate.remember(), None
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(cuda), self.training_forward():
                images, labels = self._image_parts(batch)[0], self._label_parts(batch)[0]
                samples = self._sample_parts(batch)[0]
                self.method(images, labels, self.distillation, *samples).total.backward()
        except (torch.OutOfMemoryError, DfptkdError):
            raise
        except Exception as error:  # as in `_first`
            if self.config.step.mode != "auto":
                raise
            failure = first_line(error)
        self.gate.settle(torch.zeros_like(self.gate.is_open), before)
        self.optimizer.zero_grad(set_to_none=True)
        failures = [found for found in self.world.exchange(failure) if found is not None]
        if failures:
            self._fall_back(failures[0])

    def _fall_back(self, reason: str) -> None:
        self.fallback = f"steps by {self.mode} failed, eager does them: {reason}"
        self.mode, self.graph = "eager", None
        self.method.compile_regions(disable=True)
        rates_to_numbers(self.optimizer)

    def body(self, batch: Batch, step: int) -> None:
        """All of a step that runs on the device."""
        with span("normalise"):
            images = self.image_parts(batch)
        self.learn(batch, images, step)

    def learn(
        self,
        batch: Batch,
        images: Sequence[Tensor],
        step: int,
        known: Sequence[FrozenOutputs | None] = (),
    ) -> None:
        """All of a step but the images, which are normalised.

        Args:
            batch: Its labels and sample numbers.
            images: [B / accumulate, 3, H, W] each.
            step: Its number.
            known: What the frozen teacher makes of each, where it has run already.
        """
        self.optimizer.zero_grad(set_to_none=True)
        before = self.gate.remember()
        outputs: list[tuple[StepOutput, int]] = []
        columns = self._label_parts(batch), self._sample_parts(batch), self._place_parts(batch)
        parts = zip(images, *columns, strict=True)
        for i, (part, labels, samples, places) in enumerate(parts):
            with accumulating(self.replicas, is_last=i + 1 == len(images)):
                with span("forward"), self.training_forward():
                    frozen = known[i] if known else self.frozen_outputs(part, *places)
                    output = self.replicas(part, labels, self.distillation, *samples, frozen=frozen)
                with span("backward"):
                    share = len(labels) / len(batch.labels)
                    total = output.total if share == 1 else output.total * share
                    self.scaler.scale(total).backward()
            outputs.append((output, len(labels)))
        with span("optimizer"):
            passes = self._update(outputs, step)
        with span("gate"):
            self.gate.settle(passes, before)
            self.counters.add(passes * len(outputs))
        if self.method.takes_samples:
            with span("memory"):
                self.method.remember(self._rows([output for output, _ in outputs]), passes)
        if self.ema is not None:
            with span("EMA"):
                update_ema(self.ema, self.method.student, self.config.optim.ema_decay, passes)
        with span("metrics"):
            for output, count in outputs:
                self.meter.add(output, count, passes)

    def _image_parts(self, batch: Batch) -> tuple[Tensor, ...]:
        """Normalised images, cut into the parts that are accumulated."""
        return self.normalise(batch).chunk(self.config.accumulate)

    def _label_parts(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch.labels.chunk(self.config.accumulate)

    def samples(self, indices: Tensor) -> tuple[Samples, ...]:
        """What the method takes beside images and labels: often nothing."""
        if not self.method.takes_samples:
            return ()
        return (Samples(indices, self.gate.counts[SkipCounts._fields.index("seen")]),)

    def _sample_parts(self, batch: Batch) -> tuple[tuple[Samples, ...], ...]:
        return tuple(self.samples(part) for part in batch.indices.chunk(self.config.accumulate))

    def _place_parts(self, batch: Batch) -> tuple[tuple[Tensor, ...], ...]:
        """What `frozen_outputs` takes beside images: where their logits are, if remembered."""
        if not self.remembers:
            return ((),) * len(self._label_parts(batch))
        return tuple((part,) for part in batch.places().chunk(self.config.accumulate))

    def _rows(self, outputs: list[StepOutput]) -> BankRows:
        """What all parts, in all processes, are to be remembered by."""
        found = [output.rows for output in outputs if output.rows is not None]
        whole = (torch.cat(parts) for parts in zip(*found, strict=True))
        images = min(self.config.global_batch, len(self.data.train))
        return BankRows(*(self.world.all_rows(part, images) for part in whole))

    def _update(self, outputs: list[tuple[StepOutput, int]], step: int) -> Tensor:
        """Move the parameters, if the step passes; returns whether it does, 0-d bool."""
        if self.config.loss.update == "alternating":
            self._rest(step)
        self.scaler.unscale_(self.optimizer)
        moving = [p for p in self.params if p.grad is not None]
        norm = get_total_norm([p.grad for p in moving])
        totals = [output.total.detach() for output, _ in outputs]
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
        passes = self.gate.judge(total, norm, self.scaler.is_enabled())
        if self.config.optim.clip_grad_norm is not None:
            clip_grads_with_norm_(moving, self.config.optim.clip_grad_norm, norm)
        # What torch's own gradient scaling sets: a fused optimiser then leaves everything alone;
        # parameters and state of any other are put back by the gate.
        self.optimizer.found_inf = (~passes).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        return passes

    def _rest(self, step: int) -> None:
        """Alternating update: on even steps the student moves, with the embeddings of its features,
        on odd steps all the others.

        A parameter without gradient is left alone by the optimiser, momentum and weight decay
        included.
        """
        for group in self.optimizer.param_groups:
            if (group["name"] in ("student", "embeddings")) != (step % 2 == 0):
                for param in group["params"]:
                    param.grad = None

    def set_distillation(self, step: int) -> None:
        """The warm-up factor of this step."""
        if not self.warmup_steps:
            return
        factor = min(1.0, step / self.warmup_steps)
        if self.mode == "eager" and (self.device.type == "cpu" or factor == 1.0):
            self.distillation = factor
            return
        # A number would be compiled, or captured, as a constant; an eager step on a GPU would copy
        # the weights that it makes from the host, and wait for the copy.
        if not isinstance(self.distillation, Tensor):
            self.distillation = torch.ones((), device=self.device)
        self.distillation.fill_(factor)

    def restore(self, steps: int) -> None:
        """Set schedule, learning rates and counts to where they stand after `steps` steps."""
        self.gate.counts[2] = steps
        self.schedule.last_epoch = steps
        rates = learning_rates(self.schedule, steps)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    # Compiled and captured -----------------------------------------------------------------------

    def _compile(self) -> None:
        self.method.compile_regions(**self.compiling)

    def run_beside_others(self) -> None:
        """From now on graphs replay on a stream of their own, beside those of other runs."""
        if self.mode == "graph":
            self.stream = torch.cuda.Stream(self.device)

    def share_batches(self, other: TrainStep | None = None) -> None:
        """Normalise a batch that several runs take once, and run the frozen teacher once on it, as
        `other` does; a graph does its own."""
        if self.mode == "graph":
            return
        if other is None:
            self.image_parts = Remembered(self._image_parts)
            self.frozen_outputs = Remembered(self.frozen_outputs)
        else:
            self.image_parts, self.frozen_outputs = other.image_parts, other.frozen_outputs
            self.remembers = other.remembers

    def remember_logits(self, outputs: Callable[[Tensor, Tensor], FrozenOutputs | None]) -> None:
        """Ask `outputs` what the frozen teacher makes of images: [B, 3, H, W] and their
        `Batch.places`, int64 [B]."""
        self.frozen_outputs, self.remembers = outputs, True

    def glance(self) -> SkipCounts | None:
        """See `Gate.glance`."""
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            return self.gate.glance()

    @torch.no_grad()
    def examine(self, batch: Batch) -> dict[str, float]:
        """Every loss term on a batch as the networks are now, and the total; nothing moves."""
        before = self.gate.remember()
        with self.training_forward(), self.kernels.in_force(), self.plainly():
            outputs = [
                self.method(images, labels, 1.0, *samples)
                for images, labels, samples in zip(
                    self._image_parts(batch),
                    self._label_parts(batch),
                    self._sample_parts(batch),
                    strict=True,
                )
            ]
        self.gate.settle(torch.zeros_like(self.gate.is_open), before)
        names = ("total", *self.method.term_names)
        values = [[o.total, *(o.terms[n] for n in self.method.term_names)] for o in outputs]
        means = torch.tensor(values, dtype=torch.float64).mean(dim=0)
        return dict(zip(names, means.tolist(), strict=True))

    def join(self) -> None:
        """Let whatever reads this run's state next wait for its steps (on the device)."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    @contextmanager
    def _own_stream(self, batch: Batch) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            batch.record_stream(self.stream)
            yield

    def _replay(self, batch: Batch) -> None:
        if self.graph is None:
            self._capture(batch)
        assert self.graph is not None
        self.inputs.copy_(batch)
        self.graph.replay()

    def _capture(self, batch: Batch) -> None:
        """Make the graph, on inputs of its own; the gate is shut, so that nothing moves."""
        self.inputs = batch.clone()
        rates_to_device(self.optimizer, self.device)
        random = torch.cuda.get_rng_state(self.device)
        self.gate.is_open.fill_(False)
        assert self.capture_stream is not None
        try:
            warm_up(lambda: self.body(self.inputs, 0), self.capture_stream, WARMUP_STEPS)
            self.graph = record_step(
                lambda: self.body(self.inputs, 0), self.capture_stream, self.config
            )
        finally:
            torch.cuda.synchronize(self.device)  # nothing may still look at the gate
            torch.cuda.set_rng_state(random, self.device)
            self.gate.is_open.fill_(True)


def record_step(
    call: Callable[[], None],
    stream: torch.cuda.Stream,
    config: RunConfig,
    generators: Sequence[torch.Generator] = (),
) -> torch.cuda.CUDAGraph:
    """The capture of a step; arguments as of `capture`.

    Raises:
        OutOfMemoryError: It does not fit.
        UsageError: It failed; what the allocator then holds rules out going on in this process.
    """
    try:
        return capture(call, stream, generators=generators)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UsageError(
            f"step.mode={config.step.mode!r}: a step cannot be captured as a CUDA graph here "
            f"({first_line(error)}): expected --step.mode compile or eager"
        ) from error
