"""`dfptkd bench data`: every loader walks the same images, and what is counted is what it says."""

import csv
import time

import pytest
import torch
from sample_images import write_folder

from dfptkd.bench import data as bench
from dfptkd.engine.cli import main
from dfptkd.engine.config import DataConfig
from dfptkd.engine.data import load_data

CPU = torch.device("cpu")
PAIR = "cifar:resnet14>cifar:resnet8"


def make_setting(root, **changes):
    teacher, student = PAIR.split(">")
    values = {
        "data": DataConfig(name="folder", root=str(root), image_size=32, workers=1),
        "batch": 4,
        "steps": 3,
        "train_steps": 2,
        "teacher": teacher,
        "student": student,
        "method": "dfpt",
        "device": CPU,
    }
    return bench.Setting(**{**values, **changes})


@pytest.fixture
def root(tmp_path):
    write_folder(tmp_path / "images", train=5)
    return tmp_path / "images"


def test_all_loaders_walk_the_same_images(root):
    setting = make_setting(root)
    found = {}
    for loader in ("torchvision", "synthetic"):
        walk = bench.Walk(load_data(setting.config(loader).data, CPU), setting)
        found[loader] = torch.cat([b.indices for b in walk.batches(6)])
    assert torch.equal(*found.values())
    assert len(found["torchvision"]) == 7 * 4  # the first batch is not timed
    for epoch in found["torchvision"].split(8):  # two batches of four; two images are left out
        assert len(epoch.unique()) == len(epoch)


def test_rows_are_of_a_batch_and_of_a_step(root):
    rows = bench.measure(make_setting(root), ["torchvision", "synthetic"], rounds=3)
    assert [(r.provider, r.passes) for r in rows] == [
        ("torchvision", "loading"),
        ("synthetic", "loading"),
        ("torchvision", "step"),
        ("torchvision", "waiting"),
        ("synthetic", "step"),
        ("synthetic", "waiting"),
    ]
    assert {r.n for r in rows} == {3}
    assert {r.shape for r in rows} == {"4x3x32x32"}
    assert {r.contract for r in rows} == {"1 workers"}
    for step, waiting in ((rows[2], rows[3]), (rows[4], rows[5])):
        assert 0 < waiting.median_us < step.median_us


def test_a_slow_loader_is_seen_in_loading_and_in_waiting(root, monkeypatch):
    def slow(self, indices, **options):
        time.sleep(0.05)
        return batch(self, indices, **options)

    data = load_data(make_setting(root).config("synthetic").data, CPU)
    batch = type(data.train).batch
    monkeypatch.setattr(type(data.train), "batch", slow)
    rows = bench.measure(make_setting(root, train_steps=5), ["synthetic"], rounds=1)
    loading, step, waiting = (r.median_us for r in rows)
    assert loading >= 50_000
    assert 50_000 <= waiting < step
    assert waiting < 200_000  # of a step, not of all five


def test_without_training_steps_no_network_is_built(root, monkeypatch):
    monkeypatch.setattr(bench, "build_step", None)
    rows = bench.measure(make_setting(root, train_steps=0), ["synthetic"], rounds=1)
    assert [r.passes for r in rows] == ["loading"]


def test_command(root, tmp_path, capsys):
    out = tmp_path / "results.csv"
    options = [
        "--data.root", str(root), "--image-size", "32", "--batch", "4", "--workers", "1",
        "--steps", "2", "--rounds", "1", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    loaders = ["--loaders", "torchvision,synthetic"]
    assert main(["bench", "data", *options, *loaders, "--train-steps", "1", "--pair", PAIR]) == 0
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["kernel"] for row in rows} == {"data:folder", f"data:dfpt:{PAIR}"}
    printed = capsys.readouterr().out
    assert "waits for data" in printed
    speed = 4 / float(rows[0]["median_us"]) * 1e6
    assert f"{speed:,.0f}" in printed
    assert main(["bench", "data", *options, *loaders]) == 0
    assert "waits for data" not in capsys.readouterr().out


@pytest.mark.parametrize("is_there", [True, False])
def test_loaders_that_are_there(is_there, monkeypatch, capsys):
    def check(config):
        if not is_there:
            raise bench.UsageError("no DALI")

    monkeypatch.setattr(bench, "check_loader", check)
    loaders = bench._available(None)
    assert loaders == [n for n in bench.LOADERS if is_there or n != "dali"]
    assert ("DALI is not installed" in capsys.readouterr().out) is not is_there


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 3, "no data folder: set --data.root"),
        (["--data.root", "/nowhere"], 3, "/nowhere: no such folder"),
        (["--loaders", "pillow"], 2, "--loaders pillow: expected some of"),
        (["--pair", "resnet34"], 2, "expected TEACHER>STUDENT"),
        (["--batch", "0"], 2, "expected a whole number of at least 1"),
        (["--method", "magic"], 2, "magic"),
    ],
)
def test_refusals_are_a_line(options, code, message, capsys):
    assert main(["bench", "data", "--device", "cpu", *options]) == code
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
