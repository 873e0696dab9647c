"""Weights from files: read without executing anything, found whatever wraps them, loaded strictly,
refused in one line.

A checkpoint may hold a network's tensors in the file itself or in a dictionary inside it, under
their own names or behind a prefix ("module.", "_orig_mod.", "model.", "module.student."), beside an
average of them, an optimizer or another network. The network that they are for tells which they
are: those where every one of its names is found behind the same prefix.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EmaChoice
from ..errors import DataError
from ..files import read_metadata, read_tensors
from .key_maps import foreign_names, renamed
from .torch_file import read_torch_file

SHOWN_KEYS = 3
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")
PACKAGE = "package:"
"""Before the name of an installed package that holds one weights file."""
MAX_DEPTH = 4
"""Dictionaries inside one another that are looked into."""
EMA_METADATA = {"weights": "ema"}
"""In the header of a safetensors file of ours that holds an average."""


@dataclass(frozen=True)
class Table:
    """The tensors of one dictionary in a file, by name."""

    where: str
    """Its keys from the outside in, with dots between ("state.model"); empty: the file itself."""
    tensors: dict[str, Tensor]
    is_average: bool
    """Whether its place says that these are an average of a network's weights."""


@dataclass(frozen=True)
class _Network:
    """A whole network in a table."""

    table: Table
    prefix: str
    """The prefix of its names in the table, with the dot; it may be empty."""
    tensors: dict[str, Tensor]
    """By the names behind the prefix."""
    is_average: bool

    @property
    def where(self) -> str:
        """For messages: "'state_dict', names behind 'module.'"."""
        key = f"'{self.table.where}'" if self.table.where else ""
        prefix = f"names behind '{self.prefix}'" if self.prefix else ""
        return ", ".join(filter(None, (key, prefix))) or "the file itself"

    def holds(self, name: str) -> bool:
        """Whether a tensor of the table is the network's, or the counter beside an average."""
        return name.startswith(self.prefix) or name == _counter(self.prefix)


def is_file(weights: str) -> bool:
    """Whether `weights` means a file, not a name that a library knows."""
    path = Path(weights)
    return (
        weights.startswith(PACKAGE)
        or path.is_file()
        or path.suffix in FILE_SUFFIXES
        or len(path.parts) > 1
    )


def ema_beside(path: Path) -> Path:
    """Where a run writes the average of the weights that it writes to `path`."""
    return path.with_name(f"{path.stem}_ema{path.suffix}")


def load_weights(
    model: nn.Module,
    weights: str | Path,
    *,
    ema: EmaChoice = "auto",
    say: Callable[[str], None] = print,
) -> None:
    """Copies the weights of a file into a model, or refuses them before touching it.

    Reads `.safetensors`, or what `torch.save` wrote: checkpoints of timm, torchvision's references,
    Lightning, mdistiller, RepDistiller, of DataParallel and of torch.compile, ours, and whatever
    else holds every tensor of the model under its own names behind one prefix, or under those that
    key_maps.py knows. Names of the file are never guessed: a tensor more or less is refused.

    Args:
        model: Receives the weights.
        weights: The file, or "package:NAME" for the one weights file in the folder of an installed
            package, whose code is not run.
        ema: Where the file holds an exponential moving average beside the raw weights, or a run of
            ours has written one beside it: `yes` takes it, `no` the raw ones, `auto` the raw ones
            or an average that is alone.
        say: Gets a line where there was a choice, or tensors were passed over.

    Raises:
        DataError: The file is missing, damaged, holds code, does not hold this model, holds it more
            than once, or holds values that no trained network has.
    """
    source = str(weights)
    tables = read_tables(weights)
    found = _networks(tables, model)
    notes: list[str] = []
    chosen = _choose(found, model, ema, source, notes.append).tensors if found else None
    state = _likest(tables, model) if chosen is None else chosen
    load_strict(model, renamed(state, model, source), source)
    for note in notes:
        say(note)


def read_tables(weights: str | Path) -> list[Table]:
    """All dictionaries of tensors in a weights file, outermost first, on the CPU.

    Args:
        weights: As in `load_weights`. The average that a run of ours has written beside the file
            counts as part of it.

    Raises:
        DataError: The file is missing, damaged, holds code, or holds no tensors by name.
    """
    if str(weights).startswith(PACKAGE):
        weights = _file_of_package(str(weights))
    path = Path(weights)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in FILE_SUFFIXES)
        raise DataError(
            f"{path}: is a folder, expected a weights file ({_first(inside) or 'none'})"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such weights file, expected {' '.join(FILE_SUFFIXES)}")
    if path.suffix == ".safetensors":
        tables = [Table("", read_tensors(path), _says_average(path))]
        beside = ema_beside(path)
        if beside.is_file() and _says_average(beside):
            tables.append(Table(beside.name, read_tensors(beside), True))
        return tables
    content = read_torch_file(path)
    tables = [Table(where, t, _names_average(where)) for where, t in _dictionaries(content)]
    if not tables:
        keys = f"keys {_first(list(content))}" if isinstance(content, dict) else None
        raise DataError(
            f"{path}: holds no state dict ({keys or type(content).__name__}), expected a "
            f"dictionary name -> tensor, or one inside up to {MAX_DEPTH} others"
        )
    return tables


def load_strict(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into a model, or refuses them before touching it.

    BatchNorm's `num_batches_tracked` alone may be missing: files from before PyTorch 0.4.1 lack it,
    and inference does not read it.

    Args:
        model: Receives the weights.
        state_dict: Every parameter and buffer of the model, and nothing else.
        source: Where the weights come from, for the message.

    Raises:
        DataError: A key is missing, unexpected, of another shape, of a type that does not hold
            weights, or has a value that no trained network has.
    """
    expected = model.state_dict()
    missing = [key for key in _required(expected) if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    shared = [key for key in expected if key in state_dict]
    misshapen = [key for key in shared if state_dict[key].shape != expected[key].shape]
    strange = [key for key in shared if not _can_hold(state_dict[key], expected[key])]
    if not (missing or unexpected or misshapen or strange):
        state = {k: state_dict[k].detach().to(expected[k].dtype) for k in shared}
        check_values(state, source)
        # With the model's own versions of its layers: these are its names, and some layers ask.
        expected.update(state)
        model.load_state_dict(expected)
        return

    classes = _class_counts(model, state_dict, misshapen)
    if classes and not (missing or unexpected or strange):
        raise DataError(f"{source}: has {classes[0]} classes, expected {classes[1]}")
    shapes = [
        f"{key} {list(state_dict[key].shape)} (expected {list(expected[key].shape)})"
        for key in misshapen
    ]
    types = [f"{k} {_kind(state_dict[k])} (expected {_kind(expected[k])})" for k in strange]
    groups = {
        "missing": missing,
        "unexpected": unexpected,
        "wrong shape": shapes,
        "wrong type": types,
    }
    difference = "; ".join(f"{name} {_first(keys)}" for name, keys in groups.items() if keys)
    raise DataError(f"{source}: does not fit {type(model).__name__}: {difference}")


def check_values(state_dict: Mapping[str, Tensor], source: str) -> None:
    """Refuse values that no trained network has: its logits would be wrong or not finite.

    Args:
        state_dict: Parameters and buffers by name; those that are no floating point numbers are
            passed over.
        source: Where they come from, for the message.

    Raises:
        DataError: A value is not finite, or a variance of a normalisation is negative.
    """
    for key, value in state_dict.items():
        if not value.is_floating_point():
            continue
        bad = value.numel() - int(value.isfinite().sum())
        if bad:
            raise DataError(
                f"{source}: {key}: {bad:,} of {value.numel():,} values are NaN or infinite as "
                f"{_kind(value)}, expected finite weights"
            )
        if key.rpartition(".")[2] == "running_var" and bool((value < 0).any()):
            raise DataError(
                f"{source}: {key}: a variance of {value.min().item():.3g}, expected 0 or more"
            )


# Finding a network -------------------------------------------------------------------------------


def _networks(tables: list[Table], model: nn.Module) -> list[_Network]:
    """Where the tables hold every tensor of the model, under its own names or those of a package
    known to key_maps.py; where any of them has nothing else and the model's shapes, these alone."""
    own = model.state_dict()
    for names in (set(_required(own)), *foreign_names(model)):
        found = [network for table in tables for network in _whole(table, names)]
        if found:
            return [network for network in found if _fits(network.tensors, own)] or found
    return []


def _prefixes(tensors: Collection[str], names: Collection[str]) -> Counter[str]:
    """How many of `names` stand behind each prefix (with its dot, or empty) in a table's names."""
    deepest = 1 + max((name.count(".") for name in names), default=0)
    found: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for start in range(max(0, len(parts) - deepest), len(parts)):
            if ".".join(parts[start:]) in names:
                found["".join(f"{part}." for part in parts[:start])] += 1
    return found


def _whole(table: Table, names: Collection[str]) -> list[_Network]:
    """The networks of a table that have all of `names`. One inside another (a distiller that is its
    own student, and keeps the teacher in `teacher`) is not also part of the outer one."""
    counts = _prefixes(table.tensors, names)
    prefixes = [prefix for prefix, count in counts.items() if count == len(names)]
    return [
        _behind(table, outer, [p for p in prefixes if p.startswith(outer) and p != outer])
        for outer in prefixes
    ]


def _behind(table: Table, prefix: str, inner: Collection[str] = ()) -> _Network:
    """The network behind a prefix of a table's names, without those behind `inner`."""
    counters = {_counter(p) for p in inner}
    tensors = {
        key.removeprefix(prefix): value
        for key, value in table.tensors.items()
        if key.startswith(prefix)
        and key not in counters
        and not any(key.startswith(p) for p in inner)
    }
    has_counter = _counter(prefix) in table.tensors
    return _Network(
        table, prefix, tensors, table.is_average or _names_average(prefix) or has_counter
    )


def _counter(prefix: str) -> str | None:
    """torch's AveragedModel keeps a network in `module`, and the number of updates beside it."""
    return f"{prefix.removesuffix('module.')}n_averaged" if prefix.endswith("module.") else None


def _choose(
    found: list[_Network],
    model: nn.Module,
    ema: EmaChoice,
    source: str,
    say: Callable[[str], None],
) -> _Network:
    """The network to load, said where there was a choice.

    Raises:
        DataError: What was asked for is not there, or is there more than once.
    """
    raw = [network for network in found if not network.is_average]
    averages = [network for network in found if network.is_average]
    if ema == "yes" and not averages:
        raise DataError(
            f"{source}: holds no EMA of the weights (raw ones: {raw[0].where}), expected one for "
            "--teacher.ema yes (eval: --ema)"
        )
    if ema == "no" and not raw:
        raise DataError(
            f"{source}: holds an EMA of the weights alone ({averages[0].where}), expected the raw "
            "ones for --teacher.ema no"
        )
    takes_average = ema == "yes" or not raw
    wanted = averages if takes_average else raw
    different = [n for n in wanted[1:] if not _equal(n.tensors, wanted[0].tensors)]
    if different:
        places = "; ".join(network.where for network in (wanted[0], *different))
        raise DataError(
            f"{source}: holds {1 + len(different)} different sets of weights for "
            f"{type(model).__name__} ({places}), expected one: save the one that is meant alone"
        )
    chosen = wanted[0]
    if raw and averages:
        used, other, of_eval = (
            ("the EMA", "no", "no --ema") if takes_average else ("the raw ones", "yes", "--ema")
        )
        say(
            f"{source}: holds raw weights ({raw[0].where}) and their EMA ({averages[0].where}), "
            f"{used} are used; --teacher.ema {other} (eval: {of_eval}) takes the others"
        )
    elif averages:
        say(f"{source}: holds an EMA of the weights alone ({chosen.where}), which is used")
    inside = [network for network in found if network.table is chosen.table]
    passed = [k for k in chosen.table.tensors if not any(n.holds(k) for n in inside)]
    if passed:
        say(
            f"{source}: the weights are {chosen.where}; passed over {len(passed)} other tensors "
            f"({_first(passed)})"
        )
    return chosen


def _likest(tables: list[Table], model: nn.Module) -> dict[str, Tensor]:
    """The tensors that come closest to the model, for a message that says what is missing."""
    names = set(model.state_dict())
    best, count = tables[0].tensors, 0
    for table in tables:
        for prefix, number in _prefixes(table.tensors, names).items():
            if number > count:
                best, count = _behind(table, prefix).tensors, number
    return best


def _dictionaries(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors by name of each dictionary in `content` that holds any, outermost first."""
    seen: set[int] = set()  # a pickle may refer to one object from many places, itself too
    level: list[tuple[str, Any]] = [("", content)]
    for _ in range(MAX_DEPTH + 1):
        inner: list[tuple[str, Any]] = []
        for where, value in level:
            if not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            named = [(key, item) for key, item in value.items() if isinstance(key, str)]
            tensors = {k: t for k, t in named if isinstance(t, Tensor) and not t.is_nested}
            if tensors:
                yield where, tensors
            inner += [(f"{where}.{key}" if where else key, item) for key, item in named]
        level = inner


def _names_average(where: str) -> bool:
    """Whether a key or a prefix says that it holds an average: "state_dict_ema", "model_ema"."""
    return "ema" in re.split(r"[^a-z0-9]+", where.lower())


def _says_average(path: Path) -> bool:
    """Whether a safetensors file of ours says that it holds an average."""
    return EMA_METADATA.items() <= read_metadata(path).items()


def _required(names: Collection[str]) -> list[str]:
    return [name for name in names if name.rpartition(".")[2] != "num_batches_tracked"]


def _fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return all(key in own and value.shape == own[key].shape for key, value in state.items())


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and x.shape == b[k].shape and torch.equal(x, b[k])
        for k, x in a.items()
    )


def _can_hold(given: Tensor, expected: Tensor) -> bool:
    """Whether values can be copied without another meaning: int8 is no fp32, counts are counts."""
    is_plain = given.layout == torch.strided and given.device.type == "cpu"
    if not is_plain or given.is_quantized or given.is_complex() != expected.is_complex():
        return False
    return given.is_floating_point() or not expected.is_floating_point()


def _kind(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        return f"{name} {str(tensor.layout).removeprefix('torch.')}"
    return name if tensor.device.type == "cpu" else f"{name} on {tensor.device.type}"


def _file_of_package(weights: str) -> Path:
    name = weights.removeprefix(PACKAGE)
    # Of a dotted name the parent would be imported; of this one nothing is.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = [Path(f) for f in (spec.submodule_search_locations or ())] if spec else []
    if not folders:
        raise DataError(
            f"{weights}: expected the name of an installed package, as Python imports it"
        )
    found = [p for f in folders for p in sorted(f.rglob("*")) if p.suffix in FILE_SUFFIXES]
    if len(found) != 1:
        names = _first([p.name for p in found]) or "none"
        raise DataError(f"{weights}: expected one weights file in {folders[0]}, found {names}")
    return found[0]


def _class_counts(
    model: nn.Module, state_dict: Mapping[str, Tensor], misshapen: list[str]
) -> tuple[int, int] | None:
    """(classes in the file, of the model) where the rows of one linear layer are the difference."""
    owners = {key.rpartition(".")[0] for key in misshapen}
    if len(owners) != 1:
        return None
    owner = owners.pop()
    linear, weight = model.get_submodule(owner), state_dict.get(f"{owner}.weight")
    if not isinstance(linear, nn.Linear) or weight is None:
        return None
    same_columns = weight.shape[1:] == linear.weight.shape[1:]
    return (weight.shape[0], linear.out_features) if same_columns else None


def _first(keys: list[Any]) -> str:
    rest = len(keys) - SHOWN_KEYS
    return ", ".join(map(str, keys[:SHOWN_KEYS])) + (f" and {rest} more" if rest > 0 else "")
