"""The components of a step and the borders between them, for all that is measured by part.

Whoever measures passes `enter`, a function that is told "from now on, work belongs to `part`". It
is called by hooks that `borders` puts on a step:

    of the step     the spans that the step names itself
    forward         before a module runs, and after those that something else follows in their pair
    backward        when the gradient of a component's output is complete: autograd runs its nodes
                    in the opposite order of the forward pass, so what follows belongs to the
                    component, up to the next such gradient

The hooks read no value and keep no tensor: losses, gradients and statistics keep their bits. Only
eager steps have borders; compiled code calls no hooks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .methods import Method
from .methods.base import FrozenTeacherMethod
from .methods.dfpt import DualPathDistillation
from .models import DualPathTeacher, PromptFusion
from .spans import listen
from .step import TrainStep

DATA_WAIT, COPY, NORMALISE = "data wait", "copy", "normalise"
SHARED, ORIGINAL = "teacher, shared stages", "teacher, original path"
HEAD, STUDENT, LOSS = "prompt path, head", "student", "loss"
OPTIMIZER, EMA, LOGGING = "optimizer", "EMA", "logging"
REST = "gate and the rest"

# Spans of TrainStep.body -> component; what lies between two spans is the rest.
_SPANS = {
    "copy": COPY,
    "normalise": NORMALISE,
    "optimizer": OPTIMIZER,
    "EMA": EMA,
    "metrics": LOGGING,
}


class Part(NamedTuple):
    """A component in one direction."""

    component: str
    backward: bool = False


Enter = Callable[[Part], None]


def stage_name(number: int) -> str:
    """A stage of the teacher (from 1) as the prompt path runs it."""
    return f"prompt path, stage {number}"


def prompt_name(number: int) -> str:
    """The prompt block behind stage `number`."""
    return f"prompt block {number}"


def fusion_name(number: int) -> str:
    """The fusion block behind stage `number`."""
    return f"fusion block {number}"


def components(step: TrainStep) -> list[str]:
    """Every component of a step, in the order of a table."""
    method = step.method
    names = [DATA_WAIT, COPY, NORMALISE]
    if isinstance(method, DualPathDistillation):
        dual = method.teacher
        stages = range(dual.shared_stages + 1, len(dual.original.stages) + 1)
        names += [SHARED] if dual.shared_stages else []
        names += [ORIGINAL, *map(stage_name, stages)]
        names += [*map(prompt_name, dual.inserted), *map(fusion_name, dual.inserted), HEAD]
    elif isinstance(method, FrozenTeacherMethod):
        names.append(ORIGINAL)
    names += [STUDENT, LOSS, OPTIMIZER, REST]
    return [*names, *([] if step.ema is None else [EMA]), LOGGING]


@contextmanager
def borders(step: TrainStep, enter: Enter) -> Iterator[None]:
    """Has `enter` called at every border of the steps made inside the block."""
    with ExitStack() as stack:
        stack.enter_context(listen(lambda name: _span(name, enter)))
        _Borders(enter, stack).of_method(step.method)
        yield


@contextmanager
def _span(name: str, enter: Enter) -> Iterator[None]:
    # A backward pass starts with the loss; every component behind it has a border of its own.
    enter(Part(LOSS, True) if name == "backward" else Part(_SPANS.get(name, REST)))
    yield
    enter(Part(REST))


class _Borders:
    """Puts the hooks on a method's modules; `stack` takes them away again."""

    def __init__(self, enter: Enter, stack: ExitStack) -> None:
        self.enter, self.stack = enter, stack

    def of_method(self, method: Method) -> None:
        self.before(method.student, STUDENT)
        self.output(method.student, STUDENT)
        self.around(method, "losses", self.losses)
        if isinstance(method, DualPathDistillation):
            self.of_teacher(method.teacher)
        elif isinstance(method, FrozenTeacherMethod):
            self.before(method.teacher, ORIGINAL, ORIGINAL)

    def of_teacher(self, dual: DualPathTeacher) -> None:
        """Both paths: the same frozen module is the original path's where no gradient is asked."""
        for i, stage in enumerate(dual.original.stages, start=1):
            frozen = SHARED if i <= dual.shared_stages else ORIGINAL
            self.before(stage, stage_name(i), frozen)
        self.before(dual.original.neck, HEAD, ORIGINAL)
        self.before(dual.original.head, HEAD, ORIGINAL)
        trunk = dual.original if dual.copied is None else dual.copied
        for i, stage in enumerate(trunk.stages, start=1):
            self.output(stage, stage_name(i))
        if dual.copied is not None:
            for i, stage in enumerate(dual.copied.stages, start=1):
                self.before(stage, stage_name(i))
            self.before(dual.copied.neck, HEAD)
        self.before(dual.head, HEAD)
        self.output(dual.head, HEAD)
        for i in dual.inserted:
            self.of_pair(dual.pairs[f"stage{i}"], i)  # type: ignore[arg-type]

    def of_pair(self, pair: PromptFusion, number: int) -> None:
        prompt, fusion = prompt_name(number), fusion_name(number)
        self.before(pair, prompt)
        self.output(pair, fusion)
        # Called one by one, or the prompt block through `fused`, which is no module's forward.
        self.output(pair.prompt, prompt, then=fusion)
        self.around(pair.prompt, "fused", lambda call: self.fused(call, prompt, fusion))

    # What the hooks do ---------------------------------------------------------------------------

    def before(self, module: nn.Module, component: str, without_grad: str | None = None) -> None:
        """A border before `module`; `without_grad`: whose it is where no graph is made."""

        def hook(*_: Any) -> None:
            is_frozen = without_grad is not None and not torch.is_grad_enabled()
            self.enter(Part(without_grad if is_frozen else component))  # type: ignore[arg-type]

        self.stack.callback(module.register_forward_pre_hook(hook).remove)

    def output(self, module: nn.Module, component: str, then: str | None = None) -> None:
        """A border in the backward pass at the output of `module`; `then`: one after it, too."""

        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.mark([output], component)
            if then is not None:
                self.enter(Part(then))

        self.stack.callback(module.register_forward_hook(hook).remove)

    def mark(self, tensors: Iterable[Tensor | None], component: str) -> None:
        """What follows the gradient of any of `tensors` is the backward of `component`."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.enter(Part(component, True)))

    def around(self, owner: nn.Module, name: str, wrap: Callable[[Callable], Callable]) -> None:
        """Replaces a method on this one instance."""
        before = vars(owner).get(name)
        setattr(owner, name, wrap(getattr(owner, name)))
        if before is None:
            self.stack.callback(delattr, owner, name)
        else:
            self.stack.callback(setattr, owner, name, before)

    def losses(self, call: Callable) -> Callable:
        def run(*inputs: Any) -> Any:
            self.enter(Part(LOSS))
            output = call(*inputs)
            self.enter(Part(REST))
            return output

        return run

    def fused(self, call: Callable, prompt: str, fusion: str) -> Callable:
        def run(x: Tensor) -> Any:
            pending = call(x)
            self.mark(pending, prompt)
            self.enter(Part(fusion))
            return pending

        return run


# What is measured by part -------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """A stretch of time that belongs to one part, in seconds from the start of its timeline."""

    part: Part
    start: float
    seconds: float


class Timeline:
    """A clock whose time belongs to the part that was entered last; none gets lost between two.

    On CUDA it is the device's time, by events on the current stream that are read at the end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[Part, Any]] = []

    def enter(self, part: Part) -> None:
        """From now on time belongs to `part`."""
        self.marks.append((part, self.now()))

    def now(self) -> Any:
        """A moment: seconds, or an event to be read later."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> list[Slice]:
        """End the last part; waits for the device."""
        end = self.now()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        first = self.marks[0][1]
        starts = [self._between(first, moment) for _, moment in self.marks]
        ends = [*starts[1:], self._between(first, end)]
        return [
            Slice(part, start, end - start)
            for (part, _), start, end in zip(self.marks, starts, ends, strict=True)
        ]

    def _between(self, earlier: Any, later: Any) -> float:
        if self.device.type == "cuda":
            return earlier.elapsed_time(later) / 1e3
        return later - earlier


def seconds_of(slices: Sequence[Slice]) -> dict[Part, float]:
    """Time of each part."""
    total: dict[Part, float] = defaultdict(float)
    for piece in slices:
        total[piece.part] += piece.seconds
    return dict(total)


class Ledger:
    """Charges what counters grew by to the part in which they grew.

    Args:
        read: The counters as they stand, ever growing.
    """

    def __init__(self, read: Callable[[], tuple[int, ...]]) -> None:
        self.read = read
        self.last = read()
        self.part: Part | None = None
        self.entries: dict[Part, tuple[int, ...]] = {}

    def enter(self, part: Part) -> None:
        """From now on growth belongs to `part`."""
        self.close()
        self.part = part

    def close(self) -> None:
        """Charge what has grown so far."""
        now = self.read()
        if self.part is not None:
            so_far = self.entries.get(self.part, (0,) * len(now))
            grown = (a + b - c for a, b, c in zip(so_far, now, self.last, strict=True))
            self.entries[self.part] = tuple(grown)
        self.last = now
