"""The interpreter, checked to be on, with sums as exact as a GPU's."""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("interpreted_*.py: run with TRITON_INTERPRET=1, one file a process")

from triton.runtime import interpreter

torch.set_num_threads(1)


def _pairwise_sum(self, values):
    """NumPy adds one by one along an axis that is not the innermost, a GPU in a tree."""
    innermost = np.ascontiguousarray(np.moveaxis(values.handle.data, self.axis, -1))
    total = np.expand_dims(innermost.sum(-1), self.axis) if self.keep_dims else innermost.sum(-1)
    return self.to_tensor(total, values.dtype)


interpreter.ReduceOps.sum = _pairwise_sum
