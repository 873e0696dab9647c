"""M28-M43: declared runs, whatever ends them, and what is kept of them."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from injectors import tiny_config

from dfptkd.engine import study as study_module
from dfptkd.engine.config import Cell, Study
from dfptkd.engine.errors import DataError, Stopped, UsageError
from dfptkd.engine.lock import RunLock
from dfptkd.engine.study import Slot, list_study, run_study, slots, student_jobs, teacher_jobs
from dfptkd.engine.study_record import put_on_record, read_archive, read_rows
from dfptkd.engine.train import run

ONE_THREAD = [Slot("cpu", {"OMP_NUM_THREADS": "1"})] * 2
STUDY = Study(
    "tiny_study", "cpu", "Does it run?", "It says nothing.",
    (Cell("labels only", "tiny", "ce"), Cell("KD", "tiny", "kd")), (0, 1), epochs=2,
)  # fmt: skip


def configured(root: Path, **changes):
    """Cells in `root`; the teacher is trained by the study."""

    def configure(cell: Cell):
        config = tiny_config(root / "x", cell.method, **changes)
        teacher = replace(config.teacher, weights=None, epochs=1, global_batch=16)
        return replace(config, out=None, out_root=str(root), arm=cell.arm, teacher=teacher)

    return configure


def run_all(root: Path, results: Path, study: Study = STUDY, **options) -> None:
    run_study(study, configured(root), ONE_THREAD, results=results, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study from beginning to end: its runs, and its record."""
    root = tmp_path_factory.mktemp("study")
    run_all(root / "runs", root / "results")
    return root


@pytest.fixture
def results(done, tmp_path):
    shutil.copytree(done / "results", tmp_path / "results")
    return tmp_path / "results"


# The runs -----------------------------------------------------------------------------------------


def test_a_study_trains_the_teacher_then_every_cell_and_seed(done):
    assert (done / "runs/teacher-synthetic-cifar-resnet8_s2-seed0/teacher.safetensors").is_file()
    rows = read_rows(done / "results/tiny_study.csv")
    assert [(r.cell, r.method, r.seed) for r in rows] == [
        ("labels only", "ce", 0), ("labels only", "ce", 1), ("KD", "kd", 0), ("KD", "kd", 1),
    ]  # fmt: skip
    assert [r.teacher_top1 is None for r in rows] == [True, True, False, False]
    assert all(r.epochs == 2 and r.train_images == 64 and r.threads == 1 for r in rows)
    assert rows[2].command == "dfptkd train tiny --method kd --epochs 2 --seed 0"


def test_rows_say_what_the_runs_have_written(done):
    row = read_rows(done / "results/tiny_study.csv")[2]
    with open(done / "runs" / row.run / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    tops = [float(line["test/student_top1"]) for line in metrics]
    assert (row.last_top1, row.best_top1) == (tops[-1], max(tops))
    assert row.seconds == float(metrics[-1]["seconds"])
    wrote = json.loads((done / "runs" / row.run / "run.json").read_text())
    assert (row.commit, row.torch) == (wrote["commit"], wrote["versions"]["torch"])


def test_a_finished_study_runs_nothing_and_changes_no_byte(done, monkeypatch):
    files = [done / "results/tiny_study.csv", done / "results/runs/tiny_study-cpu.zip"]
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(study_module, "start", lambda *_: pytest.fail("a run was started"))
    run_all(done / "runs", done / "results")
    assert [file.read_bytes() for file in files] == before


def test_more_seeds_run_those_alone(done):
    configure = configured(done / "runs")
    jobs = student_jobs(replace(STUDY, seeds=(1, 2)), configure, on_gpu=False)
    assert [job.name for job in jobs] == ["tiny-ce-seed2", "tiny-kd-seed2"]
    assert teacher_jobs(job.config for job in jobs) == []


def test_on_a_gpu_the_seeds_of_a_cell_are_one_job(tmp_path):
    jobs = student_jobs(STUDY, configured(tmp_path), on_gpu=True)
    assert [(job.config.method, job.config.seeds) for job in jobs] == [
        ("ce", (0, 1)), ("kd", (0, 1)),
    ]  # fmt: skip


LONG = replace(STUDY, cells=(Cell("labels only", "tiny", "ce"),), seeds=(0,), epochs=100)


def when_it_trains(folder: Path, then) -> threading.Thread:
    """Calls `then` once a run's status says that it has done some steps."""

    def watch():
        while True:
            with suppress(OSError, ValueError):
                if json.loads((folder / "status.json").read_text())["step"] >= 8:
                    return then()
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_study_that_was_asked_to_stop_goes_on_from_there(tmp_path):
    run_folder = tmp_path / "runs/tiny-ce-seed0"
    when_it_trains(run_folder, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped by SIGTERM: the same command goes on from here"):
        run_all(tmp_path / "runs", tmp_path / "results", LONG)
    status = json.loads((run_folder / "status.json").read_text())
    assert status["state"] == "stopped"
    assert 8 <= status["step"] < 400
    assert not (tmp_path / "results").exists()
    run_all(tmp_path / "runs", tmp_path / "results", LONG)
    (row,) = read_rows(tmp_path / "results/tiny_study.csv")
    events = [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["kind"] == "stopped"] == [status["step"]]
    metrics = (run_folder / "metrics.csv").read_text().splitlines()
    assert (row.epochs, len(metrics)) == (100, 101)  # none missing, none twice


def test_when_the_time_is_over_nothing_more_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "start", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(Stopped, match="the time is over"):
        run_all(tmp_path / "runs", tmp_path / "results", minutes=0.0)


def test_a_run_that_somebody_else_stopped_is_not_done(tmp_path):
    def stop():
        lock = json.loads((tmp_path / "runs/tiny-ce-seed0/.lock").read_text())
        os.kill(lock["pid"], signal.SIGTERM)

    when_it_trains(tmp_path / "runs/tiny-ce-seed0", stop)
    with pytest.raises(DataError, match=r"tiny-ce-seed0 \(exit code 75\)"):
        run_all(tmp_path / "runs", tmp_path / "results", LONG)


def test_runs_end_saved_when_the_study_is_killed(tmp_path):
    def killed(config):
        root = Path(config.out_root)
        when_it_trains(root / "tiny-ce-seed0", lambda: os.kill(os.getpid(), signal.SIGKILL))
        run_all(root, root.parent / "results", LONG)

    config = configured(tmp_path / "runs")(LONG.cells[0])
    process = multiprocessing.get_context("fork").Process(target=killed, args=(config,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    status = {}
    while status.get("state") != "stopped" and time.monotonic() < deadline:
        status = json.loads((tmp_path / "runs/tiny-ce-seed0/status.json").read_text())
        time.sleep(0.1)
    assert status["state"] == "stopped"


def test_an_error_of_the_study_leaves_no_run_behind(tmp_path, monkeypatch):
    workers = []
    begun = study_module.start

    def start_and_remember(job, slot):
        workers.append(begun(job, slot))
        return workers[-1]

    def fail(_):
        raise OSError("no log")

    monkeypatch.setattr(study_module, "start", start_and_remember)
    monkeypatch.setattr(study_module, "last_line", fail)
    two = replace(LONG, cells=(*LONG.cells, Cell("?", "unknown", "ce")))

    def configure(cell):
        config = configured(tmp_path / "runs")(cell)
        student = "cifar:resnet9" if cell.label == "?" else config.student
        return replace(config, recipe=cell.recipe, student=student)

    with pytest.raises(OSError, match="no log"):
        run_study(two, configure, ONE_THREAD, results=tmp_path / "results")
    assert len(workers) == 2
    assert all(worker.process.poll() is not None for worker in workers)


@pytest.mark.parametrize("taken", ["runs", "results"])
def test_two_studies_do_not_work_in_the_same_folder(tmp_path, taken):
    with RunLock(tmp_path / taken), pytest.raises(UsageError, match=f"{taken}: in use by process"):
        run_all(tmp_path / "runs", tmp_path / "results")


def test_a_run_that_fails_is_named_and_the_others_are_done(done, tmp_path):
    shutil.copytree(done / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/tiny-kd-seed0")
    broken = replace(STUDY, cells=(Cell("?", "tiny", "dkd"), *STUDY.cells), seeds=(0,))

    def configure(cell):
        config = configured(tmp_path / "runs")(cell)
        return replace(config, student="cifar:resnet9") if cell.method == "dkd" else config

    with pytest.raises(
        DataError, match=r"1 of the runs.*tiny-dkd-seed0 \(exit code 2\): .*resnet9"
    ):
        run_study(broken, configure, ONE_THREAD, results=tmp_path / "results")
    rows = read_rows(tmp_path / "results/tiny_study.csv")
    assert [(row.cell, row.seed) for row in rows] == [("labels only", 0), ("KD", 0)]


def test_a_folder_with_a_run_of_other_options_is_refused_before_anything_runs(
    done, tmp_path, monkeypatch
):
    monkeypatch.setattr(study_module, "start", lambda *_: pytest.fail("a run was started"))
    for study, configure, said in (
        (STUDY, configured(done / "runs", global_batch=32), "global_batch: 16 there, 32 here"),
        (
            replace(STUDY, epochs=3, seeds=(0,)),
            configured(done / "runs"),
            "epochs: 2 there, 3 here",
        ),
    ):
        with pytest.raises(DataError, match=f"holds another run.*{said}"):
            run_study(study, configure, ONE_THREAD, results=tmp_path / "results")
    assert list(tmp_path.iterdir()) == []


def test_what_is_on_record_is_not_run_again(results, tmp_path, monkeypatch):
    """On another machine, to which the record alone has come."""
    started = []
    monkeypatch.setattr(study_module, "work_through", lambda jobs, *_: started.extend(jobs) or [])
    four = replace(STUDY, seeds=(0, 1, 2))
    run_study(four, configured(tmp_path / "runs"), ONE_THREAD, results=results)
    assert [job.name for job in started] == [
        "teacher-synthetic-cifar-resnet8_s2-seed0", "tiny-ce-seed2", "tiny-kd-seed2",
    ]  # fmt: skip
    on_gpu = student_jobs(four, configured(tmp_path / "runs"), True, {"tiny-kd-seed1"})
    assert [job.config.seeds for job in on_gpu] == [(0, 1, 2), (0, 2)]


def test_a_record_of_other_options_is_refused_and_stays(results, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "start", lambda *_: pytest.fail("a run was started"))
    before = [path.read_bytes() for path in sorted(results.rglob("*.*"))]
    other = configured(tmp_path / "runs", global_batch=32)
    with pytest.raises(DataError, match=r"tiny_study-cpu\.zip: tiny-ce-seed0: holds another run"):
        run_study(STUDY, other, ONE_THREAD, results=results)
    assert [path.read_bytes() for path in sorted(results.rglob("*.*"))] == before


def test_an_option_younger_than_the_record_has_its_default(results):
    """Its default is what the code did before."""
    kept = read_archive(results / "runs/tiny_study-cpu.zip")["tiny-ce-seed0"]
    older = json.loads(kept.run)
    del older["config"]["loss"]["reverse_kl"]
    config = replace(STUDY.config(STUDY.cells[0], configured(results)), seed=0)
    replace(kept, run=json.dumps(older)).check(config, "x")
    changed = replace(config, loss=replace(config.loss, reverse_kl=True))
    with pytest.raises(DataError, match=r"x: holds another run \(loss.reverse_kl: False there"):
        replace(kept, run=json.dumps(older)).check(changed, "x")


def test_list_says_what_is_done_and_how_to_do_it(done, tmp_path, capsys):
    list_study(replace(STUDY, seeds=(0, 1, 2)), configured(done / "runs"), tmp_path)
    said = capsys.readouterr().out
    assert "2/3  KD: dfptkd train tiny --method kd --epochs 2 --seed 0" in said


# What to run on -----------------------------------------------------------------------------------


def test_a_cpu_is_shared_out_by_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert slots("cpu", None) == [Slot("cpu", {"OMP_NUM_THREADS": "1"})] * 8
    assert slots("cpu", 3) == [Slot("cpu", {"OMP_NUM_THREADS": "2"})] * 3


def test_each_gpu_is_a_place_and_the_visible_ones_alone(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    gpus = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots(None, None)]
    assert gpus == ["3", "5"]
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in slots("cuda", 3)] == ["3", "5", "3"]


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(DataError, match="no CUDA device"):
        slots("cuda", None)


# The record ---------------------------------------------------------------------------------------


def test_the_record_names_no_path_of_the_machine(done):
    with zipfile.ZipFile(done / "results/runs/tiny_study-cpu.zip") as archive:
        texts = [archive.read(name).decode() for name in archive.namelist()]
    assert len(texts) == 8
    for text in (*texts, (done / "results/tiny_study.csv").read_text()):
        assert str(done) not in text
        assert str(Path.home()) + "/" not in text


def test_what_is_on_record_stays_when_the_runs_are_gone(results, tmp_path):
    before = read_rows(results / "tiny_study.csv")
    assert put_on_record(STUDY, configured(tmp_path / "nothing"), results) == 4
    assert read_rows(results / "tiny_study.csv") == before


def test_a_run_done_again_takes_the_place_of_the_old_one(results, tmp_path):
    configure = configured(tmp_path / "runs", eval_every=2)
    run(replace(STUDY.config(STUDY.cells[0], configure), seed=1))
    before = read_rows(results / "tiny_study.csv")
    assert put_on_record(STUDY, configure, results) == 4
    after = read_rows(results / "tiny_study.csv")
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    assert len(read_archive(results / "runs/tiny_study-cpu.zip")) == 4


def test_other_budgets_keep_their_rows(results, tmp_path):
    short = replace(STUDY, budget="short")
    table = results / "tiny_study.csv"
    table.write_text(table.read_text().replace("\ncpu,", "\nshort,"))
    os.rename(results / "runs/tiny_study-cpu.zip", results / "runs/tiny_study-short.zip")
    configure = configured(tmp_path / "runs")
    run(replace(STUDY.config(STUDY.cells[0], configure), seed=1))
    assert put_on_record(STUDY, configure, results) == 1
    assert [r.budget for r in read_rows(table)] == ["short"] * 4 + ["cpu"]
    assert put_on_record(short, configure, results) == 4
    assert [r.budget for r in read_rows(table)] == ["cpu"] + ["short"] * 4


def test_nothing_finished_leaves_no_record(tmp_path):
    assert put_on_record(STUDY, configured(tmp_path / "nothing"), tmp_path / "results") == 0
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("budget,cell", "budget,label", "line 1: expected the columns budget,cell,"),
        (",tiny,kd,,0,", ",tiny,kd,,nought,", "line 4: seed='nought': expected a int"),
        (",tiny,kd,,0,", ",tiny,kd,0,", "line 4: expected 20 cells, got 19"),
    ],
)
def test_a_damaged_table_is_refused_with_its_line(results, old, new, said):
    table = results / "tiny_study.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(DataError) as caught:
        read_rows(table)
    assert str(caught.value).startswith(f"{table}: {said}")


def test_a_damaged_archive_is_refused_and_left_alone(results, tmp_path):
    archive = results / "runs/tiny_study-cpu.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    before = archive.read_bytes()
    with pytest.raises(DataError, match="damaged archive"):
        put_on_record(STUDY, configured(tmp_path / "nothing"), results)
    assert archive.read_bytes() == before
