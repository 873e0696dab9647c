"""Direction of imports, lean import and banned calls, read from the syntax trees of our files."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "engine", "recipes", "bench")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Folder -> what its files may import of ours: a folder or one module. `__version__` is all that the
# root offers to those below it.
ARROWS = {
    "kernels": ("kernels",),
    "engine": ("kernels", "engine", "__version__"),
    "recipes": ("engine.config", "recipes"),
    "bench": ("kernels", "engine", "recipes", "bench", "__version__"),
}
# build_native.py is loaded by setup.py, before torch is there.
STANDARD_LIBRARY_ONLY = ("kernels/build_native.py",)
OWN_NAMES = {"dfptkd", "tests", "setup", *FOLDERS}
NEVER_AT_IMPORT = (
    "timm", "onnx", "onnxscript", "onnxruntime", "matplotlib", "tensorboard", "tyro", "nvidia.dali",
    "apex", "wandb", "triton",
)  # fmt: skip


def modules_of(node: ast.AST, path: str) -> list[str]:
    """Modules that an import statement names, ours as "<folder>.<...>" or "" for the root."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level == 0:
        return [node.module or ""]
    here = path.removesuffix(".py").split("/")[: -node.level]
    if node.level > path.count("/") + 1:
        return ["<above the root>"]
    base = here + (node.module.split(".") if node.module else [])
    # `from . import x`: x may be a module, so each name counts as one.
    return [
        ".".join([*base, alias.name]) if not node.module else ".".join(base) for alias in node.names
    ]


def import_faults(source: str, path: str) -> list[str]:
    """Imports in `source`, a file at `path` under the root, that break a rule."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        for module in modules_of(node, path):
            first = module.split(".")[0]
            where = f"{path}:{getattr(node, 'lineno', 0)} imports {module}"
            if not relative and first in OWN_NAMES:
                faults.append(f"{where}: our own files are imported relatively")
            elif relative and not any(
                module == allowed or module.startswith(allowed + ".")
                for allowed in ARROWS[path.split("/")[0]]
            ):
                faults.append(f"{where}: wrong direction")
            elif path in STANDARD_LIBRARY_ONLY and first not in sys.stdlib_module_names:
                faults.append(f"{where}: standard library only")
    return faults


def call_faults(source: str, path: str) -> list[str]:
    """Calls that could run code out of a file, or code made of text."""
    tree = ast.parse(source)
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "joblib"):
            faults.append(f"{path}:{node.lineno} from {node.module} import hides the call")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        banned = (
            name in ("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler")
            or (name == "torch.load" and options.get("weights_only") != "True")
            or (name.endswith(".load") and options.get("allow_pickle", "False") != "False")
        )
        if banned:
            faults.append(f"{path}:{node.lineno} calls {ast.unparse(node)}")
    return faults


def relative_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_files_to_look_at():
    assert {relative_name(path).split("/")[0] for path in FILES} == set(FOLDERS)


@pytest.mark.parametrize("path", FILES, ids=relative_name)
def test_imports_follow_the_arrows(path):
    assert import_faults(path.read_text(), relative_name(path)) == []


@pytest.mark.parametrize("path", FILES, ids=relative_name)
def test_no_banned_call(path):
    assert call_faults(path.read_text(), relative_name(path)) == []


@pytest.mark.parametrize("package", ["timm", "onnx", "onnxruntime", "nvidia.dali", "apex", "wandb"])
def test_an_optional_package_is_imported_in_one_adapter_file(package):
    importers = {
        relative_name(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        for module in modules_of(node, relative_name(path))
        if module == package or module.startswith(package + ".")
    }
    assert len(importers) <= 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/x.py", "from ..engine.config import RunConfig"),
        ("kernels/x.py", "from .. import engine"),
        ("kernels/x.py", "from .. import __version__"),
        ("engine/x.py", "from ..recipes import quickstart"),
        ("engine/models/x.py", "from ...bench.step import main"),
        ("engine/x.py", "def f():\n    from ..bench import step"),
        ("engine/x.py", "from ..tests import conftest"),
        ("engine/x.py", "from ...elsewhere import y"),
        ("recipes/x.py", "from ..engine.train import run"),
        ("recipes/x.py", "from ..kernels import use_backend"),
        ("engine/x.py", "import dfptkd.kernels"),
        ("engine/x.py", "from dfptkd.kernels import use_backend"),
        ("bench/x.py", "from kernels import use_backend"),
        ("kernels/build_native.py", "import torch"),
    ],
)
def test_a_planted_wrong_import_is_found(path, source):
    assert len(import_faults(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "engine/models/x.py",
            "from ...kernels import use_backend\nfrom ..config import RunConfig",
        ),
        ("engine/x.py", "from .. import __version__"),
        ("recipes/x.py", "from ..engine.config import RunConfig\nfrom . import cifar100"),
        ("bench/x.py", "from ..engine.train import run\nfrom ..recipes import quickstart"),
        ("engine/x.py", "import torch, numpy\nfrom kernelspec import y"),
    ],
)
def test_a_right_import_is_let_through(path, source):
    assert import_faults(source, path) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "pickle.loads(data)",
        "pickle.Unpickler(file).load()",
        "from pickle import loads",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
    ],
)
def test_a_planted_banned_call_is_found(source):
    assert len(call_faults(source, "engine/x.py")) == 1


def test_safe_calls_are_let_through():
    source = "torch.load(p, weights_only=True); model.eval(); np.load(p); Restricted(f).load()"
    assert call_faults(source, "engine/x.py") == []


def heavy_modules_after(statement: str) -> list[str]:
    """Those of NEVER_AT_IMPORT that a fresh process then holds, and "CUDA" if initialised."""
    code = f"""
        import sys, torch
        before = set(sys.modules)
        {statement}
        heavy = [m for m in {NEVER_AT_IMPORT!r} if m in sys.modules and m not in before]
        print(*heavy, *(["CUDA"] if torch.cuda.is_initialized() else []))
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_is_lean():
    assert (
        heavy_modules_after("import dfptkd, dfptkd.kernels, dfptkd.engine, dfptkd.engine.models")
        == []
    )


def test_a_heavy_import_is_found():
    assert heavy_modules_after("import dfptkd, tyro") == ["tyro"]


def test_the_root_alone_does_not_import_torch():
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import sys, dfptkd; assert 'torch' not in sys.modules"]
    )
    assert done.returncode == 0
