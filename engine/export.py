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

from .checkpoint import load_checkpoint, read_index
from .errors import DataError, NumericError, UsageError
from .files import read_tensors, save_file, write_atomically
from .identity import STUDENT_FILE, WEIGHTS_FILE, network_of_record
from .models import create_model
from .models.input_norm import InputNorm, trained_norm
from .models.weights import EMA_METADATA, ema_beside, load_strict
from .records import RunRecord, read_run

if TYPE_CHECKING:
    import onnx

FORMATS = ("safetensors", "onnx")
ONNX_TOLERANCE = 1e-4  # of the largest logit; convolutions sum in another order there
FINISHED = (STUDENT_FILE, WEIGHTS_FILE)
"""The weights file of a finished run: a student, or the teacher of train-teacher."""
AVERAGES = tuple(ema_beside(Path(name)).name for name in FINISHED)
STATE = "state.safetensors"


@dataclass(frozen=True)
class Source:
    """A trained student, or the average of its weights, and what is known about it."""

    record: RunRecord
    file: Path
    """Where the tensors come from."""
    tensors: dict[str, Tensor]
    """The network's state dict."""
    top1: float | None
    """Test accuracy in percent at this point of the run."""
    default_out: Path
    is_ema: bool
    epochs: float | None = None
    """Passes over the training images that it has had."""

    @property
    def has_ema(self) -> bool:
        """Whether the run has kept an average of the student's weights."""
        return (self.record.run["config"].get("optim") or {}).get("ema_decay") is not None

    @property
    def stem(self) -> str:
        """The exported files' name without its ending."""
        return "student_ema" if self.is_ema else "student"

    @property
    def data(self) -> dict[str, Any]:
        return self.record.run["data"]

    @property
    def norm(self) -> InputNorm:
        """Mean and std of its images."""
        found = trained_norm(self.record.run)
        assert found is not None  # `read_source` has looked
        return found

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
            "mean": list(self.norm.mean),
            "std": list(self.norm.std),
            "class_names": data.get("class_names"),
            "top1": self.top1,
        }
        text = {
            k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items() if v is not None
        }
        known = network_of_record(self.record.run, self.record.status)
        known = dataclasses.replace(known, epochs=self.epochs, state=None, top1=self.top1)
        average = EMA_METADATA if self.is_ema else {}
        return {"format": "pt", **known.metadata(), **text, **average}

    def model(self) -> nn.Module:
        """The plain architecture with the trained weights, in eval mode."""
        name = self.record.run["config"]["student"]
        model = create_model(name, num_classes=self.data["num_classes"])
        load_strict(model, self.tensors, f"{self.file} ({name})")
        return model.eval()


def export_student(
    checkpoint_or_run: Path,
    out: Path | None = None,
    *,
    formats: Sequence[str] = FORMATS,
    ema: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Writes `student.safetensors` and `student.onnx`, of an average `student_ema.` instead.

    The ONNX network reads `images`, float32 [N, 3, H, W] with any N, normalised with the mean and
    std that its metadata name, and returns `logits` [N, C]. It is compared with PyTorch before it
    is put in place, if onnxruntime is installed.

    Args:
        checkpoint_or_run: a finished run folder, one of its `checkpoints/step-N`, or the weights
            file in either.
        out: target folder; absent: `export/` in the run folder, `export/step-N/` for a checkpoint.
        formats: any of "safetensors" and "onnx".
        ema: the average that a run with optim.ema_decay has kept, in place of the raw weights.
        overwrite: replace files of an earlier export.
        say: gets one line for each thing done.

    Returns:
        The files written.

    Raises:
        UsageError: unknown format; a target exists; the ONNX packages are missing (after the other
            formats are written).
        DataError: no student there, or no average, or one that does not fit its architecture.
        NumericError: onnxruntime and PyTorch disagree; the ONNX file is not written.
        StorageError: the disk refused.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise UsageError(f"export format {unknown[0]!r}: expected one of {', '.join(FORMATS)}")
    source = read_source(checkpoint_or_run, ema=ema)
    model = source.model()
    out = out or source.default_out
    targets = {name: out / f"{source.stem}.{name}" for name in formats}
    for target in targets.values():
        if target.exists() and not overwrite:
            raise UsageError(f"{target} exists: expected a new place (--out) or --overwrite")
    written = []
    for name in sorted(targets, key=FORMATS.index):
        write = write_safetensors if name == "safetensors" else write_onnx
        say(write(source, model, targets[name]))
        written.append(targets[name])
    if source.has_ema and not source.is_ema:
        say(f"{source.record.folder}: these are the raw weights; --ema takes their EMA")
    return written


def read_source(path: Path, *, ema: bool = False) -> Source:
    """Reads the student of a run folder, or of a checkpoint folder inside one.

    Args:
        path: the folder, or the weights file in it.
        ema: the average of the student's weights in place of the student.

    Raises:
        DataError: it holds no student, or no average, or a run record too old to say what the
            images are.
    """
    folder, ema = _folder_of(path, ema)
    finished = next((folder / name for name in FINISHED if (folder / name).is_file()), None)
    if (folder / STATE).is_file():
        record = read_run(folder.resolve().parents[1])
        file, tensors = _network_in_state(folder, ema)
        row = _row_of_step(record, folder.resolve().name)
        top1, epochs = row.get("test/ema_top1" if ema else "test/student_top1"), row.get("epoch")
        default_out = record.folder / "export" / folder.resolve().name
    elif finished is not None:
        record = read_run(folder)
        file = ema_beside(finished) if ema else finished
        if file.is_file():
            tensors = read_tensors(file)
        else:  # a run from before averages had a file; its last checkpoint has the same
            file, tensors = _network_in_state(_last_checkpoint(folder), ema)
        top1 = record.last("ema_top1" if ema else "student_top1")
        epochs = record.status.get("epoch")
        default_out = folder / "export"
    else:
        raise DataError(
            f"{folder}: no trained network: expected a finished run (student.safetensors) "
            "or a checkpoint (state.safetensors)"
        )
    missing = {"num_classes", "image_size", "mean", "std"} - set(record.run.get("data") or {})
    if not missing and trained_norm(record.run) is None:
        missing = {"mean and data.std of three channels"}
    if missing or not isinstance(record.run["config"].get("student"), str):
        what = ", ".join(f"data.{key}" for key in sorted(missing)) or "config.student"
        raise DataError(
            f"{record.folder / 'run.json'}: lacks {what}: expected a run of this version"
        )
    return Source(record, file, tensors, top1, default_out, ema, epochs)


def is_of_run(path: Path) -> bool:
    """Whether a file is one that a run leaves, in its folder or in a checkpoint of it."""
    if path.name == STATE:
        return True
    return path.name in (*FINISHED, *AVERAGES) and (path.parent / "run.json").is_file()


def _folder_of(path: Path, ema: bool) -> tuple[Path, bool]:
    """The folder of a run or a checkpoint where one of its files is named, and whether its average
    is meant.

    Raises:
        DataError: it is not there, or another file, which alone does not say what its images are.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not path.is_file():
        return path, ema
    if is_of_run(path):
        return path.parent, ema or path.name in AVERAGES
    raise DataError(
        f"{path}: expected a run's folder, or checkpoints/step-N in one, as run.json says what the "
        "network's images are"
    )


def _network_in_state(checkpoint: Path, ema: bool) -> tuple[Path, dict[str, Tensor]]:
    """The file of a checkpoint that holds the student, and the student or its average."""
    prefix = "ema.module." if ema else "student."
    state = load_checkpoint(checkpoint).tensors  # verified: a flipped bit would not show
    tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not tensors:
        what = "EMA of the weights" if ema else "student"
        hint = "a run with --optim.ema-decay: " if ema else ""
        raise DataError(
            f"{checkpoint / STATE}: holds no {what}: expected {hint}names that begin with "
            f"'{prefix}'"
        )
    return checkpoint / STATE, tensors


def _last_checkpoint(run: Path) -> Path:
    folder = run / "checkpoints"
    last = read_index(folder).get("last")
    if last is None:
        raise DataError(f"{run}: no EMA of the weights: expected a run with --optim.ema-decay")
    return folder / last


def write_safetensors(source: Source, model: nn.Module, target: Path) -> str:
    """Writes the state dict under its plain names; returns a line that says so."""
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    write_atomically(target, lambda path: save_file(tensors, path, source.metadata))
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
    found = program.model_proto
    # Each part says where in our source it was traced, with this machine's paths: an equal student
    # would give another file elsewhere.
    graph = found.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (found, graph, *graph.node, *values):
        part.ClearField("metadata_props")
    return found


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


def _row_of_step(record: RunRecord, step_folder: str) -> dict[str, float]:
    """The row of metrics.csv at the step of a checkpoint named `step-N`; empty: there is none."""
    step = step_folder.rpartition("-")[2]
    rows = (row for row in record.metrics if step.isdigit() and row.get("step") == int(step))
    return next((row for row in rows if "test/student_top1" in row), {})
