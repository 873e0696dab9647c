"""Contrastive representation distillation (Tian et al., ICLR 2020, arXiv 1910.10699), a term.

Student and supervisor each have an embedding (a linear layer, then length 1) and a memory bank: a
moving average, of length 1 too, of the embeddings of every training image. What one of them makes
of an image must agree with what the other's bank has of the same image, and not with what it has of
K images of other classes:

    s(x) = <v, bank[x]> / T - b,      b = log K + 1 / (2 d T^2)
    L    = mean over images of [softplus(-s(same)) + sum over the K others of softplus(s(other))]
    L_CRD = L(student against the supervisor's bank) + L(supervisor against the student's bank)

That is the loss of the authors' code (RepDistiller) in the log domain, where h = P / (P + K / N)
with P = exp(<v, bank> / T) / Z is sigmoid(s). T = 0.07, d = 128 and the bank's momentum 0.5 are
theirs. Three things are ours: Z, which they estimate on the first batch, is the expectation of that
estimate, N exp(1 / (2 d T^2)), and so does not depend on how a batch is cut; the others are drawn
with replacement, as a function of (seed, step, image); the 1e-7 that guards a quotient is gone.

Memory: 2 N d fp32 for the banks; 2 B N for the products of a batch, which autograd keeps, and B N
for the gradient of one. Multiplying by a whole bank takes less traffic than gathering B K of its
rows as long as N is under K d, 2 million.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.dual_path_loss import upcast
from ..data.order import Stream, hash_bits, integers
from ..errors import DataError
from .base import BankRows, Samples

WIDTH = 128
TEMPERATURE = 0.07
MOMENTUM = 0.5
SAVED_BYTES = 2 * 4 * WIDTH  # of a training image: its rows in the banks, part of a checkpoint
PRODUCT_BYTES = 2 * 4  # of a training image and one of the batch
IMAGE_BYTES = SAVED_BYTES + 8  # and its place in the order by class


class Contrast(nn.Module):
    """Embeddings and banks of student and supervisor.

    Args:
        widths: Features of the student and of the supervisor.
        labels: Of the training images, int64 [N].
        negatives: K.
        seed: Of the draws of other images.

    Raises:
        DataError: All images are of one class.
    """

    by_class: Tensor
    first: Tensor
    count: Tensor

    def __init__(self, widths: tuple[int, int], labels: Tensor, negatives: int, seed: int) -> None:
        super().__init__()
        self.num_negatives, self.seed = negatives, seed
        self.embeddings = nn.ModuleList(nn.Linear(width, WIDTH) for width in widths)
        # Of length 1 in the mean, as the rows that will replace them are.
        bound = math.sqrt(3 / WIDTH)
        for name in ("student_bank", "supervisor_bank"):
            self.register_buffer(name, torch.empty(len(labels), WIDTH).uniform_(-bound, bound))
        labels = labels.cpu()
        count = labels.bincount()
        if int(count.max()) == len(labels):
            raise DataError("loss.crd: expected training images of two classes at least")
        # The images of a class lie one after the other in `by_class`; made of the labels, no state.
        for name, value in (
            ("by_class", labels.argsort(stable=True)),
            ("first", count.cumsum(0) - count),
            ("count", count),
        ):
            self.register_buffer(name, value, persistent=False)

    @property
    def banks(self) -> tuple[Tensor, Tensor]:
        """The student's and the supervisor's, [N, d] each."""
        return self.student_bank, self.supervisor_bank  # type: ignore[return-value]

    def forward(
        self, student: Tensor, supervisor: Tensor, target: Tensor, samples: Samples
    ) -> tuple[Tensor, BankRows]:
        """L_CRD, 0-d, and the rows that the banks are to hold of these images; nothing is written.

        Args:
            student: Features [B, C].
            supervisor: Features [B, D].
            target: int64 [B].
            samples: Which images these are.
        """
        features = (upcast(student), upcast(supervisor))
        ours, theirs = (
            F.normalize(embed(x), dim=1) for embed, x in zip(self.embeddings, features, strict=True)
        )
        same = samples.indices[:, None]
        chosen = torch.cat([same, self.draw(target, samples)], dim=1)  # [B, 1 + K]
        student_bank, supervisor_bank = self.banks
        loss = self.contrast(ours, supervisor_bank, chosen)
        loss = loss + self.contrast(theirs, student_bank, chosen)
        rows = [
            F.normalize(MOMENTUM * bank[samples.indices] + (1 - MOMENTUM) * v.detach(), dim=1)
            for bank, v in ((student_bank, ours), (supervisor_bank, theirs))
        ]
        return loss, BankRows(samples.indices, *rows)

    def contrast(self, v: Tensor, bank: Tensor, chosen: Tensor) -> Tensor:
        """L of the embeddings v [B, d]; of `chosen`, int64 [B, 1 + K], the first is the same."""
        bias = math.log(self.num_negatives) + 1 / (2 * WIDTH * TEMPERATURE**2)
        scores = (v @ bank.T).gather(1, chosen) / TEMPERATURE - bias
        return (F.softplus(-scores[:, 0]) + F.softplus(scores[:, 1:]).sum(dim=1)).mean()

    def draw(self, target: Tensor, samples: Samples) -> Tensor:
        """Images of other classes than `target` (int64 [B]), all equally likely: int64 [B, K]."""
        total, places = len(self.by_class), torch.arange(self.num_negatives, device=target.device)
        counter = (samples.step * total + samples.indices) * self.num_negatives
        bits = hash_bits(self.seed, 0, counter[:, None] + places, Stream.NEGATIVE)
        first, count = self.first[target][:, None], self.count[target][:, None]
        rank = integers(bits, total - count)
        return self.by_class[torch.where(rank < first, rank, rank + count)]

    @torch.no_grad()
    def remember(self, rows: BankRows, passes: Tensor) -> None:
        """Write rows into the banks, if the step passes (0-d bool).

        An image that is in the batch twice, as one that stands in for another in quarantine may be,
        takes its last rows: every write of one place writes the same.
        """
        indices = rows.indices
        places = torch.arange(len(indices), device=indices.device)
        last = torch.where(indices[:, None] == indices, places, -1).amax(dim=1)
        for bank, new in zip(self.banks, (rows.student, rows.supervisor), strict=True):
            bank.index_copy_(0, indices, torch.where(passes, new[last], bank[indices]))
