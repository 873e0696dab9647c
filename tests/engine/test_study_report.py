"""Studies on record: what is made of them, and what is refused. The runs are made up."""

import csv
import json
import re
import statistics
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dfptkd.engine.cli import main
from dfptkd.engine.config import Cell, RunConfig, Study, to_dict
from dfptkd.engine.errors import DataError, UsageError
from dfptkd.engine.paired import PairedDifference, half_width, t_quantile
from dfptkd.engine.study_figures import study_figures
from dfptkd.engine.study_record import put_on_record
from dfptkd.engine.study_report import BEGIN, END, NOTHING, markdown, sentences, study_report
from dfptkd.engine.study_results import difference, read_studies
from dfptkd.engine.teacher import run_folder
from dfptkd.recipes.quickstart import quickstart

KD, DFPT, MIXTURE, LABELS = (
    Cell("KD", "quickstart", "kd"),
    Cell("DFPT-KD", "quickstart", "dfpt"),
    Cell("mixture", "quickstart", "dfpt", "mixture"),
    Cell("labels only", "quickstart", "ce"),
)
LAST = {
    KD: (60.0, 61.0, 62.5, 61.5),
    DFPT: (61.0, 62.1, 63.4, 62.5),  # a point above, seed by seed
    MIXTURE: (60.5, 60.5, 63.0, 61.3),
    LABELS: (),
}
TEACHER = {"name": "cifar:resnet20_s2", "sha256": "ab", "weights": "t", "top1": 75.25}
COLUMNS = ("epoch", "test/student_top1", "test/prompt_top1", "seconds")


def make_study(name: str = "main", budget: str = "cpu") -> Study:
    return Study(
        name, budget, "Is one above the other?", "It is made up.", tuple(LAST), (0, 1, 2, 3),
        epochs=3, against=("KD",), curves=("test/student_top1", "test/prompt_top1"),
    )  # fmt: skip


STUDIES = {"main": lambda budget: make_study("main", budget),
           "other": lambda budget: make_study("other", budget)}  # fmt: skip


def make_run(config: RunConfig, last: float) -> None:
    """A finished run whose student's best epoch is the one before its last."""
    folder = run_folder(config)
    folder.mkdir(parents=True)
    prompt = "" if config.method in ("ce", "kd") else f"{last + 2}"
    curve = [(1, last - 9, "", 5), (2, last + 1, prompt, 9), (3, last, prompt, 12 + config.seed)]
    rows = [",".join(COLUMNS), *(",".join(map(str, row)) for row in curve)]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "run.json").write_text(
        json.dumps(
            {
                "config": to_dict(config),
                "versions": {"torch": "2.14.1"},
                "commit": "0123456789ab",
                "hardware": {"device": "cpu", "cpu": "a CPU", "threads": 1},
                "data": {"train_images": 5000},
                "teacher": None if config.method == "ce" else TEACHER,
            }
        )
    )
    (folder / "student.safetensors").touch()


def put(root: Path, name: str = "main", budget: str = "cpu", last=LAST) -> Path:
    """Puts a made-up study on record; returns its table."""
    study = make_study(name, budget)

    def configure(cell: Cell) -> RunConfig:
        config = quickstart(cell.method)
        return replace(config, arm=cell.arm, epochs=3, out_root=str(root / "runs" / budget))

    for cell in study.cells:
        for seed, value in enumerate(last[cell]):
            config = replace(configure(cell), seed=seed)
            if not run_folder(config).exists():
                make_run(config, value)
    put_on_record(study, configure, root / "results")
    return root / "results" / f"{name}.csv"


@pytest.fixture
def table(tmp_path) -> Path:
    return put(tmp_path)


def edit(table: Path, change) -> None:
    """Lets `change` work on the rows of a table, each a dict of texts."""
    rows = list(csv.DictReader(table.read_text().splitlines()))
    header = list(rows[0])
    rows = change(rows) or rows
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def edit_archive(table: Path, change) -> Path:
    """Lets `change` work on the archive's files, {name: text}."""
    path = table.parent / "runs" / f"{table.stem}-cpu.zip"
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        texts = {info.filename: archive.read(info).decode() for info in infos}
    dates = {info.filename: info.date_time for info in infos}
    change(texts)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in texts.items():
            archive.writestr(zipfile.ZipInfo(name, dates.get(name, infos[0].date_time)), text)
    return path


def results_of(*tables: Path, studies=STUDIES):
    return read_studies(tables, studies)


# Intervals


@pytest.mark.parametrize(
    ("degrees", "value"),
    [
        (1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (7, 2.3646),
        (10, 2.2281), (29, 2.0452), (30, 2.0423), (120, 1.9799), (1000, 1.9623),
    ],
)  # fmt: skip
def test_t_quantiles_are_those_of_the_tables(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, abs=5e-5)


def test_paired_difference_by_hand():
    found = PairedDifference.of({0: 61.0, 1: 62.1, 2: 63.4}, {2: 62.5, 1: 61.0, 0: 60.0, 9: 1.0})
    assert found.n == 3
    assert found.mean == pytest.approx(1.0)
    assert found.high - found.mean == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert found.mean - found.low == pytest.approx(half_width([1.0, 1.1, 0.9]))
    assert found.is_shown


def test_a_single_pair_has_no_interval_and_none_no_difference():
    found = PairedDifference.of({0: 61.0}, {0: 60.0, 1: 3.0})
    assert (found.mean, found.n, found.low, found.high) == (1.0, 1, None, None)
    assert not found.is_shown
    assert PairedDifference.of({0: 61.0}, {1: 60.0}) is None


def test_pairs_are_made_by_seed(tmp_path):
    (results,) = results_of(put(tmp_path / "a"))
    mixed = {**LAST, DFPT: tuple(reversed(LAST[DFPT]))}
    (swapped,) = results_of(put(tmp_path / "b", last=mixed))
    right, wrong = (difference(r.cells[1], r.cells[0]) for r in (results, swapped))
    assert right.mean == pytest.approx(wrong.mean)
    assert right.is_shown
    assert not wrong.is_shown


# What is refused


def test_record_is_read_back_in_the_order_of_the_study(table):
    (results,) = results_of(table, table)
    assert [(c.label, c.n) for c in results.cells] == [
        ("KD", 4), ("DFPT-KD", 4), ("mixture", 4), ("labels only", 0),
    ]  # fmt: skip
    assert tuple(results.cells[1].by_seed.values()) == LAST[DFPT]
    assert [len(runs) for runs in results.cells[0].curves.values()] == [4, 0]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("last_top1", "63.2"), ("best_top1", "99.0"), ("prompt_top1", ""), ("teacher_top1", "1.0"),
        ("seconds", "1.0"), ("seed", "7"), ("epochs", "4"), ("train_images", "50000"),
        ("device", "another"), ("threads", "2"), ("torch", "2.11.0"), ("commit", ""),
        ("date", "2020-01-01"), ("method", "kd"), ("arm", "mixture"),
        ("command", "dfptkd train quickstart --method dfpt --epochs 3 --seed 0"),
    ],
)  # fmt: skip
def test_a_changed_value_is_refused_by_name(table, column, value):
    def change(rows):
        (row,) = (r for r in rows if r["cell"] == "DFPT-KD" and r["seed"] == "1")
        row[column] = value

    edit(table, change)
    with pytest.raises(DataError) as error:
        results_of(table)
    message = str(error.value)
    assert "\n" not in message
    said = rf"({column}|command): .* in the table, |main has no cell .*, {column} {value}"
    assert re.search(rf"quickstart-dfpt-seed1: ({said})", message)


def test_rows_of_two_runs_that_change_places_are_refused(table):
    def change(rows):
        a, b = (r for r in rows if r["cell"] == "KD" and r["seed"] in "01")
        a["run"], b["run"] = b["run"], a["run"]

    edit(table, change)
    with pytest.raises(DataError, match=r"seed1: seed: 0 in the table, 1 by its archived run"):
        results_of(table)


def test_a_missing_archive_or_run_is_refused(table):
    path = edit_archive(
        table, lambda texts: [texts.pop(n) for n in list(texts) if "dfpt-seed2" in n]
    )
    with pytest.raises(DataError, match=r"seed2: not among the archived runs"):
        results_of(table)
    path.unlink()
    with pytest.raises(DataError, match=r"not among the archived runs"):
        results_of(table)


def test_an_archived_run_without_a_row_is_refused(table):
    edit(table, lambda rows: rows[:-1])
    with pytest.raises(DataError, match=r"mixture-dfpt-seed3: an archived run without a row"):
        results_of(table)


def test_a_doubled_row_is_refused(table):
    edit(table, lambda rows: [*rows, rows[0]])
    with pytest.raises(DataError, match=r"kd-seed0: 2 rows"):
        results_of(table)


def test_a_second_run_of_a_seed_is_refused(table):
    def copy(texts):
        for name in [n for n in texts if n.startswith("quickstart-kd-seed0/")]:
            texts[name.replace("kd-seed0", "kd-again-seed0")] = texts[name]

    edit_archive(table, copy)
    edit(table, lambda rows: [*rows, {**rows[0], "run": "quickstart-kd-again-seed0"}])
    with pytest.raises(DataError, match=r"'KD', arm None, seed 0: 2 rows"):
        results_of(table)


def test_a_damaged_archived_run_is_refused(table):
    def cut(texts):
        texts["quickstart-kd-seed0/run.json"] = "{"

    edit_archive(table, cut)
    with pytest.raises(DataError, match=r"kd-seed0: run.json or metrics.csv .* is damaged"):
        results_of(table)


@pytest.mark.parametrize("place", [0.01, 0.3, 0.6, 0.9, 0.99])
def test_a_damaged_archive_is_one_line(table, place):
    path = table.parent / "runs" / "main-cpu.zip"
    whole = path.read_bytes()
    cut = int(len(whole) * place)
    path.write_bytes(whole[:cut] + bytes(20) + whole[cut + 20 :])
    with pytest.raises(DataError) as error:
        results_of(table)
    assert "\n" not in str(error.value)


def test_runs_of_a_cell_that_are_not_alike_are_refused(table):
    def enlarge(texts):
        name = "quickstart-kd-seed0/run.json"
        texts[name] = texts[name].replace('"train_images": 5000', '"train_images": 6000')

    edit_archive(table, enlarge)
    edit(table, lambda rows: [rows[0] | {"train_images": "6000"}, *rows[1:]])
    with pytest.raises(DataError, match=r"KD: runs of different length or on different data"):
        results_of(table)


def changed(study: Study, **changes):
    return {"main": lambda budget: replace(study, budget=budget, **changes)}


def test_runs_under_different_teachers_are_refused(table):
    """Their differences would be the teachers'."""

    def exchange(texts):
        name = "quickstart-dfpt-seed1/run.json"
        texts[name] = texts[name].replace('"ab"', '"cd"')

    edit_archive(table, exchange)
    with pytest.raises(DataError, match=r"dfpt-seed1: another cifar:resnet20_s2 as teacher"):
        results_of(table)


def test_runs_on_different_data_are_refused(table):
    """Of as many images under one name; a run that does not say which they are is no other."""

    def say(hashes):
        def change(texts):
            for seed, sha256 in hashes.items():
                name = f"quickstart-dfpt-seed{seed}/run.json"
                run = json.loads(texts[name])
                run["data"] |= {"name": "own", "train_sha256": sha256}
                texts[name] = json.dumps(run)

        edit_archive(table, change)

    say({1: "ab", 2: "ab"})
    assert results_of(table)
    say({3: "cd"})
    with pytest.raises(DataError, match=r"dfpt-seed3: on other data than other runs have \(SHA"):
        results_of(table)


def test_what_the_study_does_not_say_any_more_is_refused(table):
    study = make_study()
    with pytest.raises(DataError, match=r"main has no cell 'mixture' of quickstart"):
        results_of(table, studies=changed(study, cells=(KD, DFPT, LABELS)))
    other_arm = (KD, DFPT, replace(MIXTURE, arm="no_fusion"), LABELS)
    with pytest.raises(DataError, match=r"main has no cell 'mixture' of quickstart, arm mixture"):
        results_of(table, studies=changed(study, cells=other_arm))
    with pytest.raises(DataError, match=r"--epochs 9"):
        results_of(table, studies=changed(study, epochs=9))
    edit(table, lambda rows: [r | {"command": r["command"].replace("3", "9", 1)} for r in rows])
    with pytest.raises(DataError, match=r"epochs: 3 in the table, 9 by the study"):
        results_of(table, studies=changed(study, epochs=9))


def test_an_arm_that_the_run_has_not_is_refused_even_if_row_and_archive_agree(table):
    cells = (KD, replace(DFPT, arm="no_fusion"), MIXTURE, LABELS)
    study = replace(make_study(), cells=cells)

    def change(rows):
        for row in rows:
            if row["cell"] == "DFPT-KD":
                row["command"] = study.command(cells[1], int(row["seed"]))

    edit(table, change)
    with pytest.raises(DataError, match=r"main has no cell 'DFPT-KD' of quickstart, arm None"):
        results_of(table, studies=changed(study))


def test_tables_that_are_none_are_refused(table, tmp_path):
    with pytest.raises(DataError, match=r"no study of that name"):
        results_of(table, studies={"other": STUDIES["other"]})
    with pytest.raises(UsageError, match=r"expected one table a study"):
        results_of(table, put(tmp_path / "again"))
    edit(table, lambda rows: [r | {"budget": "huge"} for r in rows])
    with pytest.raises(DataError, match=r"unknown budget 'huge'"):
        results_of(table)


# The Markdown


def section(table: Path, **changes) -> str:
    found = [replace(r, study=replace(r.study, **changes)) for r in results_of(table)]
    names = {f"{r.study.name}-{r.study.budget}": [table.with_name("a.svg")] for r in found}
    return markdown(found, names, table.parent)


def test_section_has_the_numbers_of_the_table(table):
    text = section(table)
    kd, dfpt = (next(x for x in text.splitlines() if x.startswith(f"| {c.label} |"))
                for c in (KD, DFPT))  # fmt: skip
    std = statistics.stdev(LAST[DFPT])
    half = half_width([1.0, 1.1, 0.9, 1.0])
    assert dfpt == (
        f"| DFPT-KD | 4 | {statistics.fmean(LAST[DFPT]):.2f} ± {std:.2f} "
        f"| {statistics.fmean(LAST[DFPT]) + 1:.2f} | {statistics.fmean(LAST[DFPT]) + 2:.2f} "
        f"| 75.25 | +1.00 ({1 - half:+.2f} to {1 + half:+.2f}; 4) | 14 |"
    )
    assert kd.endswith("|  | 75.25 |  | 14 |")  # no prompt path, no difference from itself
    assert "| labels only | 0 |  |  |  |  |  |  |" in text
    assert (
        "`quickstart`; 4 seeds, 3 epochs on 5,000 training images; a CPU (1 thread), torch 2.14.1, "
        "commit 0123456789ab, " in text
    )
    assert "**Is one above the other?**" in text
    assert text.endswith("\n\nIt is made up.")


def test_sentences_say_what_is_shown_and_what_is_not(table):
    (results,) = results_of(table)
    shown, note = sentences(results)
    half = half_width([1.0, 1.1, 0.9, 1.0])
    above, open_, few = shown.splitlines()
    assert above == (
        f"- Above KD (points, 95 % interval): DFPT-KD by 1.00 ({1 - half:.2f} to {1 + half:.2f}, "
        "n = 4 pairs)."
    )
    mixture = difference(results.cells[2], results.cells[0])
    assert open_.startswith("- No difference from KD shown (")
    assert open_.endswith(f": mixture (up to {max(-mixture.low, mixture.high):.2f}, n = 4 pairs).")
    assert few == "- Fewer than two pairs with KD, so no interval: labels only."
    assert note == "The 2 intervals are not corrected for multiple comparisons."


def test_a_cell_below_is_said_to_be_below(tmp_path):
    (results,) = results_of(put(tmp_path, last={**LAST, DFPT: (59.0, 60.1, 61.4, 60.5)}))
    first = next(sentences(results)).splitlines()[0]
    assert re.match(
        r"- Below KD \(.*\): DFPT-KD by 1\.00 \(0\.\d\d to 1\.\d\d, n = 4 pairs\)", first
    )


def test_two_references_are_compared_with_each_other_once(table):
    (results,) = results_of(table)
    results = replace(results, study=replace(results.study, against=("KD", "DFPT-KD")))
    text = "\n".join(sentences(results))
    assert re.search(r"Above KD .*: DFPT-KD by 1\.00", text)
    assert not re.search(r"Below DFPT-KD .*: KD by", text)
    assert "The 3 intervals" in text


def test_cells_are_compared_within_their_group(table):
    (results,) = results_of(table)
    names = ("a", "a", "b", "b")
    cells = [replace(results.cells[i].cell, group=name) for i, name in enumerate(names)]
    alike = [replace(r, cell=cell) for r, cell in zip(results.cells, cells, strict=True)]
    study = replace(results.study, cells=tuple(cells), against=("KD", "mixture"))
    results = replace(results, study=study, cells=alike)
    found = {
        heading: [(o.label, [c.label for c in cs]) for o, cs in results.comparisons(group)]
        for heading, group in results.groups().items()
    }
    assert found == {"a": [("KD", ["DFPT-KD"])], "b": [("mixture", ["labels only"])]}
    text = markdown([results], {"main-cpu": [Path("a.svg")]}, Path())
    assert "intervals are not corrected" not in text  # there is one
    assert text.count("`a`:") == 2  # its table, and what that shows


def test_what_is_missing_is_said(table, tmp_path):
    text = section(table)
    assert "Not complete: 12 of 16 runs are on record. No run yet of labels only." in text
    whole = {**LAST, LABELS: LAST[KD]}
    assert "Not complete" not in section(put(tmp_path / "whole", last=whole))


def test_studies_have_their_order_and_only_the_first_is_open(tmp_path):
    put(tmp_path, "other")
    tables = [put(tmp_path, name) for name in ("other", "main")]
    put(tmp_path, "main", "full")
    found = results_of(*tables)
    text = markdown(found, {f"{r.study.name}-{r.study.budget}": [Path("a")] for r in found}, Path())
    heads = re.findall(r"^### .*", text, re.MULTILINE)
    assert heads == ["### main, full budget", "### main, cpu budget", "### other, cpu budget"]
    assert text.index("<details>") > text.index(heads[2])


def test_each_recipe_has_its_own_table_comparisons_and_panel(table):
    (results,) = results_of(table)
    others = [replace(r, cell=replace(r.cell, recipe="other")) for r in results.cells[:2]]
    study = replace(results.study, cells=(*LAST, *(r.cell for r in others)))
    results = replace(results, study=study, cells=[*results.cells, *others])
    text = markdown([results], {"main-cpu": [Path("a.svg")]}, Path())
    assert text.count("| method | n |") == 2
    assert text.count("`other`:") == 2  # its table, and what that shows
    assert "No run yet of labels only (`quickstart`)." in text
    assert "The 3 intervals" in text
    for svg in study_figures(results).values():
        assert svg.count(">other</text>") == 1


def test_text_out_of_files_stays_in_its_cell(table):
    def name_the_device(texts):
        for name, text in texts.items():
            texts[name] = text.replace("a CPU", f"<b>a|{END}")

    edit_archive(table, name_the_device)
    edit(table, lambda rows: [r | {"device": f"<b>a|{END}"} for r in rows])
    assert "&lt;b>a\\|&lt;!--" in section(table)


# Files


@pytest.fixture
def readme(tmp_path) -> Path:
    path = tmp_path / "README.md"
    path.write_bytes(f"before\r\n{BEGIN}\nold\n{END}\nafter".encode())
    return path


def test_readme_gets_the_block_and_nothing_else_changes(table, readme, tmp_path):
    study_report([table], STUDIES, readme=readme)
    first = readme.read_bytes()
    text = first.decode()
    assert text.startswith(f"before\r\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nafter")
    assert "old" not in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 5
    assert all((tmp_path / link).is_file() for link in links)
    study_report([table], STUDIES, readme=readme)
    assert readme.read_bytes() == first


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", "0 lines <!-- results: begin"),
        (f"{BEGIN}\n", "0 lines <!-- results: end"),
        (f"{BEGIN}\n{BEGIN}\n{END}\n", "2 lines <!-- results: begin"),
        (f"{BEGIN}\n{END}\n{END}\n", "2 lines <!-- results: end"),
        (f"{END}\n{BEGIN}\n", "expected <!-- results: begin --> before <!-- results: end -->"),
    ],
)
def test_readme_without_its_markers_is_left_alone(table, readme, text, says):
    readme.write_text(text)
    with pytest.raises(DataError, match=re.escape(says)):
        study_report([table], STUDIES, readme=readme)
    assert readme.read_text() == text
    assert not list(table.parent.glob("*.svg"))


def test_a_refused_table_changes_no_file(table, readme):
    before = readme.read_bytes()
    edit(table, lambda rows: [r | {"last_top1": "99.0"} for r in rows])
    with pytest.raises(DataError):
        study_report([table], STUDIES, readme=readme)
    assert readme.read_bytes() == before
    assert not list(table.parent.glob("*.svg"))


def test_figures_are_the_same_bytes_each_time(table, tmp_path, capsys):
    study_report([table], STUDIES)
    assert "![main: accuracy by method](" in capsys.readouterr().out
    study_report([table], STUDIES, out=tmp_path / "again")
    names = sorted(path.name for path in table.parent.glob("*.svg"))
    assert names == ["main-cpu-test-prompt_top1.svg", "main-cpu-test-student_top1.svg",
                     "main-cpu.svg"]  # fmt: skip
    for name in names:
        svg = (table.parent / name).read_text()
        assert svg == (tmp_path / "again" / name).read_text()
        assert svg.startswith("<!-- matplotlib ")
        assert "#0404" not in svg  # every placeholder has become a colour
        assert "mixture" in svg  # as text


def test_no_study_is_a_sentence():
    assert markdown([], {}, Path()) == NOTHING


# The command


def test_command_takes_tables_or_runs_and_not_both(table, tmp_path, capsys):
    runs = str(tmp_path / "runs")
    assert main(["report", str(table), runs]) == 2
    assert main(["report", runs, "--readme", "README.md"]) == 2
    assert main(["report", str(tmp_path / "main.csv")]) == 3
    assert main(["report", str(table)]) == 3  # the real study has other cells
    last = capsys.readouterr().err.splitlines()[-1]
    assert "main has no cell" in last


def test_a_table_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.csv: no such file"):
        results_of(tmp_path / "nothing.csv")
