"""`dfptkd bench compare`: what is slower beyond noise is found, what is noise is not."""

import json
import math

import pytest

from dfptkd.engine.cli import main

MACHINE = {
    "cpu": {"brand_raw": "AMD EPYC", "count": 2}, "device": "cpu", "threads": 2,
    "torch": "2.14.1", "triton": "3.8.0", "python_version": "3.11.7",
}  # fmt: skip


def entry(name, median, *, spread=0.02, rounds=20):
    stats = {
        "rounds": rounds,
        "q1": median * (1 - spread),
        "median": median,
        "q3": median * (1 + spread),
    }
    return {"fullname": f"bench/test_step.py::{name}", "stats": stats}


def write(path, entries, commit="aaa", **machine):
    content = {
        "machine_info": MACHINE | machine,
        "commit_info": {"id": commit},
        "benchmarks": entries,
    }
    path.write_text(json.dumps(content))
    return str(path)


def compare(tmp_path, capsys, old, new, *options, **machine):
    files = [write(tmp_path / "old.json", old), write(tmp_path / "new.json", new, **machine)]
    code = main(["bench", "compare", *files, *options])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_slower_beyond_noise_has_an_exit_code_of_its_own(tmp_path, capsys):
    code, lines, _ = compare(
        tmp_path, capsys, [entry("a", 1.0), entry("b", 1.0)], [entry("a", 1.3), entry("b", 1.02)]
    )
    assert code == 6
    (slower,) = (line for line in lines if line.startswith("slower"))
    assert "test_step.py::a" in slower
    assert "1.30x" in slower
    assert lines[-1].startswith("2 compared: 1 slower, 0 faster, 1 within noise")


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (entry("a", 1.09), "less than the threshold"),
        (entry("a", 1.3, spread=0.25), "the quartiles overlap"),
        (entry("a", 0.5), "faster"),
        (entry("a", 2.0, rounds=4), "too few rounds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_slower(tmp_path, capsys, new, why):
    code, lines, _ = compare(tmp_path, capsys, [entry("a", 1.0)], [new])
    assert code == 0
    assert not any(line.startswith("slower") for line in lines)
    if why in ("faster", "too few rounds"):
        assert lines[0].startswith(f"{why}: bench/test_step.py::a")


def test_the_threshold_is_an_option(tmp_path, capsys):
    old, new = [entry("a", 1.0)], [entry("a", 1.09)]
    assert compare(tmp_path, capsys, old, new, "--threshold", "5")[0] == 6
    assert compare(tmp_path, capsys, old, new, "--threshold", "10")[0] == 0


def test_what_only_one_file_has_is_named(tmp_path, capsys):
    code, lines, _ = compare(
        tmp_path, capsys, [entry("a", 1.0), entry("gone", 1.0)], [entry("a", 1.0), entry("new", 1)]
    )
    assert code == 0
    assert f"missing in {tmp_path}/new.json: bench/test_step.py::gone" in lines
    assert f"missing in {tmp_path}/old.json: bench/test_step.py::new" in lines


def test_other_versions_are_named(tmp_path, capsys):
    _, lines, _ = compare(
        tmp_path, capsys, [entry("a", 1.0)], [entry("a", 1.0)], torch="2.11.0", commit="bbb"
    )
    assert lines[:2] == ["differs: torch 2.14.1 and 2.11.0", "differs: commit aaa and bbb"]


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"cpu": {"brand_raw": "Intel Xeon", "count": 2}}, "CPU AMD EPYC and Intel Xeon"),
        ({"device": "NVIDIA H200"}, "device cpu and NVIDIA H200"),
        ({"threads": 1}, "threads 2 and 1"),
    ],
    ids=str,
)
def test_other_machines_are_refused_unless_meant(tmp_path, capsys, machine, said):
    entries = [entry("a", 1.0)]
    code, _, error = compare(tmp_path, capsys, entries, entries, **machine)
    assert code == 3
    assert said in error
    assert error.count("\n") == 1
    code, lines, _ = compare(tmp_path, capsys, entries, entries, "--other-machine", **machine)
    assert code == 0
    assert f"differs: {said}" in lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("not JSON", "expected a file of pytest bench/ --benchmark-json"),
        ("[1, 2]", "expected a file of pytest bench/ --benchmark-json"),
        ('{"benchmarks": []}', "expected a file of pytest bench/ --benchmark-json"),
        (json.dumps({"machine_info": MACHINE, "benchmarks": []}), "no benchmark in common"),
        (
            json.dumps({"machine_info": MACHINE, "benchmarks": [entry("a", 1.0, rounds=math.inf)]}),
            "cannot convert float infinity to integer",
        ),
        (
            json.dumps({"machine_info": MACHINE, "benchmarks": [entry("a", float("nan"))]}),
            "times that are not in order",
        ),
    ],
    ids=["absent", "text", "list", "without machine", "empty", "endless", "not a number"],
)
def test_bad_files_are_one_line(tmp_path, capsys, text, said):
    old, new = write(tmp_path / "old.json", [entry("a", 1.0)]), tmp_path / "new.json"
    if text is not None:
        new.write_text(text)
    assert main(["bench", "compare", old, str(new)]) == 3
    error = capsys.readouterr().err
    assert said in error
    assert str(new) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "args", [["one.json"], ["a", "b", "--threshold", "-1"], ["a", "b", "--threshold", "much"]]
)
def test_wrong_options_are_usage(args, capsys):
    assert main(["bench", "compare", *args]) == 2
    assert capsys.readouterr().err.count("\n") == 1
