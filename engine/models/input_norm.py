"""Mean and standard deviation that a network's images are normalised by: each network has its own.

A network that was trained elsewhere reads images normalised as they were there. Whoever knows says
so: the user (`--teacher.mean`, `--teacher.std`), the header of a file of ours, the run.json beside
it, torchvision of its weights, timm of those that it has trained. Where nobody does: the data's.

Images are normalised for the student. A teacher of other statistics puts them right itself:

    x_T = scale x_S + shift,    scale = std_S / std_T,    shift = (mean_S - mean_T) / std_T

which holds for the black border of a crop as well, as that is normalised with the image. (Folding
it into the first convolution would not do: the zeros that pad are no black pixels.) Rounding in
fp32 is that of one more multiplication; images of 16 bits are rounded once more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import read_json, read_metadata
from .external import timm_statistics, torchvision_statistics

Channels = tuple[float, float, float]

_ROUNDING = 1e-4  # published statistics have four decimals; this is a tenth of a grey level
# What a run of ours names the network that it has trained, beside its run.json.
_OWN_FILES = ("student.safetensors", "teacher.safetensors")


@dataclass(frozen=True)
class InputNorm:
    """Statistics that images are normalised by."""

    mean: Channels
    """Mean of each channel, pixels in 0..1."""
    std: Channels
    """Standard deviation of each channel, pixels in 0..1."""
    source: str = "the data"
    """Who says so, for people."""

    def equals(self, other: InputNorm) -> bool:
        """Whether the figures are those of `other`, within their own rounding."""
        pairs = zip((*self.mean, *self.std), (*other.mean, *other.std), strict=True)
        return all(abs(a - b) < _ROUNDING for a, b in pairs)

    def to_json(self) -> dict[str, Any]:
        """For a record or a checkpoint."""
        return {"mean": list(self.mean), "std": list(self.std), "stated_by": self.source}

    @classmethod
    def from_json(cls, values: Any) -> InputNorm | None:
        """Inverse of `to_json`; None where it holds no statistics."""
        if not isinstance(values, dict):
            return None
        mean, std = (_channels(values.get(name)) for name in ("mean", "std"))
        if mean is None or std is None or min(std) <= 0:
            return None
        source = values.get("stated_by")
        return cls(mean, std, source if isinstance(source, str) else cls.source)

    def __str__(self) -> str:
        mean, std = (" ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        return f"mean {mean} and std {std}"


class Renormalise(nn.Module):
    """Images that are normalised by one network's statistics, by those of another.

    Args:
        given: By which they come.
        wanted: By which they leave.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, given: InputNorm, wanted: InputNorm) -> None:
        super().__init__()
        scale = [g / w for g, w in zip(given.std, wanted.std, strict=True)]
        shift = [
            (g - w) / std for g, w, std in zip(given.mean, wanted.mean, wanted.std, strict=True)
        ]
        for name, values in (("scale", scale), ("shift", shift)):
            value = torch.tensor(values, dtype=torch.float64).float()[:, None, None]
            self.register_buffer(name, value, persistent=False)  # no weights of the network

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> same, of the same dtype
        # Not in 16 bits: rounded constants would be off for every pixel alike.
        return torch.addcmul(self.shift, images, self.scale).to(images.dtype)


@dataclass(frozen=True)
class InputNorms:
    """Those of a run's networks."""

    data: InputNorm
    student: InputNorm
    teacher: InputNorm | None = None
    """None: there is no teacher."""

    @classmethod
    def of(
        cls,
        data: InputNorm,
        student: InputNorm | None,
        teacher: InputNorm | None,
        has_teacher: bool,
    ) -> InputNorms:
        """The stated statistics of each network, or else the data's own."""
        own = [data if n is None or n.equals(data) else n for n in (student, teacher)]
        return cls(data, own[0], own[1] if has_teacher else None)

    @property
    def by_network(self) -> dict[str, InputNorm]:
        """Those of the networks that there are."""
        found = {"student": self.student, "teacher": self.teacher}
        return {name: norm for name, norm in found.items() if norm is not None}

    @property
    def figures(self) -> dict[str, tuple[Channels, Channels]]:
        """Mean and std by the network."""
        return {name: (norm.mean, norm.std) for name, norm in self.by_network.items()}

    def entry(self) -> Renormalise | None:
        """The module that the teacher's images pass first; None: they are right as they come."""
        if self.teacher is None or self.teacher.equals(self.student):
            return None
        return Renormalise(self.student, self.teacher)

    def to_json(self) -> dict[str, Any]:
        """By the network."""
        return {name: norm.to_json() for name, norm in self.by_network.items()}

    @classmethod
    def from_json(cls, data: InputNorm, values: dict[str, Any]) -> InputNorms:
        """Inverse of `to_json`; a network that is not known takes the data's."""
        found = {name: InputNorm.from_json(value) or data for name, value in values.items()}
        return cls(data, found.get("student", data), found.get("teacher"))

    def __str__(self) -> str:
        """One line: the data's, and what is a network's own."""
        own = {name: norm for name, norm in self.by_network.items() if not norm.equals(self.data)}
        said = f"images are normalised by the data's {self.data}"
        if len(own) == len(self.by_network):
            said = f"the data has {self.data}"
        parts = [f"the {name}'s images by its own {n} ({n.source})" for name, n in own.items()]
        return "; ".join([said, *parts])


def given_norm(mean: Sequence[float] | None, std: Sequence[float] | None) -> InputNorm | None:
    """The statistics that options give; None: they give none."""
    if mean is None or std is None:
        return None
    return InputNorm(tuple(mean), tuple(std), "--teacher.mean and --teacher.std")  # type: ignore[arg-type]


def stated_norm(name: str, weights: str | None, num_classes: int) -> InputNorm | None:
    """The statistics that a network's weights were trained with, as far as they are stated.

    Args:
        name: Of the model, as of `create_model`.
        weights: As of `create_model`; they have been loaded.
        num_classes: Of the network.

    Returns:
        None where nobody says: of random weights, and of most files.

    Raises:
        DataError: There is a run.json beside the file that cannot be read.
    """
    if weights is None:
        return None
    if Path(weights).is_file():
        found = _of_file(Path(weights))
        if found is not None:
            return found
    family, _, architecture = name.rpartition(":")
    statistics = {"torchvision": torchvision_statistics, "timm": timm_statistics}.get(family)
    known = statistics(architecture, weights, num_classes) if statistics else None
    return None if known is None or len(known[0]) != 3 else InputNorm(*known)  # type: ignore[arg-type]


def trained_norm(run: dict[str, Any]) -> InputNorm | None:
    """Mean and std by which a run has normalised the images of the network that it trains.

    `run`: a run.json; one that is older than this names the data's, and did so.
    """
    for part in ("student", "data"):
        found = InputNorm.from_json(run.get(part))
        if found is not None:
            return found
    return None


def _of_file(path: Path) -> InputNorm | None:
    """The statistics in a file's header, or in the record of the run that has left it there."""
    found = _of_header(path)
    beside = path.parent / "run.json"
    if found is None and path.name in _OWN_FILES and beside.is_file():
        run = read_json(beside, "a run.json")
        if isinstance(run, dict) and str(run.get("format")).startswith("dfptkd.run/"):
            found = trained_norm(run)
    return None if found is None else InputNorm(found.mean, found.std, f"{path}")


def _of_header(path: Path) -> InputNorm | None:
    if path.suffix != ".safetensors":
        return None
    header = read_metadata(path)
    try:
        return InputNorm.from_json({k: json.loads(header[k]) for k in ("mean", "std")})
    except (KeyError, ValueError, RecursionError):
        return None


def _channels(values: Any) -> Channels | None:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        return None
    if not all(type(v) in (int, float) and math.isfinite(v) and v <= 1 for v in values):
        return None
    return tuple(float(v) for v in values)  # type: ignore[return-value]
