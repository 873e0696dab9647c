"""M21, M23, M28-M43, M49: what each study runs, and that its commands run the same."""

from dataclasses import replace
from pathlib import Path

import pytest

from dfptkd.engine.cli import main, parse_run
from dfptkd.engine.config import to_dict
from dfptkd.recipes import cifar100
from dfptkd.recipes.arms import ARMS
from dfptkd.recipes.quickstart import quickstart
from dfptkd.recipes.studies import STUDIES

BUDGETS = ("full", "short", "cpu")
ALL = [(name, budget) for name in STUDIES for budget in BUDGETS]


def configure(cell):
    name = cell.recipe.removeprefix("cifar100.")
    make = quickstart if name == "quickstart" else getattr(cifar100, name)
    config = make(cell.method)
    return config if cell.arm is None else replace(ARMS[cell.arm](config), arm=cell.arm)


def labels(name, budget):
    return [cell.label for cell in STUDIES[name](budget).cells]


@pytest.mark.parametrize(("name", "budget"), ALL)
def test_a_cell_differs_from_every_other_one(name, budget):
    study = STUDIES[name](budget)
    assert (study.name, study.budget) == (name, budget)
    assert len({(cell.heading, cell.label) for cell in study.cells}) == len(study.cells)
    rows = {(cell.recipe, cell.label, cell.arm) for cell in study.cells}
    assert len(rows) == len(study.cells)  # what tells a row's cell
    configs = [to_dict(replace(configure(cell), arm=None)) for cell in study.cells]
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


@pytest.mark.parametrize(("name", "budget"), ALL)
def test_every_cell_has_something_to_be_compared_with(name, budget):
    study = STUDIES[name](budget)
    assert study.against
    for heading in {cell.heading for cell in study.cells}:
        there = {cell.label for cell in study.cells if cell.heading == heading}
        assert there & set(study.against)
    assert set(study.against) <= {cell.label for cell in study.cells}


@pytest.mark.parametrize(("name", "budget"), ALL)
def test_the_command_of_a_run_is_its_configuration(name, budget):
    study = STUDIES[name](budget)
    for cell in study.cells:
        program, verb, *options = study.command(cell, 7).split()
        assert (program, verb) == ("dfptkd", "train")
        assert parse_run("train", options) == replace(study.config(cell, configure), seed=7)


def test_budgets_are_the_protocols_or_small_networks():
    for name in STUDIES.keys() - {"quickstart"}:
        full, short, cpu = (STUDIES[name](budget) for budget in BUDGETS)
        assert [cell.recipe for cell in full.cells] == [cell.recipe for cell in short.cells]
        assert {full.config(cell, configure).epochs for cell in full.cells} == {240}
        assert {short.config(cell, configure).epochs for cell in short.cells} == {40}
        assert {cell.recipe for cell in cpu.cells} == {"cifar100.resnet20_s2_resnet8_s2"}
        assert len(cpu.seeds) >= 8


def test_quickstart_is_what_make_demo_runs():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    methods = makefile.partition("METHODS := ")[2].partition("\n")[0].split()
    assert "train quickstart --method $$method --seeds 0,1,2 $(DEMO_FLAGS)" in makefile
    study = STUDIES["quickstart"]("cpu")
    assert [cell.method for cell in study.cells] == methods
    assert (study.seeds, study.epochs) == ((0, 1, 2), None)


def test_M28_the_main_table_has_every_method_and_both_controls_on_each_pair():
    study = STUDIES["main"]("full")
    methods = {(cell.method, cell.arm) for cell in study.cells}
    short = {(cell.method, cell.arm) for cell in STUDIES["main"]("short").cells}
    assert short - methods == {("dkd", "short_warmup")}  # 20 epochs of 240 are 3 of 40
    assert methods == {
        ("ce", None), ("kd", None), ("kd", "same_total"), ("dkd", None), ("dist", None),
        ("dfpt", None), ("dfpt_plus", None), ("dfpt", "mixture"),
    }  # fmt: skip
    pairs = [cell.recipe.removeprefix("cifar100.") for cell in study.cells[::8]]
    assert pairs == [
        "wrn_40_2_shufflenetv1", "resnet32x4_resnet8x4", "resnet56_resnet20", "vgg13_vgg8",
    ]  # fmt: skip
    assert len(study.cells) == 8 * len(pairs)


def test_M33_supervision_by_the_student_from_none_to_twice():
    study = STUDIES["bidirectional"]("cpu")
    values = [configure(cell).loss.prompt_student for cell in study.cells if cell.method == "dfpt"]
    assert sorted(values) == [0.0, 0.1, 0.5, 1.0, 2.0]
    assert set(study.curves) == {"test/prompt_top1", "kl/prompt_student"}


def test_M39_the_teachers_of_the_gap_grow_under_one_student():
    study = STUDIES["gap"]("full")
    assert len(study.cells) == 12
    for cell in study.cells:
        assert f"cifar:{cell.group.removeprefix('teacher ')}" == configure(cell).teacher.name
    same = configure(study.cells[1]).loss
    assert (study.cells[1].label, same.kd_ce, same.kd_kl) == ("KD at equal total weights", 1, 2)
    teachers = [configure(cell).teacher.name for cell in study.cells[::3]]
    assert teachers == [f"cifar:resnet{depth}" for depth in (32, 44, 56, 110)]
    assert {configure(cell).student for cell in study.cells} == {"cifar:resnet20"}


def test_M37_M41_M42_the_sweeps_have_their_values():
    def swept(name, value):
        cells = STUDIES[name]("cpu").cells
        return {value(configure(cell)) for cell in cells if cell.method.startswith("dfpt")}

    assert swept("scales", lambda c: c.prompt.r1) == {2, 4, 8, 16}
    assert {0.125, 0.25, 0.5, 1.0} <= swept("scales", lambda c: c.prompt.r2)
    assert swept("scales", lambda c: c.prompt.arrangement) == {"sequential", "parallel"}
    assert swept("weights", lambda c: c.loss.student_teacher) == {0.0, 0.5, 1.0, 2.0}
    assert swept("weights", lambda c: c.loss.student_prompt) == {0.0, 0.5, 1.0, 2.0}
    assert swept("weights", lambda c: c.loss.tau) == {1.0, 2.0, 4.0, 8.0}
    assert swept("weights", lambda c: c.optim.prompt_lr_scale) == {0.1, 0.3, 1.0, 3.0}
    assert swept("weights", lambda c: c.optim.backbone_lr_scale) == {0.001, 0.01, 0.1, 1.0}
    assert swept("capacity", lambda c: c.prompt.r1) == {1, 2, 4, 8, 16}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["mian", "--budget", "cpu"], "unknown study 'mian': did you mean main?"),
        (["main"], "--budget"),
        (["main", "--budget", "tiny"], "full"),
        (["main", "--budget", "cpu", "--seeds", "0,x"], "--seeds"),
        (["main", "--budget", "cpu", "--workers", "0"], "--workers 0: expected a number above 0"),
        (["main", "--budget", "cpu", "--minutes", "-1"], "--minutes -1.0: expected a number above"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(args, said, capsys):
    assert main(["study", *args]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_the_command_lists_studies_and_runs(capsys, tmp_path):
    assert main(["study", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in STUDIES)
    assert main(["study", "gap", "--budget", "cpu", "--list", "--out-root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("0/8  ") == 12
    assert list(tmp_path.iterdir()) == []
