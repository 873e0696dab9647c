"""The certificate of step 0 finds a wrong kernel, moves nothing, and the run goes on without it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfptkd.engine.config import DataConfig, OptimConfig, RunConfig, TeacherConfig
from dfptkd.engine.guards import certify
from dfptkd.engine.methods import build_method
from dfptkd.engine.models import create_model
from dfptkd.engine.train import run
from dfptkd.kernels import backend, use_backend, which_backend
from dfptkd.kernels.dual_path_loss import _EagerFusedLoss

pytestmark = pytest.mark.skipif(
    backend.unavailable("native") is not None, reason="no native library: nothing to certify"
)


def make_method(name: str):
    torch.manual_seed(0)
    student, teacher = (create_model("cifar:resnet8_s2", num_classes=4) for _ in range(2))
    return build_method(RunConfig(method=name), student, teacher)


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    return images, torch.randint(4, (6,), generator=generator)


@pytest.fixture
def wrong_kernel(monkeypatch):
    """Gradients that are 1 % too large, as a silent defect of a kernel would make them."""
    original = _EagerFusedLoss.forward

    def forward(ctx, launch, *rest):
        def spoiled(*inputs):
            outputs = list(launch(*inputs))
            outputs[-1] = outputs[-1] * 1.01
            return tuple(outputs)

        return original(ctx, spoiled, *rest)

    monkeypatch.setattr(_EagerFusedLoss, "forward", staticmethod(forward))


@pytest.mark.parametrize("name", ["kd", "dfpt", "dfpt_plus"])
def test_the_fused_loss_is_certified_and_no_state_moves(name):
    method = make_method(name)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    certificate = certify(method, *batch())
    assert certificate.backend == "native"
    assert certificate.holds, str(certificate)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert method.student.training


@pytest.mark.parametrize("name", ["ce", "dkd", "dist"])
def test_methods_without_a_fused_loss_have_no_certificate(name):
    assert certify(make_method(name), *batch()) is None


def test_a_wrong_kernel_fails_the_certificate(wrong_kernel):
    certificate = certify(make_method("dfpt"), *batch())
    assert not certificate.holds
    assert 0.005 < certificate.gradient < 0.02


def tiny_run(root, **changes) -> RunConfig:
    config = RunConfig(
        recipe="tiny",
        method="dfpt",
        student="cifar:resnet8_s2",
        epochs=1,
        global_batch=8,
        device="cpu",
        out_root=str(root),
        data=DataConfig(name="synthetic", image_size=16, num_classes=4, limit=24),
        teacher=TeacherConfig(name="cifar:resnet8_s2", weights=str(root / "teacher.safetensors")),
        optim=OptimConfig(lr=0.02),
    )
    return replace(config, **changes)


def events(folder) -> dict[str, str]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return {event["kind"]: event["message"] for event in map(json.loads, lines)}


def test_a_run_with_a_wrong_kernel_falls_back_and_says_so(tmp_path, wrong_kernel, capsys):
    teacher = create_model("cifar:resnet8_s2", num_classes=4)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    run(tiny_run(tmp_path, out=str(tmp_path / "spoiled")))
    assert "reference" in events(tmp_path / "spoiled")["certificate_failed"]
    assert "more than rounding" in capsys.readouterr().out

    # What it trained is what the reference trains, to the bit.
    with use_backend("reference"):
        run(tiny_run(tmp_path, out=str(tmp_path / "reference")))
    names = [tmp_path / name / "student.safetensors" for name in ("spoiled", "reference")]
    spoiled, reference = map(load_file, names)
    assert all(torch.equal(spoiled[k], v) for k, v in reference.items())


def test_a_run_logs_its_certificate_and_differs_from_the_reference_by_rounding(tmp_path):
    teacher = create_model("cifar:resnet8_s2", num_classes=4)
    assert which_backend("dual_path_loss", torch.zeros(2, 2)) == "native"
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    run(tiny_run(tmp_path, out=str(tmp_path / "fused")))
    assert "loss[native]" in events(tmp_path / "fused")["certificate"]
    with use_backend("reference"):
        run(tiny_run(tmp_path, out=str(tmp_path / "reference")))
    fused, reference = (
        load_file(tmp_path / name / "student.safetensors") for name in ("fused", "reference")
    )
    for name, value in reference.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-3, atol=1e-4)
