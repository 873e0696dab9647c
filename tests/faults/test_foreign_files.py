"""Files that somebody else wrote, or nobody: code in them never runs (row 17), rubbish in them is
one line of complaint, and reading changes nothing."""

import argparse
import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from injectors import in_child, listing, tiny_config, train, write_teacher
from safetensors.torch import save

from dfptkd.engine import checkpoint as checkpoint_module
from dfptkd.engine.checkpoint import load_checkpoint, newest_checkpoint, read_index
from dfptkd.engine.cli import main, parse_run
from dfptkd.engine.config import Cell, DataConfig, RunConfig, Study
from dfptkd.engine.data import load_data
from dfptkd.engine.data.cifar import parse_binary, parse_python
from dfptkd.engine.data.fashion_mnist import parse_idx
from dfptkd.engine.data.quarantine import read_quarantine
from dfptkd.engine.errors import DataError, DfptkdError
from dfptkd.engine.export import read_source
from dfptkd.engine.log import RunLog
from dfptkd.engine.models.weights import read_tables
from dfptkd.engine.report import report
from dfptkd.engine.study_record import put_on_record, read_rows
from dfptkd.engine.teacher import find_teacher
from dfptkd.engine.train import run

# torch wonders about pickle protocols before it refuses them.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

FUZZ = settings(
    max_examples=60,
    deadline=30_000,  # a hang fails, also on a machine that has other work to do
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking may take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and what it was made with."""
    root = tmp_path_factory.mktemp("finished")
    write_teacher(root)
    run(tiny_config(root / "run", "dfpt"))
    return root / "run"


# Row 17: code in files ---------------------------------------------------------------------------


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def attacks(marker: Path) -> dict[str, bytes]:
    """Name -> a file that runs code where it is unpickled without care."""
    found = {f"pickle {p}": pickle.dumps({"model": Attack(marker)}, protocol=p) for p in (0, 2, 5)}
    for name, new in (("torch zip", True), ("torch legacy", False)):
        file = io.BytesIO()
        torch.save({"model": Attack(marker)}, file, _use_new_zipfile_serialization=new)
        found[name] = file.getvalue()
    return found


def test_row_17_control_the_attacks_work(tmp_path):
    for name, content in attacks(tmp_path / "marker").items():
        if name.startswith("torch"):
            torch.load(io.BytesIO(content), weights_only=False)
        else:
            pickle.loads(content)
        assert (tmp_path / "marker").is_dir(), name
        (tmp_path / "marker").rmdir()


@pytest.mark.parametrize("suffix", [".pth", ".tar", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("name", attacks(Path("x")))
def test_row_17_no_code_runs_out_of_weights(tmp_path, name, suffix):
    path = tmp_path / f"teacher{suffix}"
    path.write_bytes(attacks(tmp_path / "marker")[name])
    with pytest.raises(DataError) as refused:
        read_tables(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("option", ["--teacher.weights", "--student-weights"])
def test_row_17_no_code_runs_out_of_weights_on_the_command_line(tmp_path, capsys, option):
    path = tmp_path / "weights.pth"
    path.write_bytes(attacks(tmp_path / "marker")["torch zip"])
    write_teacher(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(to_json(tiny_config(tmp_path / "out", "kd"))))
    assert main(["train", "--config", str(config), option, str(path)]) == DataError.exit_code
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "nothing was executed" in said
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", attacks(Path("x")))
@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "manifest.json"])
def test_row_17_no_code_runs_out_of_a_checkpoint(tmp_path, finished, capsys, name, file):
    out, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(finished, out)
    for path in (out / "checkpoints").glob("step-*"):
        (path / file).write_bytes(attacks(marker)[name])
        if file != "manifest.json":  # the attacker can compute a manifest
            (path / "manifest.json").write_text(checkpoint_module._manifest(path))
    newest = next((out / "checkpoints").glob("step-*"))
    for args in (
        ["train", "--config", str(out / "run.json"), "--out", str(out), "--epochs", "3"],
        ["train", "--config", str(out / "run.json"), "--out", str(out), "--resume", str(newest)],
        ["eval", str(newest)],
        ["export", str(newest), "--formats", "safetensors"],
    ):
        assert main(args) == DataError.exit_code, args
        assert capsys.readouterr().err.count("\n") == 1, args
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pickle 0", "pickle 2", "pickle 5"])
@pytest.mark.parametrize("packed", [False, True])
def test_row_17_no_code_runs_out_of_a_cifar_archive(tmp_path, name, packed):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for file in ("train", "test", "meta"):
        (folder / file).write_bytes(attacks(tmp_path / "marker")[name])
    if packed:
        with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as tar:
            tar.add(folder, folder.name)
        shutil.rmtree(folder)
    with pytest.raises(DataError, match="refused to load") as refused:
        load_data(DataConfig(name="cifar100", root=str(tmp_path)), torch.device("cpu"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_row_17_no_code_runs_out_of_what_should_be_json(tmp_path, finished, capsys, name):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for file in ("run.json", "status.json", "metrics.csv", "events.jsonl"):
        kept = (out / file).read_bytes()
        (out / file).write_bytes(attacks(tmp_path / "marker")[name])
        for args in (["report", str(out)], ["export", str(out)], ["eval", str(out)]):
            code = main([*args, *(["--out", str(tmp_path / "o")] if args[0] != "eval" else [])])
            assert code in (0, DataError.exit_code), args
            assert capsys.readouterr().err.count("\n") <= 1
            shutil.rmtree(tmp_path / "o", ignore_errors=True)
            (tmp_path / "o").unlink(missing_ok=True)
        (out / file).write_bytes(kept)
    path = tmp_path / "dfptkd-quarantine.json"
    path.write_bytes(attacks(tmp_path / "marker")[name])
    for read in (read_quarantine, lambda p: parse_run("train", ["--config", str(p)])):
        with pytest.raises(DataError):
            read(path)
    assert not (tmp_path / "marker").exists()


def test_row_17_options_beside_weights_are_read_past(tmp_path):
    """Training scripts store them there; test_checkpoint_forms.py has all that may be."""
    options = argparse.Namespace(lr=0.1)
    torch.save({"opt": options, "model": {"w": torch.ones(2)}}, tmp_path / "w.pth")
    assert [list(table.tensors) for table in read_tables(tmp_path / "w.pth")] == [["w"]]


# Rubbish -----------------------------------------------------------------------------------------


def to_json(config: RunConfig) -> dict:
    import dataclasses

    return json.loads(json.dumps(dataclasses.asdict(config)))


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes cut, overwritten, doubled or replaced."""

    @st.composite
    def change(draw) -> bytes:
        data = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data)))
            until = draw(st.integers(at, min(len(data), at + 64)))
            data[at:until] = draw(st.binary(max_size=24))
        return bytes(data[: draw(st.sampled_from([len(data), len(data) // 2, len(data) - 1]))])

    return st.one_of(change(), st.binary(max_size=200), st.just(b""), st.just(b"[" * 1500))


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.just([]), st.just({}), st.just("../../x"), st.just("\0"), st.just(10**400),
    st.lists(st.integers(-3, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip


def mutated_json(text: str) -> st.SearchStrategy[bytes]:
    """The JSON with some of its values replaced, removed or added: still JSON."""

    @st.composite
    def change(draw) -> bytes:
        value = json.loads(text)
        for _ in range(draw(st.integers(1, 3))):
            node, parent, key = value, None, None
            while isinstance(node, (dict, list)) and node and draw(st.integers(0, 4)):
                parent = node
                key = draw(st.sampled_from(list(node) if isinstance(node, dict) else [0, -1]))
                node = parent[key]
            if parent is None:
                return json.dumps(draw(LEAVES)).encode()
            if draw(st.integers(0, 3)):
                parent[key] = draw(LEAVES)
            else:
                del parent[key]
        return json.dumps(value).encode()

    return change()


def refused_in_one_line(read, *args) -> bool:
    """Whether the reader refuses; any other error than ours is a failure."""
    try:
        read(*args)
    except DfptkdError as error:
        message = str(error)
    else:
        return False
    assert "\n" not in message
    assert len(message) < 2000
    return True


@pytest.fixture
def run_copy(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("forged", [False, True], ids=["damaged", "forged manifest"])
@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "manifest.json", "index.json"])
def test_fuzz_checkpoint(run_copy, file, forged):
    folder = run_copy / "checkpoints"
    path = folder / "step-8"
    target = folder / file if file == "index.json" else path / file
    content = target.read_bytes()
    change = mutated(content)
    if file.endswith(".json"):
        change |= mutated_json(content.decode())
    others = {k: v for k, v in listing(run_copy).items() if not k.endswith((file, "manifest.json"))}

    @FUZZ
    @given(change)
    def check(damaged):
        target.write_bytes(damaged)
        if forged and file not in ("manifest.json", "index.json"):
            (path / "manifest.json").write_text(checkpoint_module._manifest(path))
        refused = refused_in_one_line(load_checkpoint, path)
        assert refused or forged or damaged == content or file == "index.json"
        assert newest_checkpoint(folder, lambda _: None).step in (4, 8)
        read_index(folder)
        after = listing(run_copy)
        assert {k: v for k, v in after.items() if not k.endswith((file, "manifest.json"))} == others

    check()


def test_fuzz_config(tmp_path, run_copy):
    path = tmp_path / "run.json"
    text = (run_copy / "run.json").read_text()

    @FUZZ
    @given(mutated(text.encode()) | mutated_json(json.dumps(json.loads(text)["config"])))
    def check(damaged):
        path.write_bytes(damaged)
        refused_in_one_line(parse_run, "train", ["--config", str(path)])

    before = listing(run_copy)
    check()
    assert listing(run_copy) == before


@pytest.mark.parametrize("file", ["run.json", "status.json", "metrics.csv", "events.jsonl"])
def test_fuzz_report(tmp_path, run_copy, file):
    content = (run_copy / file).read_bytes()
    change = mutated(content)
    if file.endswith(".json"):
        change |= mutated_json(content.decode())
    others = {k: v for k, v in listing(run_copy).items() if k != file}

    @settings(FUZZ, deadline=60_000, max_examples=40)
    @given(change)
    def check(damaged):
        (run_copy / file).write_bytes(damaged)
        refused_in_one_line(report, [run_copy], tmp_path / "report.html")

    check()
    assert {k: v for k, v in listing(run_copy).items() if k != file} == others


@pytest.mark.parametrize("file", ["tiny.csv", "runs/tiny-cpu.zip"])
def test_fuzz_record_of_a_study(tmp_path, file):
    study = Study("tiny", "cpu", "?", "", (Cell("labels only", "tiny", "ce"),), (3,))

    def configure(_):
        return replace(tiny_config(tmp_path / "x"), out=None, out_root=str(tmp_path / "runs"))

    run(replace(configure(None), seed=3))
    results = tmp_path / "results"
    put_on_record(study, configure, results)
    shutil.rmtree(tmp_path / "runs")
    kept = {name: (results / name).read_bytes() for name in ("tiny.csv", "runs/tiny-cpu.zip")}
    change = mutated(kept[file])
    if file.endswith(".zip"):  # sound as an archive, and not what it should hold
        with zipfile.ZipFile(results / file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        inside = st.sampled_from(sorted(members)).flatmap(
            lambda name: mutated(members[name]).map(lambda new: zipped({**members, name: new}))
        )
        change |= inside

    @FUZZ
    @given(change)
    def check(damaged):
        for name, content in {**kept, file: damaged}.items():
            (results / name).write_bytes(content)
        before = listing(results)
        if file == "tiny.csv":
            refused_in_one_line(read_rows, results / file)
        if refused_in_one_line(put_on_record, study, configure, results):
            assert listing(results) == before

    check()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("file", ["run.json", "student.safetensors", "status.json"])
def test_fuzz_eval_and_export(run_copy, file):
    content = (run_copy / file).read_bytes()
    change = mutated(content)
    if file.endswith(".json"):
        change |= mutated_json(content.decode())

    def read():
        source = read_source(run_copy)
        source.model()
        assert all(isinstance(value, str) for value in source.metadata.values())

    @FUZZ
    @given(change)
    def check(damaged):
        (run_copy / file).write_bytes(damaged)
        refused_in_one_line(read)

    check()


def test_fuzz_what_a_teacher_is_found_by(run_copy):
    shutil.copy(run_copy / "student.safetensors", run_copy / "teacher.safetensors")
    text = (run_copy / "run.json").read_text()
    config = tiny_config(run_copy, out_root=str(run_copy.parent))

    @FUZZ
    @given(mutated(text.encode()) | mutated_json(text))
    def check(damaged):
        (run_copy / "run.json").write_bytes(damaged)
        find_teacher(config)

    check()


@pytest.mark.parametrize("file", ["metrics.csv", "events.jsonl"])
def test_fuzz_logs_that_a_run_goes_on_with(run_copy, file):
    content = (run_copy / file).read_bytes()

    @FUZZ
    @given(mutated(content))
    def check(damaged):
        (run_copy / file).write_bytes(damaged)
        log = RunLog(run_copy, ["epoch", "step"], 8)
        log.row({"epoch": 3.0, "step": 12})
        log.event("note", "x", 12)
        log.close()
        assert (run_copy / file).read_bytes().endswith(b"\n")
        last = (run_copy / "metrics.csv").read_text().splitlines()[-1]
        assert last == "3,12"
        assert json.loads((run_copy / "events.jsonl").read_text().splitlines()[-1])["step"] == 12

    check()


@pytest.mark.parametrize("kind", [".pth", "legacy.pth", ".safetensors"])
def test_fuzz_weights(tmp_path, kind):
    state = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3, dtype=torch.float16)}
    file = io.BytesIO()
    if kind == ".safetensors":
        content = save(state)
    else:
        torch.save({"model": state}, file, _use_new_zipfile_serialization=kind == ".pth")
        content = file.getvalue()
    path = tmp_path / f"weights{kind}"

    @settings(FUZZ, max_examples=150)
    @given(mutated(content))
    def check(damaged):
        path.write_bytes(damaged)
        refused_in_one_line(read_tables, path)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    check()


PARSERS = {
    "binary": (
        np.zeros((3, 3073), np.uint8).tobytes(),
        lambda raw: parse_binary(raw, "f", label_bytes=1, num_records=3, num_classes=10),
    ),
    "python": (
        pickle.dumps({b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 1, 2]}, protocol=3),
        lambda raw: parse_python(raw, "f", label_key=b"labels", num_records=3, num_classes=10),
    ),
    "idx": (
        gzip.compress(bytes((0, 0, 8, 1, 0, 0, 0, 5)) + bytes(5)),
        lambda raw: parse_idx(raw, "f", (5,)),
    ),
}


@pytest.mark.parametrize("name", PARSERS)
def test_fuzz_data_files(name):
    content, parse = PARSERS[name]
    parse(content)  # negative control: the sound one is read

    @settings(FUZZ, max_examples=150)
    @given(mutated(content))
    def check(damaged):
        refused_in_one_line(parse, damaged)

    check()


def test_fuzz_quarantine(tmp_path):
    path = tmp_path / "list.json"
    text = '{"format": "dfptkd.quarantine/1", "checked": 10, "images": {"a.jpg": "empty"}}'
    path.write_text(text)
    assert read_quarantine(path).images

    @FUZZ
    @given(mutated(text.encode()) | mutated_json(text))
    def check(damaged):
        path.write_bytes(damaged)
        refused_in_one_line(read_quarantine, path)

    check()


def test_a_run_goes_on_from_a_folder_whose_index_is_rubbish(tmp_path):
    config = tiny_config(tmp_path / "a", max_steps=4)
    assert in_child(train, config, folder=tmp_path).code == 0
    (tmp_path / "a/checkpoints/index.json").write_bytes(b"\xff{")
    other = tiny_config(tmp_path / "b", resume=str(tmp_path / "a"))
    ended = in_child(train, other, folder=tmp_path)
    assert ended.code == 0, ended.output
    assert "resumed from step 4" in ended.output
