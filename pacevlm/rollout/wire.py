"""Messages between rank 0 and the other ranks of a launch: a JSON head and tensors, and nothing that runs code.

They go through gloo, torch's transport over TCP, because rollouts exchange kilobytes; a GPU's own transport would gain
nothing and needs every rank at once. Waiting sleeps in the kernel and may last for hours.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from pacevlm.errors import RankError
from pacevlm.launch import Launch

# To find each other; a rank that is still loading libraries is waited for.
_MEETING = timedelta(minutes=10)
# Nothing that is waited for afterwards has an end of its own: a timed evaluation takes hours.
_FOREVER = timedelta(days=3650)
_MESSAGES, _ALIVE = 0, 1


class Wire:
    """The connections of one rank; opened by all ranks together.

    Args:
        launch: which rank this is.

    Raises:
        RankError: the ranks do not find each other.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch, self.host = launch, socket.gethostname()
        try:
            store = _meet(launch)
            dist.init_process_group(
                "gloo", store=store, rank=launch.rank, world_size=launch.num_ranks, timeout=_MEETING
            )
            self._group: Any = dist.new_group(backend="gloo", timeout=_FOREVER)
        except (RuntimeError, ValueError) as error:
            where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise RankError(
                f"the {launch.num_ranks} ranks did not find each other at {where} ({_first_line(error)}); look at the "
                "network, and at GLOO_SOCKET_IFNAME where a machine has several"
            ) from error
        self._watchers: list[threading.Thread] = []

    def send(self, peer: int, head: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> int:
        """Send a message to a rank; returns its bytes. Raises RankError if that rank is gone."""
        parts = [tensor.detach().cpu().contiguous() for tensor in tensors]
        shapes = [[str(part.dtype).removeprefix("torch."), list(part.shape)] for part in parts]
        text = json.dumps({**head, "tensors": shapes}).encode()
        body = torch.cat([torch.frombuffer(bytearray(text), dtype=torch.uint8), *map(_as_bytes, parts)])
        self._do(dist.send, torch.tensor([len(text), len(body)]), peer)
        self._do(dist.send, body, peer)
        return len(body)

    def receive(self, peer: int) -> tuple[dict[str, Any], list[Tensor], int]:
        """Wait for a rank's message: its head, its tensors and its bytes. Raises RankError if that rank is gone."""
        sizes = torch.empty(2, dtype=torch.int64)
        self._do(dist.recv, sizes, peer)
        length, total = sizes.tolist()
        body = torch.empty(total, dtype=torch.uint8)
        self._do(dist.recv, body, peer)
        head = json.loads(body[:length].numpy().tobytes())
        tensors, start = [], length
        for name, shape in head.pop("tensors"):
            dtype: torch.dtype = getattr(torch, name)
            end = start + math.prod(shape) * dtype.itemsize
            # A copy, because a view of another dtype has to begin where its own size divides.
            tensors.append(body[start:end].clone().view(dtype).view(shape))
            start = end
        return head, tensors, total

    def watch(self, peer: int, lost: Callable[[], None]) -> None:
        """Call `lost` from a thread as soon as a rank is gone without having said so."""

        def wait() -> None:
            try:
                self._do(dist.recv, torch.empty(1, dtype=torch.uint8), peer, _ALIVE)
            except RankError:
                lost()

        self._watchers.append(threading.Thread(target=wait, daemon=True))
        self._watchers[-1].start()

    def leave(self, peers: Sequence[int]) -> None:
        """Say to ranks that this one ends in order, wait until they do, and close; ranks that are gone are left out."""
        for peer in peers:
            with suppress(RankError):
                self._do(dist.send, torch.zeros(1, dtype=torch.uint8), peer, _ALIVE)
        for watcher in self._watchers:
            watcher.join()
        dist.destroy_process_group()

    def _do(self, what: Callable[..., Any], tensor: Tensor, peer: int, tag: int = _MESSAGES) -> None:
        try:
            what(tensor, peer, group=self._group, tag=tag)
        except RuntimeError as error:
            raise RankError(f"rank {peer} is gone ({_first_line(error)})") from error


def _meet(launch: Launch) -> Store:
    """A part of the launcher's store that this start alone uses.

    torchrun keeps one store through all restarts, where the addresses of killed ranks still stand, and its agents count
    restarts apart. So rank 0 and every other rank answer each other's one-time words until they know of each other.
    """
    store, _, _ = next(rendezvous("env://", timeout=_MEETING))
    store, word = PrefixStore("pacevlm", store), uuid.uuid4().hex
    if launch.rank > 0:
        store.set(f"hello {launch.rank}", word)
        found = store.get(word).decode()  # waits for it
        store.set(f"{found} {launch.rank}", "")
        return PrefixStore(found, store)
    until = time.monotonic() + _MEETING.total_seconds()
    missing, greeted = set(range(1, launch.num_ranks)), set[str]()
    while missing:
        for rank in sorted(missing):
            if store.check([f"hello {rank}"]) and (theirs := store.get(f"hello {rank}").decode()) not in greeted:
                greeted.add(theirs)
                store.set(theirs, word)
            if store.check([f"{word} {rank}"]):
                missing.discard(rank)
        if time.monotonic() > until:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(missing)))} did not come")
        time.sleep(0.02)
    return PrefixStore(word, store)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
