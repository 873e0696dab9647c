"""The table of traits: every option has a row, the rows say what runs really do, and what cannot
have an effect is refused."""

import dataclasses
import json
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_images import write_folder

from dfptkd.engine import config as config_module
from dfptkd.engine import options as options_module
from dfptkd.engine import run_record as run_record_module
from dfptkd.engine import train as train_module
from dfptkd.engine.cli import main, option_types, parse_run
from dfptkd.engine.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    PromptConfig,
    RunConfig,
    StepConfig,
    TeacherConfig,
    to_dict,
)
from dfptkd.engine.data import SOURCES, cifar, load_data
from dfptkd.engine.data.quarantine import Quarantine
from dfptkd.engine.errors import DataError, StorageError, UsageError
from dfptkd.engine.machine import check_machine
from dfptkd.engine.models import cost as cost_module
from dfptkd.engine.models import create_model
from dfptkd.engine.options import (
    IMAGE_FILES,
    MAY_CHANGE,
    NOT_KNOWN_FROM_PAPER,
    OPTIONS,
    Traits,
    check_table,
    related_terms,
    unmet,
    value_of,
)
from dfptkd.engine.suggestions import SYNONYMS, option_suggestion
from dfptkd.engine.train import run

RECIPE = "cifar100.resnet20_s2_resnet8_s2"
NETWORK = "cifar:resnet8_s2"
SECTIONS = {
    RunConfig: "", DataConfig: "data.", TeacherConfig: "teacher.", PromptConfig: "prompt.",
    LossConfig: "loss.", OptimConfig: "optim.", StepConfig: "step.",
}  # fmt: skip


# The table ----------------------------------------------------------------------------------------


def test_a_field_without_traits_and_traits_without_a_field_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Younger(RunConfig):
        patience: int = 3

    check_table(RunConfig, OPTIONS)
    with pytest.raises(TypeError, match=r"options without traits: \['patience'\]"):
        check_table(Younger, OPTIONS)
    with pytest.raises(TypeError, match=r"traits without an option: \['loss\.rho'\]"):
        check_table(RunConfig, {**OPTIONS, "loss.rho": Traits(False, True)})


def test_the_table_names_the_data_sets_and_options_that_there_are():
    assert IMAGE_FILES == SOURCES
    hints = typing.get_type_hints(DataConfig)
    assert set(IMAGE_FILES) < set(typing.get_args(hints["name"]))
    for traits in OPTIONS.values():
        for needs in traits.needs:
            assert set(needs.looks_at) <= OPTIONS.keys()
        assert traits.sets is None or traits.sets in OPTIONS


def test_M20_the_record_names_our_readings():
    must = ("loss.tau", "loss.prompt_student", "loss.warmup_epochs", "prompt.r1", "prompt.bn_mode")
    assert {*must, "optim.prompt_lr_scale", "optim.backbone_lr_scale"} <= {*NOT_KNOWN_FROM_PAPER}


# What runs read -----------------------------------------------------------------------------------

# Nobody reads an option for its effect here: copies, JSON, and the table itself.
_COPIES = ("dataclasses.py", "copy.py", "<string>", Path(options_module.__file__).name)
_OWN = ("__post_init__", "_clean_values", "of_any_method", "to_dict")


def _is_use(frame) -> bool:
    while frame.f_code.co_filename == config_module.__file__:
        if frame.f_code.co_name in _OWN:
            return False
        frame = frame.f_back  # a property of a configuration, on behalf of who asks for it
    return Path(frame.f_code.co_filename).name not in _COPIES


@contextmanager
def reading() -> Iterator[set[str]]:
    """The options that code inside reads."""
    found: set[str] = set()

    def recorder(cls, prefix):
        names = {f.name for f in dataclasses.fields(cls)}

        def read(self, name):
            if name in names and _is_use(sys._getframe(1)):
                found.add(prefix + name)
            return object.__getattribute__(self, name)

        return read

    for cls, prefix in SECTIONS.items():
        cls.__getattribute__ = recorder(cls, prefix)
    try:
        yield found
    finally:
        for cls in SECTIONS:
            del cls.__getattribute__


BASE = RunConfig(
    recipe="cell",
    method="ce",
    student=NETWORK,
    epochs=3,
    eval_every=2,  # an epoch that is not evaluated is neither the best nor the last
    global_batch=8,
    eval_batch=8,
    device="cpu",
    kernels="reference",  # nothing is measured
    data=DataConfig(name="synthetic", image_size=16, num_classes=4, limit=8),
    teacher=TeacherConfig(name=NETWORK, remember="off"),
)
CRD = {"crd": 0.8, "crd_negatives": 3}


def change(config: RunConfig, **values) -> RunConfig:
    """Options by their dotted names, with __ for the dot, all at once."""
    top: dict = {}
    for name, value in values.items():
        section, _, field = name.replace("__", ".").rpartition(".")
        if section:
            top.setdefault(section, {})[field] = value
        else:
            top[field] = value
    return dataclasses.replace(
        config,
        **{
            k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v
            for k, v in top.items()
        },
    )


CELLS = {
    **{method: {"method": method} for method in ("ce", "kd", "dkd", "dist", "dfpt", "dfpt_plus")},
    "mixture": {"method": "dfpt", "loss__mixture_control": True},
    "mixture at 1": {"method": "dfpt", "loss__mixture_control": True, "loss__tau": 1.0},
    "combined": {
        "method": "dfpt", "loss__decoupled": True, "loss__rkd_distance": 25.0,
        **{f"loss__{name}": value for name, value in CRD.items()},
    },
    "no fusion": {"method": "dfpt", "prompt__fusion": False},
    "makes its teacher": {
        "method": "kd", "teacher__weights": None, "teacher__train_if_missing": True,
        "teacher__epochs": 1, "teacher__global_batch": 8,
    },
    "adamw": {"optim__name": "adamw", "optim__schedule": "cosine", "optim__weight_decay": 0.0},
    "seeds": {"seeds": (1, 2), "data__order_seed": 0},
    "growing": {"data__start_size": 8},
    "cifar100": {"data__name": "cifar100"},
    "torchvision": {"data__loader": "torchvision"},
    "device": {"data__loader": "device"},
    "made up": {"data__loader": "synthetic"},
    "trouble": {"optim__lr": 1e30, "step__max_skips": 0, "step__max_rewinds": 0},
}  # fmt: skip
# In the record, and in the folder's name where that is not given.
NAMES = {"arm"}
# Read where something goes wrong, in the last of these cells.
IN_TROUBLE = {"step.max_skips", "step.max_skips_in_a_row", "step.max_rewinds", "on_storage_error"}
# Options that are nothing without another.
TOGETHER = {"teacher.mean": "teacher.std", "teacher.std": "teacher.mean"}
# Options without effect, with values that any run would feel if it read them.
OTHERS = {
    "data.root": "/nowhere", "data.quarantine": "/nowhere", "data.mean": (0.1,) * 3,
    "data.std": (0.1,) * 3, "data.crop_padding": 3, "data.start_size": 8,
    "teacher.weights": "/nowhere", "teacher.name": "cifar:resnet14_s2",
    "teacher.stages": ("layer1", "layer2"),
    "teacher.expected_top1": 99.0, "teacher.expected_of": ("cifar:resnet20", "cifar100"),
    "teacher.mean": (0.1,) * 3, "teacher.std": (0.1,) * 3,
    "prompt.kernels": (1,), "prompt.insert_stages": (1,),
    "optim.milestones": (0.1,), "optim.betas": (0.1, 0.1), "optim.momentum": 0.1,
    "data.ramp": (0.0, 0.1), "out_root": "/nowhere",
}  # fmt: skip


def other_value(name: str, value):
    """Another value that an option may have."""
    cls = next(
        c
        for c, prefix in SECTIONS.items()
        if prefix == name.rpartition(".")[0] + "." * ("." in name)
    )
    hint = typing.get_type_hints(cls)[name.rpartition(".")[2]]
    if name in OTHERS:
        return OTHERS[name]
    if typing.get_origin(hint) is typing.Literal:
        return next(v for v in reversed(typing.get_args(hint)) if v != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.5
    raise AssertionError(f"another value of {name}={value!r}?")


def changed_option(config: RunConfig, name: str, value) -> RunConfig:
    """`config` with another value of an option, and of the one that it is nothing without."""
    other = TOGETHER.get(name)
    more = {} if other is None else {other: OTHERS[other]}
    return change(config, **{n.replace(".", "__"): v for n, v in ({name: value} | more).items()})


class Cells:
    """Runs of the cells, each once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        torch.manual_seed(0)
        teacher = create_model(NETWORK, num_classes=4).state_dict()
        save_file(teacher, root / "teacher.safetensors")
        pictures = root / "pictures"
        write_folder(pictures, train=4, val=3)
        Quarantine(14, {"val/ant/0.jpg": "broken"}).write(pictures / "dfptkd-quarantine.json")
        write_cifar100(root / "arrays")

    def config(self, cell: str) -> RunConfig:
        config = change(BASE, **CELLS[cell], out_root=str(self.root / cell))
        if cell == "cifar100":
            config = change(config, data__root=str(self.root / "arrays"))
        if config.data.loader != "auto":
            pictures = {"name": "folder", "root": str(self.root / "pictures"), "image_size": 24}
            pictures |= {"workers": 0, "skip_quarantined": True}
            config = change(config, **{f"data__{name}": v for name, v in pictures.items()})
        if config.method != "ce" and cell != "makes its teacher":
            config = change(config, teacher__weights=str(self.root / "teacher.safetensors"))
        return change(config, out=f"{self.root}/out-{cell}") if cell == "adamw" else config

    def read_in(self, cell: str) -> set[str]:
        """The options that a run of a cell reads."""
        with reading() as found:
            code = self.train(self.config(cell), cell)
        assert code == (4 if cell == "trouble" else 0)
        return found

    def train(self, config: RunConfig, name: str) -> int:
        file = self.root / f"{name}.json"
        file.write_text(json.dumps(to_dict(config)))
        return main(["train", "--config", str(file)])


def write_cifar100(root: Path) -> None:
    """The binary archive, of twelve images a split."""
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    for name in ("train.bin", "test.bin"):
        record = torch.zeros(12, 2 + 3072, dtype=torch.uint8)
        record[:, 1] = torch.arange(12)
        record[:, 2:] = torch.randint(256, (12, 3072), generator=torch.Generator().manual_seed(0))
        (folder / name).write_bytes(record.numpy().tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"c{i}" for i in range(100)) + "\n")


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        small = dataclasses.replace(cifar._SETS["cifar100"], num_train=12, num_test=12)
        patch.setitem(cifar._SETS, "cifar100", small)
        for module in (cost_module, run_record_module):  # half of the time of so small a run
            patch.setattr(module, "count_macs", lambda *args, **options: 1)
        yield Cells(tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="module")
def read(cells):
    """Cell -> the options that its run reads."""
    found = {cell: cells.read_in(cell) for cell in CELLS if cell != "trouble"}

    def full_disk(writer):
        raise StorageError("a full disk")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.CheckpointWriter, "finish", full_disk)
        found["trouble"] = cells.read_in("trouble")
    return found


@pytest.mark.parametrize("cell", CELLS)
def test_an_option_is_read_or_refused(cells, read, cell):
    """Every option in every kind of run: what the table says has an effect is read by the run."""
    config = cells.config(cell)
    effective = {name for name in OPTIONS if unmet(name, config) is None}
    if cell != "trouble":
        effective -= IN_TROUBLE
    assert effective - read[cell] - NAMES == set()
    for name in OPTIONS.keys() - effective - IN_TROUBLE:
        given = config
        if value_of(config, name) is None:
            options_module.refuse_without_effect([name], [config], "train")  # it sets nothing
            given = changed_option(config, name, OTHERS[name])
        with pytest.raises(UsageError) as refused:
            options_module.refuse_without_effect([name], [given], "train")
        assert "\n" not in str(refused.value)
        assert str(refused.value).startswith(f"train: --{name.replace('_', '-')} has no effect")


def test_every_option_has_an_effect_somewhere(cells):
    configs = [cells.config(cell) for cell in CELLS]
    assert [name for name in OPTIONS if all(unmet(name, c) for c in configs)] == []


def idle_changes(config: RunConfig) -> RunConfig:
    """Every option that the table calls idle with another value; but for what a run refuses."""
    changed = config
    for name in OPTIONS:
        if unmet(name, config) is None:
            continue
        value = other_value(name, value_of(config, name))
        try:
            one = changed_option(config, name, value)
            if one.data != config.data:
                load_data(one.data, torch.device("cpu"))
            changed = changed_option(changed, name, value)
        except (UsageError, DataError):
            assert name.startswith(("data.", "loss.", "step.")), name
    assert changed != config
    return changed


@pytest.mark.parametrize("cell", [c for c in CELLS if c not in ("trouble", "combined")])
def test_options_without_effect_have_none(cells, read, cell):
    """All of them changed at once: the bits of the finished students stay."""
    config = cells.config(cell)
    changed = idle_changes(config)
    moved = (
        {"out": f"{config.out}-changed"}
        if config.out
        else {"out_root": f"{config.out_root}-changed"}
    )
    changed = change(changed, **moved)
    assert cells.train(changed, f"{cell}-changed") == 0
    where = Path(config.out or config.out_root)
    files = sorted(where.rglob("student.safetensors"))
    assert files
    for file in files:
        before = load_file(file)
        after = load_file(Path(f"{where}-changed") / file.relative_to(where))
        assert all(torch.equal(before[name], after[name]) for name in before)


# What is typed -----------------------------------------------------------------------------------


def refused(capsys, args: str) -> str:
    """The one line of a command that ends with exit code 2."""
    assert main(args.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            "train {} --data.image-size 224",
            "--data.image-size has no effect with data.name=cifar100",
        ),
        ("train {} --data.num-classes 10", "expected data.name synthetic"),
        ("plan {} --data.num-classes 10", "plan: --data.num-classes has no effect"),
        ("train {} --method kd --loss.student-teacher 5", "with method=kd: expected method dfpt"),
        ("train {} --method dfpt --loss.kd-kl 5", "--loss.kd-kl has no effect with method=dfpt"),
        ("train {} --loss.kd-kl 0.9", "expected method kd"),  # its own value too
        ("train {} --method kd --prompt.r1 8", "--prompt.r1 has no effect with method=kd"),
        ("train {} --arm mixture --prompt.r1 8", "loss.mixture_control=True"),
        ("train {} --method ce --teacher.weights x", "--teacher.weights has no effect"),
        ("train {} --no-deterministic --data.no-keep-test", "--data.keep-test has no effect"),
        ("train {} --teacher.epochs 3", "expected train-teacher, or teacher.train_if_missing"),
        ("train quickstart --teacher.weights x --teacher.lr 1", "teacher.weights=x"),
        ("train {} --optim.name adamw --optim.momentum 0.5", "optim.name=adamw"),
        ("train {} --optim.gamma 0.5", "optim.schedule=cosine: expected optim.schedule step"),
        ("train {} --loss.crd-negatives 9", "expected loss.crd above 0"),
        ("train {} --seeds 0,1 --seed 3", "--seed has no effect with seeds=(0, 1)"),
        ("train {} --method kd --arm r1_8", "--arm r1_8, which sets prompt.r1, prompt.min_width"),
        ("train {} --method kd --arm alternating", "loss.update='alternating' with method"),
        (
            "train-teacher {} --method kd",
            "train-teacher: --method kd: a teacher learns from labels",
        ),
        (
            "train-teacher {} --teacher.weights x",
            "--teacher.weights has no effect on a run that is",
        ),
        ("train-teacher {} --prompt.r1 8", "learns from labels alone"),
        ("train-teacher {} --loss.kd-kl 1", "learns from labels alone"),
        ("train-teacher {} --arm r1_8", "train-teacher: --arm r1_8"),
        ("train-teacher {} --epochs 3 --teacher.epochs 5", "--epochs 3 and --teacher.epochs 5"),
        ("train-teacher {} --teacher.name a:b --student c:d", "expected one of them"),
    ],
)
def test_a_set_option_that_cannot_have_an_effect_is_refused(capsys, args, words):
    assert words in refused(capsys, args.format(RECIPE))


@pytest.mark.parametrize(
    "args",
    [
        "train {} --method kd --loss.kd-kl 5 --loss.reverse-kl",
        "train {} --arm decoupled --loss.dkd-beta 3",
        "train {} --data.crop-padding 0 --data.no-flip --data.root x --method ce",
        "train {} --method kd --arm same_total",
        # what the recipe sets has to be taken back
        "train imagenet.efficientnet_lite0_shufflenetv2 --data.name cifar100 --data.mean None "
        "--data.std None",
        "train quickstart --teacher.epochs 3 --teacher.lr 1 --teacher.global-batch 8",
        "train imagenet.resnet34_resnet18 --data.image-size 160 --data.workers 3",
        "plan quickstart --data.name folder --data.num-classes 10",
        "profile {} --method kd --prompt.r1 8 --loss.kd-kl 2",  # stands beside dfpt there
        "train-teacher {} --arm teacher_resnet14_s2 --teacher.epochs 3",
    ],
)
def test_an_option_that_has_an_effect_is_taken(args):
    verb, *options = args.format(RECIPE).split()
    assert parse_run(verb, options) is not None


def test_eval_refuses_options_without_effect(cells, read, capsys):
    run_folder = cells.root / "ce/cell-ce-seed0"
    for option in ("--data.root x", "--data.quarantine x", "--data.skip-quarantined"):
        line = refused(capsys, f"eval {run_folder} {option}")
        assert f"eval: {option.split()[0]} has no effect with data.name=synthetic" in line
    assert main(["eval", str(run_folder), "--data.limit", "4", "--device", "cpu"]) == 0


def test_train_teacher_takes_what_the_recipe_says_of_its_teacher(tmp_path):
    options = (
        "--teacher.name cifar:resnet14_s2 --teacher.epochs 7 --teacher.lr 0.3 "
        "--teacher.global-batch 32"
    )
    config = parse_run("train-teacher", [RECIPE, *options.split()])
    assert (config.student, config.epochs, config.optim.lr, config.global_batch) == (
        "cifar:resnet14_s2", 7, 0.3, 32,
    )  # fmt: skip
    assert (config.role, config.method) == ("teacher", "ce")
    own = parse_run(
        "train-teacher", [RECIPE, "--epochs", "9", "--teacher.lr", "0.3", "--seed", "4"]
    )
    assert (own.epochs, own.optim.lr, own.seed, own.student) == (9, 0.3, 4, "cifar:resnet20_s2")
    same = parse_run("train-teacher", [RECIPE, "--epochs", "9", "--teacher.epochs", "9"])
    assert same.epochs == 9
    # of a configuration that is a teacher's own run already
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_dict(config)))
    assert parse_run("train-teacher", ["--config", str(file)]) == config
    with pytest.raises(UsageError, match=r"--teacher\.epochs .*expected --epochs"):
        parse_run("train-teacher", ["--config", str(file), "--teacher.epochs", "5"])


def test_a_recipe_may_set_what_only_other_methods_read():
    assert parse_run("train", [RECIPE, "--method", "kd"]).loss.dkd_beta == 2


# What users of other trainers type ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--lr 0.1", "did you mean --optim.lr"), ("--batch-size 64", "mean --global-batch?"),
        ("-b 64", "--global-batch"), ("--bs=64", "--global-batch"),
        ("--wd 1", "--optim.weight-decay"), ("--weight-decay 1", "--optim.weight-decay"),
        ("--weight_decay 1", "--optim.weight-decay"), ("--amp", "bf16 on a GPU"),
        ("--fp16", "--precision fp16"), ("--bf16", "--precision"),
        ("--workers 4", "--data.workers"),
        ("-j 4", "--data.workers"), ("--num-workers 4", "--data.workers"),
        ("--gpus 2", "torchrun --nproc-per-node"), ("--quiet", "> FILE"),
        ("--dry-run", "dfptkd plan"), ("--momentum 1", "--optim.momentum"),
        ("--temperature 4", "--loss.tau"), ("-T 4", "--loss.tau"), ("--alpha 1", "--loss.kd-kl"),
        ("--beta 1", "--loss.dkd-beta"), ("--teacher x", "--teacher.name or --teacher.weights"),
        ("--student-model x", "did you mean --student?"), ("--dataset x", "--data.name"),
        ("--data-dir x", "--data.root"), ("--data x", "--data.root"), ("--output x", "--out or"),
        ("--output-dir x", "--out"), ("--save-dir x", "--out"), ("--log-dir x", "--out"),
        ("--pretrained", "--student-weights or --teacher.weights"),
        ("--resume-from x", "--resume"), ("--optim.learning-rate 1", "--optim.lr"),
        ("--epoch 3", "did you mean --epochs?"), ("--xyzzy", "--help lists the options"),
        ("--optim.lr inf", "optim.lr=inf: expected a finite number"),
        ("--optim.betas 0.9,nan", "optim.betas=(0.9, nan): expected finite numbers"),
        ("--optim.lr -1", "optim.lr=-1.0"),
    ],
)  # fmt: skip
def test_other_trainers_names_get_the_right_answer(capsys, typed, words):
    line = refused(capsys, f"train {RECIPE} {typed}")
    assert words in line
    assert "arm" not in line.replace("warm", "")


def test_synonyms_lead_to_options_that_there_are():
    known = option_types(RunConfig)
    launcher = {"--nproc-per-node", "--no-python", "--config", "--loss.*"}
    for word, answer in SYNONYMS.items():
        assert f"--{word}" not in known
        words = answer.replace(",", " ").split() if isinstance(answer, str) else answer
        assert {w for w in words if w.startswith("--")} <= {*known, *launcher}, word
        assert word == word.lower()


def test_other_commands_suggest_their_own_options(capsys):
    assert "did you mean --batch?" in refused(capsys, "eval x --batchs 3")
    assert option_suggestion("--lr", ["--batch"], {}) == ": --help lists the options"


# Values and paths ---------------------------------------------------------------------------------


def test_every_number_is_finite_and_every_text_could_be_a_path():
    for cls, prefix in SECTIONS.items():
        for field in dataclasses.fields(cls):
            name, hint = prefix + field.name, field.type
            bad: list = []
            if "float" in hint:
                bad = [float("inf"), float("nan"), -float("inf")]
                default = getattr(cls(), field.name)
                if "tuple" in hint:
                    bad = [(*(default or (0.5,) * 3)[:-1], value) for value in bad]
            elif "str" in hint:
                bad = ["a\0b", "a" * 256, "a/" * 3000, "\ud800"]
                bad = [(text,) for text in bad] if "tuple" in hint else bad
            for value in bad:
                with pytest.raises(UsageError) as refusal:
                    cls(**{field.name: value})
                assert str(refusal.value).startswith(f"{name}=")
                assert "\n" not in str(refusal.value)
                assert len(str(refusal.value)) < 250


LONG = "x" * 300


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (f"train {RECIPE} --out {LONG}", 2),
        (f"train {RECIPE} --out-root {LONG}", 2),
        (f"train {RECIPE} --data.root {LONG}", 2),
        (f"train {RECIPE} --teacher.weights {LONG}", 2),
        (f"train {RECIPE} --resume {LONG}", 2),
        (f"train --config {LONG}", 3),
        (f"eval {LONG}", 3),
        (f"export {LONG}", 3),
        (f"report {LONG}", 3),
        (f"report {LONG}.csv", 3),
        (f"verify-data {LONG}", 3),
        (f"profile {RECIPE} --trace {LONG}/x", 3),
        ("verify-data FILE", 3),
        ("verify-data FILE/x", 3),
        ("eval FILE/x", 3),
        ("export FILE/x", 3),
        ("report FILE/x", 3),
        ("train --config FILE/x", 3),
        (f"train {RECIPE} --method ce --data.root FILE", 3),
        ("train quickstart --method ce --data.name synthetic --data.limit 8 --out FILE", 5),
        ("train quickstart --method ce --data.name synthetic --data.limit 8 --out FILE/x", 5),
        ("report RUNS --out FILE/x", 3),
    ],
)
def test_a_path_that_cannot_be_is_one_line(capsys, tmp_path, args, code):
    file = tmp_path / "file"
    file.write_text("kept")
    args = args.replace("FILE", str(file)).replace("RUNS", str(tmp_path))
    assert main(args.split()) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dfptkd: ")
    assert file.read_text() == "kept"


# Terms that relate images -------------------------------------------------------------------------


def test_terms_that_relate_images_are_known_by_their_weights():
    dist = dataclasses.replace(BASE, method="dist")
    assert related_terms(dist) == ["loss.dist_intra"]
    assert related_terms(change(dist, loss__dist_intra=0.0)) == []
    rkd = change(BASE, method="dfpt", loss__rkd_distance=1.0, loss__rkd_angle=1.0)
    assert related_terms(rkd) == ["loss.rkd_distance", "loss.rkd_angle"]
    assert related_terms(change(BASE, method="dfpt", loss__crd=0.8)) == []
    assert related_terms(dataclasses.replace(BASE, method="kd")) == []


RELATED = change(BASE, method="dist", global_batch=8, data__limit=16, max_steps=1)


@pytest.mark.parametrize(
    ("changes", "size", "images"),
    [({"accumulate": 4}, 1, 2), ({"accumulate": 8}, 1, 1), ({"accumulate": 2}, 2, 2),
     ({"global_batch": 2}, 1, 2)],
)  # fmt: skip
def test_parts_too_small_for_a_relation_are_refused(changes, size, images):
    from dfptkd.engine.distributed import World

    world = World(0, size)
    config = dataclasses.replace(RELATED, **changes)
    with pytest.raises(UsageError, match=rf"parts of {images} images, .*loss\.dist_intra"):
        check_machine(config, world)
    check_machine(dataclasses.replace(config, method="kd"), world)  # which relates none
    if size == 1:
        check_machine(dataclasses.replace(RELATED, accumulate=2), world)  # four images


def said_of_terms(folder):
    warnings = json.loads((folder / "run.json").read_text())["warnings"]
    return [warning for warning in warnings if "loss terms" in warning]


def test_a_batch_in_parts_is_said_and_stays_so(cells, tmp_path):
    weights = str(cells.root / "teacher.safetensors")
    config = change(RELATED, teacher__weights=weights, out=str(tmp_path / "run"), accumulate=2)
    run(config)
    (said,) = said_of_terms(tmp_path / "run")
    assert said.startswith("loss terms compare the 4 images of a part with each other, not the 8")
    longer = dataclasses.replace(config, max_steps=2)
    with pytest.raises(
        DataError, match=r"accumulate=2 in 1 processes, this run has 1 in 1.*dist_in"
    ):
        run(dataclasses.replace(longer, accumulate=1))
    run(longer)
    whole = change(config, out=str(tmp_path / "whole"), accumulate=1)
    run(whole)
    assert said_of_terms(tmp_path / "whole") == []
    assert "accumulate" in MAY_CHANGE
