"""Which of several processes this one is, as torchrun, accelerate or a batch system started them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pacevlm.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """A launch of several processes, seen by one of them.

    Attributes:
        rank: which process this is, from 0; rank 0 leads.
        num_ranks: how many there are, on all machines.
        local_rank: which one of its machine this is, from 0.
    """

    rank: int
    num_ranks: int
    local_rank: int


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The launch that the environment describes, as torchrun writes it; None for a process on its own.

    Raises:
        ConfigError: a variable of a launch is missing or no number that fits.
    """
    if environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in environ:
        return None
    missing = [name for name in _NAMES if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"the environment has RANK and WORLD_SIZE but no {', '.join(missing)}; start with torchrun, set all of "
            f"{', '.join(_NAMES)}, or unset WORLD_SIZE"
        )
    given = [environ[name] for name in _NAMES[:3]]
    rank, num_ranks, local_rank = (int(text) if text.isdecimal() else -1 for text in given)
    if not 0 <= local_rank <= rank < num_ranks:
        raise ConfigError(
            f"the environment has RANK, WORLD_SIZE and LOCAL_RANK {', '.join(given)}; it must be "
            "0 <= LOCAL_RANK <= RANK < WORLD_SIZE"
        )
    return Launch(rank, num_ranks, local_rank)
