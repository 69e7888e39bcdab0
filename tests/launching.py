"""Several ranks as a launcher starts them: processes that find each other by their environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def rank_environments(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    return [{**os.environ, **paths, **shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(num_ranks)]


def start_ranks(num_ranks: int, arguments: Sequence[str | Path]) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS` as so many ranks."""
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for env in rank_environments(num_ranks)
    ]


def end_of(ranks: Sequence[subprocess.Popen[str]], most_seconds: float) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of every rank; none runs on behind this, and none takes longer."""
    until = time.monotonic() + most_seconds
    try:
        said = [rank.communicate(timeout=max(0.1, until - time.monotonic())) for rank in ranks]
        return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
