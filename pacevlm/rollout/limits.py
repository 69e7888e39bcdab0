"""How much a batch of rollouts may hold: chosen from the memory that is free, and halved where it was not enough."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace

import torch

from pacevlm.checks import check_whole
from pacevlm.files import MAX_WHOLE
from pacevlm.models.elastic import ElasticModel

# Shares of the free memory; the rest stays free.
BATCH_SHARE, PREFIX_SHARE = 0.5, 0.25
# Besides its keys and values, a token takes the room of so many vectors while a block runs: queries, residual stream,
# and the copies that its experts read and write.
WORKING_VECTORS = 64
# Larger batches than these gain nothing: a CPU's caches are full long before its memory.
MOST_ROWS = {"cpu": 256, "accelerator": 4096}
MOST_TOKENS = {"cpu": 8192, "accelerator": 1 << 18}
MOST_PREFIX_BYTES = {"cpu": 2 << 30, "accelerator": 16 << 30}


@dataclass(frozen=True)
class BatchLimits:
    """What batches of rollouts may hold.

    Attributes:
        max_rows: most rows in a batch.
        max_tokens: most prompt tokens, padding included, in a batch.
        max_prefix_bytes: memory for shared prefixes.

    Raises:
        ConfigError: a limit is below 1.
    """

    max_rows: int
    max_tokens: int
    max_prefix_bytes: int

    def __post_init__(self) -> None:
        check_whole(self, 1, MAX_WHOLE, "max_rows", "max_tokens", "max_prefix_bytes")

    @classmethod
    def for_model(cls, model: ElasticModel, **given: int | None) -> BatchLimits:
        """Limits that fit the memory that is free on the model's device now.

        Args:
            given: limits that are settled already, by name; None is chosen too.
        """
        kind = "cpu" if model.device.type == "cpu" else "accelerator"
        num_free = free_bytes(model.device)
        cache_bytes = model.adapter.num_blocks * model.adapter.cache_bytes_per_token
        token_bytes = cache_bytes + WORKING_VECTORS * model.d_model * model.dtype.itemsize
        chosen = {
            "max_rows": MOST_ROWS[kind],
            "max_tokens": max(1, min(MOST_TOKENS[kind], int(BATCH_SHARE * num_free) // token_bytes)),
            "max_prefix_bytes": max(1, min(MOST_PREFIX_BYTES[kind], int(PREFIX_SHARE * num_free))),
        }
        return cls(**chosen | {name: value for name, value in given.items() if value is not None})

    def halved(self, num_rows: int, num_tokens: int) -> BatchLimits:
        """Limits under which a batch that did not fit, of so many rows and tokens, is cut in two."""
        return replace(
            self,
            max_rows=max(1, min(self.max_rows, -(-num_rows // 2))),
            max_tokens=max(1, min(self.max_tokens, num_tokens // 2)),
        )


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses; what the allocator keeps for reuse counts as free."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        free, _ = module.mem_get_info(device)
        return int(free + module.memory_reserved(device) - module.memory_allocated(device))
    # Systems that do not say what is free say what there is.
    name = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: torch.device) -> int:
    """The largest memory that this process had so far, on an accelerator or, for a CPU, all of it; 0 where unknown."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory; on a CPU it has no exception of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
