"""Builds apex's CUDA extension amp_C alone, with the sources and flags that its setup.py gives it:
all of apex takes longer. In the folder of a checkout of github.com/NVIDIA/apex; needs nvcc."""

import os
import site
from pathlib import Path

import torch
from torch.utils.cpp_extension import load


def main() -> None:
    """Leaves amp_C beside the checkout."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", capability)
    text = Path("setup.py").read_text()
    names = text.partition('name="amp_C"')[2].partition("]")[0].split('"')
    sources = [name for name in names if name.startswith("csrc/")]
    # A pip-installed CUDA has its headers there.
    packages = [Path(folder) for folder in site.getsitepackages()]
    headers = [str(path) for folder in packages for path in folder.glob("nvidia/*/include")]
    load(
        "amp_C",
        sources,
        extra_cflags=["-O3"],
        build_directory="..",
        verbose=True,
        extra_cuda_cflags=["-lineinfo", "-O3", "--use_fast_math"],
        extra_include_paths=["csrc", *headers],
    )


if __name__ == "__main__":
    main()
