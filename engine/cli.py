"""The command `dfptkd`.

Verbs are dispatched here; tyro makes the options of `train` and `train-teacher` from RunConfig.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib
import io
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .config import RunConfig, from_dict
from .errors import DataError, DfptkdError, Stopped, StorageError, UsageError
from .files import read_json
from .log import complain
from .options import (
    OF_TEACHER_RUN,
    OPTIONS,
    as_typed,
    differing,
    refuse_idle_arm,
    refuse_without_effect,
    value_of,
)
from .suggestions import option_suggestion, suggestion

# What the system says of a disk, and of a path that somebody has named.
_OF_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES)
_OF_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)

VERBS = {
    "train": "train a student: dfptkd train RECIPE [--method M] [--data.root DIR] [options]",
    "train-teacher": "train a recipe's teacher: dfptkd train-teacher RECIPE [options]",
    "status": "how a run has ended, as its exit code: dfptkd status RUN... [--since SECONDS]",
    "eval": "accuracy of a run or a file of weights: dfptkd eval PATH [--model M] --data.root DIR",
    "report": "what runs or studies show: dfptkd report RUN...|STUDY.csv... [--out PATH]",
    "export": "student as safetensors and ONNX: dfptkd export CHECKPOINT [--out DIR]",
    "plan": "what a run will need, and whether it fits: dfptkd plan RECIPE [--probe] [options]",
    "profile": "time, FLOPs, memory by component: dfptkd profile RECIPE [--steps N] [--trace FILE]",
    "verify-data": "what a run would refuse in a folder: dfptkd verify-data DIR [--out FILE]",
    "bench": "measurements: dfptkd bench kernels|step|data|overhead|optim|first|compare [options]",
    "study": "a declared set of runs, and its record: dfptkd study NAME --budget full|short|cpu",
    "doctor": "what is installed and what is lost without the rest: dfptkd doctor [--build-native]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except DfptkdError as error:
        if isinstance(error, Stopped):
            # torchrun ends its workers when one has left; those that have saved leave by themselves
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not error.is_echo:  # else the process that raised it says it
            complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted before there was anything to save")
        return 75
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (*_OF_DISK, *_OF_PATH):
            raise
        where = "standard output" if error.filename is None else error.filename
        complain(f"{where}: {error.strerror}")
        return (StorageError if error.errno in _OF_DISK else DataError).exit_code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else UsageError.exit_code
    if argv[0] == "--version":
        from .. import __version__

        print(f"dfptkd {__version__}")
        return 0
    verb, args = argv[0], argv[1:]
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "train-teacher": _train_teacher,
        "plan": _plan,
        "eval": _eval,
        "report": _report,
        "status": _status,
        "export": _export,
        "profile": _profile,
        "verify-data": _verify_data,
        "bench": _bench,
        "study": _study,
        "doctor": _doctor,
    }
    if verb not in commands:
        raise UsageError(f"unknown command {verb!r}{suggestion(verb, commands)}")
    return commands[verb](args)


def _overview() -> str:
    lines = ["usage: dfptkd COMMAND ...", ""]
    lines += [f"  {verb:<14} {text}" for verb, text in VERBS.items()]
    lines += ["", "recipes: " + " ".join(recipe_names()), "arms:    " + " ".join(arms())]
    lines += ["", "dfptkd train RECIPE --help lists every option."]
    lines += ["exit codes: 0 done, 1 defect, 2 usage, 3 data, 4 numeric, 5 storage, 75 stopped;"]
    lines += ["of bench compare also 6: something got slower"]
    return "\n".join(lines)


# train -------------------------------------------------------------------------------------------


def _train(args: list[str]) -> int:
    from .distributed import World
    from .identity import data_identity
    from .machine import check_machine
    from .stand_in import check_before_teacher
    from .teacher import find_teacher, teacher_run
    from .train import run, run_seeds

    config = parse_run("train", args)
    if config is None:
        return 0
    world = World.from_environment()
    makes_teacher = (
        config.method != "ce" and config.teacher.weights is None and config.teacher.train_if_missing
    )
    for planned in [config, *([teacher_run(config)] if makes_teacher else [])]:
        device = check_machine(planned, world)

    def lacks_teacher() -> bool:
        return find_teacher(config, data_identity(config.data)) is None

    with world.connected(device, config.step.timeout):
        if makes_teacher and world.of_main(lacks_teacher):
            world.everywhere(lambda: check_before_teacher(config, world))
            run(teacher_run(config), world)
        run_seeds(config, world)
    return 0


def _train_teacher(args: list[str]) -> int:
    from .train import run_seeds

    config = parse_run("train-teacher", args)
    if config is not None:
        run_seeds(config)
    return 0


PLAN_HELP = """of plan alone, before the options of train:
  --probe   take real steps for at most 60 seconds; without, hours are not known
  --json    one JSON object
Neither data nor weights are needed. Exit code 0: the run fits; 5: memory or disk does not hold it.
"""
PROFILE_HELP = """of profile alone, before the options of train:
  --steps N      timed steps of each kind
  --trace FILE   a Chrome trace of two steps
  --json         one JSON object
Neither data nor weights are needed.
"""


def _plan(args: list[str]) -> int:
    own = ("--probe", "--json")
    probe, as_json = (_take_flag(args, name) for name in own)
    _print_help_of_verb(args, PLAN_HELP)
    config = parse_run("plan", args, own)
    if config is None:
        return 0
    from .plan import run_plan

    return run_plan(config, probe=probe, as_json=as_json)


def parse_run(verb: str, args: list[str], own: Sequence[str] = ()) -> RunConfig | None:
    """Recipe, arm and options as a RunConfig; None if help was asked for.

    `own`: options of the verb, taken out of `args` before, to be suggested too.

    Raises:
        UsageError: Unknown recipe, option or value.
    """
    recipe = args.pop(0) if args and not args[0].startswith("-") else None
    method, arm, file = (_take(args, f"--{name}") for name in ("method", "arm", "config"))
    wants_help = any(arg in ("-h", "--help") for arg in args)
    if recipe is None and file is None:
        if wants_help:
            print(_overview())
            return None
        raise UsageError(f"{verb}: expected a recipe, one of: {' '.join(recipe_names())}")
    if recipe is not None and file is not None:
        raise UsageError(f"recipe {recipe!r} and --config {file}: expected one of them")
    if file is not None:
        config = _read_config(Path(file))
        config = config if method is None else _with_method(config, method)
    else:
        config = _make_recipe(typing.cast(str, recipe), method)
    prog = f"dfptkd {verb} {recipe or '--config ' + file}"  # type: ignore[operator]
    trains_teacher = verb == "train-teacher"
    if trains_teacher and method not in (None, "ce"):
        raise UsageError(
            f"train-teacher: --method {method}: a teacher learns from labels alone: expected none"
        )
    try:
        if trains_teacher and config.role != "teacher":
            return _parse_teacher_run(config, arm, args, prog)
        before, config = config, _with_arm(config, arm)
        if arm is not None:
            refuse_idle_arm(arm, before, config, differing(before, config), verb)
        config, typed = parse_options(config, args, prog, own)
    except SystemExit:  # help was printed
        return None
    configs = _compared_in_profile(config) if verb == "profile" else [config]
    refuse_without_effect(typed, configs, verb, without_data=verb in ("plan", "profile"))
    if "teacher.expected_top1" in typed:  # a figure of the user's own is of whatever the run has
        teacher = dataclasses.replace(config.teacher, expected_of=None)
        config = dataclasses.replace(config, teacher=teacher)
    return config


def _parse_teacher_run(recipe: RunConfig, arm: str | None, args: list[str], prog: str) -> RunConfig:
    """The run that trains a recipe's teacher. What is said of the teacher is said of the recipe,
    from which that run is made, and all other options of the run itself.

    Raises:
        As `parse_run`; SystemExit as `parse_options`.
    """
    from .teacher import teacher_run

    before, armed = teacher_run(recipe), _with_arm(recipe, arm)
    if arm is not None:
        after, changes = teacher_run(armed), differing(recipe, armed)
        refuse_idle_arm(arm, before, after, changes, "train-teacher")
    of_teacher: list[str] = []
    others: list[str] = []
    for words in _by_option(_expanded(args)):
        (of_teacher if dotted(words[0]) in OF_TEACHER_RUN else others).extend(words)
    armed, typed_of_teacher = parse_options(armed, of_teacher, prog)
    config, typed = parse_options(teacher_run(armed), others, prog)
    if "student" in typed:  # the record is to name the network that it has
        teacher = dataclasses.replace(config.teacher, name=config.student)
        config = dataclasses.replace(config, teacher=teacher)
    for name in typed_of_teacher:
        own = OF_TEACHER_RUN[name]
        if own in typed and value_of(config, own) != value_of(armed, name):
            raise UsageError(
                f"train-teacher: {as_typed(own)} {value_of(config, own)} and {as_typed(name)} "
                f"{value_of(armed, name)}: expected one of them, as both say it of the teacher's "
                "run"
            )
    refuse_without_effect(typed, [config], "train-teacher")
    return config


def _compared_in_profile(config: RunConfig) -> list[RunConfig]:
    """The runs that `profile` puts side by side, the one that was asked for first."""
    from .profile import compared, of_method

    methods = dict.fromkeys((config.method, *compared(config)))
    return [of_method(config, method) for method in methods]


def parse_options(
    config: RunConfig, args: list[str], prog: str, own: Sequence[str] = ()
) -> tuple[RunConfig, list[str]]:
    """`config` with the options in `args`, and which ones these are, by their dotted names; every
    field is one. `own` as in `parse_run`.

    Raises:
        UsageError: Unknown option or value.
        SystemExit: Help was asked for and printed.
    """
    listed = _expanded(args, own)
    if not listed:
        return config, []
    import tyro

    if "--help" in listed or "-h" in listed:
        return tyro.cli(RunConfig, default=config, args=listed, prog=prog), []
    typed = list(dict.fromkeys(dotted(arg) for arg in listed if arg.startswith("--")))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(RunConfig, default=config, args=listed, prog=prog), typed
    except SystemExit:
        raise UsageError(_one_line(said.getvalue())) from None


def _expanded(args: Sequence[str], own: Sequence[str] = ()) -> list[str]:
    """Options and values as tyro takes them: `--a=b` in two words, `--seeds 0,1,2` in four.

    Raises:
        UsageError: Unknown option.
    """
    known = option_types(RunConfig)
    listed: list[str] = []
    option = ""
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in ("-h", "--help") or not _OPTION.match(name):
            values = [arg]
        else:
            option = "--" + name.lstrip("-").replace("_", "-")
            if option not in known:
                raise UsageError(
                    f"unknown option {name}{option_suggestion(option, [*known, *own])}"
                )
            listed.append(option)
            values = [value] if equals else []
        for word in values:
            listed += [part for part in word.split(",") if part] if known.get(option) else [word]
    return listed


_OPTION = re.compile(r"--|-(?!inf$|nan$)[a-zA-Z]")  # and no negative number


def _by_option(listed: Sequence[str]) -> list[list[str]]:
    """Each option with its values."""
    found: list[list[str]] = []
    for word in listed:
        if word.startswith("--") or not found:
            found.append([])
        found[-1].append(word)
    return found


def dotted(option: str) -> str:
    """The dotted name of an option as it is typed: `--data.no-flip` is data.flip."""
    section, dot, name = option.removeprefix("--").replace("-", "_").rpartition(".")
    if section + dot + name not in OPTIONS:
        name = name.removeprefix("no_")
    return section + dot + name


def option_types(cls: type, prefix: str = "") -> dict[str, bool]:
    """Every option of a configuration class -> whether it takes a list."""
    found: dict[str, bool] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            found |= option_types(typing.cast(type, hint), f"{prefix}{name}.")
            continue
        found[f"--{prefix}{name}"] = "tuple" in str(hint)
        if hint is bool:
            found[f"--{prefix}no-{name}"] = False
    return found


def _one_line(panel: str) -> str:
    """The message out of tyro's panel: what stands between its first two rules."""
    lines = [re.sub(r"[│╭╮╰╯─]", " ", line).strip() for line in panel.splitlines()]
    body: list[str] = []
    rules = 0
    for line in lines:
        if re.fullmatch(r"-{3,}", line):
            rules += 1
        elif rules == 1:
            body.append(line)
    return " ".join(" ".join(body or lines).split())


def _take(args: list[str], name: str) -> str | None:
    """Remove `name VALUE` or `name=VALUE` from args and return VALUE."""
    for i, arg in enumerate(args):
        if arg == name:
            if i + 1 == len(args):
                raise UsageError(f"{name}: expected a value")
            value = args[i + 1]
            del args[i : i + 2]
            return value
        if arg.startswith(name + "="):
            del args[i]
            return arg.partition("=")[2]
    return None


def _print_help_of_verb(args: list[str], text: str) -> None:
    """What a verb adds to the options of train, if help was asked for."""
    if "-h" in args or "--help" in args:
        print(text)


def _take_flag(args: list[str], name: str) -> bool:
    """Remove `name` from args; whether it was there."""
    found = name in args
    args[:] = [arg for arg in args if arg != name]
    return found


def _read_config(path: Path) -> RunConfig:
    """A RunConfig out of a run.json, or out of a file that holds the configuration alone."""
    values = read_json(path, "a run.json")
    try:
        return from_dict(
            RunConfig, values.get("config", values) if isinstance(values, dict) else values
        )
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _with_method(config: RunConfig, method: str) -> RunConfig:
    _check_method(method)
    return dataclasses.replace(config, method=typing.cast(Any, method))


def _with_arm(config: RunConfig, arm: str | None) -> RunConfig:
    if arm is None:
        return config
    if arm not in arms():
        raise UsageError(f"unknown arm {arm!r}{suggestion(arm, arms())}")
    return dataclasses.replace(arms()[arm](config), arm=arm)


def _check_method(method: str) -> None:
    methods = typing.get_args(typing.get_type_hints(RunConfig)["method"])
    if method not in methods:
        raise UsageError(f"unknown method {method!r}: expected one of {' '.join(methods)}")


# Recipes are loaded by name at run time: the engine imports nothing above it.


def _recipes(module: str = "") -> Any:
    package = __package__.rpartition(".")[0] + ".recipes"
    return importlib.import_module(f"{package}.{module}" if module else package)


def _recipe_modules() -> list[str]:
    folder = Path(_recipes().__file__).parent
    names = [p.stem for p in sorted(folder.glob("*.py"))]
    return [name for name in names if name not in ("__init__", "arms", "studies")]


def recipe_names() -> list[str]:
    """Every recipe: `quickstart`, `cifar100.wrn_40_2_shufflenetv1`, ..."""
    names = []
    for module in _recipe_modules():
        functions = [
            name
            for name, value in vars(_recipes(module)).items()
            if callable(value) and value.__module__.endswith(f"recipes.{module}") and name[0] != "_"
        ]
        names += [name if name == module else f"{module}.{name}" for name in functions]
    return names


def _make_recipe(name: str, method: str | None) -> RunConfig:
    if name not in recipe_names():
        raise UsageError(f"unknown recipe {name!r}{suggestion(name, recipe_names())}")
    module, _, function = name.partition(".")
    make = getattr(_recipes(module), function or module)
    if method is None:
        return make()
    _check_method(method)
    return make(method)


def arms() -> dict[str, Callable[[RunConfig], RunConfig]]:
    """Named variations of recipes."""
    return _recipes("arms").ARMS


# The other commands ------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are a UsageError."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (-[^ =]*)", message)
        if unknown:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            message = f"unknown option {unknown[1]}{option_suggestion(unknown[1], known, {})}"
        raise UsageError(f"{self.prog.removeprefix('dfptkd ')}: {message}")


def _parser(verb: str) -> Parser:
    return Parser(prog=f"dfptkd {verb}", description=VERBS[verb], allow_abbrev=False)


def _status(args: list[str]) -> int:
    parser = _parser("status")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument(
        "--since", type=float, default=0.0, help="1 if a run has not moved since (date +%%s)"
    )
    options = _parse(parser, args)
    if options is None:
        return 0
    from .records import exit_code_of

    codes = []
    for run in options.runs:
        code, line = exit_code_of(run, options.since)
        print(line)
        codes.append(code)
    failed = [code for code in codes if code not in (0, Stopped.exit_code)]
    return failed[0] if failed else max(codes)


def _eval(args: list[str]) -> int:
    parser = _parser("eval")
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="run folder, one of its checkpoints/step-N, or any file of weights (package:NAME: "
        "that in an installed package)",
    )
    parser.add_argument(
        "--model", help="the network that a file holds (cifar:resnet20, ...); absent: as it says"
    )
    parser.add_argument("--data.name", dest="name", help="data set; absent: that of the training")
    parser.add_argument("--data.root", dest="root", help="folder of the data; absent: DFPTKD_DATA")
    parser.add_argument(
        "--data.image-size", dest="image_size", type=int, help="side in pixels (image files)"
    )
    for name in ("mean", "std"):
        parser.add_argument(
            f"--data.{name}", dest=name, nargs="+", help="three numbers (image files)"
        )
    parser.add_argument("--data.limit", dest="limit", type=int, help="images, even over classes")
    parser.add_argument("--data.loader", dest="loader", help="auto, dali, torchvision or device")
    parser.add_argument("--data.quarantine", dest="quarantine", help="list by verify-data")
    parser.add_argument(
        "--data.skip-quarantined", dest="skip", action="store_true", help="leave them out, say so"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the EMA of its weights, where it has one"
    )
    parser.add_argument("--batch", type=int, default=256, help="images in a step")
    parser.add_argument("--device", help="cpu or cuda; absent: cuda where there is one")
    options = _parse(parser, args)
    if options is None:
        return 0
    if options.batch < 1:
        raise UsageError(f"--batch {options.batch}: expected 1 or more")
    from .eval_checkpoint import evaluate_checkpoint

    result = evaluate_checkpoint(
        options.checkpoint,
        model=options.model,
        root=options.root,
        limit=options.limit,
        loader=options.loader,
        quarantine=options.quarantine,
        skip_quarantined=options.skip,
        batch_size=options.batch,
        device=options.device,
        ema=options.ema,
        name=options.name,
        image_size=options.image_size,
        mean=_statistics("--data.mean", options.mean),
        std=_statistics("--data.std", options.std),
    )
    which = f" ({result.weights} weights)" if result.weights else ""
    print(
        f"{result.model}{which}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % on "
        f"{result.images:,} test images of {result.data}"
        + (f" (without {result.skipped} in quarantine)" if result.skipped else "")
    )
    if result.logged is not None:
        print(f"logged by the run at this step: {result.logged:.2f} %")
    for note in result.notes:
        print(f"note: {note}")
    return 0


def _statistics(option: str, words: Sequence[str] | None) -> tuple[float, ...] | None:
    """Numbers with blanks or commas between; how many, the configuration checks."""
    if words is None:
        return None
    try:
        return tuple(float(part) for part in ",".join(words).split(",") if part)
    except ValueError:
        raise UsageError(f"{option} {' '.join(words)}: expected three numbers") from None


def _report(args: list[str]) -> int:
    parser = _parser("report")
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="RUN|STUDY.csv",
        help="run folders, or folders of them: a table and one HTML file. "
        "Or tables of studies, with their archives: Markdown and figures",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="of runs: the HTML file; of studies: folder of the figures, absent: beside the table",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="of studies: file to put the Markdown into, between its <!-- results: begin --> and "
        "<!-- results: end -->; absent: it is printed",
    )
    options = _parse(parser, args)
    if options is None:
        return 0
    tables = [path for path in options.inputs if path.suffix == ".csv" and not path.is_dir()]
    if tables and len(tables) < len(options.inputs):
        raise UsageError("report: expected run folders, or tables of studies, not both")
    if tables:
        from .study_report import study_report

        studies = _recipes("studies").STUDIES
        study_report(tables, studies, out=options.out, readme=options.readme)
        return 0
    if options.readme is not None:
        raise UsageError("report: --readme goes with tables of studies")
    from .report import report

    report(options.inputs, options.out)
    return 0


def _verify_data(args: list[str]) -> int:
    parser = _parser("verify-data")
    parser.add_argument("folder", type=Path, help="the data folder, as of --data.root")
    parser.add_argument(
        "--data.name",
        dest="name",
        help="as which data set a run reads it; absent: what its layout looks like",
    )
    parser.add_argument("--out", type=Path, help="the list; absent: beside the data")
    parser.add_argument("--workers", type=int, help="processes; absent: one a core")
    options = _parse(parser, args)
    if options is None:
        return 0
    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers {options.workers}: expected 1 or more")
    from .data.verify import run_verify

    return run_verify(options.folder, options.out, options.workers, options.name)


def _export(args: list[str]) -> int:
    parser = _parser("export")
    parser.add_argument(
        "checkpoint", type=Path, help="run folder, or one of its checkpoints/step-N"
    )
    parser.add_argument("--out", type=Path, help="folder for the files; absent: <run>/export")
    parser.add_argument(
        "--formats", default="safetensors,onnx", help="safetensors, onnx or both, with a comma"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the EMA of its weights, where it has one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = _parse(parser, args)
    if options is None:
        return 0
    from .export import export_student

    export_student(
        options.checkpoint,
        options.out,
        formats=options.formats.split(","),
        ema=options.ema,
        overwrite=options.overwrite,
    )
    return 0


def _profile(args: list[str]) -> int:
    as_json = _take_flag(args, "--json")
    _print_help_of_verb(args, PROFILE_HELP)
    steps, trace = _take(args, "--steps"), _take(args, "--trace")
    if steps is not None and not (steps.isdecimal() and int(steps) > 0):
        raise UsageError(f"--steps {steps}: expected a whole number of at least 1")
    config = parse_run("profile", args, ("--json", "--steps", "--trace"))
    if config is None:
        return 0
    from .profile import profile
    from .profile_tables import print_profile

    found = profile(
        config,
        steps=None if steps is None else int(steps),
        trace=None if trace is None else Path(trace),
    )
    if as_json:
        print(found.to_json())
    else:
        print_profile(found)
    return 0


def _bench(args: list[str]) -> int:
    parts = ("kernels", "step", "data", "overhead", "optim", "first", "compare")
    if not args or args[0] not in parts:
        raise UsageError(f"bench: expected what to measure, one of: {' '.join(parts)}")
    package = __package__.rpartition(".")[0]
    return importlib.import_module(f"{package}.bench.{args[0]}").main(args[1:])


def _study(args: list[str]) -> int:
    studies = _recipes("studies").STUDIES
    if not args or args[0] in ("-h", "--help"):
        print("studies, and what each asks:\n")
        for name, make in studies.items():
            print(f"  {name:<14} {make('full').question}")
        print("\ndfptkd study NAME --help lists the options.")
        return 0 if args else UsageError.exit_code
    name = args.pop(0)
    if name not in studies:
        raise UsageError(f"unknown study {name!r}{suggestion(name, studies)}")
    parser = Parser(prog=f"dfptkd study {name}", description=VERBS["study"], allow_abbrev=False)
    add = parser.add_argument
    budgets = ("full", "short", "cpu")
    add("--budget", choices=budgets, required=True, help="240 or 40 epochs, or small networks")
    add("--seeds", help="numbers with commas; absent: the study's")
    add("--data.root", dest="root", help="folder of the data; absent: DFPTKD_DATA")
    add("--out-root", type=Path, help="folder of the runs; absent: runs/study-BUDGET")
    add("--results", type=Path, default=Path("bench/results"), help="folder of the record")
    add("--device", choices=("cpu", "cuda"), help="absent: cuda where there is one")
    add("--workers", type=int, help="runs at a time; absent: one a GPU, one a core")
    add("--minutes", type=float, help="stop and save after so long")
    add("--list", action="store_true", help="say what there is to do, and do nothing")
    options = _parse(parser, args)
    if options is None:
        return 0
    from .study import list_study, run_study, slots

    study = studies[name](options.budget)
    if options.seeds is not None:
        study = dataclasses.replace(study, seeds=_numbers("--seeds", options.seeds))
    for option in ("workers", "minutes"):
        value = getattr(options, option)
        if value is not None and value <= 0:
            raise UsageError(f"--{option} {value}: expected a number above 0")
    out_root = options.out_root or Path("runs") / f"study-{options.budget}"

    def configure(cell: Any) -> RunConfig:
        config = _with_arm(_make_recipe(cell.recipe, cell.method), cell.arm)
        data = dataclasses.replace(config.data, root=options.root)
        return dataclasses.replace(config, out_root=str(out_root), data=data)

    if options.list:
        list_study(study, configure, options.results)
        return 0
    places = slots(options.device, options.workers)
    run_study(study, configure, places, results=options.results, minutes=options.minutes)
    return 0


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Different whole numbers with commas between."""
    parts = text.split(",")
    numbers = tuple(int(p) for p in parts if p.isdecimal())
    if len(set(numbers)) < len(parts):
        raise UsageError(f"{option} {text}: expected different whole numbers with commas between")
    return numbers


def _doctor(args: list[str]) -> int:
    parser = _parser("doctor")
    parser.add_argument(
        "--build-native", action="store_true", help="build the C++ kernels for the CPU now"
    )
    options = _parse(parser, args)
    if options is None:
        return 0
    from .doctor import run_doctor

    return run_doctor(options.build_native)


def _parse(parser: Parser, args: list[str]) -> argparse.Namespace | None:
    """The options, or None if help was printed."""
    try:
        return parser.parse_args(args)
    except SystemExit:
        return None


if __name__ == "__main__":
    sys.exit(main())
