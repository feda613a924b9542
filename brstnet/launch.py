"""What a process that trains is started with: the C allocator's settings, and a device."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import: only what needs it pays
    import torch

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc keeps freed activations instead of giving them back each step: training on the CPU was
measured 1.65 to 1.8 times faster. Read once, when a process starts, so the launcher sets it."""


def restart_with_allocator(module: str) -> None:
    """Replace this process by the same command with the allocator's settings, unless it has them.

    Args:
        module: what was run with `python -m`.
    """
    if sys.platform == "linux" and not ALLOCATOR.keys() <= os.environ.keys():
        arguments = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**ALLOCATOR, **os.environ})


def pick_device(name: str = "auto") -> "torch.device":
    """The device to use: with auto the first GPU if there is one, else the CPU.

    Raises:
        ValueError: the device asked for is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is visible here; use cpu or auto")
    return torch.device(name)
