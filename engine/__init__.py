"""Models, methods, data and the training loop; `run` and `evaluate` are the way in."""

from typing import Any

_HOME = {
    "RunConfig": "config",
    "RunResult": "train",
    "run": "train",
    "evaluate": "metrics",
    "measured_kernels": "kernel_choice",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
