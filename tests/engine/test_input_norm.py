"""Each network reads images that are normalised by its own mean and std, in training, in evaluation
and in what is delivered; right are the logits of the plain network on images normalised by hand."""

import copy
import json
from dataclasses import replace
from inspect import unwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfptkd.engine import train as train_module
from dfptkd.engine.checkpoint import load_checkpoint, save_checkpoint
from dfptkd.engine.config import DataConfig, OptimConfig, RunConfig, TeacherConfig
from dfptkd.engine.data import load_data
from dfptkd.engine.data.facts import data_facts
from dfptkd.engine.data.source import Augmentation, ImageData, ResidentSplit
from dfptkd.engine.errors import DataError, UsageError
from dfptkd.engine.eval_checkpoint import evaluate_checkpoint
from dfptkd.engine.export import export_student
from dfptkd.engine.logits_file import SUFFIX
from dfptkd.engine.methods import build_method
from dfptkd.engine.metrics import predict
from dfptkd.engine.models import create_model
from dfptkd.engine.models.external import TRANSFORM_INPUT
from dfptkd.engine.models.input_norm import InputNorm, InputNorms, Renormalise, stated_norm
from dfptkd.engine.stand_in import build_step, stand_in
from dfptkd.engine.train import norms_of, run, run_seeds
from dfptkd.kernels import normalize_images

CPU = torch.device("cpu")
CLASSES, SIDE, IMAGES = 4, 16, 48
DATA = InputNorm((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
OTHER = InputNorm((0.3, 0.6, 0.2), (0.1, 0.4, 0.2))  # far from it: a mistake shows
IMAGENET = InputNorm((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = InputNorm((0.5,) * 3, (0.5,) * 3)


def by_hand(images: Tensor, norm: InputNorm) -> Tensor:
    """uint8 [N, H, W, 3] as fp32 [N, 3, H, W]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (norm.mean, norm.std))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def network(name="cifar:resnet8", classes=CLASSES, side=SIDE):
    """Random weights, but BatchNorms of one batch's statistics: the images show in the logits."""
    torch.manual_seed(1)
    model = create_model(name, num_classes=classes).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(32, 3, side, side))
    return model.eval()


def save_weights(model, path, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata)
    return str(path)


@pytest.fixture
def teacher():
    return network()


@pytest.fixture
def data(teacher, monkeypatch) -> ImageData:
    """Pictures of which the teacher gets three in four right, normalised as it wants them; the runs
    of a test read these."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, SIDE, SIDE, 3), generator=generator).byte()
    with torch.no_grad():
        labels = teacher(by_hand(images, OTHER)).argmax(1)
    labels[::4] = (labels[::4] + 1) % CLASSES
    train = ResidentSplit(images, labels, Augmentation(IMAGES, 2, True, CPU))
    names = [str(i) for i in range(CLASSES)]
    made = ImageData(
        "synthetic", train, ResidentSplit(images, labels, None), CLASSES, names, (SIDE, SIDE),
        DATA.mean, DATA.std,
    )  # fmt: skip
    monkeypatch.setattr(train_module, "load_data", lambda config, device: made)
    return made


def make_config(tmp_path, teacher=None, method="kd", **changes) -> RunConfig:
    """Three steps of 16 images an epoch."""
    weights = None if teacher is None else save_weights(teacher, tmp_path / "theirs.safetensors")
    config = RunConfig(
        recipe="tiny",
        method=method,
        student="cifar:resnet8_s2",
        epochs=1,
        global_batch=16,
        eval_batch=32,
        device="cpu",
        kernels="reference",
        out_root=str(tmp_path),
        data=DataConfig(name="synthetic", num_classes=CLASSES, image_size=SIDE, limit=IMAGES),
        teacher=TeacherConfig(
            name="cifar:resnet8", weights=weights, mean=OTHER.mean, std=OTHER.std, remember="off"
        ),
        optim=OptimConfig(lr=0.02),
    )
    return replace(config, **changes)


def record_of(out):
    return json.loads((out / "run.json").read_text())


# What is known ------------------------------------------------------------------------------------


def test_timm_says_what_its_weights_want_by_tag():
    pytest.importorskip("timm")
    vit = "timm:vit_tiny_patch16_224"
    found = {
        (name, weights): stated_norm(name, weights, 1000)
        for name in ("timm:test_resnet", "timm:resnet18", vit, f"{vit}.augreg_in21k_ft_in1k")
        for weights in ("pretrained", None)
    }
    assert found["timm:test_resnet", "pretrained"].equals(HALF)
    assert "test_resnet.r160_in1k" in found["timm:test_resnet", "pretrained"].source
    assert found["timm:resnet18", "pretrained"].equals(IMAGENET)
    assert found[vit, "pretrained"].equals(HALF)
    assert all(norm is None for (_, weights), norm in found.items() if weights is None)
    for tag, norm in (("ra_in1k", IMAGENET), ("ra4_e3600_r224_in1k", HALF)):
        assert stated_norm("timm:efficientnet_b0", tag, 1000).equals(norm)


def test_a_file_for_timm_counts_as_timms_where_it_has_as_many_classes(tmp_path):
    pytest.importorskip("timm")
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert stated_norm("timm:test_resnet", str(file), 1000).equals(HALF)
    assert stated_norm("timm:test_resnet", str(file), 10) is None  # somebody else trained it


def test_torchvision_says_it_of_its_weights_and_of_their_downloads(tmp_path):
    assert stated_norm("torchvision:resnet18", "IMAGENET1K_V1", 1000).equals(IMAGENET)
    for name in ("googlenet", "inception_v3"):
        found = stated_norm(f"torchvision:{name}", "IMAGENET1K_V1", 1000)
        assert found.equals(HALF)
        assert "transform_input" in found.source
    for name, expected in (("googlenet-1378be20.pth", HALF), ("mine.pth", None)):
        torch.save({}, tmp_path / name)
        found = stated_norm("torchvision:googlenet", str(tmp_path / name), 1000)
        assert found is None if expected is None else found.equals(expected)


def test_the_networks_that_transform_their_input_are_all_of_torchvisions():
    from torchvision import models

    builders = (models.get_model_builder(name) for name in models.list_models(module=models))
    found = {b.__name__ for b in builders if "transform_input" in unwrap(b).__code__.co_consts}
    assert found == set(TRANSFORM_INPUT)


def test_a_file_of_ours_says_it_and_so_does_the_run_beside_it(tmp_path, teacher):
    header = {"mean": json.dumps(OTHER.mean), "std": json.dumps(OTHER.std)}
    own = save_weights(teacher, tmp_path / "a/any-name.safetensors", header)
    assert stated_norm("cifar:resnet8", own, CLASSES).equals(OTHER)
    beside = save_weights(teacher, tmp_path / "b/teacher.safetensors")
    assert stated_norm("cifar:resnet8", beside, CLASSES) is None
    run_file = tmp_path / "b/run.json"
    run_file.write_text(json.dumps({"format": "dfptkd.run/1", "data": OTHER.to_json()}))
    assert stated_norm("cifar:resnet8", beside, CLASSES).equals(OTHER)
    both = {"format": "dfptkd.run/1", "data": DATA.to_json(), "student": OTHER.to_json()}
    run_file.write_text(json.dumps(both))
    assert stated_norm("cifar:resnet8", beside, CLASSES).equals(OTHER)
    run_file.write_text(json.dumps({"format": "another program's", "data": DATA.to_json()}))
    assert stated_norm("cifar:resnet8", beside, CLASSES) is None
    run_file.write_text("{")
    with pytest.raises(DataError, match=r"run\.json"):
        stated_norm("cifar:resnet8", beside, CLASSES)


# The same logits as by hand -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_are_put_right_within_rounding_black_borders_too(dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 8, 8, 3), generator=generator).byte()
    offsets = torch.randint(0, 9, (5, 2), generator=generator)
    options = {"crop": (4, offsets), "flip": torch.arange(5) % 2 == 0, "dtype": dtype}
    given, wanted = (normalize_images(images, n.mean, n.std, **options) for n in (DATA, OTHER))
    entry = Renormalise(DATA, OTHER)
    found = entry.double()(given) if dtype == torch.float64 else entry(given)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    # scale of up to 2.7 on what bf16 has rounded already; constants are fp32's
    eps = 1e-6 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    assert (found - wanted).abs().max() <= eps * wanted.abs().max()


def logits_of(config, data, model):
    """What a method measures of its teacher, and how it chose the statistics."""
    torch.manual_seed(0)
    student = create_model(config.student, num_classes=data.num_classes)
    teacher = {"name": config.teacher.name, "weights": config.teacher.weights}
    norms = norms_of(config, data, teacher, None, pytest.fail)
    method = build_method(config, student, model, data.train.labels, norms.entry()).eval()
    data = replace(data, mean=norms.student.mean, std=norms.student.std)
    return predict(method.teacher_logits, data, batch_size=32), norms, method


def test_googlenet_as_torchvision_runs_it_with_its_transform_input(data, tmp_path):
    """The file that its download would be; the oracle is torchvision's own network."""
    torch.manual_seed(0)
    data = replace(data, num_classes=1000, mean=IMAGENET.mean, std=IMAGENET.std)
    oracle = network("torchvision:googlenet", 1000, side=32)
    torch.save(oracle.state_dict(), tmp_path / "googlenet-1378be20.pth")
    weights = str(tmp_path / "googlenet-1378be20.pth")
    wanted = TeacherConfig(name="torchvision:googlenet", weights=weights)
    config = replace(make_config(tmp_path), teacher=wanted)
    found, norms, _ = logits_of(config, data, copy.deepcopy(oracle))
    oracle.transform_input = True
    images = data.test.images
    with torch.no_grad():
        right, wrong = (oracle(by_hand(images, norm)) for norm in (IMAGENET, HALF))
    scale = right.abs().max()
    assert (found - right).abs().max() <= 1e-4 * scale
    assert (wrong - right).abs().max() > 1e-2 * scale
    assert str(norms).count("; ") == 1


@pytest.mark.parametrize("method", ["kd", "dfpt", "dfpt_plus"])
def test_a_timm_network_of_mean_one_half_in_every_forward_pass(data, tmp_path, method):
    """Measured, in a training step with crops and flips, and on the prompt path's first stages."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    data = replace(data, num_classes=1000)
    oracle = network("timm:test_resnet", 1000, side=32)
    weights = save_weights(oracle, tmp_path / "model.safetensors")
    wanted = TeacherConfig(name="timm:test_resnet", weights=weights, fold_bn=False)
    model = create_model(wanted.name, num_classes=1000, weights=weights)
    config = replace(make_config(tmp_path, method=method), teacher=wanted)
    found, norms, built = logits_of(config, data, model)
    with torch.no_grad():
        right = oracle(by_hand(data.test.images, HALF))
    scale = right.abs().max()
    assert (found - right).abs().max() <= 1e-4 * scale
    assert norms.teacher.equals(HALF)
    assert norms.student.equals(DATA)
    batch = data.train.batch(torch.arange(16), seed=0, epoch=0)
    given, own = (
        normalize_images(
            batch.images, n.mean, n.std, dtype=torch.float32, crop=batch.crop, flip=batch.flip
        )
        for n in (DATA, HALF)
    )
    with torch.no_grad():
        right, student = oracle(own), built.student(given)
        logits = built.all_logits(given)
        assert (built.frozen_outputs(given).logits - right).abs().max() <= 1e-4 * scale
        start = built.frozen_start(given)
        assert (built.frozen_logits(start) - right).abs().max() <= 1e-4 * scale
        if method != "kd":
            plain = build_method(config, create_model(config.student, num_classes=1000), model)
            plain.eval().load_trained_state(
                {
                    k.replace(".stages.0.1.", ".stages.0."): v
                    for k, v in built.trained_state().items()
                }
            )
            prompt = plain.prompt_logits(own)
            assert (logits[1] - prompt).abs().max() <= 1e-4 * prompt.abs().max()
    assert torch.equal(logits[0], student)
    assert (logits[-1] - right).abs().max() <= 1e-4 * scale


# A run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kd", "dfpt"])
def test_a_teacher_of_other_statistics_has_its_own_accuracy(
    data, teacher, tmp_path, capsys, method
):
    config = make_config(tmp_path, teacher, method, max_steps=1)
    out = run(config).out
    record = record_of(out)
    assert record["teacher"]["top1"] == 75.0
    assert record["teacher"]["mean"] == list(OTHER.mean)
    assert record["student"]["std"] == record["data"]["std"] == list(DATA.std)
    said = [line for line in capsys.readouterr().out.splitlines() if "normalised" in line]
    assert said == [
        "images are normalised by the data's mean 0.5071 0.4867 0.4408 and std 0.2675 0.2565 "
        "0.2761; the teacher's images by its own mean 0.3 0.6 0.2 and std 0.1 0.4 0.2 "
        "(--teacher.mean and --teacher.std)"
    ]
    without = replace(config, out=str(tmp_path / "x"))
    without = replace(without, teacher=replace(config.teacher, mean=None, std=None))
    assert record_of(run(without).out)["teacher"]["top1"] < 60


def test_one_half_of_the_statistics_alone_is_refused():
    with pytest.raises(UsageError, match=r"teacher\.mean=.*teacher\.std"):
        TeacherConfig(mean=(0.5,) * 3)
    with pytest.raises(UsageError, match=r"teacher\.std=\(0\.0, 1\.0, 1\.0\): expected three"):
        TeacherConfig(mean=(0.5,) * 3, std=(0.0, 1.0, 1.0))


def test_equal_statistics_change_nothing(data, teacher, tmp_path):
    """Not a module more, and the same bits."""
    ends = []
    for name, norm in (("a", None), ("b", DATA)):
        config = make_config(tmp_path, teacher, out=str(tmp_path / name))
        mean, std = (None, None) if norm is None else (norm.mean, norm.std)
        run(replace(config, teacher=replace(config.teacher, mean=mean, std=std)))
        ends.append(load_checkpoint(tmp_path / name / "checkpoints/step-3").tensors)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert InputNorms(DATA, DATA, DATA).entry() is None


def test_a_student_that_goes_on_from_weights_of_other_statistics_keeps_them(
    data, tmp_path, monkeypatch
):
    """In what it learns from, in eval, in the export, and as a teacher of the next."""
    start = network("cifar:resnet8_s2")
    header = {"mean": json.dumps(OTHER.mean), "std": json.dumps(OTHER.std)}
    weights = save_weights(start, tmp_path / "start.safetensors", header)
    config = make_config(tmp_path, method="ce", student_weights=weights, max_steps=1)
    result = run(config)
    assert record_of(result.out)["student"]["mean"] == list(OTHER.mean)
    model = create_model("cifar:resnet8_s2", num_classes=CLASSES).eval()
    model.load_state_dict(
        {
            k.removeprefix("student."): v
            for k, v in load_checkpoint(result.out / "checkpoints/step-1").tensors.items()
            if k.startswith("student.")
        }
    )
    with torch.no_grad():
        hits = model(by_hand(data.test.images, OTHER)).argmax(1) == data.test.labels
    assert result.last["student_top1"] == pytest.approx(100 * hits.float().mean().item())
    monkeypatch.setattr("dfptkd.engine.eval_checkpoint.load_data", lambda config, device: data)
    assert evaluate_checkpoint(result.out, device="cpu").top1 == result.last["student_top1"]
    (exported,) = export_student(result.out, formats=["safetensors"], say=lambda _: None)
    for file in (exported, result.out / "student.safetensors"):
        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["mean"]) == list(OTHER.mean)
        assert stated_norm("cifar:resnet8_s2", str(file), CLASSES).equals(OTHER)


def as_before(folder):
    """The newest checkpoint as a version that knew nothing of this would have written it."""
    newest = max(folder.glob("checkpoints/step-*"), key=lambda p: int(p.name.split("-")[1]))
    checkpoint = load_checkpoint(newest)
    state = {k: v for k, v in checkpoint.state.items() if k != "norms"}
    save_checkpoint(folder / "checkpoints", checkpoint.tensors, state, keep=2, is_best=False)


def test_an_old_run_goes_on_as_it_was_begun_and_says_so(data, teacher, tmp_path, capsys):
    """Whatever is known of its teacher by now."""
    config = make_config(tmp_path, teacher)
    config = replace(config, teacher=replace(config.teacher, mean=None, std=None))
    whole = run(replace(config, out=str(tmp_path / "whole"))).out
    begun = replace(config, out=str(tmp_path / "a"))
    run(replace(begun, max_steps=1))
    as_before(tmp_path / "a")
    header = {"mean": json.dumps(OTHER.mean), "std": json.dumps(OTHER.std)}
    save_weights(teacher, tmp_path / "theirs.safetensors", header)
    capsys.readouterr()
    run(begun)
    said = capsys.readouterr().out
    assert "the teacher's images have been normalised by mean 0.5071" in said
    assert "by mean 0.3 0.6 0.2 and std 0.1 0.4 0.2" in said
    ends = [load_checkpoint(out / "checkpoints/step-3").tensors for out in (whole, tmp_path / "a")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    new = run(replace(config, out=str(tmp_path / "new"))).out
    assert record_of(new)["teacher"]["top1"] == 75.0


def test_a_run_that_goes_on_keeps_its_own_whatever_became_of_the_file(data, teacher, tmp_path):
    header = {"mean": json.dumps(OTHER.mean), "std": json.dumps(OTHER.std)}
    config = make_config(tmp_path, teacher)
    config = replace(config, teacher=replace(config.teacher, mean=None, std=None))
    save_weights(teacher, tmp_path / "theirs.safetensors", header)
    whole = run(replace(config, out=str(tmp_path / "whole"))).out
    begun = replace(config, out=str(tmp_path / "a"))
    run(replace(begun, max_steps=1))
    save_weights(teacher, tmp_path / "theirs.safetensors")
    run(begun)
    ends = [load_checkpoint(out / "checkpoints/step-3").tensors for out in (whole, tmp_path / "a")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_seeds_of_other_statistics_share_nothing(data, teacher, tmp_path):
    """One was begun before its teacher's were known; each ends as it would alone."""
    config = make_config(tmp_path, teacher)
    config = replace(config, teacher=replace(config.teacher, mean=None, std=None))
    config = replace(config, data=replace(config.data, order_seed=7))
    alone = [run(replace(config, seed=0, out_root=str(tmp_path / "alone"))).out]
    run(replace(config, max_steps=1))
    header = {"mean": json.dumps(OTHER.mean), "std": json.dumps(OTHER.std)}
    save_weights(teacher, tmp_path / "theirs.safetensors", header)
    alone.append(run(replace(config, seed=1, out_root=str(tmp_path / "alone"))).out)
    for own, result in zip(alone, run_seeds(replace(config, seeds=(0, 1))), strict=True):
        ends = [load_checkpoint(out / "checkpoints/step-3").tensors for out in (own, result.out)]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_remembered_logits_of_other_statistics_are_other_logits(
    data, teacher, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ends = []
    for norm, remember in ((DATA, "file"), (OTHER, "off"), (OTHER, "file")):
        config = make_config(tmp_path, teacher, epochs=2, out=str(tmp_path / f"{len(ends)}"))
        own = {"mean": norm.mean, "std": norm.std, "remember": remember}
        out = run(replace(config, teacher=replace(config.teacher, **own))).out
        ends.append(load_checkpoint(out / "checkpoints/step-6").tensors)
    assert len(list((tmp_path / "cache").rglob(f"*{SUFFIX}"))) == 2
    assert all(torch.equal(ends[1][name], ends[2][name]) for name in ends[1])
    assert not torch.equal(ends[0]["student.fc.weight"], ends[1]["student.fc.weight"])


def test_plan_counts_what_the_teachers_images_pass_first():
    pytest.importorskip("timm")
    config = RunConfig(
        method="kd", student="cifar:resnet8", device="cpu",
        data=DataConfig(name="imagenet", image_size=32, num_classes=1000),
        teacher=TeacherConfig(name="timm:test_resnet", weights="pretrained"),
    )  # fmt: skip
    for mean, count in ((None, 1), (HALF.mean, 0)):
        own = replace(config, data=replace(config.data, mean=mean, std=mean))
        twin = stand_in(own, data_facts(own.data))
        step = build_step(twin, load_data(replace(twin.data, limit=64), CPU), CPU)
        assert sum(isinstance(m, Renormalise) for m in step.method.modules()) == count
