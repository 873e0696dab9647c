"""What was measured on this machine: choices of backends in a file of the user's cache folder.

One JSON file for all machines that share the folder. An entry counts only where device, driver,
versions, threads, the sources of `kernels/` and the native library built from them are those that
it was measured with.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..kernels import backend
from ..kernels.backend import BACKENDS, COMPOSITES, OPERATIONS, Site
from .errors import StorageError
from .files import first_line, write_atomically
from .log import hardware, versions

FORMAT = "dfptkd.kernels/1"
VARIABLE = "DFPTKD_KERNEL_CACHE"  # names another file
LOCK_WAIT_S = 10.0  # for another process, which holds the lock for as long as it takes to write
_LOOK_S = 0.02


@dataclass(frozen=True)
class Certificate:
    """How a fused backend compares with fp64 on real inputs, where it compares worst."""

    backend: str
    holds: bool
    tensor: str = ""
    """An output, a statistic or a gradient."""
    error: float = 0.0
    """Of the fused backend, over the tensor's largest value."""
    eager_error: float = 0.0
    """Of eager PyTorch, likewise."""
    failure: str = ""
    """Why there is nothing to compare, or no use in it."""

    @property
    def is_comparison(self) -> bool:
        """Whether it could be compared at all."""
        return self.tensor != ""

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        return (
            f"{self.tensor} is off by {self.error:.1e}, eager PyTorch by {self.eager_error:.1e} "
            "(relative, against fp64)"
        )


@dataclass(frozen=True)
class Choice:
    """The backend of a site, and why it is that."""

    site: Site
    images: int
    """Of the call that was measured."""
    backend: str
    why: str
    """One phrase."""
    median_us: dict[str, float]
    """Backend -> median of forward and backward, in the run's mode; empty where none was timed."""
    certificate: Certificate | None = None
    """Of the fused backend, chosen or not; None where none could serve."""

    def to_json(self) -> dict[str, Any]:
        """As a run's record and the cache have it."""
        own = {
            **self.site._asdict(),
            "dtype": str(self.site.dtype).removeprefix("torch."),
            "shape": list(self.site.shape),
            "options": list(self.site.options),
        }
        rest = {k: v for k, v in asdict(self).items() if k != "site"}
        return own | rest

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Choice:
        """Inverse of `to_json`.

        Raises:
            ValueError: It is none.
        """
        try:
            site = Site(
                values["operation"],
                values["device"],
                getattr(torch, values["dtype"]),
                tuple(values["shape"]),
                tuple(values["options"]),
            )
            certificate = values["certificate"]
            found = cls(
                site,
                values["images"],
                values["backend"],
                values["why"],
                {name: float(median) for name, median in values["median_us"].items()},
                None if certificate is None else Certificate(**certificate),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"no choice of a backend: {first_line(error)}") from error
        names = (*OPERATIONS, *COMPOSITES)
        is_known = site.operation in names and found.backend in BACKENDS
        if not is_known or not found._has_sound_types():
            raise ValueError(f"no choice of a backend: {site.operation} by {found.backend}")
        return found

    def _has_sound_types(self) -> bool:
        site, certificate = self.site, self.certificate
        parts = [
            isinstance(site.dtype, torch.dtype),
            all(type(n) is int for n in (self.images, *site.shape)),
            all(isinstance(o, (str, int, float)) for o in site.options),
            isinstance(self.why, str),
        ]
        if certificate is not None:
            texts = certificate.backend, certificate.tensor, certificate.failure
            errors = certificate.error, certificate.eager_error
            parts += [isinstance(text, str) for text in texts]
            parts += [isinstance(error, (int, float)) for error in errors]
            parts.append(isinstance(certificate.holds, bool))
        return all(parts)

    @property
    def is_conclusive(self) -> bool:
        """Whether medians or wrong values speak for it, not a lack of memory or of a compiler."""
        found = self.certificate
        is_wrong = found is not None and found.is_comparison and not found.holds
        return is_wrong or bool(self.median_us)

    @property
    def complaint(self) -> str:
        """That a fused backend cannot serve here, and why, for people; empty where it can."""
        found = self.certificate
        if found is None or found.holds:
            return ""
        said = "is not right" if found.is_comparison else "could not be compared"
        rounding = "" if found.failure else ", more than rounding"
        return f"{self}: {found.backend} {said} here: {found}{rounding}: the reference serves it"

    def __str__(self) -> str:
        """The site, for people."""
        shape = "x".join(map(str, self.site.shape))
        words = [self.site.operation, str(self.site.dtype).removeprefix("torch."), shape]
        return " ".join([*words, *map(str, self.site.options)])


class KernelCache:
    """The choices that were measured on this machine.

    Args:
        mode: Execution mode in which they were timed.
        warn: Gets one line if the file is damaged; it is then measured anew and written over.
        path: The file; absent: that of the user.
    """

    def __init__(
        self, mode: str, warn: Callable[[str], None] = print, path: Path | None = None
    ) -> None:
        self.mode, self.warn = mode, warn
        self.path = cache_path() if path is None else path
        self._has_warned = False
        self._known: dict[str, Any] | None = None

    def find(self, site: Site, images: int) -> Choice | None:
        """What was known of a site, measured with so many images, when this object first looked."""
        if self._known is None:
            self._known = self._read()
        machine = _digest(describe_machine(site.device))
        entries = self._known["machines"].get(machine, {}).get("choices", {})
        values = entries.get(_key(self.mode, site, images))
        return None if values is None else Choice.from_json(values)

    def settle(self, choice: Choice) -> Choice:
        """Writes a choice down, or takes over the one that another process has written meanwhile.

        A choice that is not conclusive is left to the next run, which may have the memory or the
        compiler. A file that cannot be written is no error: the next run measures again.
        """
        if not choice.is_conclusive:
            return choice
        machine = describe_machine(choice.site.device)
        key = _key(self.mode, choice.site, choice.images)
        with suppress(OSError, StorageError), self._locked():
            whole = self._read()
            own = whole["machines"].setdefault(_digest(machine), {"machine": machine})
            entries = own.setdefault("choices", {})
            if key in entries:
                return Choice.from_json(entries[key])
            entries[key] = choice.to_json() | {"mode": self.mode}
            text = json.dumps(whole, indent=1)
            write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))
        return choice

    def of_machine(self, device: str) -> list[tuple[str, Choice]]:
        """(mode, choice) of all that is known of this machine's device, in the file's order."""
        found = self._read()["machines"].get(_digest(describe_machine(device)), {})
        return [(v["mode"], Choice.from_json(v)) for v in found.get("choices", {}).values()]

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}, expected {FORMAT!r}")
            for machine in found["machines"].values():
                for key, values in machine["choices"].items():
                    _check(key, values)
            return found
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as e:
            if not self._has_warned:
                self._has_warned = True
                self.warn(
                    f"{self.path}: expected choices of kernels in JSON ({first_line(e)}): they are "
                    "measured anew"
                )
        return {"format": FORMAT, "machines": {}}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Of several processes one at a time, where the file system knows locks."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f"{self.path.name}.lock"), "w") as file:
            _lock(file, LOCK_WAIT_S)
            yield


def _lock(file: IO[str], wait_s: float) -> None:
    """Lock a file, unless there are no locks here, or the one who has it does not move: a process
    that was halted, a server that is gone. Then the last of two writers wins."""
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                return
            time.sleep(_LOOK_S)
        except OSError:
            return


def _key(mode: str, site: Site, images: int) -> str:
    values = Choice(site, images, "", "", {}).to_json()
    names = ("operation", "device", "dtype", "shape", "options")
    return json.dumps([mode, images, *(values[name] for name in names)])


def _check(key: str, values: dict[str, Any]) -> None:
    """Raises ValueError where an entry is none, stands under the key of another call, or has a
    backend serve that does not run there or was not found right."""
    choice = Choice.from_json(values)
    if key != _key(values["mode"], choice.site, choice.images):
        raise ValueError(f"{choice} under the key of another call")
    if choice.backend != "reference":
        is_fast = choice.backend == backend.fast_backend(choice.site.device)
        if not is_fast or choice.certificate is None or not choice.certificate.holds:
            raise ValueError(f"{choice} by {choice.backend}, which cannot have been chosen")


def cache_path() -> Path:
    """The user's file: DFPTKD_KERNEL_CACHE, or beside the native library in the cache folder."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else backend.cache_folder() / "kernels.json"


def describe_machine(device: str) -> dict[str, Any]:
    """What a measurement on this type of device holds for."""
    about = {**_describe_device(device), "threads": torch.get_num_threads()}
    if device == "cpu":
        about["library"] = _digest_of_library(backend.library_path())
    return about | {"torch": torch.__version__, "kernels": _digest_of_kernels()}


@functools.cache
def _describe_device(device: str) -> dict[str, Any]:
    found = hardware(torch.device(device))
    about = {name: found[name] for name in ("device", "cpu")}
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        about |= {
            "capability": list(capability),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": versions().get("triton"),
        }
    return about


def _driver() -> str:
    """Version of NVIDIA's kernel module; empty where none is to be seen, as in some containers."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""


def _digest(machine: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _digest_of_kernels() -> str:
    """Names the state of the sources of all kernels."""
    folder = Path(backend.__file__).parent
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]


@functools.cache
def _digest_of_library(path: Path | None) -> str:
    """Names the native library itself: it may be older than the sources, or built anew."""
    try:
        return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:  # nor can it be loaded
        return ""
