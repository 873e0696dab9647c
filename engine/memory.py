"""Memory that a forward pass keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def kept_bytes(forward: Callable[[], object], constants: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that the graph of a forward pass keeps alive for its backward.

    Args:
        forward: Makes the graph.
        constants: Parameters and buffers, which live without it: not counted.
    """
    known = {t.untyped_storage().data_ptr() for t in constants}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(size for address, size in kept.items() if address not in known)
