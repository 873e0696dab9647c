"""Which backend serves each fused call of a run: measured on the user's machine, for its shapes.

The networks do one forward pass on the run's first batch, and each fused call in it that is met for
the first time is made again there and then, on copies of its inputs:

    compared    output, statistics and all gradients of the fused backend (for a random gradient of
                the output) and of eager PyTorch, both against fp64; two calls must agree in every
                bit. Nothing fused serves a run that was not compared on this machine.
    timed       forward and backward by either, interleaved, in the run's own mode: as they stand,
                compiled by Inductor, or compiled and replayed as a CUDA graph. The fused backend
                serves if it is faster beyond noise.

What was found is kept for the next run (kernel_cache.py). Rank 0 measures for all processes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import backend, use_backend
from ..kernels.backend import Call, Choices, Site, deciding, use_choices
from .cuda_graph import capture, warm_up
from .errors import UsageError
from .files import first_line
from .kernel_cache import Certificate, Choice, KernelCache
from .models.per_module_work import CastWeights
from .timing import Timing, spread, time_call

# The certificate -------------------------------------------------------------------------------

# Errors that two sound ways of summing may show, as multiples of eager PyTorch's own.
ERROR_FACTOR = 2.0
# What is allowed beyond, in units of the dtype's rounding (eps): of the largest difference over the
# largest value, and of the root mean squares; eager's own error can be small by luck. Sums over a
# batch lose a few bits in fp32; values of 16 bits are the result of one rounding.
_FLOORS = {4: (32.0, 16.0), 8: (32.0, 16.0), 2: (2.0, 0.25)}
# A tensor counts at least for this share of the largest one of its kind: a gradient that is zero
# but for rounding has no relative error.
_LEAST_SCALE = 0.01
ATTEMPTS = 3
NOISE = 0.01  # of the input's standard deviation

# The measurement -------------------------------------------------------------------------------

MOST_ROUNDS, LEAST_ROUNDS = 20, 5
LEAST_GAIN = 0.05  # of the reference's median
SITE_SECONDS = 0.5  # of rounds beyond the least, for one site,
RUN_SECONDS = 6.0  # and until a run's measuring took so long

# What stands in a compiled region of a step; a convolution there is called as it is here.
_IN_REGIONS = ("prompt_pair", "frozen_relu", "dual_path_loss", "distillation_loss")
_numbers = itertools.count()
_log = logging.getLogger(__name__)


class KernelChoices:
    """The backends of a run's fused calls.

    Args:
        asked: auto: as measured; else the backend to take wherever it can serve and its certificate
            holds, without a look at the clock.
        mode: eager, compile or graph: how the run executes its steps.
        options: Of `torch.compile`, as the run has them.
        warn: Gets a line if the cache is damaged.

    Raises:
        ValueError: What is asked for is unknown.
    """

    def __init__(
        self,
        asked: str = "auto",
        mode: str = "eager",
        options: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        if asked not in ("auto", *backend.BACKENDS):
            expected = ", ".join(("auto", *backend.BACKENDS))
            raise ValueError(f"unknown backend {asked!r}: expected one of {expected}")
        self.asked, self.mode, self.options = asked, mode, dict(options or {})
        self.cache = KernelCache(mode, warn)
        self.table: dict[Site, Choice] = {}
        self.choices = Choices({})
        self.unproven: set[Site] = set()
        """Whose backend is bound by a record, and was not compared on this machine."""
        self.measured_s = 0.0
        """Seconds that measuring has taken; 0 where all was known."""

    def in_force(self) -> AbstractContextManager[None]:
        """The choices made so far serve inside; the reference whatever is not among them."""
        return use_choices(self.choices)

    @contextlib.contextmanager
    def deciding(self) -> Iterator[None]:
        """Every fused call inside is measured when it is first met, and then served by choice."""
        if self.asked == "reference":
            with self.in_force():
                yield
            return
        with deciding(self._decide):
            yield
        self._settle()

    def record(self) -> list[dict[str, Any]]:
        """All choices as JSON data, for `adopt`."""
        return [choice.to_json() for choice in self.table.values()]

    def adopt(self, record: Sequence[dict[str, Any]]) -> None:
        """Take over the choices of a record; nothing about them is measured.

        Raises:
            ValueError: It is no record.
        """
        found = [Choice.from_json(values) for values in record]
        self.table |= {choice.site: choice for choice in found}
        for name in {choice.backend for choice in found}:
            backend.unavailable(name)  # asking loads it: this process may not have measured
        self._settle()

    def bind(self, record: Sequence[dict[str, Any]]) -> None:
        """As `adopt`, for a record that may be another machine's: what was not compared on this one
        is compared when it is met, and the reference serves where the comparison fails.

        Raises:
            ValueError: It is no record.
        """
        self.adopt(record)
        self.unproven = {
            site
            for site, choice in self.table.items()
            if choice.backend != "reference" and not self._is_proven(choice)
        }

    def _is_proven(self, choice: Choice) -> bool:
        known = self.cache.find(choice.site, choice.images)
        found = None if known is None else known.certificate
        return found is not None and found.holds and found.backend == choice.backend

    def missing(self, device: str) -> tuple[str, str] | None:
        """A backend that a choice for this type of device needs and that cannot be used here, and
        why; None where there is none."""
        for name in sorted({c.backend for c in self.table.values() if c.site.device == device}):
            reason = backend.unavailable(name)
            if reason is not None:
                return name, reason
        return None

    def do_without(self, name: str) -> None:
        """Let the reference serve whatever `name` was chosen for: a process of the run lacks it."""
        why = f"not every process of the run has {name}"
        self.table = {
            site: replace(choice, backend="reference", why=why)
            if choice.backend == name
            else choice
            for site, choice in self.table.items()
        }
        self._settle()

    def summary(self) -> str:
        """Which backends serve, in one line."""
        fast = [c for c in self.table.values() if c.backend != "reference"]
        if not fast:
            return "kernels: the reference for all fused calls"
        names = " and ".join(sorted({c.backend for c in fast}))
        calls = f"{len(fast)} of {len(self.table)} fused calls"
        return f"kernels: {names} for {calls} (dfptkd doctor lists them)"

    def _compiling(self) -> AbstractContextManager[None]:
        """Compiles, though the pass that measures runs everything uncompiled."""
        if self.mode == "eager":
            return contextlib.nullcontext()
        return torch.compiler.set_stance("default")

    def _settle(self) -> None:
        backends = {site: choice.backend for site, choice in self.table.items()}
        if backends != self.choices:
            self.choices = Choices(backends)

    def _decide(self, site: Site, call: Call) -> str:
        if site in self.unproven:
            self._prove(site, call)
        if site in self.table:
            return self.table[site].backend
        wanted = backend.fast_backend(site.device) if self.asked == "auto" else self.asked
        if wanted is None or backend.refusal(wanted, site.operation, site.device, site.dtype):
            backend.log_fallback(site.operation, site.device, site.dtype, wanted)
            return "reference"  # there is nothing to choose
        self.table[site] = self._find(site, call, wanted)
        return self.table[site].backend

    def _prove(self, site: Site, call: Call) -> None:
        self.unproven.discard(site)
        choice = self.table[site]
        certificate = certify(call, choice.backend, site)
        if certificate.holds:
            self.table[site] = replace(choice, certificate=certificate)
            return
        why = f"{choice.backend} failed its certificate where the run went on"
        self.table[site] = Choice(site, choice.images, "reference", why, {}, certificate)

    def _find(self, site: Site, call: Call, wanted: str) -> Choice:
        images = 0 if call.tensors[0] is None else len(call.tensors[0])
        known = self.cache.find(site, images) if self.asked == "auto" else None
        if known is not None:
            return known
        started = time.monotonic()
        choice = self._measure(site, images, call, wanted)
        self.measured_s += time.monotonic() - started
        return self.cache.settle(choice) if self.asked == "auto" else choice

    def _measure(self, site: Site, images: int, call: Call, wanted: str) -> Choice:
        certificate = certify(call, wanted, site)
        if not certificate.holds:
            why = f"{wanted} failed its certificate"
            return Choice(site, images, "reference", why, {}, certificate)
        if self.asked != "auto":
            return Choice(site, images, wanted, "asked for", {}, certificate)
        seconds = SITE_SECONDS if self.measured_s < RUN_SECONDS else 0.0
        try:
            with self._compiling():
                timings = time_backends(call, wanted, site, self.mode, self.options, seconds)
        except Exception as error:  # compilers and drivers raise whatever they like
            why = f"{wanted} could not be timed: {first_line(error)}"
            return Choice(site, images, "reference", why, {}, certificate)
        medians = {name: round(timing.median, 1) for name, timing in timings.items()}
        if is_faster(timings[wanted], timings["reference"]):
            return Choice(site, images, wanted, "faster", medians, certificate)
        why = f"{wanted} is not faster beyond noise"
        return Choice(site, images, "reference", why, medians, certificate)


@contextlib.contextmanager
def measured_kernels(
    kernels: str = "auto", *, choices: KernelChoices | None = None
) -> Iterator[KernelChoices]:
    """Measured backends for a training loop of your own, in eager mode.

        with measured_kernels() as kernels:
            for images, labels in batches:
                loss = ...  # each fused call is measured when it is met for the first time
                loss.backward()

    What is compiled cannot be measured while it runs: let one step run uncompiled inside, and put
    what it found in force around the compiled ones by `kernels.in_force()`. A kernel that is wrong
    on this machine is logged as a warning at the end.

    Args:
        kernels: auto, reference, native or triton, as `--kernels`.
        choices: Those to go on with; absent: new ones, which begin with what is known of this
            machine.

    Yields:
        The choices made so far.

    Raises:
        ValueError: `kernels` is none of the four.
    """
    found = KernelChoices(kernels) if choices is None else choices
    before = set(found.table)
    try:
        with found.deciding():
            yield found
    finally:
        for site, choice in found.table.items():
            if site not in before and choice.complaint:
                _log.warning("%s", choice.complaint)


def check_kernels(asked: str, device: torch.device) -> None:
    """Refuse `--kernels` where the backend cannot be.

    Raises:
        UsageError: It runs on another kind of device, or is not there.
    """
    if asked in ("auto", "reference"):
        return
    name = "prompt_pair"  # it has every backend
    reason = backend.refusal(asked, name, device.type, torch.float32)
    if reason is not None:
        if backend.fast_backend(device.type) != asked:
            reason = f"{asked} does not run on {device.type}"
        others = [n for n in ("auto", "reference", backend.fast_backend(device.type)) if n]
        expected = " or ".join(n for n in others if n != asked)
        raise UsageError(f"kernels={asked!r}: {reason}: expected {expected}")


# Compared ----------------------------------------------------------------------------------------


def certify(call: Call, wanted: str, site: Site) -> Certificate:
    """Compare a fused backend with eager PyTorch, both against fp64.

    A ReLU whose input is zero but for rounding lets a gradient pass by one way of summing and not
    by another. So a comparison that fails is made again, with a little noise on the first input: a
    kernel that is wrong fails every time.

    Args:
        call: The call, as it was met.
        wanted: The fused backend.
        site: Where it was met.
    """
    found = _certify(call, wanted, site)
    first = call.tensors[0]
    for attempt in range(1, ATTEMPTS):
        if found.holds or found.failure or first is None or not first.is_floating_point():
            break
        with torch.no_grad():
            generator = torch.Generator(first.device).manual_seed(attempt)
            noise = torch.empty_like(first).normal_(generator=generator)
            noisy = first + NOISE * first.std() * noise
        noisy.requires_grad_(first.requires_grad)
        found = _certify(replace(call, tensors=(noisy, *call.tensors[1:])), wanted, site)
    return found


def _certify(call: Call, wanted: str, site: Site) -> Certificate:
    try:
        upstream: list[Tensor] = []
        eager = _Copy(call).results("reference", upstream)
        with torch.autocast(site.device, enabled=False):
            exact = _Copy(call, exact=True).results("reference", upstream)
        ours, again = (_Copy(call).results(wanted, upstream) for _ in range(2))
    except torch.OutOfMemoryError:
        return Certificate(wanted, False, failure="too little memory to compare it")
    except Exception as error:  # of a compiler, a driver, a kernel
        return Certificate(wanted, False, failure=f"{type(error).__name__}: {first_line(error)}")
    for (name, a), (_, b) in zip(ours, again, strict=True):
        if not torch.equal(a, b):
            return Certificate(wanted, False, name, failure=f"two calls differ in {name}")
    return _compare(wanted, ours, eager, exact, torch.finfo(site.dtype))


def _compare(
    wanted: str,
    ours: list[tuple[str, Tensor]],
    eager: list[tuple[str, Tensor]],
    exact: list[tuple[str, Tensor]],
    dtype: torch.finfo,
) -> Certificate:
    floors = [units * dtype.eps for units in _FLOORS[dtype.bits // 8]]
    scales = {name: _norms(true) for name, true in exact}
    largest: dict[str, list[float]] = {}
    for name, norms in scales.items():
        kind = largest.setdefault(name.split(" ")[0], [0.0, 0.0])
        kind[:] = [max(a, b) for a, b in zip(kind, norms, strict=True)]
    worst, found = -1.0, Certificate(wanted, True)
    for (name, a), (_, b), (_, true) in zip(ours, eager, exact, strict=True):
        kind, own = largest[name.split(" ")[0]], scales[name]
        scale = [max(n, _LEAST_SCALE * k, 1e-300) for n, k in zip(own, kind, strict=True)]
        errors, eager_errors = (
            [n / s for n, s in zip(_norms(x.double() - true.double()), scale, strict=True)]
            for x in (a, b)
        )
        # An integer is right or wrong.
        extra = floors if a.is_floating_point() else [0.0, 0.0]
        for error, other, floor in zip(errors, eager_errors, extra, strict=True):
            bound = ERROR_FACTOR * other + floor
            if not (math.isfinite(error) and math.isfinite(bound)):
                return Certificate(wanted, False, name, failure=f"{name} is not finite")
            excess = error / bound if bound else (0.0 if error == 0 else math.inf)
            if excess > worst:
                worst = excess
                found = Certificate(wanted, excess <= 1.0, name, error, other)
    return found


def _norms(x: Tensor) -> list[float]:
    """Largest value and root mean square; NaN where there is one."""
    if not x.numel():
        return [0.0, 0.0]
    x = x.double()
    return [x.abs().max().item(), x.square().mean().sqrt().item()]


def _random_like(outputs: list[Tensor]) -> list[Tensor]:
    """A random gradient for each output that can have one, the same in every run."""
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    return [
        torch.empty_like(y, requires_grad=False).normal_(generator=generator)
        for y in outputs
        if y.is_floating_point()
    ]


class _Copy:
    """A call on tensors, and in a module, of its own: nothing that it does is seen by the run."""

    def __init__(self, call: Call, *, exact: bool = False) -> None:
        function = call.exact if exact and call.exact is not None else call.function
        self.module: nn.Module | None = None
        leaves: list[Tensor] = []
        if isinstance(function, nn.Module):
            function = self.module = copy.deepcopy(function)
            if exact:
                self.module.double()
            leaves = [p for p in self.module.parameters() if p.requires_grad]
        self.function: Callable[..., Any] = function
        self.tensors: list[Tensor | None] = []
        for tensor in call.tensors:
            own = None if tensor is None else tensor.detach().clone()
            if own is not None and own.is_floating_point():
                own = own.double() if exact and call.exact is None else own
                assert tensor is not None
                own.requires_grad_(tensor.requires_grad and torch.is_grad_enabled())
                leaves = [own, *leaves] if own.requires_grad else leaves
            self.tensors.append(own)
        self.leaves = leaves

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Let the module have its weights in autocast's dtype, as a step casts them: before."""
        if self.module is None:
            return
        for module, name in CastWeights([self.module], dtype).slots:
            weight = module._parameters[name]
            assert weight is not None
            module._parameters[name] = nn.Parameter(weight.detach().to(dtype))
        inputs = [t for t in self.tensors if t is not None and t.requires_grad]
        self.leaves = [*inputs, *(p for p in self.module.parameters() if p.requires_grad)]

    def forward(self) -> list[Tensor]:
        """The outputs."""
        found = self.function(*self.tensors)
        return [found] if isinstance(found, Tensor) else list(found)

    def backward(self, outputs: list[Tensor], upstream: list[Tensor]) -> Sequence[Tensor | None]:
        """Gradients of what asks for one; `upstream` is filled where it is empty."""
        if not upstream:
            upstream += _random_like(outputs)
        floating = [y for y in outputs if y.is_floating_point()]
        pairs = [(y, g) for y, g in zip(floating, upstream, strict=True) if y.requires_grad]
        if not pairs or not self.leaves:
            return ()
        ends, grads = [y for y, _ in pairs], [g.to(y.dtype) for y, g in pairs]
        return torch.autograd.grad(ends, self.leaves, grads, allow_unused=True)

    def results(self, name: str, upstream: list[Tensor]) -> list[tuple[str, Tensor]]:
        """Outputs, statistics and gradients by a backend, each with its name."""
        with use_backend(name):
            outputs = self.forward()
            gradients = self.backward(outputs, upstream)
        named = [(f"output {i}", y.detach()) for i, y in enumerate(outputs)]
        if self.module is not None:
            named += [(f"statistic {n}", b) for n, b in self.module.named_buffers()]
        return named + [(f"gradient {i}", g) for i, g in enumerate(gradients) if g is not None]


# Timed -------------------------------------------------------------------------------------------


def time_backends(
    call: Call,
    wanted: str,
    site: Site,
    mode: str,
    options: Mapping[str, Any],
    seconds: float,
) -> dict[str, Timing]:
    """Time forward and backward by a fused backend and by the reference, interleaved.

    Args:
        call: The call, as it was met.
        wanted: The fused backend.
        site: Where it was met.
        mode: The run's execution mode.
        options: Of `torch.compile`.
        seconds: Of rounds beyond the least number of them, where they do not settle it sooner.
    """
    device = torch.device(site.device)
    calls = {name: _runnable(call, name, site, mode, options) for name in ("reference", wanted)}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.monotonic()
    for rounds in range(1, MOST_ROUNDS + 1):
        for name, run in calls.items():
            samples[name].append(time_call(run, device))
        found = {name: spread(values) for name, values in samples.items()}
        ours, reference = found[wanted], found["reference"]
        is_settled = is_faster(ours, reference) or ours.p20 > reference.median
        if rounds >= LEAST_ROUNDS and (is_settled or time.monotonic() - started > seconds):
            break
    return found


def is_faster(ours: Timing, reference: Timing) -> bool:
    """Whether it is so beyond noise, and by enough to matter."""
    gain = 1 - ours.median / reference.median
    return ours.p80 < reference.p20 and gain >= LEAST_GAIN


def _runnable(
    call: Call, name: str, site: Site, mode: str, options: Mapping[str, Any]
) -> Callable[[], object]:
    """A warm call, forward and backward, as the run would make it."""
    own = _Copy(call)
    first = own.tensors[0]
    dtype = None if first is None else backend.autocast_dtype(first)
    if dtype is not None:
        own.cast_weights(dtype)
    upstream: list[Tensor] = []
    if mode != "eager" and site.operation in _IN_REGIONS:
        own.function = _compiled(own.function, site, options)

    def run() -> None:
        with use_backend(name):
            own.backward(own.forward(), upstream)

    is_cuda = site.device == "cuda"
    for _ in range(3 if is_cuda or mode != "eager" else 1):
        run()
    if mode != "graph":
        return run
    stream = torch.cuda.Stream()
    warm_up(run, stream, 1)
    return capture(run, stream)[0].replay


def _compiled(
    function: Callable[..., Any], site: Site, options: Mapping[str, Any]
) -> Callable[..., Any]:
    def work(*tensors: Tensor | None) -> Any:
        return function(*tensors)

    def work_after_addition(x: Tensor) -> Any:
        # Inductor makes one kernel of it and what stands before it, as it does in a network.
        return function(x + x)

    chosen = work_after_addition if site.operation == "frozen_relu" else work
    # Compiled code is looked up by the code object, and only a few versions of one are kept.
    code = chosen.__code__.replace(co_name=f"{site.operation}_{next(_numbers)}")
    chosen.__code__ = code
    return torch.compile(chosen, **options)
