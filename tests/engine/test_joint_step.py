"""Steps of several seeds as one: each ends as it would have alone, within rounding."""

import functools
import json
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from dfptkd.engine import joint_step
from dfptkd.engine import train as train_module
from dfptkd.engine.checkpoint import load_checkpoint, optimizer_tensors
from dfptkd.engine.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StepConfig,
    TeacherConfig,
)
from dfptkd.engine.data import Batch, load_data, train_batches
from dfptkd.engine.errors import NumericError, Stopped
from dfptkd.engine.joint_step import JointStep
from dfptkd.engine.metrics import Evaluator
from dfptkd.engine.models.dual_path import FrozenOutputs, Trunk
from dfptkd.engine.stand_in import build_step
from dfptkd.engine.step import TrainStep
from dfptkd.engine.teacher import teacher_run
from dfptkd.engine.together import RandomState, take_turns
from dfptkd.engine.train import run, run_seeds

CPU = torch.device("cpu")
DATA_CONFIG = DataConfig(name="synthetic", num_classes=10, image_size=16, limit=64)
DATA = load_data(DATA_CONFIG, CPU)
SEEDS = (0, 3, 5)
STEPS = 3
# In fp32: a convolution of more images may add up in another order, and steps enlarge that.
ROUNDING = 1e-3


# Steps --------------------------------------------------------------------------------------------


def make_steps(method="dfpt", **changes):
    """A step for each seed, of the same frozen teacher."""
    config = RunConfig(
        method=method,
        student="cifar:resnet8_s2",
        teacher=TeacherConfig(name="cifar:resnet14"),
        global_batch=8,
        data=DATA_CONFIG,
        device="cpu",
        optim=OptimConfig(lr=0.002, schedule="constant"),
    )
    config = replace(config, **changes)
    steps = [build_step(replace(config, seed=seed), DATA, CPU) for seed in SEEDS]
    for step in steps[1:]:
        step.method.share_teacher(steps[0].method)
    return steps


def own_batches():
    """For each round the batch of each seed, in its own order."""
    orders = [train_batches(DATA.train, batch_size=8, seed=seed, epoch=0) for seed in SEEDS]
    return [[next(order) for order in orders] for _ in range(STEPS)]


def do_together(steps, rounds):
    joint = JointStep(steps)
    for number, batches in enumerate(rounds):
        for step, batch in zip(steps, batches, strict=True):
            joint.lay_down(step, batch, number)
        for step in steps:
            joint.collect(step)
    assert joint.failure is None
    return steps


def do_alone(steps, rounds):
    for number, batches in enumerate(rounds):
        for step, batch in zip(steps, batches, strict=True):
            step(batch, number)
    return steps


def state(step):
    ema = {} if step.ema is None else step.ema.state_dict()
    return {
        **step.method.trained_state(),
        **optimizer_tensors(step.optimizer),
        **{f"ema.{k}": v for k, v in ema.items()},
        "meter": step.meter.sums,
        "counts": step.gate.counts,
    }


def gap(a, b):
    """The largest difference between two states, as a share of the largest value of its tensor, or
    of 0.001 in those that are zero but for rounding."""
    assert a.keys() == b.keys()
    gaps = [(a[name].double() - b[name]).abs().max() / max(b[name].abs().max(), 1e-3) for name in a]
    return max(gap.item() for gap in gaps)


CASES = {
    "kd": ("kd", {}),
    "dkd": ("dkd", {}),
    "dfpt": ("dfpt", {}),
    "dfpt_plus": ("dfpt_plus", {}),
    "contrast": ("dfpt", {"loss": LossConfig(crd=0.8, crd_negatives=4)}),
    "mixture": ("dfpt", {"loss": LossConfig(mixture_control=True)}),
    "parts": ("dfpt", {"accumulate": 2}),
    "joint paths": ("dfpt", {"step": StepConfig(joint_paths=True)}),
    "warm-up and average": (
        "dfpt",
        {
            "loss": LossConfig(warmup_epochs=1),
            "optim": OptimConfig(lr=0.01, ema_decay=0.9, clip_grad_norm=1.0, warmup_epochs=1),
        },
    ),
}


@pytest.mark.parametrize(("method", "changes"), CASES.values(), ids=CASES)
def test_each_seed_ends_as_its_own_run_within_rounding(method, changes):
    ours = do_together(make_steps(method, **changes), own_batches())
    theirs = do_alone(make_steps(method, **changes), own_batches())
    for a, b in zip(ours, theirs, strict=True):
        assert a.schedule.last_epoch == STEPS
        assert [g["lr"] for g in a.optimizer.param_groups] == [
            g["lr"] for g in b.optimizer.param_groups
        ]
        assert gap(state(a), state(b)) < ROUNDING
    assert gap(state(ours[0]), state(theirs[1])) > 0.5  # control: seeds do differ


@pytest.mark.parametrize("what", ["shares", "batches"])
def test_seeds_that_take_each_other_s_part_do_not(monkeypatch, what):
    """Control: what the test above compares does tell them apart."""
    if what == "shares":
        written = joint_step._frozen_outputs
        monkeypatch.setattr(joint_step, "_frozen_outputs", lambda *args: written(*args)[::-1])
    else:
        written = Batch.chunk
        monkeypatch.setattr(Batch, "chunk", lambda self, parts: written(self, parts)[::-1])
    ours = do_together(make_steps(), own_batches())
    theirs = do_alone(make_steps(), own_batches())
    gaps = [gap(state(a), state(b)) for a, b in zip(ours, theirs, strict=True)]
    assert gaps[0] > 10 * ROUNDING
    assert gaps[1] < ROUNDING  # the one in the middle
    assert gaps[2] > 10 * ROUNDING


def test_a_batch_that_seeds_share_is_taken_once(monkeypatch):
    seen = []
    forward = Trunk.forward
    monkeypatch.setattr(
        Trunk, "forward", lambda self, images: seen.append(len(images)) or forward(self, images)
    )
    rounds = own_batches()
    ours = do_together(make_steps(), [[a, b, a] for a, b, _ in rounds])
    assert seen == [8] * len(SEEDS) + [16] * STEPS  # kernels are chosen on a batch of their own
    theirs = do_alone(make_steps(), [[a, b, a] for a, b, _ in rounds])
    for a, b in zip(ours, theirs, strict=True):
        assert gap(state(a), state(b)) < ROUNDING


def test_nothing_that_is_not_finite_passes_from_seed_to_seed(monkeypatch):
    """Neither in the frozen teacher, which sees all images, nor afterwards."""
    clean = do_together(make_steps(), own_batches())
    steps = make_steps()
    (before,) = (state(steps[1])["student.conv1.weight"].clone(),)
    normalise = steps[0].normalise

    def with_bad_images(batch):
        images = normalise(batch)
        images[8:16] = torch.nan
        return images

    steps[0].normalise = with_bad_images
    do_together(steps, own_batches())
    for seed in (0, 2):
        ours, theirs = state(steps[seed]), state(clean[seed])
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps[1].gate.read()[:2] == (STEPS, STEPS)
    assert torch.equal(state(steps[1])["student.conv1.weight"], before)


def test_what_a_seed_draws_at_random_is_its_own():
    def with_dropout():
        steps = make_steps()
        for step in steps:
            linear = step.method.student.fc
            step.method.student.fc = nn.Sequential(nn.Dropout(0.5), linear)
        return steps

    def turns(steps, do):
        def walk(step, batches):
            for number, batch in enumerate(batches):
                yield from do(step, batch, number)

        states = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            states.append(RandomState(CPU))
        rows = zip(*own_batches(), strict=True)
        take_turns([walk(s, row) for s, row in zip(steps, rows, strict=True)], states)
        return steps

    def alone(step, batch, number):
        step(batch, number)
        yield

    def together(joint, step, batch, number):
        joint.lay_down(step, batch, number)
        yield
        joint.collect(step)

    ours = with_dropout()
    turns(ours, functools.partial(together, JointStep(ours)))
    theirs = turns(with_dropout(), alone)
    for a, b in zip(ours, theirs, strict=True):
        assert gap(state(a), state(b)) < ROUNDING
    # Control: the draws count.
    others = do_together(with_dropout(), own_batches())
    assert gap(state(others[0]), state(theirs[0])) > 10 * ROUNDING


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run(teacher_run(make_config(root)))
    return root


@pytest.fixture
def joint(monkeypatch):
    """Runs do joint steps on the CPU too; returns the joint steps that were made."""
    made = []

    def join(steps):
        for step in steps[1:]:
            step.method.share_teacher(steps[0].method)
        made.append(JointStep(steps))
        return made[-1]

    monkeypatch.setattr(train_module, "join", join)
    return made


def make_config(root, **changes):
    """Six steps of 8 synthetic images in two epochs."""
    config = RunConfig(
        recipe="tiny",
        method="dfpt",
        student="cifar:resnet8_s2",
        epochs=2,
        global_batch=8,
        eval_batch=16,
        device="cpu",
        out_root=str(root),
        data=DataConfig(name="synthetic", num_classes=4, image_size=16, limit=24),
        teacher=TeacherConfig(name="cifar:resnet8", epochs=1, global_batch=8),
        optim=OptimConfig(lr=0.002, milestones=(0.5,)),
        checkpoint_steps=2,
        keep_checkpoints=9,
    )
    return replace(config, **changes)


def with_teacher(root, tmp_path, **changes):
    config = make_config(root, **changes)
    weights = train_module.choose_teacher(config).weights
    teacher = replace(config.teacher, weights=weights)
    return replace(config, out_root=str(tmp_path / "together"), teacher=teacher)


def own_runs(config, tmp_path, seeds=SEEDS):
    """One after the other, none beside another."""
    alone = str(tmp_path / "alone")
    return [run(replace(config, seed=seed, out_root=alone)).out for seed in seeds]


def assert_close(own, result, steps=(2, 4, 6)):
    for step in steps:
        theirs, ours = (load_checkpoint(out / f"checkpoints/step-{step}") for out in (own, result))
        rates = [c.state["progress"]["step"] for c in (theirs, ours)]
        assert rates == [step, step]
        assert gap(ours.tensors, theirs.tensors) < ROUNDING


def events(out, kind):
    lines = (out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize(("order_seed", "images"), [(None, 24), (7, 8)])
def test_runs_end_as_they_would_have_alone(root, tmp_path, joint, monkeypatch, order_seed, images):
    """With what they save within and after an epoch."""
    config = with_teacher(root, tmp_path)
    config = replace(config, data=replace(config.data, order_seed=order_seed))
    alone = own_runs(config, tmp_path)
    seen = []
    forward = Trunk.forward

    def watched(self, x):
        if x.device.type != "meta":  # nothing is computed where it is found out what fits
            seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Trunk, "forward", watched)
    results = run_seeds(replace(config, seeds=SEEDS))
    looks = len(seen) - 6  # kernels are chosen on a batch of one run
    assert seen == [8] * looks + [images] * 6
    assert looks <= len(SEEDS)
    for own, result in zip(alone, results, strict=True):
        assert_close(own, result.out)
    assert not joint[0].waiting


def test_runs_that_stand_elsewhere_go_on_together(root, tmp_path, joint):
    """One half-way, one at the edge of an epoch, one not begun: the first to end is left out."""
    config = with_teacher(root, tmp_path)
    alone = own_runs(config, tmp_path)
    for seed, steps in zip(SEEDS, (2, 3, 0), strict=True):
        if steps:
            run(replace(config, seed=seed, max_steps=steps))
    results = run_seeds(replace(config, seeds=SEEDS))
    assert [r.step for r in results] == [6, 6, 6]
    for own, result in zip(alone, results, strict=True):
        assert_close(own, result.out, (4, 6))


def test_a_run_that_fails_leaves_the_others_together(root, tmp_path, joint, monkeypatch):
    config = with_teacher(root, tmp_path)
    alone = own_runs(config, tmp_path)
    check = train_module.Trainer.check_skips

    def fail(self):
        if self.config.seed == SEEDS[0]:
            raise NumericError("this seed diverged")
        check(self)

    monkeypatch.setattr(train_module.Trainer, "check_skips", fail)
    counts = []
    written = JointStep._run
    monkeypatch.setattr(
        JointStep, "_run", lambda self, parts: counts.append(len(parts)) or written(self, parts)
    )
    with pytest.raises(NumericError, match="this seed diverged"):
        run_seeds(replace(config, seeds=SEEDS))
    assert counts == [3, 3, 3, 2, 2, 2]
    for own in alone[1:]:
        assert_close(own, tmp_path / "together" / own.name)


def test_a_run_that_is_left_alone_does_its_own_steps(root, tmp_path, joint):
    config = with_teacher(root, tmp_path)
    (own,) = own_runs(config, tmp_path, SEEDS[:1])
    run(replace(config, seed=SEEDS[1], max_steps=4))
    results = run_seeds(replace(config, seeds=SEEDS[:2]))
    assert joint[0].is_over
    assert joint[0].failure is None
    assert_close(own, results[0].out)
    assert events(results[0].out, "fallback") == []


def test_where_joint_steps_cannot_be_each_run_does_its_own(root, tmp_path, joint, monkeypatch):
    """In memory, for one; nothing of what was tried remains, and it is said once."""
    config = with_teacher(root, tmp_path)
    alone = own_runs(config, tmp_path)
    learn = TrainStep.learn

    def short_of_memory(self, batch, images, step, known=()):
        learn(self, batch, images, step, known)
        if known and self.config.seed == SEEDS[1]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def shut(self, parts):  # as a capture is made
        for part in parts:
            part.step.gate.is_open.fill_(False)
        try:
            written(self, parts)
        finally:
            for part in parts:
                part.step.gate.is_open.fill_(True)

    written = JointStep._run
    monkeypatch.setattr(JointStep, "_run", shut)
    monkeypatch.setattr(TrainStep, "learn", short_of_memory)
    results = run_seeds(replace(config, seeds=SEEDS))
    for own, result in zip(alone, results, strict=True):
        theirs, ours = (
            load_checkpoint(out / "checkpoints/step-6").tensors for out in (own, result.out)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    said = [event for result in results for event in events(result.out, "fallback")]
    assert len(said) == 1
    assert "steps of 3 runs as one failed, each does its own: CUDA out of memory" in str(said[0])


def test_a_run_goes_back_while_the_others_go_on(root, tmp_path, joint, monkeypatch):
    config = with_teacher(root, tmp_path, epochs=3, step=StepConfig(max_skips=1))
    learn = TrainStep.learn

    def with_bad_images(self, batch, images, step, known=()):
        if self.config.seed == SEEDS[1] and step in (3, 4):
            images = [part * torch.nan for part in images]
        learn(self, batch, images, step, known)

    monkeypatch.setattr(TrainStep, "learn", with_bad_images)
    alone = own_runs(config, tmp_path)
    results = run_seeds(replace(config, seeds=SEEDS))
    for own, result in zip(alone, results, strict=True):
        assert_close(own, result.out, (2, 9))
    assert [len(events(r.out, "rewind")) for r in results] == [0, 1, 0]


def test_runs_that_are_stopped_are_saved_with_what_was_done(root, tmp_path, joint, monkeypatch):
    config = with_teacher(root, tmp_path)
    alone = own_runs(config, tmp_path)
    glance = train_module.Trainer.is_time_to_save

    def stop(self):
        if self.progress.step == 1:
            self.stop.request.ask_for_hangup()
        return glance(self)

    with monkeypatch.context() as patch:
        patch.setattr(train_module.Trainer, "is_time_to_save", stop)
        with pytest.raises(Stopped):
            run_seeds(replace(config, seeds=SEEDS))
    for own in alone:
        out = tmp_path / "together" / own.name
        assert (out / "checkpoints/step-1").is_dir()
    results = run_seeds(replace(config, seeds=SEEDS))
    for own, result in zip(alone, results, strict=True):
        assert_close(own, result.out)


def test_each_run_has_its_share_of_the_time(root, tmp_path, joint, monkeypatch):
    """Though one of them has all steps done; evaluations of the others do not count."""
    config = with_teacher(root, tmp_path)
    learn, evaluate = TrainStep.learn, Evaluator.__call__

    def slowly(self, *args):
        time.sleep(0.1)
        learn(self, *args)

    def very_slowly(self, ema):
        time.sleep(1)
        return evaluate(self, ema)

    monkeypatch.setattr(TrainStep, "learn", slowly)
    monkeypatch.setattr(Evaluator, "__call__", very_slowly)
    results = run_seeds(replace(config, seeds=SEEDS))
    ends = [load_checkpoint(result.out / "checkpoints/step-6") for result in results]
    seconds = [end.state["progress"]["seconds"] for end in ends]
    assert min(seconds) >= 0.6
    assert max(seconds) < min(1.1 * min(seconds), 2.4)


def test_known_outputs_are_cut_as_images_are():
    whole = FrozenOutputs(torch.arange(24.0).view(6, 4), torch.arange(12.0).view(6, 2))
    parts = whole.chunk(3)
    assert [len(part.logits) for part in parts] == [2, 2, 2]
    again = FrozenOutputs.joined(parts)
    assert torch.equal(again.shared, whole.shared)
    assert torch.equal(again.logits, whole.logits)
    assert FrozenOutputs.joined([FrozenOutputs(None, whole.logits)]).chunk(2)[1].shared is None
