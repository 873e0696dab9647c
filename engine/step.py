"""One optimisation step: normalise, forward, backward, update.

The body runs eagerly; other execution modes wrap the same body.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ..kernels import use_backend
from .config import RunConfig
from .data import Batch, ImageData
from .guards import Certificate, certify
from .methods import Method, StepOutput
from .metrics import EpochMeter, normaliser
from .optim import build_ema, build_optimizer, build_schedule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """Everything that a step reads and writes.

    Args:
        method: Student, teacher and losses.
        config: The run.
        data: For mean and standard deviation.
        total_steps: Length of the schedule.
        steps_per_epoch: For warm-ups, which are given in epochs.
        device: Where the method lives.
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
    ) -> None:
        self.method, self.config, self.device = method, config, device
        self.optimizer = build_optimizer(method, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, total_steps, steps_per_epoch)
        self.ema = build_ema(method.student, config.optim.ema_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.meter = EpochMeter(method.term_names, device)
        self.normalise = normaliser(data)
        self.reference_only = False
        self.warmup_steps = config.loss.warmup_epochs * steps_per_epoch
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def precision(self) -> str:
        """Compute precision after `auto` is resolved."""
        if self.config.precision != "auto":
            return self.config.precision
        return "bf16" if self.device.type == "cuda" else "fp32"

    def autocast(self) -> AbstractContextManager:
        """Casts convolutions and matrix products to the compute precision."""
        return torch.autocast(
            self.device.type, DTYPES.get(self.precision), enabled=self.precision in DTYPES
        )

    def loss_backend(self) -> AbstractContextManager:
        """The reference where the certificate has failed, else whatever serves."""
        return use_backend("reference") if self.reference_only else nullcontext()

    def certify(self, batch: Batch) -> Certificate | None:
        """Check the fused loss on a batch; nothing of the run's state moves."""
        with self.autocast():
            certificate = certify(self.method, self.normalise(batch), batch.labels)
        self.reference_only = certificate is not None and not certificate.holds
        return certificate

    def __call__(self, batch: Batch, step: int) -> None:
        """Do step number `step` (from 0) on `batch`."""
        images = self.normalise(batch)
        distillation = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.config.accumulate
        for part, labels in zip(images.chunk(parts), batch.labels.chunk(parts), strict=True):
            with self.autocast(), self.loss_backend():
                output: StepOutput = self.method(part, labels, distillation)
            self.scaler.scale(output.total * (len(labels) / len(batch.labels))).backward()
            self.meter.add(output, len(labels))
        if self.config.loss.update == "alternating":
            self._rest(step)
        if self.config.optim.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.params, self.config.optim.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.method.student)

    def _rest(self, step: int) -> None:
        """Alternating update: on even steps only the student moves, on odd steps all the others.

        A parameter without gradient is left alone by the optimiser, momentum and weight decay
        included.
        """
        for group in self.optimizer.param_groups:
            if (group["name"] == "student") != (step % 2 == 0):
                for param in group["params"]:
                    param.grad = None
