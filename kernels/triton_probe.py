"""Whether Triton can compile, load and launch a kernel on this machine.

That the package is installed says little: it needs a C compiler for the code that launches its
kernels, a cache folder that it can write, and a driver that takes what its ptxas makes.
"""

import triton


@triton.jit
def nothing_kernel():
    """No tensor, so that the probe needs neither memory nor a wait for the device."""


def probe() -> str | None:
    """Compiles and launches a kernel on the current CUDA device.

    Returns:
        The first error in one line; None: it works.

    It must not be called while a CUDA graph is captured, when a module may not be loaded.
    """
    try:
        nothing_kernel[(1,)]()
    except Exception as error:  # whatever it is, no other kernel would fare better
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    """What an exception says, in one line without a full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(":. ") if lines else type(error).__name__
