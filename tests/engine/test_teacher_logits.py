"""Remembered teacher logits: the bits of a run without, and never another teacher's or image's."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfptkd.engine import logits_file, teacher_logits
from dfptkd.engine import train as train_module
from dfptkd.engine.checkpoint import load_checkpoint
from dfptkd.engine.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StepConfig,
    TeacherConfig,
)
from dfptkd.engine.data import load_data
from dfptkd.engine.errors import UsageError
from dfptkd.engine.methods.kd import KnowledgeDistillation
from dfptkd.engine.metrics import normaliser
from dfptkd.engine.models.dual_path import DualPathTeacher, FrozenOutputs, Trunk
from dfptkd.engine.models.frozen import FrozenConv2d
from dfptkd.engine.teacher import teacher_run
from dfptkd.engine.teacher_logits import TeacherLogits, expected_hits, outlook
from dfptkd.engine.train import run, run_seeds
from tests.sample_images import encoded, picture

CPU = torch.device("cpu")
IMAGES, STEPS = 24, 12  # three steps of 8 images an epoch
AUGMENTATIONS = {
    "flip": {},
    "crop and flip": {"crop_padding": 1},
    "neither": {"flip": False},
}


def make_config(root: Path, method: str = "kd", remember: str = "off", **changes) -> RunConfig:
    """Twelve steps in four epochs, by kernels that no measurement chooses."""
    data = changes.pop("data", {})
    config = RunConfig(
        recipe="tiny",
        method=method,
        student="cifar:resnet8_s2",
        epochs=4,
        global_batch=8,
        eval_batch=16,
        eval_every=4,
        checkpoint_every=4,
        device="cpu",
        kernels="reference",
        out_root=str(root / "runs"),
        data=replace(
            DataConfig(name="synthetic", num_classes=4, image_size=16, limit=IMAGES), **data
        ),
        teacher=TeacherConfig(
            name="cifar:resnet8",
            weights=str(root / "teacher/teacher.safetensors"),
            epochs=1,
            global_batch=8,
            remember=remember,
        ),
        optim=OptimConfig(lr=0.02, milestones=(0.5,)),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder that holds two teachers, and no user's cache of logits."""
    root = tmp_path_factory.mktemp("logits")
    config = teacher_run(make_config(root))
    run(replace(config, out=str(root / "teacher")))
    run(replace(config, out=str(root / "other"), seed=1))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache, a test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dfptkd/teacher-logits"


@pytest.fixture(scope="module")
def without(root):
    """A run that remembers nothing, made once for all that ask for the same."""
    made = {}

    def get(method="kd", **changes):
        key = repr((method, sorted(changes.items())))
        if key not in made:
            out = str(root / f"without{len(made)}")
            made[key] = run(make_config(root, method, out=out, **changes))
        return made[key]

    return get


def end_of(result):
    """Networks, optimiser, statistics: everything of the last checkpoint."""
    folder = result if isinstance(result, Path) else result.out
    return load_checkpoint(folder / "checkpoints" / f"step-{STEPS}").tensors


def assert_same(a, b):
    a, b = end_of(a), end_of(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def are_same(a, b):
    a, b = end_of(a), end_of(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def messages(result) -> list[str]:
    """What events.jsonl says of logits."""
    path = result.out / "events.jsonl"  # made by the first event
    lines = path.read_text().splitlines() if path.exists() else []
    events = [json.loads(line) for line in lines]
    return [event["message"] for event in events if event["kind"] == "teacher_logits"]


def shares(result) -> list[float]:
    """Percent of the images of each epoch that were known."""
    found = [re.match(r"([\d.]+) % of", message) for message in messages(result)]
    return [float(match[1]) for match in found if match]


def known_at_start(result) -> int:
    found = [m for m in messages(result) if re.match(r"\d+ of \d+ known", m)]
    return int(found[-1].split()[0])


# The bits ----------------------------------------------------------------------------------------

CASES = [(method, "crop and flip") for method in ("kd", "dkd", "dfpt", "dfpt_plus")]
CASES += [("dist", "flip"), ("kd", "flip"), ("kd", "neither"), ("dfpt", "neither")]


@pytest.mark.parametrize(("method", "augmentation"), CASES)
def test_a_run_ends_with_the_bits_of_one_without(root, tmp_path, without, method, augmentation):
    data = AUGMENTATIONS[augmentation]
    plain_run = without(method, data=data)
    result = run(make_config(root, method, "memory", data=data, out=str(tmp_path / "b")))
    assert_same(plain_run, result)
    assert shares(plain_run) == []
    first, *later = shares(result)
    assert first == 0
    if augmentation == "neither":  # the first step, which all is settled in, leaves none
        assert later == [pytest.approx(100 * 16 / 24, abs=0.1), 100, 100]
    else:
        assert max(later) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"method": "dfpt", "precision": "bf16", "optim": OptimConfig(lr=0.02, ema_decay=0.9)},
        {"method": "dfpt", "loss": LossConfig(mixture_control=True)},
        {"method": "dfpt_plus", "loss": LossConfig(decoupled=True, crd=0.8, crd_negatives=8)},
    ],
    ids=["accumulate", "bf16, average", "mixture", "combined"],
)
def test_whatever_else_a_run_does(root, tmp_path, without, changes):
    plain_run = without(**changes)
    result = run(make_config(root, remember="memory", out=str(tmp_path / "b"), **changes))
    assert_same(plain_run, result)
    assert max(shares(result)) > 0


@pytest.mark.parametrize(("method", "order_seed"), [("kd", None), ("kd", 7), ("dfpt", None)])
def test_seeds_share_what_they_know(root, tmp_path, without, method, order_seed):
    data = {"order_seed": order_seed}
    alone = [without(method, seed=s, data=data) for s in (0, 1)]
    config = make_config(root, method, "memory", seeds=(0, 1), data=data)
    results = run_seeds(replace(config, out_root=str(tmp_path)))
    for own, result in zip(alone, results, strict=True):
        assert_same(own, result)
    one = run(make_config(root, method, "memory", data=data, out=str(tmp_path / "one")))
    both = sum(shares(results[0]))
    assert shares(results[1]) == []  # counted once
    # With an order in common each batch is asked for once.
    assert both == sum(shares(one)) if order_seed else both > sum(shares(one))


def test_a_run_that_goes_on_in_the_midst_of_an_epoch(root, tmp_path, without):
    config = make_config(root, remember="file", out=str(tmp_path / "b"))
    run(replace(config, max_steps=7))
    result = run(config)
    assert_same(without(), result)
    assert known_at_start(result) > 0
    # It may begin without, go on with it, and end without.
    config = make_config(root, out=str(tmp_path / "c"))
    run(replace(config, max_steps=2))
    run(replace(config, teacher=replace(config.teacher, remember="memory"), max_steps=7))
    assert_same(without(), run(config))


def test_nothing_of_the_teacher_runs_where_all_is_known(root, tmp_path, monkeypatch):
    calls = []
    forward = FrozenConv2d.forward

    def counting(self, x):
        calls.append(len(x))
        return forward(self, x)

    config = make_config(root, remember="memory", data={"flip": False}, out=str(tmp_path / "a"))
    ended = []

    def end_of_epoch(self, means):
        keep(self, means)
        if not ended:
            monkeypatch.setattr(FrozenConv2d, "forward", counting)
        ended.append(len(calls))

    keep = train_module.Trainer.end_of_epoch
    monkeypatch.setattr(train_module.Trainer, "end_of_epoch", end_of_epoch)
    run(replace(config, eval_every=100))
    assert ended[1] > ended[0]  # the images of the first step
    assert ended[1] == ended[2]


@pytest.mark.parametrize("known", [True, False])
def test_dfpt_runs_the_stages_of_both_paths_and_no_others(root, known, monkeypatch):
    """From the second pair on the original path is left out; the prompt path is not."""
    teacher = DualPathTeacher(train_module.create_model("cifar:resnet8", num_classes=4))
    images = torch.randn(8, 3, 16, 16)
    seen = []
    original = Trunk.finish
    monkeypatch.setattr(Trunk, "finish", lambda self, x, n: seen.append(n) or original(self, x, n))
    start = teacher.frozen_start(images)
    logits = torch.zeros(8, 4) if known else teacher.frozen_logits(start)
    found = teacher(images, FrozenOutputs(start, logits))
    assert seen == ([] if known else [1])
    assert torch.equal(found.teacher_logits, logits)
    plain = teacher.frozen_outputs(images)
    assert torch.equal(plain.shared, start)
    assert known or torch.equal(plain.logits, logits)


# What must not go unseen --------------------------------------------------------------------------


def test_a_wrong_row_changes_the_run(root, tmp_path, without, monkeypatch):
    """Control: the comparisons of this file can fail."""
    plain_run = without(data={"flip": False})
    call = TeacherLogits.__call__

    def spoil(self, images, places):
        if self.sizes and self.known[places].all():
            self.table[places[0], 0] += 0.5
        return call(self, images, places)

    monkeypatch.setattr(TeacherLogits, "__call__", spoil)
    config = make_config(root, remember="memory", data={"flip": False}, out=str(tmp_path / "b"))
    assert not are_same(plain_run, run(config))


def test_a_wrong_row_that_is_computed_again_ends_the_remembering(
    root, tmp_path, without, monkeypatch, capsys
):
    call = TeacherLogits.__call__

    def spoil(self, images, places):
        known = self.known[places] if self.sizes else torch.zeros(len(places)).bool()
        if known.any() and not known.all():
            self.table += 1.0
            self.sizes = self.sizes[:1]  # the whole batch, known ones too
        return call(self, images, places)

    monkeypatch.setattr(TeacherLogits, "__call__", spoil)
    result = run(make_config(root, remember="memory", out=str(tmp_path / "b")))
    assert "no longer remembered: the teacher gives other logits" in capsys.readouterr().out
    assert_same(without(), result)


def by_row(self, images):
    """A teacher that computes each image by itself."""
    return images.flatten(1)[:, :4].contiguous()


def by_place(self, images):
    return by_row(self, images) + 1e-3 * torch.arange(len(images))[:, None]


def by_size(self, images):
    return by_row(self, images) * (1.0 if len(images) >= 6 else 1.001)


@pytest.mark.parametrize(
    ("teacher_logits", "sizes"), [(by_row, (8, 6, 4, 2, 1)), (by_size, (8, 6)), (by_place, ())]
)
def test_sizes_that_give_other_bits_are_not_used(
    root, tmp_path, monkeypatch, capsys, teacher_logits, sizes
):
    asked, found = [], []

    def counting(self, images):
        asked.append(len(images))
        return teacher_logits(self, images)

    def agreeing(self, *args):
        found.append(original(self, *args))
        asked.clear()
        return found[-1]

    original = TeacherLogits._agreeing_sizes
    monkeypatch.setattr(KnowledgeDistillation, "teacher_logits", counting)
    monkeypatch.setattr(TeacherLogits, "_agreeing_sizes", agreeing)
    plain_run = run(make_config(root, out=str(tmp_path / "a")))
    asked.clear()
    result = run(make_config(root, remember="memory", out=str(tmp_path / "b")))
    assert found == [sizes]
    assert_same(plain_run, result)
    said = capsys.readouterr().out
    assert ("depend on its place in the batch" in said) == (sizes == ())
    steps = [size for size in asked if size <= 8]  # an evaluation has 16
    assert set(steps) <= set(sizes or (8,))
    assert len(set(steps)) > 1 or len(sizes) < 2


# Files -------------------------------------------------------------------------------------------


def test_a_second_run_finds_what_the_first_has_left(root, tmp_path, cache):
    own = {"kernels": "auto"}  # measured by the first, known to the others
    first = run(make_config(root, remember="file", out=str(tmp_path / "a"), **own))
    assert known_at_start(first) == 0
    again = run(make_config(root, remember="file", out=str(tmp_path / "b"), **own))
    assert shares(again) == [100, 100, 100, 100]
    assert_same(first, again)
    assert_same(first, run(make_config(root, out=str(tmp_path / "c"), **own)))
    other = run(make_config(root, "dkd", "file", seed=1, out=str(tmp_path / "d"), **own))
    assert known_at_start(other) == known_at_start(again) > 0  # no matter which method or seed
    assert len(list(cache.iterdir())) == 1


def test_what_gives_other_logits_is_another_file(root, tmp_path, cache):
    first = run(make_config(root, remember="file", out=str(tmp_path / "first")))
    assert known_at_start(first) == 0
    config = make_config(root, remember="file")
    other_teacher = str(root / "other/teacher.safetensors")
    other = {
        "teacher": {"teacher": replace(config.teacher, weights=other_teacher)},
        "images": {"data": replace(config.data, limit=None, train_limit=IMAGES + 4)},
        "precision": {"precision": "bf16"},
        "flip": {"data": replace(config.data, flip=False)},
        "batch": {"global_batch": 4},
    }
    for i, (name, changes) in enumerate(other.items(), start=2):
        own = {"out": str(tmp_path / name), "max_steps": 2, **changes}
        result = run(replace(config, **own))
        assert known_at_start(result) == 0, name
        assert len(list(cache.iterdir())) == i, name
    again = run(replace(config, out=str(tmp_path / "again")))  # control
    assert known_at_start(again) > 0
    assert_same(first, again)


@pytest.mark.parametrize("harm", ["truncated", "changed", "foreign"])
def test_a_damaged_file_is_said_once_and_made_anew(root, tmp_path, cache, capsys, harm):
    first = run(make_config(root, remember="file", out=str(tmp_path / "a")))
    (path,) = cache.iterdir()
    data = bytearray(path.read_bytes())
    if harm == "truncated":
        data = data[:-10]
    elif harm == "changed":
        data[-10] ^= 1
    else:
        data = bytearray(b"something else\n" * 100)
    path.write_bytes(data)
    capsys.readouterr()
    again = run(make_config(root, remember="file", out=str(tmp_path / "b")))
    said = capsys.readouterr().out
    assert said.count("set aside" if harm == "foreign" else "damaged from byte") == 1
    assert str(path) in said
    assert_same(first, again)
    third = run(make_config(root, remember="file", out=str(tmp_path / "c")))
    assert "warning" not in capsys.readouterr().out
    assert shares(third) == [100, 100, 100, 100]


def image_folder(root: Path) -> Path:
    for split, count in (("train", 6), ("val", 2)):
        for label in range(4):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = picture(10 * label + i, (16, 16))
                (folder / f"{i}.png").write_bytes(encoded(image, "PNG"))
    return root


def folder_config(root, data_root, out, remember="auto"):
    """Two forms an image."""
    data = DataConfig(
        name="folder", root=str(data_root), loader="device", image_size=16, crop_padding=0,
        workers=0,
    )  # fmt: skip
    return replace(make_config(root, remember=remember, out=str(out)), data=data)


def test_the_file_lies_beside_the_data(root, tmp_path, cache):
    data_root = image_folder(tmp_path / "data")
    first = run(folder_config(root, data_root, tmp_path / "a"))
    assert len(list((data_root / ".dfptkd/teacher-logits").glob("*.logits"))) == 1
    assert not cache.exists()
    again = run(folder_config(root, data_root, tmp_path / "b"))  # hidden: no class of the data
    assert known_at_start(again) > 0
    assert_same(first, again)
    # One changed pixel is other data.
    path = data_root / "train/class0/0.png"
    path.write_bytes(encoded(picture(99, (16, 16)), "PNG"))
    assert known_at_start(run(folder_config(root, data_root, tmp_path / "c"))) == 0


def test_a_data_folder_that_takes_nothing_leaves_the_users_cache(root, tmp_path, cache, capsys):
    data_root = image_folder(tmp_path / "data")
    (data_root / ".dfptkd").write_text("in the way")  # refuses root, too, as a read-only one would
    plain_run = run(folder_config(root, data_root, tmp_path / "a", "off"))
    result = run(folder_config(root, data_root, tmp_path / "b"))
    assert_same(plain_run, result)
    assert len(list(cache.glob("*.logits"))) == 1
    assert "warning" not in capsys.readouterr().out


def test_no_folder_at_all_leaves_the_memory(root, tmp_path, without, cache, capsys):
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("in the way")
    result = run(make_config(root, remember="file", out=str(tmp_path / "b")))
    assert "teacher logits are in memory alone: " in capsys.readouterr().out
    assert_same(without(), result)
    assert max(shares(result)) > 0


def test_a_disk_that_fills_up_ends_the_file_and_not_the_run(
    root, tmp_path, without, cache, monkeypatch, capsys
):
    append = logits_file.LogitsFile._append

    def full(self, file, new):
        if len(new[0]):
            raise OSError(28, "No space left on device")
        append(self, file, new)

    monkeypatch.setattr(logits_file.LogitsFile, "_append", full)
    result = run(make_config(root, remember="file", out=str(tmp_path / "b")))
    assert capsys.readouterr().out.count("could not be written (No space left") == 1
    assert_same(without(), result)
    assert max(shares(result)) > 0


# When it pays ------------------------------------------------------------------------------------


def look(config=None, **changes):
    config = RunConfig(method="kd") if config is None else config
    facts = {
        "images": 1000, "forms": 50, "num_classes": 10, "steps": 150, "steps_per_epoch": 15,
        "mode": "eager", "device": CPU, "available": 10**9,
    }  # fmt: skip
    return outlook(config, **{**facts, **changes})


def remembering(how, **changes):
    config = RunConfig(method="kd")
    teacher = replace(config.teacher, remember=how)
    return replace(config, **{"teacher": teacher, **changes})


def test_hits_are_those_of_a_simulation():
    generator = torch.Generator().manual_seed(0)
    for forms, draws in ((1, 4), (2, 10), (50, 10), (162, 240)):
        drawn = torch.randint(forms, (2000, draws), generator=generator)
        distinct = torch.stack([(drawn == form).any(dim=1) for form in range(forms)]).sum()
        assert expected_hits(forms, draws) == pytest.approx(
            1 - distinct.item() / drawn.numel(), abs=0.01
        )
    assert expected_hits(50, 0) == 0
    assert expected_hits(50, 0.25) == 0  # an epoch that stops after a quarter of the images


def test_what_is_foreseen():
    found = look()
    assert found.obstacle is None
    assert found.bytes == 1000 * 50 * (10 * 4 + 2)
    assert found.hits == pytest.approx(expected_hits(50, 10))
    assert found.file
    assert look(remembering("auto", precision="bf16")).bytes == 1000 * 50 * (10 * 2 + 2)
    three = remembering("auto", seeds=(0, 1, 2))
    assert look(three).hits == pytest.approx(expected_hits(50, 30))
    shared = replace(three, data=DataConfig(order_seed=0))
    assert look(shared).hits == found.hits  # their batches are the same ones
    assert not look(remembering("memory")).file
    # `auto` leaves no large file; who asks for one gets it.
    large = {"images": 50_000, "forms": 162, "num_classes": 100, "available": 10**11}
    large |= {"steps": 240 * 15}
    assert not look(**large).file
    assert look(**large).obstacle is None
    assert look(remembering("file"), **large).file


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        ({}, {"forms": None}, "no fixed number of forms"),
        ({"data": DataConfig(start_size=32)}, {}, "no fixed number of forms"),
        ({"method": "dfpt", "step": StepConfig(joint_paths=True)}, {}, "step.joint_paths"),
        ({}, {"device": torch.device("cuda"), "mode": "graph"}, "GPU"),
        ({"method": "dfpt"}, {"mode": "compile"}, "one region"),
    ],
)
def test_what_cannot_be_is_left_or_refused(config, changes, reason):
    assert reason in look(remembering("auto", **config), **changes).obstacle
    for how in ("memory", "file"):
        with pytest.raises(UsageError, match=f"teacher.remember='{how}'.*{reason}"):
            look(remembering(how, **config), **changes)
    assert look(remembering("off", **config), **changes).obstacle == "--teacher.remember off"


def test_what_does_not_pay_is_left_to_those_who_ask(cache):
    few = {"steps": 15}  # one epoch
    assert "0.0 % of the images" in look(**few).obstacle
    assert look(remembering("memory"), **few).obstacle is None
    cache.mkdir(parents=True)
    (cache / "0.logits").touch()  # others have left some
    assert look(**few).obstacle is None
    synthetic = DataConfig(name="synthetic")
    assert "synthetic" in look(remembering("auto", data=synthetic)).obstacle
    assert look(remembering("memory", data=synthetic)).obstacle is None


@pytest.mark.parametrize("how", ["auto", "memory", "file"])
def test_memory_that_does_not_allow_it(how):
    need = look().bytes
    assert look(remembering(how), available=4 * need).obstacle is None
    assert "a quarter of the free memory" in look(remembering(how), available=4 * need - 4).obstacle


def test_a_run_without_the_memory_goes_on_without(root, tmp_path, without, monkeypatch, capsys):
    monkeypatch.setattr(train_module, "available_bytes", lambda device: 100)
    result = run(make_config(root, remember="memory", out=str(tmp_path / "b")))
    assert "teacher logits are not remembered: 0.0 MB, and a quarter" in capsys.readouterr().out
    assert_same(without(), result)
    assert messages(result) == []


# Places ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_a_place_is_one_form_of_one_image(data):
    config = DataConfig(name="synthetic", num_classes=4, image_size=8, limit=6)
    split = load_data(replace(config, **data), CPU)
    normalise = normaliser(split)
    train, seen = split.train, {}
    for epoch in range(60):
        batch = train.batch(torch.arange(6), seed=0, epoch=epoch)
        for place, pixels in zip(batch.places().tolist(), normalise(batch), strict=True):
            assert 0 <= place < len(train) * train.num_forms
            assert torch.equal(seen.setdefault(place, pixels), pixels)
    pictures = {pixels.numpy().tobytes() for pixels in seen.values()}
    assert len(pictures) == len(seen)
    assert len(seen) == 6 * train.num_forms or "crop_padding" in data  # 18 forms: not all met
    assert len(seen) > 5 * train.num_forms


def test_which_splits_have_forms_and_say_what_they_hold(tmp_path):
    def load(**changes):
        config = DataConfig(name="folder", root=str(root), image_size=16, workers=0)
        return load_data(replace(config, **changes), CPU).train

    root = image_folder(tmp_path / "data")
    resident = load(loader="device")
    assert resident.num_forms == 2 * 5**2  # an eighth of the side
    assert load(loader="device", flip=False, crop_padding=0).num_forms == 1
    assert load(loader="torchvision").num_forms is None
    assert load(loader="synthetic").num_forms is None
    assert resident.content() == load(loader="device", flip=False).content()
    assert resident.content() != load(loader="device", image_size=15).content()
    assert resident.content() != load(loader="device", train_limit=8).content()
    resident.images[0, 0, 0, 0] ^= 1
    assert resident.content() != load(loader="device").content()


def test_the_users_cache_is_asked_for_by_its_variable(monkeypatch, tmp_path):
    config = remembering("auto", data=DataConfig(root=str(tmp_path)))
    assert teacher_logits.folders(config) == [
        tmp_path / ".dfptkd/teacher-logits",
        Path(os.environ["XDG_CACHE_HOME"]) / "dfptkd/teacher-logits",
    ]
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert teacher_logits.folders(RunConfig()) == [
        Path("~/.cache/dfptkd/teacher-logits").expanduser()
    ]
