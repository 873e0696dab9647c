"""The report and what it reads: run folders made up as a trainer leaves them."""

import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from dfptkd.engine.config import RunConfig
from dfptkd.engine.errors import DataError, StorageError
from dfptkd.engine.groups import compare_methods, summarise
from dfptkd.engine.options import value_of
from dfptkd.engine.records import failure_signatures, find_runs, read_run
from dfptkd.engine.report import print_table, report, write_html

TERMS = {
    "ce": ("ce",),
    "kd": ("ce", "kl"),
    "dfpt": ("student_ce", "student_teacher", "student_prompt", "prompt_ce"),
    "dfpt_plus": ("student_ce", "student_teacher", "student_prompt", "prompt_ce"),
}
DIVERGENCES = (
    "kl/teacher_prompt", "kl/prompt_student", "kl/teacher_student", "kl/teacher_student_target",
    "kl/teacher_student_nontarget", "kl/prompt_student_target", "kl/prompt_student_nontarget",
    "prob/teacher_target", "prob/prompt_target", "prompt_norm/stage1", "prompt_norm/stage2",
)  # fmt: skip


def make_run(
    root: Path,
    method: str = "dfpt",
    seed: int = 0,
    *,
    name: str | None = None,
    recipe: str = "pair",
    last: float = 70.0,
    prompt: tuple[float, ...] | None = None,
    epochs: int = 20,
    state: str = "finished",
    student: str = "cifar:resnet8",
    teacher_top1: float = 75.0,
    overhead_percent: float = 2.3,
    config: dict | None = None,
) -> Path:
    """Writes one run folder whose student ends at `last` percent, after a best of `last` + 1."""
    folder = root / (name or f"{recipe}-{method}-seed{seed}")
    folder.mkdir(parents=True)
    dfpt = method.startswith("dfpt")
    options = {
        "recipe": recipe, "method": method, "student": student, "seed": seed, "epochs": epochs,
        "out": str(folder), "loss": {"tau": 4.0, "prompt_student": 1.0},
        "prompt": {"r1": 4, "fusion": True},
    }  # fmt: skip
    for key, value in (config or {}).items():
        section, _, option = key.rpartition(".")
        (options[section] if section else options)[option] = value
    write(folder / "run.json", {
        "format": "dfptkd.run/1", "config": options, "commit": None,
        "versions": {"python": "3.11", "torch": "2.14"},
        "hardware": {"device": "cpu", "cpu": "a CPU", "cores": 2, "threads": 2},
        "teacher": None if method == "ce" else {
            "name": "cifar:resnet56", "weights": "t", "sha256": "ab" * 32, "top1": teacher_top1,
            "expected_top1": 75.0,
        },
        "data": {"name": "synthetic", "num_classes": 7, "image_size": [32, 32],
                 "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "class_names": list("abcdefg")},
        "cost": {
            "teacher_params": 1000, "teacher_macs": 2000,
            "added_params": int(overhead_percent * 10) if dfpt else None,
            "added_macs": int(overhead_percent * 20) if dfpt else None,
            "params_overhead_percent": overhead_percent if dfpt else None,
            "macs_overhead_percent": overhead_percent if dfpt else None,
        },
        "not_known_from_paper": ["loss.tau", "prompt.r1"] if dfpt else [], "warnings": [],
    })  # fmt: skip
    rows = []
    for epoch in range(1, epochs + 1):
        value = last if epoch == epochs else (last + 1) * (1 - math.exp(-6 * epoch / epochs))
        value = last + 1 if epoch == epochs - 1 else value
        row = {"epoch": epoch, "step": 10 * epoch, "lr": 0.1, "test/student_top1": value}
        row |= {f"loss/{term}": 2 / epoch for term in TERMS[method]}
        if dfpt:
            curve = prompt or [teacher_top1 * e / epochs for e in range(1, epochs + 1)]
            row["test/prompt_top1"] = curve[epoch - 1]
            row |= dict.fromkeys(DIVERGENCES, 1 / epoch)
        if method != "ce":
            row["test/teacher_top1"] = teacher_top1
        rows.append(row)
    header = [*rows[0], "test/ema_top1"]  # a column without values
    lines = [",".join(str(row.get(column, "")) for column in header) for row in rows]
    (folder / "metrics.csv").write_text("\n".join([",".join(header), *lines]) + "\n")
    write(folder / "status.json", {
        "state": state, "epoch": epochs, "step": 10 * epochs, "total_steps": 10 * epochs,
        "last": {"student_top1": last, "prompt_top1": rows[-1].get("test/prompt_top1")},
        "best": {"student_top1": last + 1, "epoch": epochs - 1},
        "seconds": 90.0, "images_per_second": 1000.0,
    })  # fmt: skip
    (folder / "events.jsonl").write_text("")
    return folder


def write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))


def edit(path: Path, **changes) -> None:
    write(path, json.loads(path.read_text()) | changes)


def groups_in(root: Path):
    return summarise(read_run(folder) for folder in find_runs(root))


# Reading


def test_read_run_returns_series_without_empty_cells(tmp_path):
    record = read_run(make_run(tmp_path, "kd", epochs=3))
    assert [epoch for epoch, _ in record.series("test/student_top1")] == [1, 2, 3]
    assert record.series("test/ema_top1") == record.series("no such column") == []


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_half_written_last_lines_are_ignored(tmp_path, cut):
    folder = make_run(tmp_path, epochs=5)
    metrics = folder / "metrics.csv"
    metrics.write_text(metrics.read_text()[:-cut])
    (folder / "events.jsonl").write_text('{"kind": "resumed", "message": ""}\n{"kind": "st')
    record = read_run(folder)
    assert [row["epoch"] for row in record.metrics] == [1, 2, 3, 4]
    assert [event["kind"] for event in record.events] == ["resumed"]


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("run.json", None, "run.json: missing"),
        ("run.json", "{", "run.json: corrupt at line 1"),
        ("run.json", "{}", "not a run record"),
        ("run.json", '{"format": "dfptkd.run/1", "config": {"recipe": "a"}}', "config.method"),
        ("metrics.csv", None, "metrics.csv: missing"),
        ("metrics.csv", "epoch,lr\n1,x\n2,0.1\n", "corrupt at line 2"),
        ("metrics.csv", "epoch,lr\n1\n", "corrupt at line 2"),
        ("metrics.csv", "a,b\n", "expected a column 'epoch'"),
        ("status.json", "[]", "expected a JSON object"),
        ("events.jsonl", "oops\n", "corrupt at line 1"),
    ],
)
def test_bad_file_is_one_line_that_names_it(tmp_path, file, text, says):
    folder = make_run(tmp_path)
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(DataError, match=re.escape(says)) as error:
        read_run(folder)
    assert str(folder / file) in str(error.value)
    assert "\n" not in str(error.value)


# Groups


def test_M31_headline_is_mean_and_sample_std_of_the_last_epoch(tmp_path):
    for seed, last in enumerate((70.0, 71.0, 73.0)):
        make_run(tmp_path, seed=seed, last=last)
    (group,) = groups_in(tmp_path)
    assert group.n == 3
    assert group.last.mean == pytest.approx(214 / 3)
    assert group.last.std == pytest.approx(math.sqrt(7 / 3))  # n - 1 in the denominator
    assert group.best.mean == pytest.approx(group.last.mean + 1)
    assert group.last.text() == "71.33 ± 1.53"


def test_a_seed_that_is_there_twice_is_one_observation(tmp_path, capsys):
    for name, seed, last in (("a", 0, 70.0), ("copy", 0, 70.5), ("b", 1, 72.25)):
        make_run(tmp_path, "kd", seed, name=name, last=last)
    (group,) = groups_in(tmp_path)
    assert group.n == group.last.n == 2
    assert group.last.mean == pytest.approx((70.25 + 72.25) / 2)
    assert group.last.std == pytest.approx(math.sqrt(2))
    report([tmp_path], tmp_path / "r.html")
    said = capsys.readouterr().out
    assert f"pair, KD: seed 0 counts once, by its mean, of {tmp_path / 'a'}, " in said
    assert "seed 1 counts" not in said


def test_unfinished_run_does_not_enter_the_mean(tmp_path):
    make_run(tmp_path, seed=0, last=70)
    make_run(tmp_path, seed=1, last=10, state="running")
    (group,) = groups_in(tmp_path)
    assert (group.n, len(group.runs), group.last.mean) == (1, 2, 70)


def test_groups_differ_by_options_that_their_method_reads_but_not_by_seed_or_folder(tmp_path):
    make_run(tmp_path, "dfpt", 0)
    make_run(tmp_path, "dfpt", 1)
    make_run(tmp_path, "dfpt", 2, name="arm", config={"loss.prompt_student": 0.0})
    make_run(tmp_path, "kd", 0)
    make_run(tmp_path, "kd", 1, name="kd-other", config={"loss.prompt_student": 0.5})
    labels = {group.label: len(group.runs) for group in groups_in(tmp_path)}
    assert labels == {
        "KD": 2,
        "DFPT-KD, loss.prompt_student=1": 2,
        "DFPT-KD, loss.prompt_student=0": 1,
    }


def test_how_a_run_is_kept_tells_no_groups_apart(tmp_path):
    make_run(tmp_path, "kd", 0, config={"checkpoint_steps": 5})
    make_run(tmp_path, "kd", 1, config={"checkpoint_minutes": 3.0})
    waits = make_run(tmp_path, "kd", 2)
    run = json.loads((waits / "run.json").read_text())
    # as recorded by a version that has the option; before, its default held
    run["config"] |= {"data": {"timeout": 60.0}, "optim": {"milestones": [0.625, 0.75, 0.875]}}
    edit(waits / "run.json", config=run["config"])
    (group,) = groups_in(tmp_path)
    assert (group.n, group.options) == (3, {})


@pytest.mark.parametrize(
    ("method", "option", "counts"),
    [
        ("kd", "loss.reverse_kl", True),
        ("dkd", "loss.reverse_kl", False),
        ("dfpt", "loss.crd_negatives", False),  # loss.crd is off
        ("ce", "optim.nesterov", True),
        ("ce", "teacher.fold_bn", False),
    ],
)
def test_an_option_counts_where_it_has_an_effect(tmp_path, method, option, counts):
    TERMS.setdefault(method, ("ce",))
    value = 5 if option == "loss.crd_negatives" else not value_of(RunConfig(), option)
    make_run(tmp_path, method, 0)
    other = make_run(tmp_path, method, 1)
    run = json.loads((other / "run.json").read_text())
    section, name = option.split(".")
    run["config"].setdefault(section, {})[name] = value
    edit(other / "run.json", config=run["config"])
    assert len(groups_in(tmp_path)) == (2 if counts else 1)


def test_another_teacher_is_another_group(tmp_path):
    make_run(tmp_path, seed=0)
    other = make_run(tmp_path, seed=1)
    teacher = json.loads((other / "run.json").read_text())["teacher"]
    edit(other / "run.json", teacher=teacher | {"sha256": "cd" * 32})
    assert [g.options for g in groups_in(tmp_path)] == [
        {"teacher.sha256": "abababab"}, {"teacher.sha256": "cdcdcdcd"},
    ]  # fmt: skip


@pytest.mark.parametrize(("dfpt", "holds"), [(71.0, True), (69.0, False)])
def test_M30_says_whether_dfpt_is_above_kd(tmp_path, dfpt, holds):
    for seed in range(3):
        make_run(tmp_path, "kd", seed, last=70.0 + seed / 10)
        make_run(tmp_path, "dfpt", seed, last=dfpt + seed / 10)
    (comparison,) = compare_methods(groups_in(tmp_path))
    assert comparison.holds is holds
    assert comparison.detail == f"{dfpt - 70:+.2f} ± 0.08 points, n = 3 and 3"


def test_less_than_is_shown_is_no_difference(tmp_path):
    """One image of 30,000."""
    for seed in range(3):
        make_run(tmp_path, "dfpt", seed, last=70.0)
        make_run(tmp_path, "dfpt_plus", seed, last=70.0 - (seed == 0) / 100)
    found = [c for c in compare_methods(groups_in(tmp_path)) if c.better.method == "dfpt_plus"]
    assert [c.holds for c in found] == [True]
    assert found[0].detail.startswith("+0.00 ")


def test_images_normalised_otherwise_are_another_group(tmp_path):
    """Whoever said so; a run that is older than that did as the data says."""
    own = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    other = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    folders = [make_run(tmp_path, seed=seed) for seed in range(4)]
    for folder, teacher in zip(folders, ({}, own, other, other), strict=True):
        record = json.loads((folder / "run.json").read_text())
        record["data"] = {**(record.get("data") or {}), **own}
        record["teacher"] |= teacher
        (folder / "run.json").write_text(json.dumps(record))
    assert [len(group.runs) for group in summarise(map(read_run, folders))] == [2, 2]


def test_M30_groups_with_other_options_are_not_compared(tmp_path):
    make_run(tmp_path, "kd", config={"global_batch": 64})
    make_run(tmp_path, "dfpt", config={"global_batch": 128})
    (comparison,) = compare_methods(groups_in(tmp_path))
    assert comparison.holds is None
    assert "not compared" in comparison.detail


# Failure signatures


def kinds(folder: Path) -> list[str]:
    return [kind for kind, _ in failure_signatures(read_run(folder))]


def test_healthy_run_has_no_failure_signature(tmp_path):
    assert kinds(make_run(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": (74.8,) * 20}, ["saturation"]),  # M44, as with identity initialisation
        ({"overhead_percent": 41.6}, ["overhead", "overhead"]),  # M45: parameters and MACs
        ({"config": {"prompt.fusion": False}}, ["fusion missing"]),  # M46
        ({"teacher_top1": 72.9}, ["teacher below expectation"]),
    ],
)
def test_M44_M45_M46_each_failure_signature_is_found(tmp_path, changes, expected):
    assert kinds(make_run(tmp_path, **changes)) == expected


def test_event_of_a_signature_is_kept_and_others_are_not_warnings(tmp_path):
    folder = make_run(tmp_path)
    events = [{"kind": "saturation", "message": "seen"}, {"kind": "resumed", "message": "no"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert failure_signatures(read_run(folder)) == [("saturation", "seen")]


def test_what_a_run_went_through_is_told_once_a_kind(tmp_path):
    folder = make_run(tmp_path)
    events = [
        ("skipped", "1 step"),
        ("rewind", "back to 3"),
        ("skipped", "2 steps"),
        ("stopped", ""),
    ]
    lines = [json.dumps({"kind": kind, "message": message}) for kind, message in events]
    (folder / "events.jsonl").write_text("".join(line + "\n" for line in lines))
    found = failure_signatures(read_run(folder))
    assert found == [("skipped steps", "1 step (and 1 more)"), ("went back", "back to 3")]


# The report


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("study")
    for method in ("ce", "kd", "dfpt", "dfpt_plus"):
        for seed in range(2):
            make_run(root / "deep", method, seed, last=70 + seed)
    return root


def test_report_is_one_file_without_network(study, capsys):
    path = report([study / "deep", study], None)  # named twice, counted once
    page = path.read_text()
    assert path == study / "deep" / "report.html"
    assert page.count("<svg") == 7
    assert "8, of which 8 finished" in page
    assert "not known to us from the paper" in page
    assert "No warnings" in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?(?!#)[a-z/]", page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "#0101" not in page  # every placeholder colour has become one of the page's
    out = capsys.readouterr().out
    assert "70.50 ± 0.71" in out
    assert out.rstrip().endswith(str(path))


def test_report_of_the_same_runs_is_the_same_file(study, tmp_path):
    runs = [read_run(folder) for folder in find_runs(study)]
    first, second = (write_html(runs, tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second


def test_text_from_files_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    folder = make_run(tmp_path, recipe=evil, name="x", config={"prompt.note": evil + "$\\x$"})
    edit(folder / "run.json", warnings=[evil], commit=evil, hardware={"device": evil})
    (folder / "events.jsonl").write_text(json.dumps({"kind": "overhead", "message": evil}) + "\n")
    plain = make_run(tmp_path, recipe=evil, name="y")  # so that labels name the option
    runs = [read_run(folder), read_run(plain)]
    page = write_html(runs, tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


def test_warnings_are_shown(tmp_path):
    make_run(tmp_path, overhead_percent=41.6)
    page = report([tmp_path]).read_text()
    assert "add 41.6 % to the teacher&#x27;s parameters" in page
    assert "No warnings" not in page


def test_run_just_begun_can_be_reported(tmp_path):
    folder = make_run(tmp_path, state="running")
    (folder / "metrics.csv").write_text("epoch,step\n")
    edit(folder / "status.json", last={}, best=None, seconds=None, images_per_second=None)
    assert "0 finished" in report([folder]).read_text()


def test_bad_run_among_good_ones_is_named_and_left_out(tmp_path, capsys):
    make_run(tmp_path, seed=0)
    bad = make_run(tmp_path, seed=1)
    (bad / "status.json").unlink()
    page = report([tmp_path]).read_text()
    assert "1, of which 1 finished" in page
    assert str(bad / "status.json") in page
    assert str(bad / "status.json") in capsys.readouterr().err
    with pytest.raises(DataError, match=r"status\.json: missing"):
        report([bad])


def test_folder_without_runs_is_a_data_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        report([tmp_path])
    with pytest.raises(DataError, match="no folder given"):
        report([])


def test_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    record = read_run(make_run(tmp_path))
    path = tmp_path / "report.html"
    path.write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageError, match="No space left"):
        write_html([record], path)
    assert path.read_text() == "old"
    assert not list(tmp_path.glob(".report*"))


def test_table_is_plain_text_without_a_terminal(tmp_path):
    make_run(tmp_path, recipe="a-recipe-[bold]-with-a-name-that-is-longer-than-most" * 2)
    stream = io.StringIO()
    print_table(groups_in(tmp_path), Console(file=stream, force_terminal=False, width=40))
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) <= 4
    assert "[bold]" in stream.getvalue()


def test_the_new_head_stands_apart_where_the_record_knows_it(tmp_path, capsys):
    folder = make_run(tmp_path, overhead_percent=32.0)
    path = folder / "run.json"
    cost = json.loads(path.read_text())["cost"]
    edit(path, cost=cost | {"new_head_params": 270, "new_head_macs": 2})
    report([tmp_path], tmp_path / "report.html")
    assert "32.0 (head 27.0)" in capsys.readouterr().out
    assert "32.0 (head 27.0)" in (tmp_path / "report.html").read_text()
    signatures = [
        message for kind, message in failure_signatures(read_run(folder)) if kind == "overhead"
    ]
    assert len(signatures) == 1  # 5 % of the parameters, but 31.9 % of the MACs in blocks
    assert "31.9 % to the teacher's MACs" in signatures[0]
