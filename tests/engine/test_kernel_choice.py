"""Backends by measurement: what is wrong or slow does not serve, what was found is remembered, on
record, and binding."""

import fcntl
import importlib
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dfptkd.engine import kernel_cache, kernel_choice
from dfptkd.engine.checkpoint import load_checkpoint
from dfptkd.engine.cli import main
from dfptkd.engine.config import DataConfig, OptimConfig, RunConfig, TeacherConfig
from dfptkd.engine.doctor import newer_than_tested, run_doctor
from dfptkd.engine.errors import DataError, UsageError
from dfptkd.engine.eval_checkpoint import evaluate_checkpoint
from dfptkd.engine.kernel_cache import Choice, KernelCache
from dfptkd.engine.kernel_choice import KernelChoices, check_kernels, measured_kernels
from dfptkd.engine.models import PromptFusion, create_model
from dfptkd.engine.timing import Timing
from dfptkd.engine.train import run, run_seeds
from dfptkd.kernels import (
    backend,
    distillation_loss,
    dual_path_loss,
    frozen_conv2d,
    frozen_relu,
    normalize_images,
    use_backend,
)
from dfptkd.kernels.backend import Choices, Site, choose_at, use_choices

# Functions shadow the modules of their names.
frozen_conv, relu_module, pair_module, loss_module = (
    importlib.import_module(f"dfptkd.kernels.{name}")
    for name in ("frozen_conv", "frozen_relu", "partial_pointwise_conv", "dual_path_loss")
)

pytestmark = pytest.mark.skipif(
    backend.unavailable("native") is not None, reason="no native library: nothing to choose"
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """A file that no other test fills."""
    path = tmp_path_factory.mktemp("cache") / "kernels.json"
    monkeypatch.setenv(kernel_cache.VARIABLE, str(path))
    return path


@pytest.fixture
def native_wins(monkeypatch):
    """No clock decides."""
    monkeypatch.setattr(kernel_choice, "is_faster", lambda ours, reference: True)


# Calls, one for each fused operation --------------------------------------------------------------


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def call_loss():
    student, prompt, teacher = randn(3, 12, 10)
    leaves = [z.clone().requires_grad_() for z in (student, prompt)]
    return dual_path_loss(*leaves, teacher, torch.arange(12) % 10).total


def call_kd_loss():
    student, teacher = randn(2, 12, 10)
    leaf = student.clone().requires_grad_()
    return distillation_loss(leaf, teacher, torch.arange(12) % 10).total


def call_pair():
    torch.manual_seed(0)
    x = randn(6, 16, 8, 8).relu().contiguous(memory_format=torch.channels_last)
    return PromptFusion(16)(x.requires_grad_())


def call_conv():
    x, weight = randn(4, 16, 8, 8), randn(16, 16, 3, 3) / 12
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    return frozen_conv2d(x, weight, randn(16), padding=1)


def call_relu():
    return frozen_relu(randn(4, 16, 8, 8).requires_grad_())


def call_images():
    images = torch.randint(
        256, (5, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return normalize_images(
        images, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), dtype=torch.float32,
        crop=(1, torch.ones(5, 2, dtype=torch.int64)), flip=torch.arange(5) % 2 == 0,
    )  # fmt: skip


CALLS = {
    "dual_path_loss": call_loss,
    "distillation_loss": call_kd_loss,
    "prompt_pair": call_pair,
    "frozen_conv2d": call_conv,
    "frozen_relu": call_relu,
    "normalize_images": call_images,
}


def choose(operation, **options) -> Choice:
    """What measuring one call comes to."""
    kernels = KernelChoices(**options)
    with kernels.deciding():
        CALLS[operation]()
    (choice,) = kernels.table.values()
    assert choice.site.operation == operation
    return choice


def spoil(monkeypatch, operation, change):
    """Lets a native kernel return `change` of its last floating output: a gradient where it makes
    one. Every launch, forward and backward, passes here."""

    def wrapped(launch):
        def run(*inputs):
            found = launch(*inputs)
            if isinstance(found, torch.Tensor):
                return change(found)
            last = max(i for i, t in enumerate(found) if t is not None and t.is_floating_point())
            return tuple(change(t) if i == last else t for i, t in enumerate(found))

        return run

    if operation.endswith("loss"):
        losses = loss_module.FusedLoss
        launcher = losses._launcher
        monkeypatch.setattr(losses, "_launcher", lambda *args: wrapped(launcher(*args)))
    elif operation == "prompt_pair":
        launch = pair_module._launch
        monkeypatch.setattr(pair_module, "_launch", wrapped(launch))
    elif operation == "frozen_conv2d":
        monkeypatch.setattr(frozen_conv, "_native", wrapped(frozen_conv._native))
    elif operation == "frozen_relu":
        forward, backward = relu_module._KERNELS["native"]
        kernels = {"native": (forward, wrapped(backward))}
        monkeypatch.setattr(relu_module, "_KERNELS", relu_module._KERNELS | kernels)
    else:
        launch = torch.ops.dfptkd.normalize_images
        monkeypatch.setattr(torch.ops.dfptkd, "normalize_images", wrapped(launch))


# Compared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", CALLS)
def test_every_fused_operation_is_certified_and_then_serves(operation, native_wins):
    choice = choose(operation)
    assert choice.certificate.holds, str(choice.certificate)
    assert choice.backend == "native"
    assert choice.median_us.keys() == {"reference", "native"}


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("asked", ["auto", "native"])
def test_a_kernel_that_is_one_percent_off_is_caught(operation, asked, native_wins, monkeypatch):
    spoil(monkeypatch, operation, lambda t: 1.01 * t)
    choice = choose(operation, asked=asked)
    assert choice.backend == "reference"
    assert not choice.certificate.holds
    assert choice.certificate.error > 3 * choice.certificate.eager_error


@pytest.mark.parametrize("operation", CALLS)
def test_a_nan_and_a_single_wrong_value_are_caught(operation, native_wins, monkeypatch):
    for value in (torch.nan, 7.0):
        with monkeypatch.context() as patch:

            def change(tensor, value=value):
                tensor = tensor.clone()
                tensor.view(-1)[tensor.numel() // 2] = value
                return tensor

            # as it lies in memory, so that a view is one
            spoil(patch, operation, lambda t, change=change: change(t.contiguous()))
            assert choose(operation).backend == "reference"


def test_two_calls_that_differ_in_a_bit_are_caught(native_wins, monkeypatch):
    count = iter(range(1000))
    spoil(monkeypatch, "frozen_relu", lambda t: t * (1 + (next(count) % 2) * 2.0**-23))
    certificate = choose("frozen_relu").certificate
    assert not certificate.holds
    assert "two calls differ in gradient 0" in str(certificate)


def test_a_kernel_that_raises_leaves_the_call_to_the_reference(native_wins, monkeypatch):
    def broken(tensor):
        raise OSError("no kernel image\nmany more lines")

    spoil(monkeypatch, "prompt_pair", broken)
    choice = choose("prompt_pair")
    assert choice.backend == "reference"
    assert str(choice.certificate) == "OSError: no kernel image"


def test_measuring_moves_nothing(native_wins):
    torch.manual_seed(0)
    pair, x = PromptFusion(16), randn(6, 16, 8, 8)
    expected = PromptFusion(16)
    expected.load_state_dict(pair.state_dict())
    random = torch.get_rng_state()
    kernels = KernelChoices()
    with kernels.deciding():
        y = pair(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in pair.parameters())
    with use_backend("native"):
        assert torch.equal(expected(x), y)
    state = expected.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in pair.state_dict().items())


# Timed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "reference", "wins"),
    [
        (Timing(9, 80, 78, 82), Timing(9, 100, 98, 102), True),
        (Timing(9, 96, 95, 97), Timing(9, 100, 98, 102), False),  # not by 5 %
        (Timing(9, 80, 60, 99), Timing(9, 100, 98, 140), False),  # noise
        (Timing(9, 120, 118, 122), Timing(9, 100, 98, 102), False),
    ],
)
def test_the_challenger_must_win_beyond_noise_and_by_enough(ours, reference, wins):
    assert kernel_choice.is_faster(ours, reference) is wins


def test_a_slow_kernel_does_not_serve(monkeypatch):
    spoil(monkeypatch, "frozen_relu", lambda t: time.sleep(0.005) or t)
    choice = choose("frozen_relu")
    assert choice.certificate.holds
    assert choice.backend == "reference"
    assert choice.median_us["native"] > choice.median_us["reference"]


def test_a_backend_that_was_asked_for_is_certified_and_not_timed(monkeypatch):
    monkeypatch.setattr(kernel_choice, "time_backends", None)
    choice = choose("frozen_relu", asked="native")
    assert (choice.backend, choice.median_us) == ("native", {})
    assert choice.certificate.holds


def test_rounds_end_when_it_is_clear(monkeypatch):
    times = iter([100.0, 10.0] * kernel_choice.MOST_ROUNDS)
    calls = []
    monkeypatch.setattr(
        kernel_choice, "time_call", lambda call, device: calls.append(call) or next(times)
    )
    assert choose("frozen_relu").backend == "native"
    assert len(calls) == 2 * kernel_choice.LEAST_ROUNDS


@pytest.mark.parametrize("operation", ["frozen_relu", "distillation_loss"])
def test_in_compile_mode_what_is_compiled_is_timed(operation, native_wins, monkeypatch):
    torch.compiler.reset()
    compiled = []

    def compiler(graph, _):
        compiled.append({str(node.target) for node in graph.graph.nodes})
        return graph

    options = {"fullgraph": True, "dynamic": False, "backend": compiler}
    with torch.compiler.set_stance("force_eager"):
        assert choose(operation, mode="compile", options=options).backend == "native"
    assert [any("dfptkd" in name for name in names) for names in compiled] == [False, True]


# In force -----------------------------------------------------------------------------------------


def test_what_is_not_listed_takes_the_reference():
    x = randn(2, 3)
    site = Site("dual_path_loss", "cpu", torch.float32, (2, 3))
    assert choose_at("dual_path_loss", x, (2, 3)) == "native"
    with use_choices(Choices({site: "native"})):
        assert choose_at("dual_path_loss", x, (2, 3)) == "native"
        assert choose_at("dual_path_loss", x, (2, 4)) == "reference"
        assert choose_at("distillation_loss", x, (2, 3)) == "reference"
        with use_backend("native"):
            assert choose_at("distillation_loss", x, (2, 3)) == "native"


def test_compiled_code_follows_the_choices():
    torch.compiler.reset()
    seen = []

    def compiler(graph, _):
        seen.append(any("dfptkd" in str(node.target) for node in graph.graph.nodes))
        return graph

    x = randn(4, 5).requires_grad_()
    work = torch.compile(frozen_relu, fullgraph=True, dynamic=False, backend=compiler)
    site = Site("frozen_relu", "cpu", torch.float32, (5,))
    for choices in ({site: "native"}, {}, {site: "native"}):
        with use_choices(Choices(choices)):
            work(x)
    assert seen == [True, False]  # equal choices need no second trace


def test_a_process_that_follows_another_loads_what_serves_it():
    """Rank 1 of a run has asked nobody whether the library is there."""
    code = """
import torch
from dfptkd.kernels import frozen_relu
from dfptkd.kernels.backend import Choices, Site, use_choices
x = torch.randn(2, 3, requires_grad=True)
with use_choices(Choices({Site("frozen_relu", "cpu", x.dtype, (3,)): "native"})):
    frozen_relu(x).sum().backward()
print(x.grad.isfinite().all().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_what_another_process_lacks_serves_nowhere(native_wins):
    kernels = KernelChoices()
    with kernels.deciding():
        call_relu()
    kernels.do_without("native")
    assert list(kernels.choices.values()) == ["reference"]
    assert kernels.record()[0]["why"] == "not every process of the run has native"


def test_measured_kernels_serve_a_loop_of_ones_own(native_wins):
    with measured_kernels() as kernels:
        first, second = call_conv(), call_conv()
    assert torch.equal(first, second)
    assert list(kernels.choices.values()) == ["native"]
    with kernels.in_force():
        assert torch.equal(call_conv(), first)
    with use_backend("native"):
        assert torch.equal(call_conv(), first)
    assert not torch.equal(call_conv(), first)  # by itself it takes PyTorch's own


def test_an_unknown_backend_is_refused_and_one_that_cannot_serve_is_named(caplog):
    for name in ("cuda", "Native", "", None):
        with pytest.raises(ValueError, match="expected one of auto, reference, native, triton"):
            measured_kernels(name).__enter__()
    backend._log_fallback_once.cache_clear()
    with measured_kernels("triton") as kernels:
        call_relu()
    assert kernels.choices == {}
    (line,) = caplog.messages
    assert (
        line == "frozen_relu: triton does not run on cpu tensors; the reference serves it, slower"
    )


def test_a_user_without_a_home_folder_measures_every_time(native_wins, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", kernel_cache.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend.Path, "home", no_home)
    assert backend.cache_folder() == Path("/nonexistent/.cache/dfptkd")
    monkeypatch.setattr(backend, "cache_folder", lambda: Path("/proc/none"))
    assert choose("frozen_relu").backend == "native"


# Remembered ---------------------------------------------------------------------------------------


def never(*args, **kwargs):
    raise AssertionError("measured again")


def test_what_was_measured_is_not_measured_again(native_wins, monkeypatch):
    first = choose("frozen_conv2d")
    monkeypatch.setattr(kernel_choice, "certify", never)
    assert choose("frozen_conv2d") == first
    with pytest.raises(AssertionError, match="measured again"):
        choose("frozen_conv2d", mode="compile")  # another mode is another measurement


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"format": "other"}', None],
    ids=["empty", "cut", "list", "format", "entry"],
)
def test_a_damaged_file_is_measured_anew_and_said_once(damage, native_wins, own_cache, monkeypatch):
    first = choose("frozen_relu")
    if damage is None:
        values = json.loads(own_cache.read_text())
        for machine in values["machines"].values():
            for choice in machine["choices"].values():
                choice["shape"] = 3
        damage = json.dumps(values)
    own_cache.write_text(damage)
    said = []
    kernels = KernelChoices(warn=said.append)
    with kernels.deciding():
        call_relu()
        call_conv()
    assert len(said) == 1
    assert str(own_cache) in said[0]
    assert [c.site.operation for c in kernels.table.values()] == ["frozen_relu", "frozen_conv2d"]
    monkeypatch.setattr(kernel_choice, "certify", never)
    assert choose("frozen_relu").certificate == first.certificate  # it is whole again


@pytest.mark.parametrize(
    "lie",
    [
        {"backend": "triton"},
        {"shape": [1, 2, 3]},
        {"shape": [{}]},
        {"options": [[1]]},
        {"images": "many"},
        {"mode": None},
        {"why": None},
        {"median_us": {"native": 10**400}},
        {"certificate": None},
        {"certificate": {"backend": "native", "holds": False, "tensor": "output 0"}},
        {"certificate": {"backend": "native", "holds": True, "error": "small"}},
    ],
    ids=lambda lie: f"{next(iter(lie))}-{str(next(iter(lie.values())))[:40]}",
)
def test_an_entry_that_cannot_be_true_is_measured_anew(lie, native_wins, own_cache, capsys):
    choose("frozen_relu")
    values = json.loads(own_cache.read_text())
    for machine in values["machines"].values():
        for choice in machine["choices"].values():
            choice |= lie
    own_cache.write_text(json.dumps(values))
    said = []
    kernels = KernelChoices(warn=said.append)
    with kernels.deciding():
        call_relu()
    assert kernels.measured_s > 0
    assert len(said) == 1
    kernels.adopt(kernels.record())
    assert run_doctor() == 0
    assert "eager   cpu frozen_relu float32 16x8x8, 4 images: native" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "error"),
    [("_random_like", torch.OutOfMemoryError("full")), ("time_backends", OSError("no compiler"))],
    ids=["compared", "timed"],
)
def test_what_could_not_be_tried_is_tried_again_by_the_next_run(
    place, error, native_wins, monkeypatch
):
    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(kernel_choice, place, fail)
        assert choose("frozen_relu").backend == "reference"
    assert choose("frozen_relu").backend == "native"


def test_another_library_of_the_same_sources_is_compared_anew(native_wins, monkeypatch, tmp_path):
    choose("frozen_relu")
    path = tmp_path / "rebuilt.so"
    path.write_bytes(b"another compiler")
    monkeypatch.setattr(backend, "library_path", lambda: path)
    monkeypatch.setattr(kernel_choice, "certify", never)
    with pytest.raises(AssertionError, match="measured again"):
        choose("frozen_relu")


def test_what_another_machine_has_measured_is_not_used_and_not_lost(
    native_wins, own_cache, monkeypatch
):
    here = kernel_cache.describe_machine("cpu")
    for key in here:
        other = {**here, key: "other"}
        with monkeypatch.context() as patch:
            patch.setattr(kernel_cache, "describe_machine", lambda device, other=other: other)
            choose("frozen_relu")
    with monkeypatch.context() as patch:
        patch.setattr(kernel_choice, "certify", never)
        with pytest.raises(AssertionError, match="measured again"):
            choose("frozen_relu")
    choose("frozen_relu")
    assert len(json.loads(own_cache.read_text())["machines"]) == len(here) + 1


def test_of_two_that_measure_at_once_the_second_follows_the_first(native_wins, monkeypatch):
    one, two = KernelChoices(), KernelChoices()
    for kernels in (one, two):
        kernels.cache.find(Site("frozen_relu", "cpu", torch.float32, (1,)), 1)  # both have looked
    with one.deciding():
        call_relu()
    monkeypatch.setattr(kernel_choice, "is_faster", lambda ours, reference: False)
    with two.deciding():
        call_relu()
    assert two.measured_s > 0
    assert two.choices == one.choices
    assert list(one.choices.values()) == ["native"]


def test_a_cache_that_cannot_be_written_is_no_error(native_wins, monkeypatch, capsys):
    monkeypatch.setenv(kernel_cache.VARIABLE, "/proc/none/kernels.json")
    assert choose("frozen_relu").backend == "native"
    assert capsys.readouterr().out == ""


def test_a_choice_is_the_same_after_json():
    for operation in CALLS:
        choice = choose(operation)
        assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


def test_doctor_shows_what_was_chosen_and_why(native_wins, capsys):
    choose("frozen_conv2d")
    choose("frozen_relu", mode="compile", options={"backend": "eager"})
    assert run_doctor() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    words = next(line for line in lines if "frozen_conv2d" in line)
    assert words[:5] == ["eager", "cpu", "frozen_conv2d", "float32", "16x8x8"]
    assert {"native;", "faster;", "us,"} <= set(words)
    assert any(line[:3] == ["compile", "cpu", "frozen_relu"] for line in lines)


def test_doctor_says_once_what_is_newer_than_tested(monkeypatch, capsys):
    from dfptkd.engine import doctor

    assert newer_than_tested() == ""
    versions = {"torch": "2.15.0a0+git", "torchvision": "0.29.1+cpu", "triton": "3.8.2"}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "1.0"))
    assert newer_than_tested() == "newer than tested: torch 2.15.0a0+git (tested up to 2.14.1)"
    versions |= {"torchvision": "1.0", "triton": "4"}
    run_doctor()
    warnings = [x for x in capsys.readouterr().out.splitlines() if "newer than tested" in x]
    assert len(warnings) == 1


# The option ---------------------------------------------------------------------------------------


def test_a_backend_that_the_device_does_not_have_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("auto", "reference", "native"):
        check_kernels(name, torch.device("cpu"))
    with pytest.raises(UsageError) as error:
        check_kernels("triton", torch.device("cpu"))
    assert str(error.value) == (
        "kernels='triton': triton does not run on cpu: expected auto or reference or native"
    )
    with pytest.raises(UsageError, match="kernels='native': native does not run on cuda: expected"):
        check_kernels("native", torch.device("cuda"))
    monkeypatch.setattr(backend, "unavailable", lambda name: "the native library is not built")
    with pytest.raises(UsageError, match="kernels='native': the native library is not built"):
        check_kernels("native", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "said"), [("triton", "does not run on cpu"), ("cublas", "cublas")]
)
def test_a_wrong_value_is_one_line_and_exit_code_2(name, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = ["--device", "cpu", "--kernels", name, "--out", str(tmp_path / "run")]
    assert main(["train", "quickstart", *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(create_model("cifar:resnet8_s2", num_classes=4).state_dict(), path)
    return path


def make_config(teacher, out, **changes) -> RunConfig:
    config = RunConfig(
        recipe="tiny",
        method="dfpt",
        student="cifar:resnet8_s2",
        epochs=1,
        global_batch=8,
        device="cpu",
        out=str(out),
        checkpoint_minutes=0,
        data=DataConfig(name="synthetic", image_size=16, num_classes=4, limit=24),
        teacher=TeacherConfig(name="cifar:resnet8_s2", weights=str(teacher)),
        optim=OptimConfig(lr=0.02),
    )
    return replace(config, **changes)


def events(folder) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        found.setdefault(event["kind"], []).append(event["message"])
    return found


def student_of(folder):
    return load_file(folder / "student.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def recorded(folder):
    return json.loads((folder / "run.json").read_text())["kernels"]


def test_a_run_records_its_choices_and_a_second_one_measures_nothing(
    teacher, tmp_path, native_wins, monkeypatch
):
    one = run(make_config(teacher, tmp_path / "one"))
    served = {entry["operation"]: entry for entry in recorded(one.out)}
    assert served.keys() == CALLS.keys() - {"distillation_loss"}
    for entry in served.values():
        assert entry["backend"] == "native"
        assert entry["certificate"]["holds"]
        assert entry["median_us"].keys() == {"reference", "native"}
    assert "native for" in events(one.out)["kernels"][0]
    assert "loss[native]" in events(one.out)["certificate"][0]
    state = load_checkpoint(one.out / "checkpoints" / "step-3").state
    assert state["kernels"] == recorded(one.out)

    monkeypatch.setattr(kernel_choice, "certify", never)
    two = run(make_config(teacher, tmp_path / "two"))
    assert recorded(two.out) == recorded(one.out)
    assert same(student_of(one.out), student_of(two.out))


@pytest.mark.parametrize("operation", ["dual_path_loss", "prompt_pair"])
def test_a_run_with_a_wrong_kernel_falls_back_and_says_so(
    teacher, tmp_path, native_wins, monkeypatch, capsys, operation
):
    spoil(monkeypatch, operation, lambda t: 1.01 * t)
    spoiled = run(make_config(teacher, tmp_path / "spoiled"))
    warnings = events(spoiled.out)["certificate_failed"]
    assert all(operation in line and "more than rounding" in line for line in warnings)
    assert "more than rounding" in capsys.readouterr().out
    backends = {e["backend"] for e in recorded(spoiled.out) if e["operation"] == operation}
    assert backends == {"reference"}
    again = run(make_config(teacher, tmp_path / "again"))
    assert len(events(again.out)["certificate_failed"]) == len(warnings)  # from the cache, too


def test_eval_compares_too(teacher, tmp_path, native_wins, monkeypatch, caplog):
    trained = run(make_config(teacher, tmp_path / "run"))
    spoil(monkeypatch, "normalize_images", lambda t: -t)
    found = evaluate_checkpoint(trained.out, device="cpu")
    assert found.top1 == found.logged
    (line,) = caplog.messages
    assert line.startswith("normalize_images float32 16x16: native is not right here: output 0")


def test_what_is_met_when_the_images_have_grown_is_on_record_and_said_too(
    teacher, tmp_path, native_wins, monkeypatch
):
    spoil(monkeypatch, "frozen_conv2d", lambda t: 1.01 * t)
    random = np.random.default_rng(0)
    for folder in ("train", "val"):
        for name in "abcd":
            path = tmp_path / "images" / folder / name
            path.mkdir(parents=True)
            for i in range(2):
                pixels = random.integers(0, 255, (80, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"{i}.jpg")
    data = DataConfig(
        name="folder", root=str(tmp_path / "images"), image_size=64, start_size=32,
        ramp=(0.1, 0.5), num_classes=4, loader="torchvision", workers=0,
    )  # fmt: skip
    result = run(make_config(teacher, tmp_path / "run", epochs=2, data=data))
    convs = [e for e in recorded(result.out) if e["operation"] == "frozen_conv2d"]
    assert {8, 16} <= {e["shape"][-1] for e in convs}  # stage 2 at 32 and at 64 pixels
    warnings = events(result.out)["certificate_failed"]
    assert len(warnings) == len(convs)
    state = load_checkpoint(result.out / "checkpoints" / "step-2").state
    assert state["kernels"] == recorded(result.out)


def test_the_reference_is_measured_by_nobody_and_has_its_own_bits(
    teacher, tmp_path, native_wins, monkeypatch
):
    fused = run(make_config(teacher, tmp_path / "fused"))
    monkeypatch.setattr(kernel_choice, "certify", never)
    asked = run(make_config(teacher, tmp_path / "asked", kernels="reference"))
    assert recorded(asked.out) == []
    with use_backend("reference"):
        forced = run(make_config(teacher, tmp_path / "forced"))
    assert same(student_of(asked.out), student_of(forced.out))
    assert not same(student_of(asked.out), student_of(fused.out))
    for name, value in student_of(asked.out).items():
        torch.testing.assert_close(student_of(fused.out)[name], value, rtol=1e-3, atol=1e-4)


def test_of_several_seeds_the_first_measures_for_all(teacher, tmp_path, native_wins, monkeypatch):
    monkeypatch.setenv(kernel_cache.VARIABLE, "/proc/none/kernels.json")
    certify, sites = kernel_choice.certify, []
    monkeypatch.setattr(
        kernel_choice, "certify", lambda *args: sites.append(args[-1]) or certify(*args)
    )
    config = make_config(teacher, "", seeds=(0, 1), out_root=str(tmp_path))
    config = replace(config, out=None)
    results = run_seeds(config)
    assert len(sites) == len(set(sites)) > 0
    assert recorded(results[0].out) == recorded(results[1].out)
    alone = run(replace(config, seeds=None, seed=1, out_root=str(tmp_path / "alone")))
    assert same(student_of(results[1].out), student_of(alone.out))


def test_on_resume_the_record_binds(teacher, tmp_path, native_wins, monkeypatch, own_cache):
    whole = run(make_config(teacher, tmp_path / "whole"))
    part = make_config(teacher, tmp_path / "part")
    run(replace(part, max_steps=2))
    own_cache.unlink()  # another measurement would now decide otherwise
    monkeypatch.setattr(kernel_choice, "time_backends", never)
    result = run(part)
    kept = [
        [{k: v for k, v in entry.items() if k != "certificate"} for entry in recorded(ended.out)]
        for ended in (result, whole)
    ]
    assert kept[0] == kept[1]
    assert same(student_of(whole.out), student_of(result.out))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_on_resume_a_kernel_is_compared_where_it_was_not_yet(
    teacher, tmp_path, native_wins, monkeypatch, own_cache, elsewhere
):
    config = make_config(teacher, tmp_path / "run")
    run(replace(config, max_steps=2))
    if not elsewhere:  # what this machine has compared is trusted
        monkeypatch.setattr(kernel_choice, "certify", never)
        assert "certificate_failed" not in events(run(config).out)
        return
    own_cache.unlink()
    spoil(monkeypatch, "dual_path_loss", lambda t: 1.01 * t)
    out = run(config).out
    (warning,) = events(out)["certificate_failed"]
    assert "dual_path_loss" in warning
    served = {e["operation"]: e["backend"] for e in recorded(out)}
    assert served.pop("dual_path_loss") == "reference"
    assert set(served.values()) == {"native"}


def test_on_resume_the_reference_binds_too(teacher, tmp_path, native_wins, capsys):
    by_reference = run(make_config(teacher, tmp_path / "whole", kernels="reference"))
    part = make_config(teacher, tmp_path / "part", kernels="reference")
    for steps in (1, 2):
        run(replace(part, max_steps=steps))
    assert "kernels=reference" not in capsys.readouterr().out  # nothing has changed
    result = run(replace(part, kernels="auto"))
    assert recorded(result.out) == []
    assert "made with the reference alone" in events(result.out)["kernels"][-2]
    assert same(student_of(by_reference.out), student_of(result.out))


def test_seeds_that_share_a_batch_but_no_kernels_have_their_own_bits(
    teacher, tmp_path, native_wins
):
    ends = []
    for seeds in [[(0,), (1,)], [(0, 1)]]:
        config = replace(
            make_config(teacher, "", out_root=str(tmp_path / f"{len(ends)}")), out=None
        )
        config = replace(config, data=replace(config.data, order_seed=5))
        run(replace(config, seed=0, max_steps=1, kernels="native"))
        run(replace(config, seed=1, max_steps=1, kernels="reference"))
        results = [result for some in seeds for result in run_seeds(replace(config, seeds=some))]
        ends.append([student_of(result.out) for result in results])
    assert all(same(alone, together) for alone, together in zip(*ends, strict=True))


def test_a_backend_that_is_gone_is_named_and_can_be_done_without(
    teacher, tmp_path, native_wins, monkeypatch
):
    config = make_config(teacher, tmp_path / "run")
    run(replace(config, max_steps=2))
    monkeypatch.setattr(
        backend, "unavailable", lambda name: "not built" if name == "native" else None
    )
    with pytest.raises(DataError) as error:
        run(config)
    assert "native kernels, which cannot be used here (not built)" in str(error.value)
    assert "--kernels reference" in str(error.value)
    result = run(replace(config, kernels="reference"))
    assert result.step == 3
    assert any("kernels=reference, whatever" in line for line in events(result.out)["kernels"])
    assert recorded(result.out) == []


def test_a_checkpoint_of_a_version_without_choices_goes_on(
    teacher, tmp_path, native_wins, monkeypatch
):
    from dfptkd.engine import train

    config = make_config(teacher, tmp_path / "run")
    save = train.CheckpointWriter.save

    def older(self, tensors, state, **options):
        state = {k: v for k, v in state.items() if k != "kernels"}
        state["config"] = {k: v for k, v in state["config"].items() if k != "kernels"}
        save(self, tensors, state, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.CheckpointWriter, "save", older)
        run(replace(config, max_steps=2))
    result = run(config)
    assert result.step == 3
    assert {entry["backend"] for entry in recorded(result.out)} == {"native"}


def test_a_damaged_cache_is_said_by_the_run(teacher, tmp_path, native_wins, own_cache):
    own_cache.write_text("{")
    result = run(make_config(teacher, tmp_path / "run"))
    assert len(events(result.out)["kernel_cache"]) == 1


def test_the_cache_is_whole_under_writers_at_the_same_time(native_wins):
    choice = choose("frozen_relu")
    caches = [KernelCache(f"mode{i}") for i in range(4)]
    threads = [threading.Thread(target=cache.settle, args=[choice]) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    modes = {mode for mode, _ in KernelCache("").of_machine("cpu")}
    assert modes == {"eager", "mode0", "mode1", "mode2", "mode3"}
    assert choice == KernelCache("mode3").find(choice.site, choice.images)


def test_a_lock_that_nobody_gives_back_holds_no_run_up(native_wins, own_cache, monkeypatch):
    """Of a process that was halted while it wrote; it had waited for ever."""
    choice = choose("frozen_relu")
    monkeypatch.setattr(kernel_cache, "LOCK_WAIT_S", 0.1)
    with open(f"{own_cache}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        settling = threading.Thread(target=KernelCache("late").settle, args=[choice], daemon=True)
        settling.start()
        settling.join(20)
        assert not settling.is_alive()
    assert "late" in {mode for mode, _ in KernelCache("").of_machine("cpu")}
