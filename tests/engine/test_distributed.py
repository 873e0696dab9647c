"""Several processes do what one does: steps, gate, evaluation, stop, resume, restart."""

import csv
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dfptkd.engine.checkpoint import load_checkpoint
from dfptkd.engine.cli import main
from dfptkd.engine.config import DataConfig, RunConfig, StepConfig
from dfptkd.engine.data import load_data, train_batches
from dfptkd.engine.data import test_batches as evaluation_batches
from dfptkd.engine.distributed import World, synchronise_batch_norms
from dfptkd.engine.errors import UsageError
from dfptkd.engine.machine import check_machine, check_sizes
from dfptkd.engine.models.prompt import PromptFusion
from dfptkd.engine.step import choose_mode
from dfptkd.kernels import use_backend

WORKER = Path(__file__).with_name("distributed_worker.py")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMAGES = 101  # no multiple of 2 or 3


def load_worker():
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()
HANG_S = 600  # far beyond what a busy machine takes


def start_processes(size: int, args: list[str]) -> None:
    """`distributed_worker.py ARGS` by `size` processes without a launcher; all must succeed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        command = [sys.executable, str(WORKER), *args]
        processes.append(
            subprocess.Popen(
                command,
                env={**variables, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=HANG_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(said)


def torchrun(*args: str, options: str = "", size: int = 2, harm: str | None = None):
    """The launch line of the README with these arguments of `dfptkd`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={size}", *options.split()]
    if harm is None:
        program = ["-m", "dfptkd.engine.cli", *args]
    else:
        program = [str(WORKER), "command", *args]
    env = {**os.environ, **({"DFPTKD_TEST_HARM": harm} if harm else {})}
    return subprocess.run(
        [*launcher, *program], env=env, capture_output=True, text=True, timeout=HANG_S
    )


# Steps --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks have found: scenario -> [rank 0, rank 1]."""
    out = tmp_path_factory.mktemp("two")
    start_processes(2, ["steps,contrast,gate,compiled,evaluation,failure,numbers", str(out)])
    found = {}
    for path in sorted(out.iterdir()):
        value = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
        found.setdefault(path.stem.split("-")[0], []).append(value)
    return found


def orders_of_summation():
    """Changes of a batch that change nothing but the order in which its images are added up."""
    return [
        lambda batch, change=change: batch._map(change)
        for change in (lambda t: t.flip(0), lambda t: t.roll(3, 0), lambda t: t.roll(5, 0).flip(0))
    ]


def gap(a: dict, b: dict) -> float:
    """Distance over length of parameters, averages and gradients; the farthest of these."""
    return max(((a[k] - b[k]).double().norm() / b[k].double().norm()).item() for k in b)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", worker.METHODS)
def test_two_ranks_take_the_steps_of_one_process(two, method, accumulate):
    """BatchNorm in eval mode; measured by what another order of summation does to one process.

    The control: a rank that trains on its share alone ends elsewhere by far.
    """

    def walk(shard=(0, 1), change=lambda batch: batch):
        step = worker.make_step(method, eval_mode=True, accumulate=accumulate)
        worker.train(step, shard, change=change)
        assert step.gate.skipped == 0
        return worker.figures(step), step.meter.sums

    alone, meter = walk()
    rounding = max(gap(walk(change=order)[0], alone) for order in orders_of_summation())
    assert 0 < rounding < 1e-3
    prefix = f"{method}.{accumulate}."
    ranks = [
        {k.removeprefix(prefix): v for k, v in rank.items() if k.startswith(prefix)}
        for rank in two["steps"]
    ]
    for rank in ranks:
        torch.testing.assert_close(rank.pop("meter"), meter, rtol=1e-5, atol=1e-5)
        assert gap(rank, alone) < 20 * rounding
    assert all(torch.equal(ranks[0][k], ranks[1][k]) for k in ranks[0])
    assert gap(walk(shard=(0, 2))[0], alone) > 100 * rounding


@pytest.mark.parametrize("accumulate", [1, 2])
def test_M49_two_ranks_remember_what_one_process_does(two, accumulate):
    """The term reads other images of all ranks; measured as above, the banks too."""

    def walk(change=lambda batch: batch, shard=(0, 1)):
        step = worker.make_step("dfpt", eval_mode=True, accumulate=accumulate, loss=worker.CONTRAST)
        worker.train(step, shard, change=change)
        return {**worker.figures(step), **dict(step.method.contrast.named_buffers())}

    alone = walk()
    rounding = max(gap(walk(order), alone) for order in orders_of_summation())
    assert 0 < rounding < 1e-3
    prefix = f"{accumulate}."
    ranks = [
        {k.removeprefix(prefix): v for k, v in rank.items() if k.startswith(prefix)}
        for rank in two["contrast"]
    ]
    for rank in ranks:
        assert rank.keys() == alone.keys()
        assert gap(rank, alone) < 20 * rounding
    assert all(torch.equal(ranks[0][k], ranks[1][k]) for k in alone)
    assert gap(walk(shard=(0, 2)), alone) > 100 * rounding


def test_a_step_that_is_bad_in_one_rank_changes_nothing_in_any(two):
    ranks = two["gate"]
    controls = [rank.pop("control") for rank in ranks]
    assert len(ranks[0]) == 14
    for name, found in ranks[0].items():
        assert (found["unchanged"], found["skipped"], found["goes on"]) == (True, 1, True), name
        assert found == ranks[1][name]  # the walks and the statistics are one
    # The control: each rank judges for itself, and they part.
    assert [c["skipped"] for c in controls] == [0, 1]
    assert controls[0]["sum"] != controls[1]["sum"]


def test_compiled_steps_follow_eager_ones(two):
    first, second = two["compiled"]
    assert first == second
    assert 0 <= first["gap"] < 1e-3


def test_an_error_in_one_process_is_one_in_all_and_said_once(two):
    assert two["failure"] == [
        [["rank 1 has no data", True], ["main has none", False]],
        [["rank 1 has no data", False], ["main has none", True]],
    ]


def test_what_processes_tell_each_other(two):
    first, second = two["numbers"]
    assert first["exchange"] == second["exchange"]
    assert first["exchange"] == [{"rank": 0, "text": "ä"}, {"rank": 1, "text": "ää"}]
    assert first["of_main"] == second["of_main"] == [0, 0.1]
    assert first["tensors"] == second["tensors"] == [0, 1, 2]
    assert first["draw"] != second["draw"]


def test_a_process_that_does_not_come_is_not_waited_for_for_ever(tmp_path):
    start_processes(2, ["hang", str(tmp_path)])
    first, _ = (json.loads((tmp_path / f"hang-rank{r}.json").read_text()) for r in (0, 1))
    assert "imed out" in first["error"], first
    assert first["seconds"] < 60  # before the other came


# Data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_cut_every_batch_of_the_one_sample_order(size, start):
    split = worker.step_data().train
    options = {"batch_size": 16, "seed": 3, "epoch": 1, "start_step": start}
    whole = list(train_batches(split, **options))
    ranks = [list(train_batches(split, **options, shard=(r, size))) for r in range(size)]
    assert [len(rank) for rank in ranks] == [len(whole)] * size
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert {len(part.labels) for part in parts} == {16 // size}
        for name in ("indices", "labels", "images", "flip"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(batch, name)), name


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    out = tmp_path_factory.mktemp("three")
    start_processes(3, ["evaluation", str(out)])
    return [json.loads(path.read_text()) for path in sorted(out.iterdir())]


def test_evaluation_counts_each_image_once_and_says_the_same_everywhere(two, three):
    alone = worker.evaluation(World())
    assert alone["seen"] == list(range(IMAGES))
    for ranks in (two["evaluation"], three):
        assert sorted(i for rank in ranks for i in rank["seen"]) == list(range(IMAGES))
        for rank in ranks:
            assert rank["row"] == ranks[0]["row"]
            assert rank["teacher"] == alone["teacher"]
            exact = [k for k in alone["row"] if "top" in k]
            assert [rank["row"][k] for k in exact] == [alone["row"][k] for k in exact]
            assert rank["row"] == pytest.approx(alone["row"], rel=1e-4)


def test_more_processes_than_images_are_refused():
    data = load_data(DataConfig(name="synthetic", num_classes=4, image_size=8, limit=6), CPU)
    config = RunConfig(global_batch=8)
    with pytest.raises(UsageError, match="6 test images: expected at most 6 processes"):
        check_sizes(RunConfig(global_batch=2), data, World(0, 7))
    with pytest.raises(UsageError, match=r"6 training images.*no multiple of 4 processes.*most 6"):
        check_sizes(config, data, World(0, 4))
    check_sizes(config, data, World(0, 3))
    parts = [
        next(train_batches(data.train, batch_size=8, seed=0, epoch=0, shard=(r, 3)))
        for r in range(3)
    ]
    assert sorted(torch.cat([p.indices for p in parts]).tolist()) == list(range(6))
    blocks = [list(evaluation_batches(data.test, batch_size=2, shard=(r, 4))) for r in range(4)]
    assert [sum(len(b.labels) for b in block) for block in blocks] == [2, 2, 1, 1]


# Refusals and choices -----------------------------------------------------------------------------


def test_a_batch_that_cannot_be_cut_is_refused():
    config = RunConfig(global_batch=12, accumulate=2, device="cpu")
    assert check_machine(config, World(1, 3, 1)) == CPU
    with pytest.raises(UsageError, match=r"global_batch=12 over 4 processes.*multiple of 8"):
        check_machine(config, World(1, 4, 1))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "RANK=None"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "MASTER_PORT"),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch, variables, words):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert World.from_environment().size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words):
        World.from_environment()


def test_the_mode_of_several_processes():
    config = RunConfig()
    assert choose_mode(config, CUDA, 2)[0] == "compile"
    assert "not captured" in choose_mode(config, CUDA, 2)[1]
    with pytest.raises(UsageError, match=r"step\.mode='graph'.*several processes"):
        choose_mode(RunConfig(step=StepConfig(mode="graph")), CUDA, 2)


def test_synchronised_statistics_are_for_gpus_and_leave_the_fused_pair(monkeypatch):
    synced = RunConfig(step=StepConfig(sync_bn=True))
    with pytest.raises(UsageError, match=r"step\.sync_bn=True on cpu: expected --device cuda"):
        choose_mode(synced, CPU, 2)
    assert choose_mode(synced, CUDA, 2)[0] == "eager"
    assert choose_mode(synced, CUDA, 1)[0] == "graph"  # says that it does nothing
    with pytest.raises(UsageError, match=r"step\.mode='compile' with step\.sync_bn"):
        choose_mode(RunConfig(step=StepConfig(sync_bn=True, mode="compile")), CUDA, 2)
    pair = PromptFusion(16)
    x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
    expected = pair(x)
    parameters = list(pair.parameters())
    synchronise_batch_norms([pair])
    assert all(a is b for a, b in zip(parameters, pair.parameters(), strict=True))
    pair._fused = None  # whatever is asked for, it must not be called
    with use_backend("native"):
        torch.testing.assert_close(pair(x), expected)


def test_a_batch_norm_that_does_more_is_not_replaced():
    class Activated(torch.nn.BatchNorm2d):
        pass

    with pytest.raises(UsageError, match=r"step\.sync_bn=True: 0 is a Activated"):
        synchronise_batch_norms([torch.nn.Sequential(Activated(3))])


# Whole runs ---------------------------------------------------------------------------------------

OPTIONS = (
    "--data.name synthetic --data.image-size 16 --data.num-classes 4 --data.limit 40 "
    "--student cifar:resnet8_s2 --teacher.name cifar:resnet14_s2 --teacher.epochs 1 "
    "--global-batch 8 --teacher.global-batch 8 --epochs 3 --eval-every 1 --device cpu "
    "--optim.ema-decay 0.9"
).split()
SIGNALS = "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
END = 15


def train_options(root: Path, out: str) -> list[str]:
    own = ["--out", str(root / out), "--out-root", str(root)]
    return ["train", "quickstart", *OPTIONS, *own]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a teacher and a run of two ranks to its end, without any stop."""
    root = tmp_path_factory.mktemp("runs")
    start_processes(2, ["command", *train_options(root, "whole")])
    return root


def state_of(folder: Path, step: int = END):
    return load_checkpoint(folder / "checkpoints" / f"step-{step}")


def assert_same_end(a: Path, b: Path) -> None:
    """Tolerance 0 on every tensor and number; equal rows but for clocks."""
    ends = [state_of(folder) for folder in (a, b)]
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    for name, tensor in ends[0].tensors.items():
        assert torch.equal(tensor, ends[1].tensors[name]), name
    for key in ("last", "best", "prompt_top1"):
        assert ends[0].state["progress"][key] == ends[1].state["progress"][key]
    assert rows(a) == rows(b)


def rows(folder: Path) -> list[dict[str, str]]:
    clocks = ("seconds", "images_per_second")
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in clocks} for row in csv.DictReader(file)]


def test_a_run_of_two_ranks_leaves_one_set_of_files(runs):
    out = runs / "whole"
    assert [row["step"] for row in rows(out)] == ["5", "10", "15"]
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert json.loads((out / "run.json").read_text())["world_size"] == 2
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    (teacher,) = runs.glob("teacher-*")  # the quick start's own, made by both
    assert state_of(teacher, 5).state["world_size"] == 2
    tensors = state_of(out).tensors
    assert not torch.equal(tensors["rng.cpu"], tensors["rank1.rng.cpu"])
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints", "events.jsonl", "metrics.csv", "run.json", "status.json",
        "student.safetensors", "student_ema.safetensors", "tensorboard",
    ]  # fmt: skip


def test_a_stop_asked_of_one_rank_stops_both_and_the_run_goes_on_to_the_same_end(runs):
    """In step 2; all see it a step later."""
    out = "stopped"
    harm = f"1:1:{int(signal.SIGUSR1)}"
    done = torchrun(*train_options(runs, out), options=SIGNALS, harm=harm)
    assert set(re.findall(r"exitcode\s*: (-?\d+)", done.stderr)) == {"75"}, done.stderr
    assert done.stderr.count("dfptkd: stopped by SIGUSR1 at step 3") == 1
    status = json.loads((runs / out / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 3)
    start_processes(2, ["command", *train_options(runs, out)])
    assert_same_end(runs / out, runs / "whole")


def test_a_killed_worker_is_started_again_and_the_run_ends_the_same(runs):
    """SIGKILL of rank 1 in the second epoch; what both did since the checkpoint is done again."""
    out = "killed"
    harm = f"1:7:{int(signal.SIGKILL)}"
    done = torchrun(*train_options(runs, out), options="--max-restarts 3", harm=harm)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed from step 5 of 15") == 1
    assert_same_end(runs / out, runs / "whole")


def test_ranks_that_remember_the_teachers_logits_end_the_same(runs):
    options = train_options(runs, "remembered")
    start_processes(2, ["command", *options, "--teacher.remember", "memory"])
    events = (runs / "remembered/events.jsonl").read_text()
    shares = [float(share) for share in re.findall(r"([\d.]+) % of \d+ images were known", events)]
    assert max(shares) > 0
    assert_same_end(runs / "remembered", runs / "whole")


def test_a_run_goes_on_with_another_number_of_processes(runs, capsys):
    """One, two, one; by the launch line of the README, said by rank 0 alone."""
    args = train_options(runs, "mixed")

    assert main([*args, "--max-steps", "3"]) == 0  # in the midst of an epoch
    both = torchrun(*args, "--max-steps", "8")
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("resumed from step 3 of 8") == 1
    assert "2 processes" in both.stdout
    assert state_of(runs / "mixed", 8).state["world_size"] == 2
    assert main(args) == 0
    assert "resumed from step 8 of 15" in capsys.readouterr().out
    assert [row["step"] for row in rows(runs / "mixed")] == ["3", "5", "8", "10", "15"]
