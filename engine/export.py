"""The student on its own: safetensors for PyTorch, ONNX for everything else.

Nothing of the distillation travels along: the exported network is the plain architecture, with
exactly its parameters and its multiply-adds. Both files carry what a user needs to feed it (mean,
std and size of the images, class names) and where it comes from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint import load_checkpoint
from .errors import DataError, NumericError, UsageError
from .files import read_tensors, write_atomically
from .identity import STUDENT_FILE, WEIGHTS_FILE, network_of_record
from .models import create_model
from .records import RunRecord, read_run

if TYPE_CHECKING:
    import onnx

FORMATS = ("safetensors", "onnx")
ONNX_TOLERANCE = 1e-4  # of the largest logit; convolutions sum in another order there


@dataclass(frozen=True)
class Source:
    """A trained student and what is known about it."""

    record: RunRecord
    tensors: dict[str, Tensor]
    """The student's state dict."""
    top1: float | None
    """Test accuracy in percent at this point of the run."""
    default_out: Path
    epochs: float | None = None
    """Passes over the training images that it has had."""

    @property
    def data(self) -> dict[str, Any]:
        return self.record.run["data"]

    @property
    def metadata(self) -> dict[str, str]:
        """What both files say about the network; numbers and lists as JSON."""
        data = self.data
        facts = {
            "model": self.record.run["config"]["student"],
            "method": self.record.method,
            "recipe": self.record.recipe,
            "dataset": data.get("name"),
            "num_classes": data["num_classes"],
            "image_size": data["image_size"],
            "mean": data["mean"],
            "std": data["std"],
            "class_names": data.get("class_names"),
            "top1": self.top1,
        }
        text = {
            k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items() if v is not None
        }
        known = network_of_record(self.record.run, self.record.status)
        known = dataclasses.replace(known, epochs=self.epochs, state=None, top1=self.top1)
        return {"format": "pt", **known.metadata(), **text}

    def model(self) -> nn.Module:
        """The plain architecture with the trained weights, in eval mode."""
        name = self.record.run["config"]["student"]
        model = create_model(name, num_classes=self.data["num_classes"])
        try:
            model.load_state_dict(self.tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self.record.folder}: weights do not fit {name}: {reason}") from None
        return model.eval()


def export_student(
    checkpoint_or_run: Path,
    out: Path | None = None,
    *,
    formats: Sequence[str] = FORMATS,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Writes `student.safetensors` and `student.onnx`.

    The ONNX network reads `images`, float32 [N, 3, H, W] with any N, normalised with the mean and
    std that its metadata name, and returns `logits` [N, C]. It is compared with PyTorch before it
    is put in place, if onnxruntime is installed.

    Args:
        checkpoint_or_run: a finished run folder, or one of its `checkpoints/step-N`.
        out: target folder; absent: `export/` in the run folder, `export/step-N/` for a checkpoint.
        formats: any of "safetensors" and "onnx".
        overwrite: replace files of an earlier export.
        say: gets one line for each thing done.

    Returns:
        The files written.

    Raises:
        UsageError: unknown format; a target exists; the ONNX packages are missing (after the other
            formats are written).
        DataError: no student there, or one that does not fit its architecture.
        NumericError: onnxruntime and PyTorch disagree; the ONNX file is not written.
        StorageError: the disk refused.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise UsageError(f"export format {unknown[0]!r}: expected one of {', '.join(FORMATS)}")
    source = read_source(checkpoint_or_run)
    model = source.model()
    targets = {name: (out or source.default_out) / f"student.{name}" for name in formats}
    for target in targets.values():
        if target.exists() and not overwrite:
            raise UsageError(f"{target} exists: expected a new place (--out) or --overwrite")
    written = []
    for name in sorted(targets, key=FORMATS.index):
        write = write_safetensors if name == "safetensors" else write_onnx
        say(write(source, model, targets[name]))
        written.append(targets[name])
    return written


def read_source(folder: Path) -> Source:
    """Reads the student of a run folder, or of a checkpoint folder inside one.

    Raises:
        DataError: it holds no student, or a run record too old to say what the images are.
    """
    checkpoint = folder / "state.safetensors"
    if checkpoint.is_file():
        record = read_run(folder.resolve().parents[1])
        state = load_checkpoint(folder).tensors  # verified: a flipped bit would not show
        prefix = "student."
        tensors = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        row = _row_of_step(record, folder.resolve().name)
        top1, epochs = row.get("test/student_top1"), row.get("epoch")
        default_out = record.folder / "export" / folder.resolve().name
    elif finished := _finished_network(folder):
        record = read_run(folder)
        tensors = read_tensors(finished)
        top1, epochs = record.last("student_top1"), record.status.get("epoch")
        default_out = folder / "export"
    else:
        raise DataError(
            f"{folder}: no trained network: expected a finished run (student.safetensors) "
            "or a checkpoint (state.safetensors)"
        )
    if not tensors:
        raise DataError(
            f"{checkpoint}: holds no student: expected names that begin with 'student.'"
        )
    missing = {"num_classes", "image_size", "mean", "std"} - set(record.run.get("data") or {})
    if missing or not isinstance(record.run["config"].get("student"), str):
        what = ", ".join(f"data.{key}" for key in sorted(missing)) or "config.student"
        raise DataError(
            f"{record.folder / 'run.json'}: lacks {what}: expected a run of this version"
        )
    return Source(record, tensors, top1, default_out, epochs)


def write_safetensors(source: Source, model: nn.Module, target: Path) -> str:
    """Writes the state dict under its plain names; returns a line that says so."""
    from safetensors.torch import save_file

    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    write_atomically(target, lambda path: save_file(tensors, path, metadata=source.metadata))
    count = sum(p.numel() for p in model.parameters())
    return f"{target}: {count:,} parameters, {len(tensors)} tensors"


def write_onnx(source: Source, model: nn.Module, target: Path) -> str:
    """Writes the ONNX network with a free batch size; returns a line on how it was checked."""
    graph = _to_onnx(model, source.data["image_size"])
    for key, value in source.metadata.items():
        if key != "format":  # a safetensors convention
            graph.metadata_props.add(key=key, value=value)
    serialised = graph.SerializeToString()
    difference = _difference_from_torch(serialised, model, source.data["image_size"])
    if difference is not None and not difference <= ONNX_TOLERANCE:  # NaN too
        raise NumericError(
            f"{target}: onnxruntime differs from PyTorch by {difference:.1e} of the largest logit: "
            f"expected at most {ONNX_TOLERANCE:g}; not written"
        )
    write_atomically(target, lambda path: path.write_bytes(serialised))
    if difference is None:
        return f"{target}: not compared with PyTorch (pip install onnxruntime)"
    return f"{target}: onnxruntime agrees with PyTorch within {difference:.1e} of the largest logit"


def _to_onnx(model: nn.Module, image_size: Sequence[int]) -> onnx.ModelProto:
    try:
        import onnx  # noqa: F401  (both are needed by torch.onnx.export, which fails less clearly)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"ONNX export needs the package {error.name!r}: pip install onnx onnxscript onnxruntime"
        ) from None
    images = torch.zeros(2, 3, *image_size)  # 2: torch.export takes a size of 1 for a constant
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None  # None only for the deprecated TorchScript path
    return program.model_proto


def _difference_from_torch(
    serialised: bytes, model: nn.Module, image_size: Sequence[int]
) -> float | None:
    """Largest difference over the largest logit, over several batch sizes; None: no onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(serialised, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros(())
    for batch in (1, 3):
        images = torch.randn(batch, 3, *image_size, generator=generator)
        with torch.no_grad():
            expected = model(images)
        (got,) = session.run(["logits"], {"images": images.numpy()})
        error = (torch.from_numpy(got) - expected).abs().max() / expected.abs().max()
        worst = torch.maximum(worst, error)  # keeps a NaN
    return worst.item()


def _finished_network(folder: Path) -> Path | None:
    """What a finished run has left: a student, or the teacher of train-teacher."""
    files = (folder / STUDENT_FILE, folder / WEIGHTS_FILE)
    return next((file for file in files if file.is_file()), None)


def _row_of_step(record: RunRecord, step_folder: str) -> dict[str, float]:
    """What was measured at the step of a checkpoint named `step-N`; empty: nothing was."""
    step = step_folder.rpartition("-")[2]
    rows = (row for row in record.metrics if step.isdigit() and row.get("step") == int(step))
    return next((row for row in rows if "test/student_top1" in row), {})
