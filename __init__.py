"""Dual-forward-path teacher knowledge distillation: `dfptkd.engine.run`, `dfptkd.kernels`."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it. Loaded at first use, so `import dfptkd` stays instant.
_HOMES = {"RunConfig": ".engine", "run": ".engine", "evaluate": ".engine"}
_SUBPACKAGES = ("bench", "engine", "kernels", "recipes")

__all__ = ["RunConfig", "__version__", "bench", "engine", "evaluate", "kernels", "recipes", "run"]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
