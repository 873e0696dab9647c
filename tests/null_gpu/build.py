"""Builds the null GPU for the torch of the interpreter that runs this.

    python tests/null_gpu/build.py FOLDER
    . FOLDER/env.sh        # from here on torch sees it, in this shell alone

Needs gcc; the headers come with torch's CUDA packages.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("memory", "streams", "device", "launches", "cublas")
LIBRARY = "libcuda.so.1"  # under the driver's own name: whoever opens that finds it loaded already
ADDRESS_SPACE = 26_000_000 * 1024  # bytes a process may map; device memory is part of it
CUDA_MAJOR = "13"
# Those of torch's libraries that talk to CUDA.
CALLERS = ("libc10_cuda", "libtorch_cuda", "libtorch_python", "libcaffe2_nvrtc", "libtorch_cpu")
OURS = re.compile(r"(?!cuFile)(__cuda|cuda|cublas|cu[A-Z])\w+")
# cuBLAS functions that compute take a handle first; these set up, ask or clear away.
NO_LAUNCH = re.compile(r"cublas(Lt|Set|Get|Destroy)\w+")


def obstacle() -> str | None:
    """Why it cannot be built for this interpreter's torch; None: it can."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"no {tool}"
    if importlib.util.find_spec("torch") is None:
        return "no torch"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if torch.version.cuda.split(".")[0] != CUDA_MAJOR:
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, not {CUDA_MAJOR}"
    for header in ("cuda_runtime_api.h", "crt/host_defines.h"):
        if not any((path / header).is_file() for path in _headers()):
            return f"no {header} in {' or '.join(map(str, _headers()))}"
    return None


def build(folder: Path) -> None:
    """Compile the library into `folder`, with what lets torch find it (see `environment`).

    Raises:
        subprocess.CalledProcessError: gcc's message is on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for part in PARTS:
        objects.append(folder / f"{part}.o")
        _gcc("-c", HERE / f"{part}.c", "-o", objects[-1], "-Wall", "-Wextra")
    stubs = folder / "stubs.c"
    stubs.write_text(stub_source(_asked_for() - _symbols(objects, "--defined-only")))
    _gcc("-shared", stubs, *objects, "-o", folder / LIBRARY, f"-Wl,-soname,{LIBRARY}", "-ldl")
    # torch imports what is installed under this name at the end of its own import
    entry = folder / "null_gpu-1.dist-info"
    entry.mkdir(exist_ok=True)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: null_gpu\nVersion: 1\n")
    (entry / "entry_points.txt").write_text("[torch.backends]\nnull_gpu = null_device:install\n")
    lines = [f"export {name}={value!r}" for name, value in environment(folder, {}).items()]
    path = "export PYTHONPATH=$NULL_GPU_PATH${PYTHONPATH:+:$PYTHONPATH}"
    limit = f"ulimit -v {ADDRESS_SPACE // 1024}"
    (folder / "env.sh").write_text("\n".join([*lines, path, limit, ""]))


def environment(folder: Path, base: dict[str, str] | None = None) -> dict[str, str]:
    """The variables of a process that sees the null GPU in `folder`, on top of `base`.

    Args:
        folder: As of `build`.
        base: Absent: those of this process.
    """
    base = dict(os.environ) if base is None else base
    path = f"{folder}:{HERE}"
    found = {
        **base,
        "LD_PRELOAD": str(folder / LIBRARY),
        "TRITON_LIBCUDA_PATH": str(folder),
        "NULL_GPU_PATH": path,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    if base:
        before = base.get("PYTHONPATH")
        found["PYTHONPATH"] = path if not before else f"{path}:{before}"
    return found


def stub_source(names: set[str]) -> str:
    """C: a function of each name that succeeds; those of cuBLAS that compute are a launch."""
    lines = [
        "// Written by build.py: what torch and Triton ask for and nobody here answers.",
        "int succeed(const char *symbol);",
        "int blas_launch(void *handle);",
        '#define EXPORT __attribute__((visibility("default")))',
    ]
    for name in sorted(names):
        if name.startswith("cublas") and not NO_LAUNCH.fullmatch(name):
            lines.append(f"EXPORT int {name}(void *handle) {{ return blas_launch(handle); }}")
        else:
            lines.append(f'EXPORT int {name}(void) {{ return succeed("{name}"); }}')
    return "\n".join([*lines, ""])


def _asked_for() -> set[str]:
    """Every CUDA function that torch's libraries and Triton's launcher call."""
    libraries = [_package("torch") / "lib" / f"{name}.so" for name in CALLERS]
    names = _symbols([path for path in libraries if path.is_file()], "--undefined-only")
    driver = _package("triton") / "backends" / "nvidia" / "driver.c"
    if driver.is_file():
        names |= set(re.findall(r"\bcu[A-Z]\w+(?=\()", driver.read_text()))
    return {name for name in names if OURS.fullmatch(name)}


def _symbols(files: list[Path], which: str) -> set[str]:
    dynamic = ["-D"] if files[0].suffix == ".so" else []
    command = ["nm", *dynamic, which, "--format=posix", *map(str, files)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    # name, with a version behind @, and type; lines that name a file have one word
    return {line.split()[0].split("@")[0] for line in lines if len(line.split()) > 1}


def _gcc(*arguments: object) -> None:
    options = [
        "-std=gnu11",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        *(f"-I{path}" for path in _headers()),
    ]
    subprocess.run(["gcc", *options, *map(str, arguments)], check=True)


def _headers() -> list[Path]:
    # those of the runtime that torch links; they lack crt/, which Triton brings
    runtime = _package("torch").parent / "nvidia" / f"cu{CUDA_MAJOR}" / "include"
    return [runtime, _package("triton") / "backends" / "nvidia" / "include"]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    return Path("/nonexistent") if spec is None or spec.origin is None else Path(spec.origin).parent


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    found = obstacle()
    if found is not None:
        sys.exit(f"the null GPU cannot be built here: {found}")
    build(Path(sys.argv[1]).resolve())
