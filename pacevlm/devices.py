"""Which devices there are to run on."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from pacevlm.errors import ConfigError

if TYPE_CHECKING:
    import torch

# The numbers that glibc's malloc.h gives its parameters.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Besides the CPU: what torch runs all of a model's operations on, with one interface for memory, streams and events.
ACCELERATORS = ("cuda", "xpu")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that a name means: `cpu`, or an accelerator with an optional number such as `cuda:1`.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    there = [torch.device("cpu")]
    for kind in ACCELERATORS:
        module = torch.get_device_module(kind)
        if module.is_available():
            there += [torch.device(kind, index) for index in range(module.device_count())]
    try:
        wanted = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        wanted = None
    for found in there:
        if wanted is not None and wanted.type == found.type and wanted.index in (None, found.index or 0):
            return found if wanted.index is not None else wanted
    raise ConfigError(
        f"device is {device!r}, but torch sees {', '.join(map(str, there))} here; set the device (--device, in a run "
        "--model.device) to one of these"
    )


def keep_memory() -> None:
    """Let this process keep the memory that it frees, where the C library can be told so (glibc).

    Large tensors and pictures are otherwise given back to the system and fetched anew, page by page, for every request:
    a fifth of the time of one about a 12-megapixel photograph, and up to half of a rollout batch's (docs/log.md).
    Profiles and what is served must do the same, so loading a model calls this. The price: the process stays as large
    as it once was.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (AttributeError, OSError, TypeError):  # another C library
        return
