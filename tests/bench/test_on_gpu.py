"""bench/on_gpu.sh: no step ends another, time is kept, and the last line says what happened.

`PYTHON` is a shell script here that does to each step what a test wants; the steps themselves run
on the null GPU (tests/null_gpu/test_first_gpu.py).
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "on_gpu.sh"


def environment(tmp_path, body, **variables):
    """Of a script whose Python is `body`: $* are its arguments."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{body}\n")
    python.chmod(0o755)
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return {**kept, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **variables}


def run(tmp_path, part, body, **variables):
    done = subprocess.run(
        [SCRIPT, *part.split()],
        env=environment(tmp_path, body, **variables),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def outcome(printed):
    """The last line: how many were well, then the names under failed, cut and not run."""
    last = printed.strip().splitlines()[-1]
    found = re.fullmatch(
        r"== [\w-]+: (\d+) ok; failed: (.*); cut: (.*); not run for lack of time: (.*); "
        r"(\d+) rows in .*/results.csv; \d+ s",
        last,
    )
    assert found, last
    return found.groups()


def test_a_failing_test_does_not_end_the_part_before_its_bench(tmp_path):
    code, printed = run(
        tmp_path,
        "loss",
        'case "$*" in *" pytest "*) echo 1 failed; exit 1 ;; *) echo "measured $*" ;; esac',
    )
    assert code == 1
    assert "1 failed" in printed
    assert "measured -m dfptkd.engine.cli bench kernels --shapes 128x100," in printed
    assert outcome(printed) == ("1", "tests (exit 1)", "none", "none", "0")


def test_a_file_whose_tests_do_not_apply_is_no_failure(tmp_path):
    code, printed = run(tmp_path, "loss", '[[ "$*" != *" pytest "* ]] || exit 5')
    assert code == 0
    assert "no test applies here" in printed
    assert outcome(printed) == ("2", "none", "none", "none", "0")
    code, printed = run(tmp_path, "loss", '[[ "$*" != *" bench "* ]] || exit 5')  # of a bench it is
    assert (code, outcome(printed)[1]) == (1, "bench (exit 5)")


def test_a_step_is_cut_at_its_limit_and_what_it_wrote_stays(tmp_path):
    body = (
        'case "$*" in *" pytest "*) exit 0 ;; esac\n'
        'printf "header\\nrow\\n" >> "${@: -1}"; echo "a row"; exec sleep 50'
    )
    started = time.monotonic()
    code, printed = run(tmp_path, "loss", body, LIMIT="2")
    assert time.monotonic() - started < 20
    assert code == 124
    assert "a row" in printed
    cut = outcome(printed)[2]
    assert re.fullmatch(r"bench \(\d+ s\)", cut)
    assert outcome(printed) == ("1", "none", cut, "none", "1")
    assert (tmp_path / "out/results.csv").read_text() == "header\nrow\n"
    assert "a row" in (tmp_path / "out/loss.txt").read_text()


def test_a_step_that_ignores_being_asked_is_killed(tmp_path):
    body = 'case "$*" in *" pytest "*) trap "" TERM; while :; do sleep 0.1; done ;; esac'
    code, printed = run(tmp_path, "loss", body, LIMIT="1")
    assert code == 124
    assert outcome(printed)[:3] == ("1", "none", outcome(printed)[2])
    assert outcome(printed)[2].startswith("tests (")


def test_a_killed_step_is_a_failure_and_the_next_one_runs(tmp_path):
    body = 'case "$*" in *" pytest "*) kill -9 $$ ;; *) echo measured ;; esac'
    code, printed = run(tmp_path, "loss", body)
    assert code == 1
    assert "measured" in printed
    assert outcome(printed)[:2] == ("1", "tests (exit 137)")


def test_what_a_step_leaves_running_is_not_waited_for(tmp_path):
    """A compiler's worker holds the pipe of the step that started it."""
    started = time.monotonic()
    code, printed = run(tmp_path, "loss", "setsid sleep 30 & echo $! >> $OUT/left; exit 0")
    assert time.monotonic() - started < 15
    for pid in (tmp_path / "out/left").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    assert (code, outcome(printed)[0]) == (0, "2")


def test_when_time_is_up_the_others_are_named(tmp_path):
    code, printed = run(tmp_path, "loss", "sleep 3", BUDGET="7")
    assert code == 124
    assert "== bench: not run, no time is left" in printed
    assert outcome(printed) == ("1", "none", "none", "bench", "0")


def test_an_interrupt_ends_the_step_too(tmp_path):
    body = "echo $$ > $OUT/pid; exec sleep 50"
    process = subprocess.Popen(
        [SCRIPT, "loss"],
        env=environment(tmp_path, body),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    pid = tmp_path / "out/pid"
    wait_for(lambda: pid.exists() and pid.read_text().strip())
    process.terminate()
    assert process.wait(timeout=20) == 130
    wait_for(lambda: not Path("/proc", pid.read_text().strip()).exists())


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_compute_sanitizer_runs_the_kernels_where_it_is(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "compute-sanitizer"
    tool.write_text('#!/bin/bash\necho "sanitized $*"\nexit 9\n')
    tool.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    code, printed = run(tmp_path, "prompt", "exit 0", PATH=path)
    assert code == 1
    assert re.search(r"sanitized --error-exitcode 9 .* bench first kernels --small", printed)
    assert outcome(printed)[:2] == ("3", "sanitizer (exit 9)")


def test_limits_of_a_part_are_within_what_is_promised():
    table = re.findall(r"^([\w-]+) +\| (\d+) +\| ([\w-]+)", SCRIPT.read_text(), re.M)
    parts = {part for part, _, _ in table}
    assert parts == {
        "first", "loss", "prompt", "step", "step-plus", "step-imagenet", "data", "optim", "study",
    }  # fmt: skip
    for part in parts - {"first"}:
        assert sum(int(seconds) for of, seconds, _ in table if of == part) <= 240
    first = {step: int(seconds) for of, seconds, step in table if of == "first"}
    assert sum(first.values()) - first.pop("sanitizer") <= 540  # it takes what is left


@pytest.mark.parametrize("part", ["", "nothing", "fir", "first|loss"])
def test_an_unknown_part_is_usage(tmp_path, part):
    done = subprocess.run([SCRIPT, part], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bench/on_gpu.sh first|")


def test_missing_data_are_named(tmp_path):
    done = subprocess.run(
        [SCRIPT, "data"],
        env=environment(tmp_path, "exit 0", DATA="/nowhere"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("/nowhere: no such folder, expected DATA=")


def test_a_folder_that_cannot_be_written_ends_it_before_the_first_step(tmp_path):
    done = subprocess.run(
        [SCRIPT, "first"],
        env=environment(tmp_path, "echo measured", OUT="/proc"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 5
    assert done.stdout == ""
    assert "/proc/first.txt: No such file or directory" in done.stderr
