"""The exported student: the plain network, complete, and the same function in every format."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from dfptkd.engine import export
from dfptkd.engine.checkpoint import save_checkpoint
from dfptkd.engine.errors import DataError, NumericError, UsageError
from dfptkd.engine.export import export_student
from dfptkd.engine.models import create_model

NUM_CLASSES = 7
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained_student():
    """A network whose weights and BatchNorm statistics are not those of a fresh one."""
    torch.manual_seed(1)
    model = create_model("cifar:resnet8", num_classes=NUM_CLASSES).train()
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
    return model.eval()


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with one checkpoint, whose state holds more than the student."""
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "step-20"
    folder.mkdir()
    data = {"name": "synthetic", "num_classes": NUM_CLASSES, "image_size": [32, 32],
            "mean": MEAN, "std": STD, "class_names": list("abcdefg")}  # fmt: skip
    config = {
        "recipe": "pair",
        "method": "dfpt",
        "student": "cifar:resnet8",
        "seed": 0,
        "epochs": 3,
    }
    record = {"format": "dfptkd.run/1", "config": config, "data": data}
    (folder / "run.json").write_text(json.dumps(record))
    status = {"state": "finished", "last": {"student_top1": 61.5}}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "metrics.csv").write_text(
        "epoch,step,test/student_top1\n1,10,40\n2,20,50.5\n3,30,61.5\n"
    )
    state = {name: t.contiguous() for name, t in trained_student().state_dict().items()}
    save_file(state, folder / "student.safetensors")
    full = {f"student.{name}": t for name, t in state.items()} | {"prompt.weight": torch.ones(3)}
    save(checkpoint.parent, full)
    return folder


def save(checkpoints: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The checkpoint of step 20, of which only the tensors are looked at."""
    state = {"step": 20, "progress": {}, "scaler": {}, "alarmed": False, "data": {}, "config": {}}
    save_checkpoint(checkpoints, tensors, state, keep=2, is_best=False)


def macs(model: torch.nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def test_M9_exported_student_has_the_parameters_and_macs_of_the_plain_one(run):
    (path,) = export_student(run, formats=("safetensors",))
    plain = create_model("cifar:resnet8", num_classes=NUM_CLASSES).eval()
    exported = load_file(path)
    assert {k: v.shape for k, v in exported.items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    expected = macs(plain)
    plain.load_state_dict(exported)
    assert macs(plain) == expected > 0
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain(images), trained_student()(images))


def test_checkpoint_gives_its_student_alone_and_its_own_accuracy(run):
    (path,) = export_student(run / "checkpoints" / "step-20", formats=("safetensors",))
    assert path == run / "export" / "step-20" / "student.safetensors"
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert names == set(trained_student().state_dict())
    assert metadata["format"] == "pt"
    assert metadata["model"] == "cifar:resnet8"
    assert [json.loads(metadata[k]) for k in ("num_classes", "mean", "std", "top1")] == [
        NUM_CLASSES, MEAN, STD, 50.5,
    ]  # fmt: skip


def test_onnx_is_the_same_function_for_any_batch_size(run, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    said: list[str] = []
    (path,) = export_student(run, tmp_path / "out", formats=("onnx",), say=said.append)
    assert path.parent == tmp_path / "out"
    assert [p.name for p in path.parent.iterdir()] == ["student.onnx"]  # no data file beside it
    assert "onnxruntime agrees" in said[0]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model = trained_student()
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mean"]) == MEAN
    assert json.loads(metadata["std"]) == STD
    assert json.loads(metadata["top1"]) == 61.5
    # Equal students give equal files, wherever on a machine they are made.
    again = export._to_onnx(trained_student(), [32, 32])
    del (written := onnx.load(path)).metadata_props[:]
    assert again.SerializeToString(deterministic=True) == written.SerializeToString(
        deterministic=True
    )
    ours = Path(export.__file__).parent
    for place in (ours, ours.resolve(), Path(torch.__file__).parent):
        assert str(place).encode() not in path.read_bytes()
    # M9: the graph holds no weight that the plain student lacks (BatchNorm may be folded away)
    graph = onnx.load(path).graph
    weights = sum(w.dims[0] * w.dims[1] for w in graph.initializer if len(w.dims) in (2, 4))
    plain = sum(p.shape[0] * p.shape[1] for p in model.parameters() if p.ndim in (2, 4))
    assert weights == plain


def test_onnx_that_computes_something_else_is_not_written(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    right = export._to_onnx

    def wrong(model, image_size):
        other = trained_student()
        with torch.no_grad():
            next(other.parameters()).mul_(1.5)
        return right(other, image_size)

    monkeypatch.setattr(export, "_to_onnx", wrong)
    with pytest.raises(NumericError, match="differs from PyTorch"):
        export_student(run, tmp_path / "out", formats=("onnx",))
    assert not list((tmp_path).glob("out/*"))


def test_without_onnx_the_safetensors_part_is_done(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match="pip install onnx"):
        export_student(run)
    assert [p.name for p in (run / "export").iterdir()] == ["student.safetensors"]


def test_existing_target_is_refused_and_nothing_touched(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "student.onnx").write_text("mine")
    with pytest.raises(UsageError, match=r"student\.onnx exists"):
        export_student(run, out)
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("student.onnx", "mine")]
    (out / "student.safetensors").write_text("old")
    export_student(run, out, formats=("safetensors",), overwrite=True)
    assert len(load_file(out / "student.safetensors")) > 0


def test_trainers_own_student_is_not_a_target_by_default(run):
    before = (run / "student.safetensors").read_bytes()
    export_student(run, formats=("safetensors",))
    assert (run / "student.safetensors").read_bytes() == before


def test_bad_sources_are_one_line(run, tmp_path):
    with pytest.raises(DataError, match="no trained network"):
        export_student(tmp_path)
    with pytest.raises(DataError, match="nope: no such file or folder"):
        export_student(tmp_path / "nope")
    with pytest.raises(UsageError, match="'pickle'"):
        export_student(run, formats=("pickle",))
    (run / "student.safetensors").write_bytes(b"garbage")
    with pytest.raises(DataError, match="damaged safetensors file"):
        export_student(run)
    save_file({"fc.weight": torch.ones(2, 2)}, run / "student.safetensors")
    with pytest.raises(
        DataError, match=r"\(cifar:resnet8\): does not fit ResNet: missing conv1"
    ) as error:
        export_student(run)
    assert "\n" not in str(error.value)
    save(run / "checkpoints", {"prompt.w": torch.ones(1)})
    with pytest.raises(DataError, match="holds no student"):
        export_student(run / "checkpoints" / "step-20")
