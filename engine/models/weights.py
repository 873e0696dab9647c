"""Weights from files: read without executing anything, loaded strictly, refused in one line."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..files import first_line, read_tensors

SHOWN_KEYS = 3
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")
PACKAGE = "package:"
"""Before the name of an installed package that holds one weights file."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict that a weights file holds, on the CPU.

    Reads `.safetensors`, or what `torch.save` wrote: a bare state dict, or one under the key
    "model" (mdistiller, RepDistiller) or "state_dict" (timm). The prefix "module." that
    data-parallel training leaves is dropped. "package:NAME" is the one weights file in the folder
    of an installed package, whose code is not run.

    Raises:
        DataError: The file is missing, damaged, holds code, or holds no state dict.
    """
    if str(path).startswith(PACKAGE):
        path = _file_of_package(str(path))
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such weights file, expected .safetensors, .pth, .pt or .tar")
    if path.suffix == ".safetensors":
        state = read_tensors(path)
    else:
        state = _find_state_dict(_read_torch(path), path)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def read_header(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; empty of any other file."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # as `read_tensors`, which says so
        return {}


def load_strict(model: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """Copies weights into a model, or refuses them before touching it.

    BatchNorm's `num_batches_tracked` alone may be missing: files from before PyTorch 0.4.1 lack it,
    and inference does not read it.

    Args:
        model: Receives the weights.
        state_dict: Every parameter and buffer of the model, and nothing else.
        source: Where the weights come from, for the message.

    Raises:
        DataError: A key is missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    missing = [
        key
        for key in expected
        if key not in state_dict and not key.endswith(".num_batches_tracked")
    ]
    unexpected = [key for key in state_dict if key not in expected]
    misshapen = [
        key
        for key in expected
        if key in state_dict and state_dict[key].shape != expected[key].shape
    ]
    if not (missing or unexpected or misshapen):
        # A plain dict carries no version: PyTorch then fills in a missing num_batches_tracked.
        model.load_state_dict(dict(state_dict))
        return

    classes = _class_counts(model, state_dict, misshapen)
    if classes and not (missing or unexpected):
        raise DataError(f"{source}: has {classes[0]} classes, expected {classes[1]}")
    shapes = [
        f"{key} {list(state_dict[key].shape)} (expected {list(expected[key].shape)})"
        for key in misshapen
    ]
    groups = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes}
    difference = "; ".join(f"{name} {_first(keys)}" for name, keys in groups.items() if keys)
    raise DataError(f"{source}: does not fit {type(model).__name__}: {difference}")


def _file_of_package(weights: str) -> Path:
    name = weights.removeprefix(PACKAGE)
    # Of a dotted name the parent would be imported; of this one nothing is.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = [Path(f) for f in (spec.submodule_search_locations or ())] if spec else []
    if not folders:
        raise DataError(
            f"{weights}: expected the name of an installed package, as Python imports it"
        )
    found = [p for f in folders for p in sorted(f.rglob("*")) if p.suffix in FILE_SUFFIXES]
    if len(found) != 1:
        names = _first([p.name for p in found]) or "none"
        raise DataError(f"{weights}: expected one weights file in {folders[0]}, found {names}")
    return found[0]


def _read_torch(path: Path) -> Any:
    try:
        # Training scripts store their options; a Namespace only holds attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        if "Weights only load failed" in str(error):
            reason = "holds more than tensors and plain values, or is damaged; nothing was executed"
        else:
            reason = f"damaged or not a weights file ({first_line(error)})"
        raise DataError(f"{path}: {reason}; expected a PyTorch state dict") from error


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    candidates = [content]
    if isinstance(content, dict):
        candidates += [content.get("model"), content.get("state_dict")]
    for candidate in candidates:
        if (
            isinstance(candidate, dict)
            and candidate
            and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in candidate.items())
        ):
            return dict(candidate)
    found = f"keys {_first(list(content))}" if isinstance(content, dict) else type(content).__name__
    raise DataError(
        f"{path}: holds no state dict ({found}), expected name -> tensor, bare or under "
        "'model' or 'state_dict'"
    )


def _class_counts(
    model: nn.Module, state_dict: dict[str, Tensor], misshapen: list[str]
) -> tuple[int, int] | None:
    """(classes in the file, of the model) where the rows of one linear layer are the difference."""
    owners = {key.rpartition(".")[0] for key in misshapen}
    if len(owners) != 1:
        return None
    owner = owners.pop()
    linear, weight = model.get_submodule(owner), state_dict.get(f"{owner}.weight")
    if not isinstance(linear, nn.Linear) or weight is None:
        return None
    same_columns = weight.shape[1:] == linear.weight.shape[1:]
    return (weight.shape[0], linear.out_features) if same_columns else None


def _first(keys: list[str]) -> str:
    rest = len(keys) - SHOWN_KEYS
    return ", ".join(map(str, keys[:SHOWN_KEYS])) + (f" and {rest} more" if rest > 0 else "")
