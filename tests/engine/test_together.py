"""Several seeds at once: each ends as it would have alone, and shares what is the same for all."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfptkd.engine import log as log_module
from dfptkd.engine import together
from dfptkd.engine import train as train_module
from dfptkd.engine.checkpoint import load_checkpoint
from dfptkd.engine.config import DataConfig, OptimConfig, RunConfig, StepConfig, TeacherConfig
from dfptkd.engine.errors import NumericError, UsageError
from dfptkd.engine.models.dual_path import Trunk
from dfptkd.engine.models.parts import Remembered
from dfptkd.engine.teacher import teacher_run
from dfptkd.engine.train import run, run_seeds

SEEDS = (0, 3, 5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run(teacher_run(make_config(root)))
    return root


def make_config(root: Path, method: str = "dfpt", **changes) -> RunConfig:
    """Six steps of 8 synthetic images in two epochs; the student drops features at random."""
    config = RunConfig(
        recipe="tiny",
        method=method,
        student="cifar:resnet8_s2",
        epochs=2,
        global_batch=8,
        eval_batch=16,
        device="cpu",
        out_root=str(root),
        data=DataConfig(name="synthetic", num_classes=4, image_size=16, limit=24),
        teacher=TeacherConfig(name="cifar:resnet8", epochs=1, global_batch=8),
        optim=OptimConfig(lr=0.02, milestones=(0.5,)),
    )
    return replace(config, **changes)


def end_of(folder: Path):
    return load_checkpoint(folder / "checkpoints" / "step-6").tensors


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("order_seed", [None, 7])
@pytest.mark.parametrize("method", ["ce", "kd", "dkd", "dfpt", "dfpt_plus"])
def test_each_seed_has_the_bits_of_its_own_run(root, tmp_path, method, order_seed):
    config = make_config(root, method)
    config = replace(config, data=replace(config.data, order_seed=order_seed))
    alone = [run(replace(config, seed=s, out=str(tmp_path / f"alone{s}"))).out for s in SEEDS]
    together_root = tmp_path / "together"
    teacher = train_module.choose_teacher(config).weights if method != "ce" else None
    config = replace(
        config, out_root=str(together_root), teacher=replace(config.teacher, weights=teacher)
    )
    results = run_seeds(replace(config, seeds=SEEDS))
    for own, result in zip(alone, results, strict=True):
        assert_same(end_of(own), end_of(result.out))
    first, second = (end_of(r.out)["student.fc.weight"] for r in results[:2])
    assert not torch.equal(first, second)  # control: seeds do differ


def test_a_stream_of_its_own_for_every_seed():
    """What draws at random between the turns (dropout) draws as in a run of its own."""

    def draws(seed, found):
        torch.manual_seed(seed)
        state = together.RandomState(torch.device("cpu"))

        def steps():
            for _ in range(3):
                found.append(torch.rand(4))
                yield

        return steps(), state

    alone, both = ([], []), ([], [])
    for seed in (0, 1):
        steps, state = draws(seed, alone[seed])
        together.take_turns([steps], [state])
    runs = [draws(seed, both[seed]) for seed in (0, 1)]
    together.take_turns([r for r, _ in runs], [s for _, s in runs])
    for a, b in zip(alone, both, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("order_seed", "calls"), [(7, 6), (None, 12)])
def test_the_original_path_runs_once_for_a_batch_that_seeds_share(
    root, tmp_path, monkeypatch, order_seed, calls
):
    count = 0
    forward = Trunk.forward

    def counting(self, images):
        nonlocal count
        count += images.device.type != "meta"  # where it is found out what fits
        return forward(self, images)

    monkeypatch.setattr(Trunk, "forward", counting)
    config = make_config(root)
    weights = train_module.choose_teacher(config).weights
    config = replace(
        config,
        out_root=str(tmp_path),
        seeds=(0, 1),
        data=replace(config.data, order_seed=order_seed),
        teacher=replace(config.teacher, weights=weights),
    )
    run_seeds(config)
    assert count == calls + 2  # each certificate looks at images of its own


def test_a_batch_is_made_once_and_a_latecomer_gets_its_own(root):
    data = train_module.load_data(make_config(root).data, torch.device("cpu"))
    made = []
    original = data.train.batch

    def counting(indices, *, seed, epoch, side):
        made.append(epoch)
        return original(indices, seed=seed, epoch=epoch, side=side)

    data.train.batch = counting
    shared = together.SharedBatches(data.train, batch_size=8, seed=0, workers=0)
    first, second = shared.epoch(0, 0), shared.epoch(0, 0)
    for a, b in zip(first, second, strict=True):
        assert a is b
    assert len(made) == 3
    (late,) = shared.epoch(0, 2)
    assert torch.equal(late.indices, a.indices)


def test_one_seed_that_fails_does_not_stop_the_others(root, tmp_path, monkeypatch):
    check = train_module.Trainer.check_skips

    def fail_seed_1(self):
        if self.config.seed == 1:
            raise NumericError("seed 1 diverged")
        check(self)

    monkeypatch.setattr(train_module.Trainer, "check_skips", fail_seed_1)
    with pytest.raises(NumericError, match="seed 1 diverged"):
        run_seeds(make_config(root, "ce", out_root=str(tmp_path), seeds=(0, 1, 2)))
    for seed, is_done in ((0, True), (1, False), (2, True)):
        assert (tmp_path / f"tiny-ce-seed{seed}/student.safetensors").is_file() == is_done


def test_a_seed_that_crashes_does_not_take_the_others_with_it(root, tmp_path, monkeypatch):
    status = train_module.Trainer.check_saturation

    def crash(self, epoch):
        if self.config.seed == 0:
            raise RuntimeError("out of memory")
        status(self, epoch)

    monkeypatch.setattr(train_module.Trainer, "check_saturation", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_seeds(make_config(root, "ce", out_root=str(tmp_path), seeds=(0, 1)))
    assert (tmp_path / "tiny-ce-seed1/student.safetensors").is_file()


def test_seeds_go_on_from_where_each_stands(root, tmp_path):
    """One finished, one stopped half-way, one not begun: all end as if run alone."""
    config = make_config(root, "ce", out_root=str(tmp_path / "a"))
    run(config)
    run(replace(config, seed=1, max_steps=4))
    results = run_seeds(replace(config, seeds=(0, 1, 2)))
    assert [r.step for r in results] == [6, 6, 6]
    for seed, result in enumerate(results):
        alone = run(replace(config, seed=seed, out_root=str(tmp_path / "b")))
        assert_same(end_of(alone.out), end_of(result.out))


def test_one_folder_for_several_seeds_is_refused(root, tmp_path):
    with pytest.raises(UsageError, match="--out-root"):
        run_seeds(make_config(root, "ce", out=str(tmp_path), seeds=(0, 1)))


def test_remembered_asks_for_the_object_not_for_its_value():
    calls = []
    double = Remembered(lambda x: calls.append(x) or 2 * x)
    a, b = torch.ones(2), torch.ones(2)
    assert double(a) is double(a)
    assert len(calls) == 1
    double(b)
    assert len(calls) == 2


class Clock:
    """Stands for the module `time`: moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


def test_a_progress_line_says_the_speed_that_the_epochs_line_says(
    root, tmp_path, monkeypatch, capsys
):
    """Of a run alone; what is left is by the clock, with the turns of the others."""
    clock = Clock()
    for module in (train_module, log_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(log_module, "_PLAIN_LINE_S", 0.0)
    step = train_module.TrainStep.__call__

    def timed(self, batch, number):
        step(self, batch, number)
        clock.now += {0: 2.0, 1: 14.0}[self.config.seed]  # 4 images a second, and 0.57

    monkeypatch.setattr(train_module.TrainStep, "__call__", timed)
    run_seeds(make_config(root, "ce", out_root=str(tmp_path), seeds=(0, 1)))
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    mine = [line for line in lines if line.startswith("seed 0")]
    assert len(mine) == 6 + 2
    assert all("  4 images/s  " in line for line in mine)
    assert all("  1 images/s  " in line for line in lines if line not in mine)
    # After step 2 of 6: the other's turn is over, 16 s for both.
    (second,) = [line for line in mine if "step 2/6" in line]
    assert second.endswith("  1:04 left")
    (epoch,) = [line for line in mine if "epoch 1/2" in line]
    assert epoch.endswith("  0:48 left")


def test_terminal_lines_name_the_seed(root, tmp_path, capsys):
    run_seeds(make_config(root, "ce", out_root=str(tmp_path), seeds=(0, 1)))
    out = capsys.readouterr().out
    assert "seed 0: " in out
    assert "seed 1: finished" in out
    run(make_config(root, "ce", out_root=str(tmp_path / "one"), step=StepConfig(mode="eager")))
    assert "seed 0: " not in capsys.readouterr().out
