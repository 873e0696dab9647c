"""`dfptkd bench step`: both sides do the same mathematics; what ours leaves out, by counts."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dfptkd.bench import step as bench
from dfptkd.engine.cli import main
from dfptkd.engine.config import PromptConfig
from dfptkd.engine.memory import kept_bytes

CPU = torch.device("cpu")
aten = torch.ops.aten


def make_setting(method="dfpt", **changes):
    values = {
        "teacher": "cifar:resnet14",
        "student": "cifar:resnet8",
        "method": method,
        "batch": 4,
        "image_size": 16,
        "classes": 10,
        "prompt": PromptConfig(),
        "device": CPU,
    }
    return bench.Setting(**{**values, **changes})


class Counting(TorchDispatchMode):
    """Counts operators; convolution_backward once more for each gradient that it makes."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket] += 1
        if func.overloadpacket is aten.convolution_backward:
            for name, wanted in zip(("input", "weight"), args[-1][:2], strict=True):
                self.found[f"{name} gradient"] += wanted
        return func(*args, **(kwargs or {}))


def counts(side):
    with Counting() as counting:
        side.call()
    return counting.found


def sides(method, **changes):
    return bench.make_sides(make_setting(method, **changes), ["plain", "ours[eager]"])


@pytest.mark.parametrize("method", ["dfpt", "dfpt_plus"])
def test_both_sides_do_the_same_mathematics(method):
    """make_sides compares the first losses; the next test is its control."""
    assert set(sides(method)) == {"plain", "ours[eager]"}


def test_sides_of_different_mathematics_are_refused(monkeypatch):
    def halved(*logits_and_labels):
        return 0.5 * losses(*logits_and_labels)

    losses = bench.plain_losses
    monkeypatch.setattr(bench, "plain_losses", halved)
    with pytest.raises(RuntimeError, match="first losses differ"):
        sides("dfpt")


def test_the_shared_stage_is_convolved_once():
    """resnet14: a stem and six blocks of two convolutions, two of them with a third; its first
    stage (stem and two blocks) is run by both paths of the plain loop."""
    found = {name: counts(side) for name, side in sides("dfpt").items()}
    plain, ours = (found[name][aten.convolution] for name in ("plain", "ours[eager]"))
    assert plain - ours == 1 + 2 * 2


def test_no_weight_gradient_of_a_frozen_convolution_and_no_batch_norm_left():
    found = {name: counts(side) for name, side in sides("dfpt").items()}
    plain, ours = found["plain"], found["ours[eager]"]
    frozen = make_setting().networks()[1]
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in frozen.modules())
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())
    assert ours["weight gradient"] == plain["weight gradient"]
    plus = {name: counts(side) for name, side in sides("dfpt_plus").items()}["ours[eager]"]
    assert plus["weight gradient"] - ours["weight gradient"] == convolutions  # the control
    # Both paths of the plain loop normalise everywhere, ours nowhere in the frozen network.
    assert plain[aten.native_batch_norm] - ours[aten.native_batch_norm] >= 2 * norms - 5


def test_the_frozen_path_keeps_less_for_its_backward():
    kept = {name: side.kept_bytes() for name, side in sides("dfpt", batch=16).items()}
    assert kept["ours[eager]"] < 0.8 * kept["plain"]


def test_several_seeds_run_the_frozen_teacher_once():
    setting = make_setting()
    one = bench.make_sides(setting, ["ours[eager]"])["ours[eager]"]
    three = bench.make_sides(setting, ["ours[eager]"], seeds=3)["ours[eager]x3"]
    trained_too = counts(one)[aten.convolution]
    teacher = setting.networks()[1]
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in teacher.modules())
    assert 3 * trained_too - counts(three)[aten.convolution] == 2 * convolutions


def test_kept_bytes_of_a_side_leave_out_what_lives_anyway():
    side = bench.make_sides(make_setting("kd"), ["ours[eager]"])["ours[eager]"]
    assert 0 < side.kept_bytes() < kept_bytes(side.call, [])


def test_bench_step_prints_a_table_and_appends_rows(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    pair = "cifar:resnet14>cifar:resnet8"
    args = ["bench", "step", "--pairs", pair, "--providers", "plain,ours[eager]", "--batch", "4"]
    assert main([*args, "--image-size", "16", "--rounds", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "plain / it" in said
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + 3  # plain and ours of dfpt, ours of kd
    assert f"step:dfpt:{pair},ours[eager],step" in out.read_text()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--pairs", "cifar:resnet14"], "expected TEACHER>STUDENT"),
        (["--methods", "dkd"], "--methods dkd: expected some of"),
        (["--providers", "ours[graph]", "--device", "cpu"], "expected some of plain,"),
        (["--batch", "0"], "expected a whole number"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(args, expected, capsys):
    assert main(["bench", "step", *args]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
