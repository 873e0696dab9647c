"""Checkpoints as other code bases write them: loaded equal bit by bit, or refused in one line that
names the reason; none executes anything."""

import argparse
import io
import os
import pathlib
import pickle
import sys
import types
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dfptkd.engine.errors import DataError, UsageError
from dfptkd.engine.models import create_model, split_stages
from dfptkd.engine.models.weights import check_values, load_weights, read_tables

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")

NAME, TEACHER = "cifar:resnet8", "cifar:resnet14"
State = dict[str, Tensor]


def trained(name: str = NAME, seed: int = 0, classes: int = 10) -> nn.Module:
    """A network whose weights and statistics are those of no other seed."""
    torch.manual_seed(seed)
    model = create_model(name, num_classes=classes)
    model(torch.randn(4, 3, 32, 32))
    return model


@pytest.fixture(scope="module")
def raw() -> State:
    return trained().state_dict()


@pytest.fixture(scope="module")
def average() -> State:
    return trained(seed=1).state_dict()


def prefixed(prefix: str, state: State) -> State:
    return OrderedDict((prefix + key, value) for key, value in state.items())


def averaged_model(state: State) -> State:
    """As torch's AveragedModel has it: `module.` before the names, and its counter."""
    model = create_model(NAME, num_classes=10)
    model.load_state_dict(state)
    ema = AveragedModel(model, use_buffers=True)
    ema.n_averaged += 7
    return ema.state_dict()


def optimizer_of(state: State) -> dict[str, Any]:
    """With a momentum for each parameter, of the parameters' shapes."""
    params = [nn.Parameter(v.clone()) for v in state.values() if v.is_floating_point()]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer.state_dict()


def timm(state: State, ema: State | None = None) -> dict[str, Any]:
    found = {
        "epoch": 99,
        "arch": "resnet8",
        "optimizer": optimizer_of(state),
        "version": 2,
        "args": argparse.Namespace(model="resnet8", lr=0.1, output=pathlib.PurePosixPath("x").name),
        "amp_scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "metric": np.float64(73.5),
        "state_dict": state,
    }
    return found if ema is None else {**found, "state_dict_ema": ema}


def lightning(prefix: str, state: State, **more: Any) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed(prefix, state),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'acc'}": {"best_model_score": torch.tensor(0.7)}},
        "optimizer_states": [optimizer_of(state)],
        "lr_schedulers": [{"last_epoch": 3, "_step_count": 4}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
        **more,
    }


def mdistiller(student: State, teacher: State) -> dict[str, Any]:
    """`latest`, `best`, `epoch_N`: a distiller inside DataParallel, with both networks."""
    model = prefixed("module.student.", student) | prefixed("module.teacher.", teacher)
    return {"epoch": 240, "model": model, "best_acc": torch.tensor(75.4),
            "optimizer": optimizer_of(student)}  # fmt: skip


def numpy_state() -> dict[str, Any]:
    """Accuracies, lists of them, and a random generator's state."""
    return {
        "best_acc": np.float64(0.75), "best_epoch": np.int64(3), "done": np.bool_(True),
        "loss": np.float32(1.5), "curve": np.arange(5.0),
        "rng": np.random.RandomState(0).get_state(),
    }  # fmt: skip


# Name -> what is written for raw weights r and their average e. All hold r under the names of the
# network, somewhere; where there is no choice, nothing but r.
LOADED: dict[str, Callable[[State, State], Any]] = {
    "bare": lambda r, e: r,
    "bare, a plain dict": lambda r, e: dict(r),
    "bare, parameters": lambda r, e: {
        k: nn.Parameter(v, requires_grad=v.is_floating_point()) if v.is_floating_point() else v
        for k, v in r.items()
    },
    "RepDistiller teacher": lambda r, e: {
        "opt": argparse.Namespace(lr=0.05),
        "epoch": 240,
        "best_acc": 0.7,
        "model": r,
    },
    "RepDistiller student, numpy accuracy": lambda r, e: {
        "opt": argparse.Namespace(lr=0.05),
        "model": r,
        "best_acc": np.float64(0.7),
    },
    "mdistiller teacher": lambda r, e: {"model": r, "epoch": 240},
    "mdistiller student_best": lambda r, e: {"model": r},
    "mdistiller vanilla, best": lambda r, e: {
        "epoch": 240,
        "model": prefixed("module.student.", r),
        "best_acc": torch.tensor(0.7),
    },
    "mdistiller kd, best": lambda r, e: mdistiller(r, trained(TEACHER, 5).state_dict()),
    "timm": lambda r, e: timm(r),
    "timm, DataParallel": lambda r, e: timm(prefixed("module.", r)),
    "torchvision reference": lambda r, e: {
        "model": r,
        "optimizer": optimizer_of(r),
        "lr_scheduler": {"last_epoch": 9},
        "epoch": 9,
        "args": argparse.Namespace(model="resnet8", output_dir="."),
        "scaler": {},
    },
    "Lightning, model": lambda r, e: lightning("model.", r),
    "Lightning, net": lambda r, e: lightning("net.", r),
    "Lightning, a compiled network": lambda r, e: lightning("model._orig_mod.", r),
    "Lightning, with metrics": lambda r, e: {
        **lightning("model.", r),
        "state_dict": prefixed("model.", r) | {"train_acc.tp": torch.zeros(10)},
    },
    "DataParallel": lambda r, e: nn.DataParallel(filled(r)).state_dict(),
    "DataParallel, 'net'": lambda r, e: {"net": prefixed("module.", r), "acc": 93.1, "epoch": 9},
    "torch.compile": lambda r, e: prefixed("_orig_mod.", r),
    "torch.compile of DataParallel": lambda r, e: prefixed("_orig_mod.module.", r),
    "DistributedDataParallel of a compiled one": lambda r, e: {
        "state_dict": prefixed("module._orig_mod.", r)
    },
    "model_state_dict": lambda r, e: {
        "epoch": 4,
        "model_state_dict": r,
        "optimizer_state_dict": optimizer_of(r),
        "loss": 0.3,
    },
    "state.model": lambda r, e: {"state": {"model": r, "epoch": 3}, "config": {"lr": 0.1}},
    "numpy beside": lambda r, e: {"model": r, **numpy_state()},
    "paths beside": lambda r, e: {"model": r, "out": Path("runs/x"), "of": Counter("aab")},
    "the same twice": lambda r, e: {"model": r, "state_dict": {k: v.clone() for k, v in r.items()}},
    "a tensor beside": lambda r, e: {"model": r, "best_acc": torch.tensor(3.0)},
    "without counts of batches": lambda r, e: {
        k: v for k, v in r.items() if "num_batches_tracked" not in k
    },
}
# As above, with an average beside r.
BOTH: dict[str, Callable[[State, State], Any]] = {
    "timm, EMA": timm,
    "timm, EMA, DataParallel": lambda r, e: timm(r, prefixed("module.", e)),
    "torchvision reference, EMA": lambda r, e: {"model": r, "model_ema": averaged_model(e)},
    "AveragedModel under any key": lambda r, e: {"net": r, "swa": averaged_model(e)},
    "Lightning, EMA": lambda r, e: {
        "state_dict": prefixed("model.", r) | prefixed("model_ema.module.", e)
    },
    "EMA in the network": lambda r, e: r | prefixed("ema.", averaged_model(e)),
    "EMA nested": lambda r, e: {"state": {"model": r, "ema": {"module": e, "decay": 0.99}}},
}


def filled(state: State) -> nn.Module:
    model = create_model(NAME, num_classes=10)
    model.load_state_dict(state)
    return model


def loaded(path: Path, **options: Any) -> tuple[State, list[str]]:
    """The state of a fresh network after loading, and what was said."""
    said: list[str] = []
    torch.manual_seed(99)
    model = create_model(NAME, num_classes=10, weights=str(path), say=said.append, **options)
    assert all("\n" not in line and line.startswith(f"{path}: ") for line in said)
    return model.state_dict(), said


def refusal(path: Path, name: str = NAME, classes: int = 10, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        create_model(name, num_classes=classes, weights=str(path), **options)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert len(message) < 1000
    return message


def assert_bits(found: State, expected: State) -> None:
    for key, value in expected.items():
        assert found[key].numpy().tobytes() == value.numpy().tobytes(), key


@pytest.mark.parametrize("form", LOADED)
def test_forms_with_one_network_load_bit_by_bit(tmp_path, raw, average, form):
    path = tmp_path / "latest"  # mdistiller's files have no suffix
    torch.save(LOADED[form](raw, average), path)
    found, said = loaded(path)
    assert_bits(found, {k: v for k, v in raw.items() if "num_batches" not in k})
    if form != "without counts of batches":
        assert_bits(found, raw)
    passed_over = {"mdistiller kd, best", "Lightning, with metrics"}
    assert bool(said) == (form in passed_over), said


@pytest.mark.parametrize("form", BOTH)
def test_beside_an_average_the_choice_is_made_and_said(tmp_path, raw, average, form):
    path = tmp_path / "w.pth"
    torch.save(BOTH[form](raw, average), path)
    for ema, expected in (("auto", raw), ("no", raw), ("yes", average)):
        found, said = loaded(path, ema=ema)
        assert_bits(found, expected)
        assert len(said) == 1
        assert ("the EMA are used" if ema == "yes" else "the raw ones are used") in said[0]
        other = "no (eval: no --ema)" if ema == "yes" else "yes (eval: --ema)"
        assert f"--teacher.ema {other} takes the others" in said[0]


def test_an_average_that_is_alone_is_used_and_said(tmp_path, average):
    path = tmp_path / "w.pth"
    torch.save({"model_ema": averaged_model(average), "epoch": 3}, path)
    for ema in ("auto", "yes"):
        found, said = loaded(path, ema=ema)
        assert_bits(found, average)
        assert said == [
            f"{path}: holds an EMA of the weights alone ('model_ema', names behind 'module.'), "
            "which is used"
        ]
    assert "expected the raw ones for --teacher.ema no" in refusal(path, ema="no")


def test_of_what_is_refused_nothing_else_is_said(tmp_path, raw, average, capsys):
    torch.save(timm(damaged(raw, "fc.bias", float("nan")), average), tmp_path / "w.pth")
    assert "fc.bias: 1 of 10 values" in refusal(tmp_path / "w.pth")
    assert capsys.readouterr().out == ""


def test_an_average_that_is_not_there_is_refused(tmp_path, raw):
    path = tmp_path / "w.pth"
    torch.save({"model": raw}, path)
    message = refusal(path, ema="yes")
    assert message == (
        f"{path}: holds no EMA of the weights (raw ones: 'model'), expected one for "
        "--teacher.ema yes (eval: --ema)"
    )
    with pytest.raises(UsageError, match=r"teacher\.ema='yes' with weights DEFAULT: expected a"):
        create_model("torchvision:resnet18", num_classes=1000, weights="DEFAULT", ema="yes")


def test_the_network_says_which_of_two_is_meant(tmp_path, raw):
    """A distiller's file holds the student and the teacher: each loads as itself."""
    teacher = trained(TEACHER, 5)
    path = tmp_path / "latest"
    torch.save(mdistiller(raw, teacher.state_dict()), path)
    assert_bits(loaded(path)[0], raw)
    said: list[str] = []
    found = create_model(TEACHER, num_classes=10, weights=str(path), say=said.append)
    assert_bits(found.state_dict(), teacher.state_dict())
    assert "'model', names behind 'module.teacher.'; passed over" in said[0]


# Name -> (what is written, the reason that the refusal gives).
REFUSED: dict[str, tuple[Callable[[State, State], Any], str]] = {
    "two of them": (
        lambda r, e: {"student": r, "teacher": e},
        r"holds 2 different sets of weights for ResNet \('student'; 'teacher'\), expected one",
    ),
    "a distiller of equal networks": (
        mdistiller,
        r"\('model', names behind 'module\.student\.'; 'model', names behind 'module\.teacher\.'\)",
    ),
    "a distiller that is its own student": (
        lambda r, e: {"state_dict": r | prefixed("teacher.", e)},
        r"\('state_dict'; 'state_dict', names behind 'teacher\.'\)",
    ),
    "a whole network": (
        lambda r, e: filled(r),
        r"holds dfptkd\.engine\.models\.cifar\.resnet\.ResNet, which is no tensor",
    ),
    "an optimizer alone": (lambda r, e: {"optimizer": optimizer_of(r)}, "holds no state dict"),
    "arrays of numpy": (
        lambda r, e: {k: v.numpy() for k, v in r.items()},
        r"holds no state dict \(keys conv1\.weight, bn1\.weight",
    ),
    "too deep": (
        lambda r, e: {"a": {"b": {"c": {"d": {"e": r}}}}},
        r"holds no state dict \(keys a\), expected .* up to 4 others",
    ),
    "nothing": (lambda r, e: {}, r"holds no state dict \(keys \)"),
    "a list": (lambda r, e: list(r.values()), r"holds no state dict \(list\)"),
    "one tensor less": (
        lambda r, e: {"model": {k: v for k, v in r.items() if k != "layer1.0.bn1.running_mean"}},
        r"does not fit ResNet: missing layer1\.0\.bn1\.running_mean$",
    ),
    "one tensor more": (
        lambda r, e: {"state_dict": {**r, "fc2.bias": r["fc.bias"]}},
        r"does not fit ResNet: unexpected fc2\.bias$",
    ),
    "other classes": (
        lambda r, e: {"model": prefixed("module.", trained(classes=7).state_dict())},
        r"has 7 classes, expected 10$",
    ),
    "another width": (
        lambda r, e: {"net": trained("cifar:resnet8x4").state_dict()},
        r"wrong shape conv1\.weight \[32, 3, 3, 3\] \(expected \[16, 3, 3, 3\]\)",
    ),
    "another network": (
        lambda r, e: {"net": trained("cifar:wrn_16_1").state_dict()},
        r"does not fit ResNet: missing",
    ),
    "quantised": (
        lambda r, e: {
            **r, "fc.weight": torch.quantize_per_tensor(r["fc.weight"], 0.1, 0, torch.qint8),
        },
        r"wrong type fc\.weight qint8 \(expected float32\)$",
    ),
    "whole numbers for weights": (
        lambda r, e: {**r, "fc.weight": (100 * r["fc.weight"]).to(torch.int8)},
        r"wrong type fc\.weight int8 \(expected float32\)$",
    ),
    "sparse": (
        lambda r, e: {**r, "fc.weight": r["fc.weight"].to_sparse()},
        r"wrong type fc\.weight float32 sparse_coo",
    ),
    "without data": (
        lambda r, e: {**r, "fc.weight": r["fc.weight"].to("meta")},
        r"wrong type fc\.weight float32 on meta",
    ),
    "a NaN": (
        lambda r, e: {"model": damaged(r, "layer2.0.conv1.weight", float("nan"))},
        r"layer2\.0\.conv1\.weight: 1 of 4,608 values are NaN or infinite as float32",
    ),
    "an infinity in a buffer": (
        lambda r, e: {"model": damaged(r, "bn1.running_mean", float("inf"))},
        r"bn1\.running_mean: 1 of 16 values are NaN or infinite",
    ),
    "too large for fp32": (
        lambda r, e: {k: v.double() * (1e300 if k == "fc.bias" else 1) for k, v in r.items()},
        r"fc\.bias: \d+ of 10 values are NaN or infinite as float32",
    ),
    "a negative variance": (
        lambda r, e: prefixed("module.", damaged(r, "layer3.0.bn2.running_var", -0.5)),
        r"layer3\.0\.bn2\.running_var: a variance of -0\.5, expected 0 or more",
    ),
}  # fmt: skip


def damaged(state: State, key: str, value: float) -> State:
    changed = {k: v.clone() for k, v in state.items()}
    changed[key].view(-1)[0] = value
    return changed


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_refused_names_the_reason(tmp_path, raw, average, form):
    write, reason = REFUSED[form]
    path = tmp_path / "w.pth"
    torch.save(write(raw, average), path)
    with pytest.raises(DataError, match=reason):
        create_model(NAME, num_classes=10, weights=str(path))
    refusal(path)


def test_a_refused_file_leaves_the_network_alone(tmp_path, raw, average):
    model = filled(average)
    torch.save(damaged(raw, "fc.bias", float("nan")), tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"fc\.bias"):
        load_weights(model, tmp_path / "w.pth")
    assert_bits(model.state_dict(), average)


def test_values_of_downloaded_weights_are_looked_at_too(monkeypatch):
    source = create_model("torchvision:squeezenet1_1", num_classes=1000)
    state = damaged(source.state_dict(), "classifier.1.bias", float("nan"))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: state)
    with pytest.raises(DataError, match=r"classifier\.1\.bias: 1 of 1,000 values are NaN"):
        create_model("torchvision:squeezenet1_1", num_classes=1000, weights="DEFAULT")
    timm = pytest.importorskip("timm")
    make = timm.create_model

    def with_a_nan(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        model = make(name, **options)
        if pretrained:
            model.load_state_dict(damaged(model.state_dict(), "fc.bias", float("nan")))
        return model

    monkeypatch.setattr(timm, "create_model", with_a_nan)
    with pytest.raises(DataError, match=r"^timm:resnet10t\S*: fc\.bias: 1 of 1,000 values"):
        create_model("timm:resnet10t", num_classes=1000, weights="pretrained")


def test_values_of_a_package_are_looked_at_too(tmp_path, raw, monkeypatch):
    folder = tmp_path / "weights_with_a_nan"
    folder.mkdir()
    (folder / "__init__.py").touch()
    torch.save(damaged(raw, "fc.weight", float("nan")), folder / "w.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        DataError, match=r"^package:weights_with_a_nan: fc\.weight: 1 of 640 values"
    ):
        create_model(NAME, num_classes=10, weights="package:weights_with_a_nan")


def test_whole_numbers_and_small_types_are_no_damage(raw):
    check_values({"count": torch.tensor(3), "w": torch.ones(2, dtype=torch.float16)}, "here")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(tmp_path, raw, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in raw.items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    found = loaded(tmp_path / "w.pth")[0]
    assert_bits(found, {k: v.to(raw[k].dtype) for k, v in state.items()})


def test_safetensors_with_a_prefix_and_lightning_beside(tmp_path, raw):
    path = tmp_path / "w.safetensors"
    save_file(prefixed("model.", raw), path)
    assert_bits(loaded(path)[0], raw)


def test_numbers_of_numpy_1_are_read_past(tmp_path, raw):
    file = io.BytesIO()
    content = {"model": raw, **numpy_state()}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    written = file.getvalue()
    assert b"numpy._core.multiarray\n" in written
    older = written.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    (tmp_path / "w.tar").write_bytes(older)
    assert_bits(loaded(tmp_path / "w.tar")[0], raw)


def test_hyper_parameters_of_lightning_are_read_as_a_dictionary(tmp_path, raw, monkeypatch):
    module = "pytorch_lightning.utilities.parsing"
    kind = type("AttributeDict", (dict,), {"__module__": module})
    with monkeypatch.context() as patch:  # the package is there when the file is written
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            patch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
        sys.modules[module].AttributeDict = kind
        torch.save(lightning("model.", raw, hyper_parameters=kind(lr=0.1)), tmp_path / "w.ckpt")
    assert_bits(loaded(tmp_path / "w.ckpt")[0], raw)


def test_a_folder_is_refused_with_what_is_in_it(tmp_path, raw):
    save_file(raw, tmp_path / "teacher.safetensors")
    assert "is a folder, expected a weights file (teacher.safetensors)" in refusal(tmp_path)


# Code --------------------------------------------------------------------------------------------


class Canary:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path, function: Callable[..., Any] = os.mkdir) -> None:
        self.call = function, (str(folder),)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Built:
    """Carries a state that is given to an object of its own class."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def named(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function by its name, as nobody's `torch.save` wrote it."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


@pytest.mark.parametrize("form", [*LOADED, *BOTH])
def test_code_beside_the_weights_is_named_and_not_run(tmp_path, raw, average, form):
    """Every form again, with a canary under another key: the file is refused and it stays put."""
    content = (LOADED | BOTH)[form](raw, average)
    path, canary = tmp_path / "w.pth", tmp_path / "canary"
    torch.save({"weights": content, "hook": Canary(canary)}, path)
    message = refusal(path)
    assert "holds posix.mkdir, which is no tensor and no plain value; nothing was executed" in (
        message
    )
    assert not canary.exists()


def test_control_the_canary_sings(tmp_path, raw):
    file = io.BytesIO()
    torch.save({"model": raw, "hook": Canary(tmp_path / "canary")}, file)
    file.seek(0)
    torch.load(file, weights_only=False)
    assert (tmp_path / "canary").is_dir()


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (lambda folder: Canary(folder, os.system), "posix.system"),
        (lambda folder: Canary(folder, eval), "eval"),
        (lambda folder: Canary(folder, os.makedirs), "os.makedirs"),
        (lambda folder: Built(folder=folder), f"{Built.__module__}.Built"),
        (lambda folder: nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda folder: np.random.default_rng(0), "numpy.random"),
    ],
)
def test_the_first_thing_that_is_no_weight_is_named(tmp_path, raw, what, name):
    path = tmp_path / "w.pth"
    torch.save({"model": raw, "other": what(tmp_path / "canary")}, path)
    message = refusal(path)
    assert f"holds {name}" in message
    assert "nothing was executed" in message
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_read_past_is_not_made(tmp_path, raw):
    """Options, paths and numbers of numpy beside the weights: no object of their classes exists
    afterwards, so that nothing of them can have run."""
    options = argparse.Namespace(lr=np.float64(0.1), out=Path("x"), canary=None)
    torch.save({"model": raw, "args": options, **numpy_state()}, tmp_path / "w.pth")
    from dfptkd.engine.models.torch_file import read_torch_file

    content = read_torch_file(tmp_path / "w.pth")
    assert_bits(content["model"], raw)
    kinds = {type(v).__name__ for k, v in content.items() if k not in ("model", "rng")}
    assert kinds == {"_Inert"}


@pytest.mark.parametrize("module", ["os", "posix", "builtins", "numpy", "argparse"])
@pytest.mark.parametrize("name", ["system", "exec", "load", "Namespace.__init__"])
def test_hand_made_pickles_are_refused(tmp_path, module, name):
    path = tmp_path / "w.pth"
    file = io.BytesIO()  # torch's older format: a magic number, a version, system facts, the object
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, file, protocol=2)
    file.write(named(module, name, f"touch {tmp_path / 'canary'}"))
    path.write_bytes(file.getvalue())
    assert "nothing was executed" in refusal(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_dictionary_inside_itself_is_read_once(tmp_path, raw):
    content: dict[str, Any] = {"model": raw}
    content["again"] = content
    torch.save(content, tmp_path / "w.pth")
    assert [table.where for table in read_tables(tmp_path / "w.pth")] == ["model"]
    assert_bits(loaded(tmp_path / "w.pth")[0], raw)


# Wrapped networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, AveragedModel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))],
)
def test_a_wrapped_network_is_cut_as_itself(wrap):
    plain = trained().eval()
    cut = split_stages(wrap(plain).eval())
    x = torch.randn(2, 3, 32, 32)
    y = x
    for stage in cut.stages:
        y = stage(y)
    assert torch.equal(cut.head(cut.neck(y)), plain(x))
    at = ("layer1", "layer2")
    assert split_stages(wrap(plain), at).channels == split_stages(plain, at).channels
