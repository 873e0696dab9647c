"""`dfptkd profile`: no time gets lost, nothing moves, and FLOPs are those of the formulas."""

import dataclasses
import gc
import json
import os
import weakref

import pytest
import torch
from torch import nn

from dfptkd.engine import profile as profiling
from dfptkd.engine import spans
from dfptkd.engine.alarms import overhead_warnings
from dfptkd.engine.cli import main, parse_run
from dfptkd.engine.config import DataConfig, LossConfig, OptimConfig, PromptConfig, RunConfig
from dfptkd.engine.counting import Traffic, Work, count_work
from dfptkd.engine.memory import kept_bytes
from dfptkd.engine.profile_tables import print_profile
from dfptkd.engine.timeline import (
    COPY,
    DATA_WAIT,
    EMA,
    HEAD,
    LOGGING,
    LOSS,
    NORMALISE,
    OPTIMIZER,
    ORIGINAL,
    REST,
    SHARED,
    STUDENT,
    Part,
    Timeline,
    borders,
    components,
    fusion_name,
    prompt_name,
    seconds_of,
    stage_name,
)
from dfptkd.kernels import use_backend, which_backend

CPU = torch.device("cpu")
METHODS = ("ce", "kd", "dkd", "dist", "dfpt", "dfpt_plus")
TINY = (
    "--data.name folder --data.image-size 16 --data.num-classes 4 --student cifar:resnet8_s2 "
    "--teacher.name cifar:resnet8_s2 --global-batch 8 --device cpu"
).split()


def config_of(method="dfpt", *, student="cifar:resnet8", **fields) -> RunConfig:
    return RunConfig(
        method=method,
        student=student,
        teacher=dataclasses.replace(RunConfig().teacher, name="cifar:resnet14"),
        data=DataConfig(name="synthetic", num_classes=10, image_size=32),
        global_batch=4,
        **fields,
    )


def setting_of(method="dfpt", **fields) -> profiling.Setting:
    config = config_of(method, **fields)
    return profiling.Setting(config, CPU, profiling.random_images(config, CPU))


def parts_of(setting: profiling.Setting, backend: str | None = None) -> list[Part]:
    """Parts in the order in which a step enters them, repetitions left out."""
    step, entered = setting.step(setting.config.method), []
    batches = setting.batches()
    step.choose_kernels(next(batches))  # is no step
    with borders(step, entered.append):
        if backend is None:
            step(next(batches), 0)
        else:
            with use_backend(backend):
                step(next(batches), 0)
    return [p for i, p in enumerate(entered) if i == 0 or entered[i - 1] != p]


# Time ---------------------------------------------------------------------------------------------


def test_every_instant_belongs_to_the_part_entered_last(monkeypatch):
    moments = iter([10.0, 10.5, 12.5, 12.75, 15.75])
    monkeypatch.setattr(Timeline, "now", lambda self: next(moments))
    timeline = Timeline(CPU)
    for part in (Part(STUDENT), Part(LOSS), Part(STUDENT), Part(STUDENT, True)):
        timeline.enter(part)
    slices = timeline.stop()
    assert [(s.start, s.seconds) for s in slices] == [(0, 0.5), (0.5, 2), (2.5, 0.25), (2.75, 3)]
    assert seconds_of(slices) == {Part(STUDENT): 0.75, Part(LOSS): 2.0, Part(STUDENT, True): 3.0}


def test_the_parts_of_a_step_sum_to_the_whole_of_it():
    setting = setting_of("dfpt_plus", optim=OptimConfig(ema_decay=0.9))
    step = setting.step("dfpt_plus")
    slices = profiling.timed_step(step, setting.batches(), iter([0]))
    end = slices[-1].start + slices[-1].seconds
    assert sum(s.seconds for s in slices) == pytest.approx(end, rel=1e-9)
    assert all(s.seconds >= 0 for s in slices)
    parts = seconds_of(slices)
    whole_step = (DATA_WAIT, COPY, NORMALISE, OPTIMIZER, REST, EMA, LOGGING)
    assert all(parts[Part(name)] > 0 for name in whole_step)


@pytest.mark.parametrize("method", METHODS)
def test_every_part_has_a_row_and_every_row_a_part(method):
    setting = setting_of(method, optim=OptimConfig(ema_decay=0.9))
    rows = components(setting.step(method))
    assert len(set(rows)) == len(rows)
    assert {part.component for part in parts_of(setting)} | {DATA_WAIT, COPY} == set(rows)


def test_the_control_without_prompt_modules_has_rows_too():
    setting = setting_of(loss=LossConfig(mixture_control=True))
    assert {p.component for p in parts_of(setting)} | {DATA_WAIT, COPY} == set(
        components(setting.step("dfpt"))
    )


FORWARD = [
    Part(COPY), Part(REST), Part(NORMALISE), Part(REST), Part(SHARED), Part(ORIGINAL),
    Part(prompt_name(1)), Part(fusion_name(1)), Part(stage_name(2)), Part(prompt_name(2)),
    Part(fusion_name(2)), Part(stage_name(3)), Part(prompt_name(3)), Part(fusion_name(3)),
    Part(HEAD), Part(STUDENT), Part(LOSS), Part(REST),
]  # fmt: skip
BACKWARD = [
    LOSS, STUDENT, HEAD, fusion_name(3), prompt_name(3), stage_name(3), fusion_name(2),
    prompt_name(2), stage_name(2), fusion_name(1), prompt_name(1),
]  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
def test_parts_come_in_the_order_of_the_walk_and_backward_in_the_opposite_one(backend):
    """Both where a pair is one fused call and where its modules are called one by one."""
    assert parts_of(setting_of(kernels="native"), backend) == [
        *FORWARD, *(Part(name, True) for name in BACKWARD), Part(REST), Part(OPTIMIZER), Part(REST),
        Part(LOGGING), Part(REST),
    ]  # fmt: skip


def test_the_native_pair_was_among_them():
    if which_backend("partial_pointwise_conv", torch.zeros(1)) == "reference":
        pytest.skip("no native library")
    setting = setting_of(kernels="native")
    step = setting.step("dfpt")
    step(next(setting.batches()), 0)
    found = {site.operation: name for site, name in step.kernels.choices.items()}
    assert found["prompt_pair"] == "native"


def test_a_copied_backbone_has_a_backward_of_every_stage():
    backward = [p.component for p in parts_of(setting_of("dfpt_plus")) if p.backward]
    assert backward == [*BACKWARD, stage_name(1)]


@pytest.mark.parametrize("prompt", [PromptConfig(fusion=False), PromptConfig(insert_stages=(2,))])
def test_parts_of_other_shapes_of_the_prompt_path(prompt):
    setting = setting_of(prompt=prompt)
    assert {p.component for p in parts_of(setting)} | {DATA_WAIT, COPY} == set(
        components(setting.step("dfpt"))
    )


# Nothing moves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ce", "kd", "dfpt", "dfpt_plus"])
def test_borders_change_no_bit(method):
    setting = setting_of(method)
    plain, measured = setting.step(method), setting.step(method)
    batches = setting.batches()
    for i in range(2):
        batch = next(batches)
        plain(batch, i)
        with borders(measured, Timeline(CPU).enter):
            measured(batch, i)
    assert torch.equal(plain.meter.sums, measured.meter.sums)
    for a, b in zip(plain.params, measured.params, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    states = plain.method.state_dict(), measured.method.state_dict()  # statistics as well
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_borders_leave_nothing_behind():
    setting = setting_of()
    step = setting.step("dfpt")
    with borders(step, lambda part: None):
        assert any(m._forward_pre_hooks for m in step.method.modules())
        assert "losses" in vars(step.method)
    for module in step.method.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "losses" not in vars(module)
        assert "fused" not in vars(module)
    assert spans._listener is None


def test_borders_keep_no_tensor_alive():
    setting = setting_of()
    step = setting.step("dfpt")
    seen = []
    step.method.student.register_forward_hook(lambda *a: seen.append(weakref.ref(a[-1])))
    with borders(step, lambda part: None):
        step(next(setting.batches()), 0)
        gc.collect()
        # the pass that measures the kernels, and the step
        assert [ref() for ref in seen] == [None, None]


# Work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "student"),
    [*((m, "cifar:resnet8") for m in METHODS), ("dfpt_plus", "cifar:ShuffleV1")],
)
def test_flops_are_those_of_the_formulas(method, student):
    """But for input gradients that nothing asks for; ShuffleNet's convolutions are grouped."""
    setting = setting_of(method, student=student, optim=OptimConfig(ema_decay=0.9))
    step = setting.step(method)
    before = {k: v.clone() for k, v in step.method.state_dict().items()}
    work = count_work(step.method, setting.config, setting.data, CPU)
    formula = 2 * setting.cost.training_macs(method) * setting.config.global_batch
    assert work.flops + work.left_out_flops == formula
    assert 0 < work.left_out_flops < 0.05 * formula
    assert {part.component for part in work.parts} <= set(components(step)) | {EMA}
    after = step.method.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_frozen_stages_have_no_weight_gradient():
    """Their backward costs what their forward does; that of trained copies twice as much."""
    for method, times in (("dfpt", 1), ("dfpt_plus", 2)):
        setting = setting_of(method)
        parts = count_work(setting.step(method).method, setting.config, setting.data, CPU).parts
        for name in (stage_name(2), stage_name(3)):
            assert parts[Part(name, True)].flops == times * parts[Part(name)].flops > 0
        assert parts[Part(fusion_name(2), True)].flops == 2 * parts[Part(fusion_name(2))].flops
        assert Part(ORIGINAL, True) not in parts
        assert Part(SHARED, True) not in parts


def test_a_frozen_teacher_is_the_forward_pass_of_its_row():
    setting = setting_of("kd")
    parts = count_work(setting.step("kd").method, setting.config, setting.data, CPU).parts
    macs = setting.cost.teacher.teacher_macs * setting.config.global_batch
    assert parts[Part(ORIGINAL)].flops == 2 * macs


def test_linear_layers_count_too():
    """A head's products are matrix products: forward, input gradient, weight gradient."""
    setting = setting_of()
    method = setting.step("dfpt").method
    parts = count_work(method, setting.config, setting.data, CPU).parts
    (linear,) = (m for m in method.teacher.head.modules() if type(m) is nn.Linear)
    macs = linear.in_features * linear.out_features * setting.config.global_batch
    assert parts[Part(HEAD)].flops == 2 * macs
    assert parts[Part(HEAD, True)].flops == 4 * macs


def test_bytes_are_reads_and_writes():
    x, w = torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 1, 1)
    n = x.nbytes

    def moved(call) -> int:
        with Traffic() as traffic:
            call()
        return traffic.bytes

    assert moved(lambda: x + x.clone()) == 2 * n + 3 * n
    assert moved(lambda: x.relu_()) == 2 * n
    assert moved(lambda: x.view(-1)[1:].t()) == 0
    assert moved(lambda: torch.empty_like(x)) == 0
    assert moved(lambda: x + torch.zeros(()).expand_as(x)) == 2 * n + 2 * 4  # made and read

    def convolution(*mask: bool) -> int:
        return moved(
            lambda: torch.ops.aten.convolution_backward(
                x, x, w, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (*mask, False)
            )
        )

    assert convolution(True, False) == 2 * n + w.nbytes  # the input itself is not needed
    assert convolution(False, True) == 2 * n + w.nbytes
    assert convolution(True, True) == 3 * n + 2 * w.nbytes


def test_kept_bytes_are_split_among_the_components_that_keep_them():
    setting = setting_of()
    step, batch = setting.step("dfpt"), next(setting.batches())
    step(batch, 0)
    kept = profiling.kept_by_component(step, batch, 1)
    whole = profiling.kept_bytes_of(step, batch)
    assert sum(kept.values()) == pytest.approx(whole, rel=0.01)
    assert kept[STUDENT] > kept[stage_name(2)] > 0
    assert ORIGINAL not in kept
    assert SHARED not in kept
    images = step.normalise(batch)
    constants = [*step.method.parameters(), *step.method.buffers()]
    assert kept[STUDENT] == kept_bytes(lambda: step.method.student(images), constants)


def test_parameters_of_the_rows_are_all_there_are():
    for method in ("ce", "kd", "dfpt", "dfpt_plus"):
        setting = setting_of(method)
        built, cost = setting.step(method).method, setting.cost.teacher
        found = setting.params(built)
        trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
        teacher = 0 if method == "ce" else cost.teacher_params
        assert sum(found.values()) == trained + teacher
        if method == "dfpt":
            assert found[STUDENT] + cost.added_params == trained


def test_a_roof_is_the_larger_of_arithmetic_and_traffic():
    roofs = profiling.Roofs(flops_per_second=100.0, bytes_per_second=10.0)
    step = setting_of("ce").step("ce")
    seconds = {Part(STUDENT): 4.0, Part(STUDENT, True): 6.0, Part(LOSS): 1.0}
    work = {Part(STUDENT): Work(100, 20), Part(STUDENT, True): Work(300, 5), Part(LOSS): Work(0, 1)}
    rows = profiling.component_rows(step, seconds, work, {}, roofs, step_s=20.0)
    found = {row.name: row for row in rows}
    assert found[STUDENT].roof_percent == pytest.approx(100 * (2 + 3) / 10)
    assert found[STUDENT].share_percent == pytest.approx(50)
    assert found[STUDENT].bound == "compute"
    assert (found[LOSS].roof_percent, found[LOSS].bound) == (pytest.approx(10), "memory")
    assert (found[REST].roof_percent, found[REST].bound) == (None, "")


# The whole ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"), [("cifar100", (100, 32)), ("fashion_mnist", (10, 28))]
)
def test_data_sets_give_their_size_without_being_read(name, expected):
    config = dataclasses.replace(config_of(), data=DataConfig(name=name))
    data = profiling.random_images(config, CPU)
    assert (data.num_classes, data.image_size[0]) == expected
    batch = next(dataclasses.replace(setting_of(), data=data).batches())
    assert batch.images.float().std() > 50
    assert batch.crop is not None


@pytest.mark.parametrize(("second_per_image", "expected"), [(0.0, 64), (0.2, 8), (9.0, 2)])
def test_on_a_cpu_the_batch_shrinks_until_the_budget_holds(second_per_image, expected, monkeypatch):
    config = dataclasses.replace(config_of("ce"), global_batch=64, accumulate=8)
    timed = []

    def fake(call, device) -> float:
        timed.append(call.args[0].images.shape[0])
        return 1e6 * second_per_image * timed[-1]

    monkeypatch.setattr(profiling, "time_call", fake)
    monkeypatch.setattr(profiling, "compared", lambda config, left_out: ["ce"])
    assert profiling.affordable_batch(config, CPU, rounds=5) == expected
    in_all = 2 * 5 + 4 + profiling.method_rounds(5) + 2
    assert expected == 2 or in_all * second_per_image * expected <= profiling.BUDGET_S
    assert max(timed) <= expected  # nothing beyond the budget is tried
    assert profiling.with_batch(config, 4).accumulate == 4


def test_M49_terms_of_other_methods_are_left_out_and_said_so(monkeypatch):
    monkeypatch.setattr(profiling, "affordable_batch", lambda *_: 4)
    for loss in (LossConfig(crd=0.8, rkd_angle=50.0), LossConfig(decoupled=True)):
        setting, notes = profiling.make_setting(config_of(loss=loss), CPU, rounds=2)
        assert setting.config.loss == LossConfig()
        assert any(all(f"loss.{name}" in note for name in loss.added) for note in notes)
        for method in METHODS:
            assert profiling.of_method(config_of(loss=loss), method).method == method


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[profiling.Profile, dict]:
    """A whole profile of a tiny pair, with a trace; roofs are not measured."""
    folder = tmp_path_factory.mktemp("profile")
    before = os.getcwd()
    os.chdir(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(profiling, "matmul_peak", lambda device, dtype: 50.0)
    patch.setattr(profiling, "copy_bandwidth", lambda device: 10.0)
    try:
        config = parse_run("profile", ["quickstart", "--method", "dfpt", *TINY])
        found = profiling.profile(config, steps=2, trace=folder / "trace.json")
        assert [p.name for p in folder.iterdir()] == ["trace.json"], "and nothing else is written"
        return found, json.loads((folder / "trace.json").read_text())
    finally:
        patch.undo()
        os.chdir(before)


def test_the_parts_are_the_step(profiled):
    """Within the noise of a busy machine here; the tables print the difference."""
    found, _ = profiled
    assert found.parts_sum_s == pytest.approx(
        sum(r.forward_s + r.backward_s for r in found.components)
    )
    assert 0.5 < found.parts_sum_s / found.step_s < 2
    assert found.difference_percent == pytest.approx(100 * (found.parts_sum_s / found.step_s - 1))


def test_methods_stand_beside_kd(profiled):
    found, _ = profiled
    rows = {row.method: row for row in found.methods}
    assert list(rows) == list(profiling.METHODS)
    assert rows["kd"].time_of_kd == rows["kd"].macs_of_kd == 1
    assert rows["ce"].macs_of_kd < 1 < rows["dfpt"].macs_of_kd < rows["dfpt_plus"].macs_of_kd
    assert rows["kd"].kept_bytes < rows["dfpt"].kept_bytes < rows["dfpt_plus"].kept_bytes
    assert rows["ce"].trained_params == rows["kd"].trained_params < rows["dfpt"].trained_params


def test_a_rival_stands_beside_the_usual_four():
    assert profiling.compared(config_of("dkd")) == [*profiling.METHODS, "dkd"]
    config = config_of(loss=LossConfig(mixture_control=True))
    assert not profiling.of_method(config, "kd").loss.mixture_control
    assert profiling.of_method(config, "dfpt") is config


def test_the_trace_has_the_components(profiled):
    found, trace = profiled
    events = [e for e in trace["traceEvents"] if e.get("cat") == "component"]
    names = {e["name"] for e in events}
    assert {STUDENT, f"{STUDENT}, backward", prompt_name(1), f"{LOSS}, backward"} <= names
    assert {row.name for row in found.components} <= names
    steps = sorted(e["ts"] for e in trace["traceEvents"] if e["name"] == "dfptkd step 0")
    assert min(e["ts"] for e in events) == pytest.approx(steps[0], abs=1.0)
    operations = [e for e in trace["traceEvents"] if e["name"] == "aten::convolution"]
    start, end = min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events)
    assert operations
    assert all(start <= e["ts"] <= end for e in operations)


def components_of(found: profiling.Profile) -> tuple[str, ...]:
    return tuple(row.name for row in found.components)


def test_the_tables_name_every_component(profiled, capsys):
    found, _ = profiled
    print_profile(found)
    text = capsys.readouterr().out
    assert all(row.name in text for row in found.components)
    for words in ("2 a MAC", "GB/s", "10 % line", "sum of the parts", "JPEG", "kept MB"):
        assert words in text
    starts = ("component", *components_of(found))
    rows = [x for x in text.splitlines() if x.startswith(starts) and "   " in x]
    assert len(rows) == len(found.components) + 1
    assert max(map(len, rows)) <= 120


def test_overhead_is_marked_against_the_line(profiled, capsys):
    found, _ = profiled
    shares = [profiling.Overhead("blocks", 9.9, 10.1, 50.0), profiling.Overhead("head", 0, 0, None)]
    cost = dataclasses.replace(setting_of().cost.teacher, added_macs=10**9)
    warned = overhead_warnings(cost.record())
    print_profile(dataclasses.replace(found, overhead=shares, warnings=warned))
    text = capsys.readouterr().out
    for words in (
        "9.9 kept",
        "10.1 exceeded",
        "50.0 exceeded",
        "not in this method",
        "MACs, above",
    ):
        assert words in text
    assert "something else" not in text or abs(found.difference_percent) > 5
    print_profile(dataclasses.replace(found, parts_sum_s=1.06 * found.step_s))
    assert "+6.0 %" in (busy := capsys.readouterr().out)
    assert "something else uses this machine" in busy
    own = found.overhead[-1]
    assert own.name == "together"
    assert own.time_percent > 0


def test_json_is_one_object_with_everything(profiled, capsys, monkeypatch):
    found, _ = profiled
    monkeypatch.setattr(profiling, "profile", lambda *args, **kwargs: found)
    assert main(["profile", "quickstart", *TINY, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["methods"][1]["method"] == "kd"
    assert values["components"][0]["name"] == DATA_WAIT
    assert values["difference_percent"] == pytest.approx(found.difference_percent)
    assert {f.name for f in dataclasses.fields(found)} < set(values)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("profile", ["expected a recipe"]),
        ("profile quickstrat", ["did you mean quickstart?"]),
        ("profile quickstart --steps 0", ["--steps 0", "at least 1"]),
        ("profile quickstart --steps x", ["--steps x"]),
        ("profile quickstart --steps", ["--steps"]),
        ("profile quickstart --trace /nowhere/trace.json", ["/nowhere/trace.json", "folder"]),
        ("profile quickstart --trace /", ["--trace /"]),
        ("profile quickstart --trice x", ["--trice"]),
        ("profile quickstart --teacher.name cifar:resnet9", ["'resnet9'", "did you mean"]),
        ("profile quickstart --device cpu --step.mode graph", ["graph", "CUDA"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(args, words, capsys):
    assert main(args.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
