"""Weights load strictly or are refused in one line; no file is ever executed."""

import argparse
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dfptkd.engine.errors import DataError, UsageError
from dfptkd.engine.models import create_model
from dfptkd.engine.models.weights import load_strict, read_tables

NAME = "cifar:resnet8"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    model = create_model(NAME, num_classes=10)
    model(torch.randn(4, 3, 32, 32))  # moves the batch statistics
    return model


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    theirs = right.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in left.state_dict().items())


def refusal(path: Path, name: str = NAME, num_classes: int = 10) -> str:
    with pytest.raises(DataError) as error:
        create_model(name, num_classes=num_classes, weights=str(path))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


WRAPPINGS = {
    "bare": lambda state: state,
    "mdistiller": lambda state: {"model": state, "epoch": 240, "best_acc": 0.5},
    "repdistiller": lambda state: {"opt": argparse.Namespace(lr=0.05), "model": state},
    "state_dict": lambda state: {"state_dict": state},
    "module.": lambda state: {"model": {f"module.{key}": v for key, v in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", [".pth", ".tar"])
def test_torch_file_round_trip(
    model: nn.Module, tmp_path: Path, wrapping: str, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(WRAPPINGS[wrapping](model.state_dict()), path)
    assert_equal(create_model(NAME, num_classes=10, weights=str(path)), model)


def test_legacy_torch_file(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path, _use_new_zipfile_serialization=False)
    assert_equal(create_model(NAME, num_classes=10, weights=str(path)), model)


def test_safetensors_round_trip(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    assert_equal(create_model(NAME, num_classes=10, weights=str(path)), model)


def test_files_older_than_num_batches_tracked_load(model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    old = OrderedDict((k, v) for k, v in state.items() if "num_batches_tracked" not in k)
    torch.save({"model": old}, tmp_path / "old.pth")
    loaded = create_model(NAME, num_classes=10, weights=str(tmp_path / "old.pth"))
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in old.items())


def test_torchvision_and_timm_read_files(tmp_path: Path) -> None:
    # MNASNet reads the version of its layers.
    for name in ("torchvision:squeezenet1_1", "torchvision:mnasnet0_5", "timm:resnet10t"):
        if name.startswith("timm"):
            pytest.importorskip("timm")
        source = create_model(name, num_classes=3)
        torch.save(source.state_dict(), tmp_path / "w.pth")
        assert_equal(create_model(name, num_classes=3, weights=str(tmp_path / "w.pth")), source)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_malicious_pickle_is_not_executed(tmp_path: Path, new_format: bool) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "executed"
    torch.save({"model": Payload(marker)}, path, _use_new_zipfile_serialization=new_format)
    assert "nothing was executed" in refusal(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # negative control: the payload does work
    assert marker.exists()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no such weights file" in refusal(tmp_path / "absent.pth")
    assert "no such weights file" in refusal(tmp_path / "absent.pth", "torchvision:resnet18")
    assert "is a folder, expected a weights file (none)" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(model: nn.Module, tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "damaged" in refusal(path)


def test_no_state_dict_inside(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "w.pth")
    assert "holds no state dict (keys epoch, optimizer)" in refusal(tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "w.pth")
    assert "holds no state dict (list)" in refusal(tmp_path / "w.pth")


def test_wrong_class_count_is_named(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    assert refusal(path, num_classes=100) == f"{path}: has 10 classes, expected 100"


def test_wrong_architecture_gets_a_key_diff(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    message = refusal(path, "cifar:wrn_16_1")
    assert "does not fit WideResNet" in message
    assert "missing block1.layer.0.bn1.weight" in message
    assert "unexpected bn1.num_batches_tracked" not in message
    assert "unexpected layer1.0.conv1.weight" in message
    assert "more" in message
    wider = refusal(path, "cifar:resnet8x4")
    assert "wrong shape conv1.weight [16, 3, 3, 3] (expected [32, 3, 3, 3])" in wider


def test_a_refused_state_dict_leaves_the_model_alone(model: nn.Module) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = {key: value + 1 for key, value in before.items()}
    del wrong["fc.bias"]
    with pytest.raises(DataError, match=r"^here: does not fit ResNet: missing fc\.bias$"):
        load_strict(model, wrong, "here")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tables_hold_tensors_on_the_cpu(model: nn.Module, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    (table,) = read_tables(tmp_path / "w.pth")
    assert table.where == "model"
    assert list(table.tensors) == list(model.state_dict())
    assert {value.device.type for value in table.tensors.values()} == {"cpu"}


@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "ResNet50_Weights.IMAGENET1K_V1"])
def test_unknown_torchvision_weights(weights: str) -> None:
    with pytest.raises(UsageError, match="unknown weights of resnet18"):
        create_model("torchvision:resnet18", num_classes=1000, weights=weights)


def test_failed_download_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(DataError, match=r"cannot download .*https://.*no route to host"):
        create_model("torchvision:resnet18", num_classes=1000, weights="IMAGENET1K_V1")


def test_pretrained_class_count_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    source = create_model("torchvision:resnet18", num_classes=1000)
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *a, **k: source.state_dict()
    )
    loaded = create_model("torchvision:resnet18", num_classes=1000, weights="DEFAULT")
    assert_equal(loaded, source)
    with pytest.raises(DataError, match="has 1000 classes, expected 10"):
        create_model("torchvision:resnet18", num_classes=10, weights="DEFAULT")
    pytest.importorskip("timm")
    with pytest.raises(DataError, match="has 1000 classes, expected 10"):
        create_model("timm:resnet18", num_classes=10, weights="pretrained")
