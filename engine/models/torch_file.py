"""Files of `torch.save`, read without executing anything in them."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from ..files import first_line


class _Inert:
    """Takes the place of an object that lies beside the weights: it takes anything, keeps nothing.

    Nothing is imported for it and no code of its class runs.
    """

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# All that a file may name beside tensors and plain values. Training scripts put their options,
# accuracies as numpy scalars, states of random generators and paths beside the weights.
_READ_PAST = (
    "argparse.Namespace",
    "numpy.dtype", "numpy.ndarray",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct",  # numpy 2
    "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",  # numpy 1
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",  # Python 3.13
)  # fmt: skip
_READ_AS_DICT = (  # Lightning's hyper-parameters
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
_ALLOWED = [(_Inert, name) for name in _READ_PAST] + [(OrderedDict, n) for n in _READ_AS_DICT]

# How torch says which name of a pickle it does not know, or will not call.
_STUMBLES = (
    r"GLOBAL (\S+) was not an allowed",
    r"unsupported GLOBAL (\S+) whose module",
    r"unrecognized function (.+?)(?: which belongs|$)",
    r"got <class '([^']+)'>",
)


def read_torch_file(path: Path) -> Any:
    """The content of a `.pth`, tensors on the CPU; see `_READ_PAST` for what else it may hold.

    Raises:
        DataError: The file is damaged, or names anything that is not on the list: it says what.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.simplefilter("ignore")  # of pickle protocols; what fails is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path}: {_reason(error)}; expected a PyTorch state dict") from error


def _reason(error: Exception) -> str:
    text = str(error)
    if "TorchScript" in text:
        return "is a TorchScript archive, which is code; nothing was executed"
    if "Weights only load failed" not in text:
        return f"damaged or not a weights file ({first_line(error)})"
    for pattern in _STUMBLES:
        found = re.search(pattern, text, re.MULTILINE)
        if found:
            name = " ".join(found[1].split())[:120]
            return f"holds {name}, which is no tensor and no plain value; nothing was executed"
    what = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    said = f" ({what[1].strip()[:120]})" if what else ""
    return f"damaged, or pickled otherwise than by torch.save{said}; nothing was executed"
