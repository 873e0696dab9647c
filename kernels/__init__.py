"""Functions on tensors, one file an operation, a reference and up to two fast backends each."""

# Eager, because a function shares its file's name: the last binding must be the function.
from .backend import use_backend, which_backend
from .batch_norm import affine_relu, batch_norm_affine
from .distillation_loss import DistillationLoss, distillation_loss
from .dual_path_loss import DualPathLoss, DualPathWeights, dual_path_loss
from .frozen_conv import frozen_conv2d
from .frozen_relu import frozen_relu
from .normalize_images import normalize_images
from .partial_pointwise_conv import partial_pointwise_conv

__all__ = [
    "DistillationLoss",
    "DualPathLoss",
    "DualPathWeights",
    "affine_relu",
    "batch_norm_affine",
    "distillation_loss",
    "dual_path_loss",
    "frozen_conv2d",
    "frozen_relu",
    "normalize_images",
    "partial_pointwise_conv",
    "use_backend",
    "which_backend",
]
