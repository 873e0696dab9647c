"""Builds the C++ sources in `csrc` into one shared library with CMake.

Only the standard library is imported: `setup.py` loads this file by its path, before the package
exists, and `dfptkd doctor --build-native` calls it from an installed package.
"""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

LIBRARY_NAME = "libdfptkd_native.so"
SOURCE_ROOT = Path(__file__).resolve().parents[1]  # holds CMakeLists.txt, in a checkout and a wheel


@functools.cache
def source_digest() -> str:
    """Names the state of the sources, so that a library is never taken for one of other sources."""
    files = [SOURCE_ROOT / "CMakeLists.txt", *sorted((SOURCE_ROOT / "kernels/csrc").iterdir())]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _find_cmake() -> str | None:
    # The scripts folder first: a virtual environment's own cmake needs no activation.
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    return shutil.which("cmake", path=os.pathsep.join(folders))


def missing_tool() -> str | None:
    """What keeps the native library from being built here, in one phrase; None: nothing does."""
    if importlib.util.find_spec("torch") is None:
        return "no torch in the build environment (use pip install --no-build-isolation)"
    if _find_cmake() is None:
        return "no cmake"
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if not any(shutil.which(compiler) for compiler in compilers if compiler):
        return "no C++ compiler"
    return None


def build(output_dir: Path) -> Path:
    """Compiles the library and puts it into `output_dir`.

    Args:
        output_dir: a folder that may be written to; made if absent.

    Returns:
        The path of the library.

    Raises:
        RuntimeError: a tool is missing, or CMake or the compiler fails; holds its last lines.
    """
    reason = missing_tool()
    if reason:
        raise RuntimeError(f"cannot build the native library: {reason}")
    with tempfile.TemporaryDirectory(prefix="dfptkd-native-") as build_dir:
        cmake = str(_find_cmake())
        _run(
            cmake, "-S", str(SOURCE_ROOT), "-B", build_dir, "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
        )  # fmt: skip
        _run(cmake, "--build", build_dir, "--parallel")
        output_dir.mkdir(parents=True, exist_ok=True)
        # A process may have the old library mapped: replace the name, never the bytes.
        partial = output_dir / f"{LIBRARY_NAME}.{os.getpid()}"
        shutil.copy2(Path(build_dir) / LIBRARY_NAME, partial)
        return partial.replace(output_dir / LIBRARY_NAME)


def _run(*command: str) -> None:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)} failed with code {done.returncode}:\n{tail}")
