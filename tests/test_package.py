"""The wheel: what is in it, what it installs as, and that it builds with and without the tools."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dfptkd.kernels import build_native

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "engine", "recipes", "bench")
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "__init__.py", *FOLDERS)
BARE_NAMES = (*FOLDERS, "tests", "setup", "build_native")


def make_wheel(folder: Path, environment: dict[str, str]) -> tuple[Path, str]:
    """Builds the wheel from a copy of the sources; returns it and what the build printed."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, checkout / name)
    (checkout / "tests").mkdir()
    (checkout / "tests/__init__.py").touch()
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation",
            "--no-index", "--wheel-dir", str(folder), str(checkout),
        ],
        env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout


def run_isolated(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_that_resolve(cwd: Path, search: Path | None = None) -> str:
    """Our folders that a process finds as top-level modules, of this checkout or of `search`."""
    places = [str(ROOT), str(search)]
    return run_isolated(
        f"""
import importlib.util, sys
if {search is not None}: sys.path.insert(0, {str(search)!r})
import dfptkd
for name in {BARE_NAMES!r}:
    spec = importlib.util.find_spec(name)
    if spec and any(str(spec.origin).startswith(p + "/") for p in {places!r}): print(name)
""",
        cwd,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The wheel of a machine without a compiler, and its build log."""
    return make_wheel(tmp_path_factory.mktemp("plain"), {"PATH": os.devnull, "CXX": ""})


@pytest.fixture(scope="module")
def unpacked(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(plain[0]) as archive:
        archive.extractall(folder)
    return folder


def test_without_a_compiler_the_wheel_is_pure_and_says_what_it_lacks(plain):
    wheel, log = plain
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "WARNING: dfptkd is installed without its native CPU kernels: no C++ compiler" in log


def test_wheel_holds_the_package_its_sources_and_nothing_else(plain):
    names = zipfile.ZipFile(plain[0]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dfptkd"}
    in_root = {name for name in names if name.count("/") == 1 and name.startswith("dfptkd/")}
    assert in_root == {"dfptkd/__init__.py", "dfptkd/CMakeLists.txt"}
    assert not [name for name in names if "/tests/" in name or name.endswith(".so")]
    expected = {
        f"dfptkd/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for pattern in ("*.py", "*.cpp")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert expected <= set(names)


def test_wheel_metadata(plain):
    with zipfile.ZipFile(plain[0]) as archive:
        folder = next(n.split("/")[0] for n in archive.namelist() if ".dist-info/" in n)
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
    assert "dfptkd = dfptkd.engine.cli:main" in scripts
    assert metadata["Requires-Python"] == ">=3.10"
    always = {r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r}
    assert {"torch>=2.11", "torchvision>=0.26"} <= always
    assert not any(r.startswith(("timm", "onnx", "apex")) for r in always)


def test_unpacked_wheel_imports_as_dfptkd_alone(unpacked, tmp_path):
    out = run_isolated(
        f"""
import sys; sys.path.insert(0, {str(unpacked)!r})
import dfptkd, dfptkd.kernels, dfptkd.engine, dfptkd.recipes, dfptkd.bench
from dfptkd.kernels import build_native
print(dfptkd.__file__, build_native.SOURCE_ROOT)
""",
        tmp_path,
    )
    assert out.split() == [str(unpacked / "dfptkd/__init__.py"), str(unpacked / "dfptkd")]
    assert names_that_resolve(tmp_path, unpacked) == ""


def test_environment_of_the_tests_offers_no_bare_names(tmp_path):
    assert names_that_resolve(tmp_path) == ""


def test_a_bare_name_would_be_found(tmp_path):
    """Negative control: with the root itself on the path, as a flat layout would have it."""
    assert "kernels" in names_that_resolve(tmp_path, ROOT)


@pytest.mark.skipif(
    build_native.missing_tool() is not None, reason=str(build_native.missing_tool())
)
def test_with_tools_the_wheel_holds_the_library_and_is_bound_to_a_platform(tmp_path):
    wheel, log = make_wheel(tmp_path, {})
    assert "WARNING: dfptkd" not in log
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert f"dfptkd/kernels/{build_native.LIBRARY_NAME}" in zipfile.ZipFile(wheel).namelist()


def test_torch_is_no_build_requirement():
    """A build requirement would let a plain `pip install .` fetch a second torch."""
    (line,) = [
        li for li in (ROOT / "pyproject.toml").read_text().splitlines() if "requires =" in li
    ]
    assert "setuptools>=77" in line
    assert "torch" not in line


def test_build_environment_without_torch_leaves_the_library_out(monkeypatch):
    monkeypatch.setattr(build_native.importlib.util, "find_spec", lambda name: None)
    assert "no torch" in build_native.missing_tool()


def test_public_face_is_lazy_and_complete():
    import dfptkd

    assert dfptkd.kernels.normalize_images
    assert set(dir(dfptkd)) == set(dfptkd.__all__)
    for name in dfptkd.__all__:
        assert getattr(dfptkd, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = dfptkd.absent


PACKAGES = (
    "dfptkd", "dfptkd.engine", "dfptkd.engine.models", "dfptkd.engine.methods",
    "dfptkd.engine.data", "dfptkd.kernels",
)  # fmt: skip


def test_no_module_takes_the_place_of_a_public_name():
    """Importing a module binds its name in its package, where a function may be expected."""
    code = f"""
import importlib, pathlib, types
for name in {PACKAGES!r}:
    package = importlib.import_module(name)
    before = {{public: getattr(package, public) for public in package.__all__}}
    modules = {{path.stem for path in pathlib.Path(package.__file__).parent.glob("*.py")}}
    for public in modules & set(before):
        importlib.import_module(f"{{name}}.{{public}}")
    for public, value in before.items():
        is_package = f"{{name}}.{{public}}" in {PACKAGES!r} + ("dfptkd.recipes", "dfptkd.bench")
        assert isinstance(value, types.ModuleType) == is_package, (name, public, value)
        assert getattr(package, public) is value, (name, public)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
