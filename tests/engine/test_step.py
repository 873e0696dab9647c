"""One optimisation step: M8, M13, M14, M19, accumulation, clipping, warm-up, precision."""

import dataclasses

import pytest
import torch

from dfptkd.engine import step as step_module
from dfptkd.engine.checkpoint import optimizer_tensors
from dfptkd.engine.config import DataConfig, LossConfig, OptimConfig, RunConfig, StepConfig
from dfptkd.engine.data import load_data, train_batches
from dfptkd.engine.errors import UsageError
from dfptkd.engine.methods import build_method
from dfptkd.engine.methods.dfpt import DualPathDistillation
from dfptkd.engine.models import create_model
from dfptkd.engine.step import TrainStep, choose_mode

CPU = torch.device("cpu")
DATA_CONFIG = DataConfig(name="synthetic", num_classes=10, image_size=16, limit=64)
DATA = load_data(DATA_CONFIG, CPU)
DEFAULT = LossConfig()
OPTIM = OptimConfig(lr=0.02, schedule="constant", weight_decay=0.01)


def make_step(method="dfpt", *, loss=DEFAULT, optim=OPTIM, per_epoch=8, eval_mode=False, **run):
    torch.manual_seed(0)
    student = create_model("cifar:resnet8", num_classes=10)
    teacher = None if method == "ce" else create_model("cifar:resnet14", num_classes=10)
    config = RunConfig(
        method=method, loss=loss, optim=optim, data=DATA_CONFIG, device="cpu", epochs=1,
        **{"kernels": "native", **run},  # nothing is timed
    )  # fmt: skip
    made = build_method(config, student, teacher).train(not eval_mode)
    return TrainStep(made, config, DATA, total_steps=100, steps_per_epoch=per_epoch, device=CPU)


def batches(size=8, count=4):
    found = list(train_batches(DATA.train, batch_size=size, seed=0, epoch=0))
    return found[:count]


def train(step, size=8, count=2):
    for i, batch in enumerate(batches(size, count)):
        step(batch, i)
    return step


def parameters(step, name):
    (group,) = (g for g in step.optimizer.param_groups if g["name"] == name)
    return group["params"]


def snapshot(step, name):
    return [p.detach().clone() for p in parameters(step, name)]


def moved(step, name, before):
    """Whether all parameters of a group have changed; fails if only some have."""
    changed = {not torch.equal(p, b) for p, b in zip(parameters(step, name), before, strict=True)}
    assert len(changed) == 1, f"only a part of {name} moved"
    return changed.pop()


def student_state(step):
    return {k: v.clone() for k, v in step.method.student.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


# Updates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dfpt", "dfpt_plus"])
@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_M19_who_moves_in_which_step(update, method):
    step = make_step(method, loss=LossConfig(update=update))
    names = [g["name"] for g in step.optimizer.param_groups]
    assert names == ["student", "prompt", "backbone"][: len(names)]
    for i, batch in enumerate(batches()):
        before = {name: snapshot(step, name) for name in names}
        momentum = {p: s["momentum_buffer"].clone() for p, s in step.optimizer.state.items()}
        step(batch, i)
        for name in names:
            rests = update == "alternating" and (name == "student") != (i % 2 == 0)
            assert moved(step, name, before[name]) != rests
            if rests:
                for p in parameters(step, name):
                    kept = step.optimizer.state.get(p, {}).get("momentum_buffer")
                    assert (kept is None) if p not in momentum else torch.equal(kept, momentum[p])


def test_M19_alternating_is_another_walk():
    walks = [
        train(make_step(loss=LossConfig(update=u)), count=3)
        for u in ("simultaneous", "alternating")
    ]
    assert not same(*(student_state(w) for w in walks))


@pytest.mark.parametrize("method", ["dfpt", "dfpt_plus"])
def test_M8_M13_M14_training_leaves_the_original_path_bit_identical(method):
    step = make_step(method)
    original = step.method.teacher.original
    state = {k: v.clone() for k, v in original.state_dict().items()}
    images = step.normalise(batches()[0])
    logits = step.method.teacher_logits(images).clone()
    prompt_logits = step.method.prompt_logits(images).detach().clone()
    train(step, count=3)
    assert same(state, original.state_dict())
    assert torch.equal(step.method.teacher_logits(images), logits)
    assert not torch.equal(step.method.prompt_logits(images), prompt_logits)


def test_a_step_starts_from_no_gradient():
    step = train(make_step("ce"), count=1)
    once = [p.grad.clone() for p in parameters(step, "student")]
    with torch.no_grad():
        for p in parameters(step, "student"):
            p.grad.fill_(1e6)
    state = student_state(step)
    other = train(make_step("ce"), count=1)
    for s in (step, other):
        s(batches()[1], 1)
    assert same(student_state(step), student_state(other))
    assert not same(student_state(step), state)
    assert any(not torch.equal(p.grad, g) for p, g in zip(step.params, once, strict=True))


# Accumulation, clipping, averaging ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["ce", "kd", "dkd", "dfpt", "dfpt_plus"])
def test_accumulated_parts_are_one_batch_for_networks_without_batch_statistics(method):
    """In eval mode; in train mode BatchNorm sees the parts, which is the control."""
    whole = train(make_step(method, eval_mode=True, global_batch=8))
    parts = train(make_step(method, eval_mode=True, global_batch=8, accumulate=4))
    for a, b in zip(whole.params, parts.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.meter.sums, parts.meter.sums, rtol=1e-5, atol=1e-5)
    control = (
        train(make_step(method, global_batch=8)),
        train(make_step(method, global_batch=8, accumulate=4)),
    )
    gaps = [(a - b).abs().max() for a, b in zip(*(c.params for c in control), strict=True)]
    assert max(gaps) > 1e-3


def test_parts_of_unequal_size_weigh_by_their_images():
    whole = make_step(eval_mode=True, global_batch=8)
    parts = make_step(eval_mode=True, global_batch=8, accumulate=2)
    batch = batches(size=7, count=1)[0]  # a split smaller than a batch: 4 + 3 images
    for step in (whole, parts):
        step(batch, 0)
    for a, b in zip(whole.params, parts.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert whole.meter.sums[-3] == parts.meter.sums[-3] == 7


@pytest.mark.parametrize("limit", [1e-3, None])
def test_clipping_bounds_the_norm_over_all_groups(limit):
    optim = OptimConfig(
        lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", clip_grad_norm=limit
    )
    step = make_step(optim=optim, precision="fp32")
    before = [p.detach().clone() for p in step.params]
    train(step, count=1)
    walked = torch.stack([(p - b).norm() for p, b in zip(step.params, before, strict=True)]).norm()
    if limit is None:
        assert walked > 0.1
    else:
        assert walked.item() == pytest.approx(limit, rel=1e-2)


def test_ema_follows_the_student_and_does_not_steer_it():
    averaged = make_step(optim=dataclasses.replace(OPTIM, ema_decay=0.5))
    plain = make_step()
    assert plain.ema is None
    expected = None
    for i, batch in enumerate(batches(count=3)):
        averaged(batch, i)
        plain(batch, i)
        now = student_state(averaged)["fc.weight"]
        expected = now if expected is None else 0.5 * expected + 0.5 * now
    torch.testing.assert_close(averaged.ema.module.fc.weight, expected)
    assert same(student_state(averaged), student_state(plain))


def test_the_schedule_moves_once_a_step():
    optim = OptimConfig(lr=0.1, schedule="step", milestones=(0.01, 0.03), gamma=0.1)
    step = make_step("ce", optim=optim, accumulate=2, global_batch=8)
    rates = []
    for i, batch in enumerate(batches(count=4)):
        rates.append(step.optimizer.param_groups[0]["lr"])
        step(batch, i)
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])  # of 100 steps: 1 and 3


# Warm-up and precision ----------------------------------------------------------------------------


def factors(step, count=6):
    """The warm-up factor that the method is called with in each step."""
    seen, forward = [], step.method.forward

    def spy(images, target, distillation=1.0, **frozen):
        seen.append(distillation)
        return forward(images, target, distillation, **frozen)

    step.choose_kernels(batches(count=1)[0])  # is no step
    step.method.forward = spy
    train(step, count=count)
    return seen


def test_distillation_warms_up_linearly_from_zero():
    assert factors(make_step(loss=LossConfig(warmup_epochs=2.0), per_epoch=2)) == [
        0.0, 0.25, 0.5, 0.75, 1.0, 1.0,
    ]  # fmt: skip
    assert factors(make_step()) == [1.0] * 6


def test_warm_up_from_zero_is_labels_only_at_first():
    """At factor 0 the student gets the gradient of its labels and no other."""
    warm = train(make_step("kd", loss=LossConfig(kd_ce=1.0, warmup_epochs=1.0)), count=1)
    labels = train(make_step("ce"), count=1)
    full = train(make_step("kd", loss=LossConfig(kd_ce=1.0)), count=1)
    # Two routes to the same gradient: equal but for the order of a sum.
    torch.testing.assert_close(student_state(warm), student_state(labels))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(student_state(full), student_state(labels))


def test_on_the_cpu_auto_means_fp32_without_scaling():
    step = make_step()
    assert step.precision == "fp32"
    assert not step.scaler.is_enabled()
    with step.autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_bf16_computes_in_bf16_and_keeps_fp32_weights():
    step = make_step(precision="bf16")
    assert not step.scaler.is_enabled()
    with step.autocast():
        assert step.method.student(torch.zeros(1, 3, 16, 16)).dtype == torch.bfloat16
    before = student_state(step)
    train(step, count=2)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in step.params)
    assert not same(before, student_state(step))
    assert step.meter.sums.isfinite().all()


def test_two_runs_of_the_same_steps_have_the_same_bits():
    first, second = (train(make_step("dfpt_plus"), count=3) for _ in range(2))
    assert same(first.method.trained_state(), second.method.trained_state())
    assert torch.equal(first.meter.sums, second.meter.sums)


def test_a_few_steps_lower_the_loss():
    step = make_step("dfpt", optim=OptimConfig(lr=0.05, schedule="constant"))
    losses = []
    for i in range(12):
        step.meter.reset()
        step(batches(size=32, count=1)[0], i)
        losses.append(step.meter.read(has_prompt_path=True)["loss/total"])
    assert losses[-1] < 0.7 * losses[0]


# The gate -----------------------------------------------------------------------------------------


def whole_state(step):
    """Everything that a step may write, by name."""
    found = dict(step.method.trained_state())
    found |= optimizer_tensors(step.optimizer)
    found["meter"] = step.meter.sums
    if step.ema is not None:
        found |= {f"ema.{k}": v for k, v in step.ema.state_dict().items()}
    return {k: v.clone() for k, v in found.items()}


def spoil(step, monkeypatch, *, value=float("nan"), part="images"):
    """The next batch carries one number that is none."""
    if part == "images":
        normalise = step.normalise

        def spoilt(batch):
            images = normalise(batch)
            images[0, 0, 0, 0] = value
            return images

        monkeypatch.setattr(step, "normalise", spoilt)
        return
    losses = step.method.losses

    def spoilt_loss(*args):
        output = losses(*args)
        if part == "gradient":  # the loss is finite, and nothing else
            output.total.register_hook(lambda grad: grad * value)
        else:
            output.total = output.total * value
        return output

    monkeypatch.setattr(step.method, "losses", spoilt_loss)


class Heedless(torch.optim.SGD):
    """Steps whatever `found_inf` says, with state of both kinds: of a parameter and of a group."""

    def __init__(self, method, optim, _):
        super().__init__(method.parameter_groups(optim), lr=optim.lr, momentum=0.9, foreach=True)
        for group in self.param_groups:
            group["steps"] = torch.zeros((), dtype=torch.int64)
            for param in group["params"]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    def step(self):
        del self.found_inf
        super().step()
        for group in self.param_groups:
            group["steps"] += 1


@pytest.mark.parametrize("part", ["images", "gradient", "loss"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("ce", "sgd"), ("dfpt", "sgd"), ("dfpt_plus", "sgd"), ("dfpt", "adamw"), ("dfpt", "heedless")],
)
def test_a_bad_step_changes_nothing(method, optimizer, first, part, monkeypatch):
    optim = dataclasses.replace(OPTIM, ema_decay=0.5)
    if optimizer == "heedless":
        monkeypatch.setattr(step_module, "build_optimizer", Heedless)
    else:
        optim = dataclasses.replace(optim, name=optimizer)
    step = make_step(method, optim=optim, global_batch=8)
    for param in step.params:  # as a run has them
        if param.dim() == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
    good, bad, after = batches(count=3)
    if not first:
        step(good, 0)
    before = whole_state(step)
    with monkeypatch.context() as patch:
        spoil(step, patch, part=part)
        step(bad, 1)
    now = whole_state(step)
    assert before.keys() == now.keys()
    assert all(torch.equal(before[k], now[k]) for k in before)
    assert step.gate.skipped == 1
    step(after, 2)  # and the next goes on as if it had not been
    assert step.gate.skipped == 1
    assert not same(before, whole_state(step))
    assert all(v.isfinite().all() for v in whole_state(step).values())


def test_control_a_heedless_optimiser_that_is_taken_at_its_word_spoils_everything(monkeypatch):
    monkeypatch.setattr(step_module, "build_optimizer", Heedless)
    monkeypatch.setattr(step_module, "skips_by_itself", lambda _: True)
    step = make_step("dfpt")
    spoil(step, monkeypatch, part="gradient")
    step(batches()[0], 0)
    assert step.gate.skipped == 1
    assert not whole_state(step)["student.fc.weight"].isfinite().all()


def test_a_good_step_of_a_heedless_optimiser_is_its_own(monkeypatch):
    monkeypatch.setattr(step_module, "build_optimizer", Heedless)
    put_back = train(make_step("dfpt"), count=3)
    monkeypatch.setattr(step_module, "skips_by_itself", lambda _: True)
    plain = train(make_step("dfpt"), count=3)
    assert same(whole_state(put_back), whole_state(plain))
    assert whole_state(plain)["optimizer.group0.steps"] == 3


def test_control_without_the_gate_a_bad_step_spoils_everything(monkeypatch):
    step = make_step("dfpt")
    monkeypatch.setattr(step.gate, "judge", lambda *_: torch.ones((), dtype=torch.bool))
    spoil(step, monkeypatch)
    step(batches()[0], 0)
    state = whole_state(step)
    assert not state["student.fc.weight"].isfinite().all()
    assert not state["student.bn1.running_mean"].isfinite().all()
    assert not state["meter"].isfinite().all()


def test_one_bad_part_spoils_the_whole_batch(monkeypatch):
    step = make_step("dfpt", global_batch=8, accumulate=4)
    before = whole_state(step)
    spoil(step, monkeypatch)
    step(batches()[0], 0)
    assert all(torch.equal(v, before[k]) for k, v in whole_state(step).items())


def test_a_shut_gate_lets_nothing_pass_and_counts_nothing():
    """So a graph warms up."""
    step = make_step("dfpt_plus", optim=dataclasses.replace(OPTIM, ema_decay=0.5))
    before = whole_state(step)
    step.gate.is_open.fill_(False)
    step.body(batches()[0], 0)
    assert all(torch.equal(v, before[k]) for k, v in whole_state(step).items())
    assert step.gate.skipped == 0


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_gate_changes_no_bit_of_a_good_step(clip, monkeypatch):
    """Against the optimiser called by itself, its momentum absent at first."""
    optim = dataclasses.replace(OPTIM, clip_grad_norm=clip)
    gated, plain = make_step("dfpt", optim=optim), make_step("dfpt", optim=optim)
    bare = torch.optim.SGD(plain.params, lr=0.02, momentum=0.9, weight_decay=0.01, fused=True)
    for i, batch in enumerate(batches(count=3)):
        gated(batch, i)
        bare.zero_grad()
        with gated.kernels.in_force():
            plain.method(plain.normalise(batch), batch.labels).total.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(plain.params, clip)
        bare.step()
    assert same(gated.method.trained_state(), plain.method.trained_state())


# Execution modes ----------------------------------------------------------------------------------


def test_a_mode_that_cannot_be_is_refused_and_auto_says_why():
    with pytest.raises(UsageError, match=r"step\.mode='graph'.*CUDA device"):
        make_step(step=StepConfig(mode="graph"))
    cuda = torch.device("cuda")
    config = RunConfig()
    assert choose_mode(config, cuda) == ("graph", "one CUDA device")
    assert choose_mode(config, CPU)[0] == "eager"
    alternating = dataclasses.replace(config, loss=LossConfig(update="alternating"))
    mode, why = choose_mode(alternating, cuda)
    assert mode == "compile"
    assert "alternating" in why
    scaled = dataclasses.replace(config, precision="fp16", step=StepConfig(mode="graph"))
    with pytest.raises(UsageError, match="fp16"):
        choose_mode(scaled, cuda)


def way(step, start):
    """How far every parameter is from where it started, as one vector."""
    return torch.cat([(p - s).detach().flatten() for p, s in zip(step.params, start, strict=True)])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_groups_without_decay_rest_with_the_group_they_are_of(name, update):
    """Every parameter of the student, its norms and biases too, moves in the same steps."""
    optim = dataclasses.replace(OPTIM, name=name, decay_norm_and_bias=False)
    step = make_step("dfpt", optim=optim, loss=LossConfig(update=update))
    assert [g["name"] for g in step.optimizer.param_groups] == ["student"] * 2 + ["prompt"] * 2
    student = {id(p) for p in step.method.student.parameters()}
    for i, batch in enumerate(batches(count=2)):
        before = [p.detach().clone() for p in step.params]
        step(batch, i)
        for p, b in zip(step.params, before, strict=True):
            rests = update == "alternating" and (id(p) in student) != (i % 2 == 0)
            assert torch.equal(p, b) == rests


@pytest.mark.parametrize("method", ["kd", "dkd", "dfpt", "dfpt_plus"])
def test_compiled_steps_follow_eager_ones_without_breaks_or_recompiles(method):
    """Warm-up of the distillation included: its factor must not be compiled in.

    Rounding moves an activation across a ReLU's edge now and then, which in so small a network is
    some percent of a gradient: the ways are compared as a whole.
    """
    torch.compiler.reset()
    loss = LossConfig(warmup_epochs=0.5)
    optim, faster = (dataclasses.replace(OPTIM, lr=lr) for lr in (1e-3, 1.25e-3))
    eager = make_step(method, loss=loss, optim=optim)
    compiled = make_step(method, loss=loss, optim=optim, step=StepConfig(mode="compile"))
    start = [p.detach().clone() for p in eager.params]
    for i, batch in enumerate(batches(count=4)):
        stance = "default" if i < 2 else "fail_on_recompile"  # the first compiles
        with torch.compiler.set_stance(stance):
            eager(batch, i)
            compiled(batch, i)
        if i == 0:
            torch.testing.assert_close(eager.meter.sums, compiled.meter.sums, rtol=1e-4, atol=1e-4)
    ours, theirs = way(compiled, start), way(eager, start)
    assert (ours - theirs).norm() < 0.1 * theirs.norm()
    other = train(make_step(method, loss=loss, optim=faster), count=4)
    assert (way(other, start) - theirs).norm() > 0.1 * theirs.norm()  # the measure sees that much
    with compiled.plainly():  # evaluation has other shapes
        compiled.method.student(torch.zeros(3, 3, 16, 16))
    compiled.method.compile_regions(disable=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(batches(size=5)[0], 5)


@pytest.fixture
def broken_compiler(monkeypatch):
    """Compiled code fails when it is first called, as where there is no C++ compiler."""

    def fail(*_):
        raise RuntimeError("InductorError: no C++ compiler\nand many more lines")

    def compile_regions(self, disable=False, **_):
        self.losses = type(self).losses.__get__(self) if disable else fail

    monkeypatch.setattr(DualPathDistillation, "compile_regions", compile_regions)
    monkeypatch.setattr(step_module, "choose_mode", lambda *_: ("compile", "for the test"))


def test_a_mode_of_auto_that_fails_leaves_the_step_to_eager(broken_compiler):
    step, expected = (make_step("dfpt_plus", kernels="reference") for _ in range(2))
    expected.method.compile_regions(disable=True)
    expected.mode = "eager"
    train(step, count=2)
    train(expected, count=2)
    assert step.mode == "eager"
    assert step.fallback.endswith("eager does them: InductorError: no C++ compiler")
    assert same(step.method.trained_state(), expected.method.trained_state())
    assert torch.equal(step.meter.sums, expected.meter.sums)
    assert step.gate.skipped == 0


def test_a_mode_that_was_asked_for_and_fails_is_an_error(broken_compiler):
    step = make_step("dfpt", step=StepConfig(mode="compile"))
    with pytest.raises(RuntimeError, match="no C"):
        train(step, count=1)
