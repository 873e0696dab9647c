"""Relational knowledge distillation (Park et al., CVPR 2019, arXiv 1904.05068), a term of others.

What is taught is not a feature but how the features of a batch lie to each other:

    distance   psi_D(i, j)    = |f_i - f_j| / mu                  mu: mean of |f_i - f_j| > 0
    angle      psi_A(i, j, k) = <e_ij, e_kj>,  e_ij = (f_i - f_j) / |f_i - f_j|

    L_D = mean over i, j of huber(psi_D of the student - psi_D of the supervisor),  L_A alike

Both means are over all pairs and triples, those of a member with itself, which add 0, among them:
the weights of mdistiller, 25 and 50, are meant for such means. Memory: B^3 angles, B^2 C
differences. Features of images that are equal give neither a direction nor a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dual_path_loss import upcast


def relational_terms(student: Tensor, supervisor: Tensor) -> tuple[Tensor, Tensor]:
    """L_D and L_A, 0-d each; a gradient flows into `student` alone.

    Args:
        student: Features [B, C].
        supervisor: Features [B, D], of the same images.
    """
    with torch.no_grad():
        theirs = _relations(upcast(supervisor))
    ours = _relations(upcast(student))
    distance, angle = (F.smooth_l1_loss(a, b) for a, b in zip(ours, theirs, strict=True))
    return distance, angle


def _relations(features: Tensor) -> tuple[Tensor, Tensor]:
    """psi_D [B, B] and psi_A [B, B, B], the vertex of an angle first."""
    # Differences and no matrix product of features: close ones would lose their digits in it.
    to_BBC = features[None] - features[:, None]  # [j, i]: f_i - f_j
    distance = torch.linalg.vector_norm(to_BBC, dim=2)
    apart = distance > 0
    mean = distance.sum() / apart.sum().clamp(min=1)
    safe = torch.where(apart, distance, 1.0)
    # Where nothing lies between two features 0 / 1 stands for the direction, gradient included.
    e_BBC = to_BBC * (apart / safe)[:, :, None]
    return distance / torch.where(mean > 0, mean, 1.0), e_BBC @ e_BBC.transpose(1, 2)
