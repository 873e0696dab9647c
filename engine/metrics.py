"""Figures of a run: running means of an epoch, and what an evaluation says of all paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import normalize_images
from ..kernels.dual_path_loss import kl_rows, upcast
from .cuda_graph import capture, warm_up
from .data import Batch, ImageData, test_batches
from .distributed import SINGLE, World
from .methods import Method, StepOutput
from .methods.dfpt import DualPathDistillation
from .methods.dkd import decoupled_kl
from .models.parts import eval_mode


class EpochMeter:
    """Means over the steps of an epoch, kept on the device so that no step waits for them.

    Each process counts its own images. `num_images` and `read` add up over all of them, and so are
    to be called by all at the same step.
    """

    def __init__(
        self, term_names: tuple[str, ...], device: torch.device, world: World = SINGLE
    ) -> None:
        self.term_names, self.world = term_names, world
        # total, terms..., images, student hits, prompt hits; fp64 keeps counts exact
        self.sums = torch.zeros(len(term_names) + 4, dtype=torch.float64, device=device)

    def add(self, output: StepOutput, num_images: int, counts: Tensor | None = None) -> None:
        """Count one step of `num_images` images, unless `counts` (0-d bool) is false."""
        losses = [output.total.detach(), *(output.terms[name] for name in self.term_names)]
        hits = [output.student_correct]
        hits += [] if output.prompt_correct is None else [output.prompt_correct]
        means, counted = torch.stack(losses).double(), torch.stack(hits).double()
        row = torch.cat([means * num_images, means.new_full((1,), num_images), counted])
        if counts is not None:
            row = torch.where(counts, row, 0.0)
        self.sums[: len(row)] += row

    def reset(self) -> None:
        """Start a new epoch."""
        self.sums.zero_()

    def num_images(self) -> int:
        """Images counted so far (waits for the device)."""
        return int(self.world.total(self.sums[-3]).item())

    def read(self, has_prompt_path: bool, own: bool = False) -> dict[str, float]:
        """Means so far, by the column names of metrics.csv (waits for the device).

        `own`: of this process's images alone, which any process may ask for at any time.
        """
        total, *rest = (self.sums if own else self.world.total(self.sums)).tolist()
        *terms, images, student_hits, prompt_hits = rest
        images = max(images, 1.0)
        row = {"loss/total": total / images}
        row |= {f"loss/{n}": t / images for n, t in zip(self.term_names, terms, strict=True)}
        row["train/student_top1"] = 100 * student_hits / images
        if has_prompt_path:
            row["train/prompt_top1"] = 100 * prompt_hits / images
        return row


def hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """0-d int64: rows of logits [B, C] whose k largest contain the label [B]."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1).sum()


Normalise = Callable[[Batch], Tensor]


def normaliser(data: ImageData, dtype: torch.dtype = torch.float32) -> Normalise:
    """Batch -> images [B, 3, H, W], channels_last, normalised, cropped and flipped as it says."""

    def normalise(batch: Batch) -> Tensor:
        return normalize_images(
            batch.images, data.mean, data.std, dtype=dtype, crop=batch.crop, flip=batch.flip
        )

    return normalise


@torch.no_grad()
def predict(
    model: Callable[[Tensor], Tensor],
    data: ImageData,
    *,
    batch_size: int,
    workers: int = 0,
    world: World = SINGLE,
) -> Tensor:
    """Logits [N, C], fp32, of the test split in its order; each process computes its block."""
    normalise = normaliser(data)
    batches = test_batches(data.test, batch_size=batch_size, workers=workers, shard=world.shard)
    own = torch.cat([model(normalise(batch)).float() for batch in batches])
    return world.all_rows(own, len(data.test))


class CapturedForward:
    """A forward pass without gradient as one CUDA graph for each shape of its input.

    The graph reads parameters and statistics where they lie, and so sees them as they are when it
    is replayed; whoever moves them elsewhere needs a new one.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The output for `images`, in memory of its own."""
        if images.shape not in self.graphs:
            self.graphs[images.shape] = self._capture(images)
        graph, inputs, output = self.graphs[images.shape]
        inputs.copy_(images)
        graph.replay()
        return output.clone()

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        inputs = images.clone()
        self.stream = self.stream or torch.cuda.Stream(images.device)
        warm_up(lambda: self.forward(inputs), self.stream, 1)
        graph, output = capture(lambda: self.forward(inputs), self.stream, self.pool)
        return graph, inputs, output


def accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in percent."""
    labels = labels.to(logits.device)
    return tuple(100 * hits(logits, labels, k).item() / len(labels) for k in (1, 5))  # type: ignore


def evaluate(
    model: nn.Module, data: ImageData, *, batch_size: int = 256, workers: int = 0
) -> dict[str, float]:
    """Accuracy of one network on the test split, every image counted once.

    Returns:
        `top1` and `top5`, in percent.
    """
    with eval_mode(model):
        logits = predict(model, data, batch_size=batch_size, workers=workers)
    top1, top5 = accuracy(logits, data.test.labels)
    return {"top1": top1, "top5": top5}


class Evaluator:
    """Evaluates all paths of a method; the frozen teacher's test logits are computed once.

    Args:
        method: The method.
        data: Its data set.
        batch_size: Images in a step.
        workers: As in `test_batches`.
        captured: Run each forward pass as a CUDA graph, for a method that stays where it is.
        world: The processes that share the work; each gets all figures.
    """

    def __init__(
        self,
        method: Method,
        data: ImageData,
        *,
        batch_size: int,
        workers: int,
        captured: bool = False,
        world: World = SINGLE,
    ) -> None:
        self.method, self.data, self.captured = method, data, captured
        self.options: dict[str, Any] = {
            "batch_size": batch_size,
            "workers": workers,
            "world": world,
        }
        self.teacher_logits: Tensor | None = None
        self.forwards: dict[str, Callable[[Tensor], Tensor]] = {}

    def teacher(self) -> dict[str, float] | None:
        """top1 and top5 of the original path, in percent; None for a method without teacher."""
        if self.method.term_names == ("ce",):
            return None
        with eval_mode(self.method):  # once: not worth a graph
            self.teacher_logits = predict(self.method.teacher_logits, self.data, **self.options)  # type: ignore[arg-type]
        top1, top5 = accuracy(self.teacher_logits, self.data.test.labels)
        return {"top1": top1, "top5": top5}

    def __call__(self, ema: nn.Module | None = None) -> dict[str, float]:
        """One row of test columns of metrics.csv (M22, M47)."""
        method, labels = self.method, self.data.test.labels
        prompt, norms = None, {}
        with eval_mode(method):
            student = self._predict("student", method.student)
            if isinstance(method, DualPathDistillation):
                norms, prompt = self._prompt_path(method)
        row = _accuracy_columns("student", student, labels)
        if ema is not None:
            with eval_mode(ema):
                averaged = self._predict("ema", ema)
            row["test/ema_top1"] = accuracy(averaged, labels)[0]
        if prompt is not None:
            row |= _accuracy_columns("prompt", prompt, labels)
        row |= {f"prompt_norm/{stage}": norm for stage, norm in norms.items()}
        if self.teacher_logits is not None:
            row |= _accuracy_columns("teacher", self.teacher_logits, labels)
            row |= path_divergence(student, prompt, self.teacher_logits, labels, method.loss.tau)
        return row

    def _predict(self, name: str, forward: Callable[[Tensor], Tensor]) -> Tensor:
        if name not in self.forwards:
            self.forwards[name] = CapturedForward(forward) if self.captured else forward
        return predict(self.forwards[name], self.data, **self.options)

    def _prompt_path(self, method: DualPathDistillation) -> tuple[dict[str, float], Tensor]:
        """Mean ||P_i(x_i)|| / ||x_i|| of each stage, and the logits [N, C]."""
        stages = list(method.teacher.pairs)

        def forward(images: Tensor) -> Tensor:  # logits, then the ratio of each stage: [B, C + N]
            with method.teacher.prompt_norms() as ratios:
                logits = method.prompt_logits(images).float()
            return torch.cat([logits, torch.stack([ratios[s] for s in stages], dim=1)], dim=1)

        found = self._predict("prompt", forward)
        logits, ratios = found.split([found.shape[1] - len(stages), len(stages)], dim=1)
        return dict(zip(stages, ratios.mean(dim=0).tolist(), strict=True)), logits.contiguous()


def path_divergence(
    student: Tensor, prompt: Tensor | None, teacher: Tensor, labels: Tensor, tau: float
) -> dict[str, float]:
    """KL between the paths at temperature tau (without the factor tau^2), and its parts (M22).

    Args:
        student: Logits [N, C].
        prompt: Logits [N, C] or None.
        teacher: Logits [N, C].
        labels: int64 [N].
        tau: Temperature.

    Returns:
        `kl/<supervisor>_student`, its `_target` and `_nontarget` parts, which sum to it, and the
        mean probability `prob/<supervisor>_target` of the true class, for teacher and prompt path;
        `kl/teacher_prompt`.
    """
    labels = labels.to(student.device)
    row: dict[str, float] = {}
    for name, supervisor in (("teacher", teacher), ("prompt", prompt)):
        if supervisor is None:
            continue
        parts = decoupled_kl(supervisor, student, labels, tau)
        nontarget = (1 - parts.target_prob) * parts.nontarget
        row[f"kl/{name}_student"] = _mean_kl(supervisor, student, tau)
        row[f"kl/{name}_student_target"] = parts.target.mean().item()
        row[f"kl/{name}_student_nontarget"] = nontarget.mean().item()
        row[f"prob/{name}_target"] = parts.target_prob.mean().item()
    if prompt is not None:
        row["kl/teacher_prompt"] = _mean_kl(teacher, prompt, tau)
    return row


def _mean_kl(supervisor: Tensor, learner: Tensor, tau: float) -> float:
    q, p = ((upcast(z) / tau).log_softmax(dim=1) for z in (supervisor, learner))
    return kl_rows(q, p).mean().item()


def _accuracy_columns(path: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    top1, top5 = accuracy(logits, labels)
    return {f"test/{path}_top1": top1, f"test/{path}_top5": top5}
