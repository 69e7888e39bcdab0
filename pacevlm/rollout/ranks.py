"""The other ranks of a launch, as rank 0 sees them: each holds the frozen model and answers what it is sent.

Rank 0 runs a command as one process does: it alone reads data, measures latencies, holds the controller and writes
files. So nothing above the rollouts knows how many ranks there are, and nothing that depends on time is decided twice.
"""

from __future__ import annotations

import os
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pacevlm.errors
from pacevlm.errors import IdentityError, PacevlmError, RankError
from pacevlm.knobs import Knobs
from pacevlm.rollout.limits import BatchLimits, peak_bytes
from pacevlm.rollout.outcome_store import StoredAnswer
from pacevlm.rollout.sharing import SharedWork
from pacevlm.rollout.wire import Wire
from pacevlm.signals import Stopped
from pacevlm.types import Example

Way = Knobs | tuple[int, ...]
"""How a row runs: with knobs, or at the highest tier and the trained top_k without some blocks."""
RowKey = tuple[str, Way]
"""The content of a row, and how it runs."""
Place = tuple[str, str]
"""Content and tier: what shares a prefix."""

GOES_ON = "everything that was answered is kept, and the same command goes on, with any number of processes"
# Pictures that a helper rank keeps, so that none is sent twice in a row.
MAX_PICTURE_BYTES = 256 << 20


@dataclass
class RankWork:
    """What a rank has done: rollouts, seconds at work, its largest memory, and what it exchanged with rank 0."""

    num_rollouts: int = 0
    busy_seconds: float = 0.0
    peak_bytes: int = 0
    num_bytes_sent: int = 0
    num_bytes_received: int = 0

    def since(self, before: RankWork) -> RankWork:
        """The work since then; the largest memory is that of the whole launch."""
        changed = {f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        return RankWork(**changed | {"peak_bytes": self.peak_bytes})


class HelperRank:
    """One other rank. What is asked of it is done one after the other, in the order of asking."""

    def __init__(self, wire: Wire, number: int) -> None:
        self.number, self.work = number, RankWork()
        self.pool = ThreadPoolExecutor(1, f"rank {number}")
        self.forgotten_graphs: list[int] = []
        self._wire, self._name = wire, f"rank {number}"
        self._pictures: OrderedDict[str, int] = OrderedDict()

    def call(
        self, do: str, tensors: Sequence[Tensor] = (), examples: Sequence[Example] = (), **words: Any
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Have the rank do something and wait for it; raises what it raises, and RankError if it is gone.

        Args:
            examples: whose pictures and questions it needs; those that it has are not sent again.
        """
        contents, pictures, dropped = self._introduce(examples)
        graphs, self.forgotten_graphs = self.forgotten_graphs, []
        head = {"do": do, "contents": contents, "dropped": dropped, "graphs": graphs, **words}
        self.work.num_bytes_sent += self._wire.send(self.number, head, [*pictures, *tensors])
        answer, answered, num_bytes = self._wire.receive(self.number)
        self.work.num_bytes_received += num_bytes
        self._name = f"rank {self.number} on {answer['host']}"
        self.work.busy_seconds += answer["seconds"]
        self.work.peak_bytes = answer["peak_bytes"]
        if "error" in answer:
            known = getattr(pacevlm.errors, answer["error"], None)
            if isinstance(known, type) and issubclass(known, PacevlmError):
                raise _remade(known, f"{self._name}: {answer['message']}")
            fault = RankError(f"{self._name} failed with {answer['error']}: {answer['message']}")
            fault.add_note(answer["traceback"])
            raise fault
        return answer, answered

    def submit(self, do: str, *args: Any, **words: Any) -> Future[tuple[dict[str, Any], list[Tensor]]]:
        """`call` from a thread of this rank's own."""
        return self.pool.submit(self.call, do, *args, **words)

    def forget_all(self) -> None:
        """The rank begins anew, with another model."""
        self._pictures.clear()

    def answer(self, model_identity: str, keys: Sequence[RowKey], examples: Sequence[Example]) -> list[StoredAnswer]:
        """The answers of rows, in order."""
        rows = [[content_id, str(way) if isinstance(way, Knobs) else list(way)] for content_id, way in keys]
        said, _ = self.call("answer", (), examples, model=model_identity, rows=rows)
        self.work.num_rollouts += len(keys)
        return [StoredAnswer(*answer) for answer in said["answers"]]

    def _introduce(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], list[Tensor], list[str]]:
        """Contents that the rank lacks, the bytes of their pictures, and those that it drops for them."""
        wanted = {example.content_id: example for example in examples}
        contents, pictures = [], []
        for content_id, example in wanted.items():
            if content_id in self._pictures:
                self._pictures.move_to_end(content_id)
                continue
            size, picture = _picture_bytes(example)
            about: dict[str, Any] = {"id": content_id, "picture": example.picture_id, "question": example.question}
            contents.append(about | {"where": example.where, "size": size})
            pictures.append(picture)
            self._pictures[content_id] = picture.numel()
        dropped = []
        num_bytes = sum(self._pictures.values())
        while num_bytes > MAX_PICTURE_BYTES and next(iter(self._pictures)) not in wanted:
            content_id, size_bytes = self._pictures.popitem(last=False)
            num_bytes -= size_bytes
            dropped.append(content_id)
        return contents, pictures, dropped


class Ranks:
    """All ranks of a launch, led by this process, rank 0.

    Attributes:
        helpers: the other ranks.
        work: what each rank has done, rank 0 first.
        ready: ranks that have worked on a content at a tier, and probably keep its prefix.
        seconds_per_cost: how fast each rank was last; None where that is not known.
        lost: what became of a rank that is gone; None while all are there.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire, num_ranks = wire, wire.launch.num_ranks
        self.lost: str | None = None
        self.helpers = [HelperRank(self.wire, number) for number in range(1, num_ranks)]
        self.work = [RankWork(), *(helper.work for helper in self.helpers)]
        self.ready: dict[Place, set[int]] = {}
        self.seconds_per_cost: list[float | None] = [None] * num_ranks
        self._loaded: tuple[Mapping[str, Any] | None, list[Future[Any]]] = (None, [])
        self._told = self.totals()
        for helper in self.helpers:
            self.wire.watch(helper.number, partial(self._lose, helper))

    def __len__(self) -> int:
        return len(self.work)

    def _lose(self, helper: HelperRank) -> None:
        self.lost = f"{helper._name} is gone; {GOES_ON}"
        os.kill(os.getpid(), signal.SIGTERM)

    # Models -----------------------------------------------------------------------------------------------------------

    def load(self, settings: Mapping[str, Any]) -> None:
        """Let the other ranks begin to load a model, while this one does; one that they have is kept.

        Args:
            settings: what they need to know, ready for JSON.
        """
        if self._loaded[0] == settings:
            return
        for helper in self.helpers:
            helper.forget_all()
        self.ready.clear()
        self.seconds_per_cost = [None] * len(self)
        self._loaded = settings, [helper.submit("load", settings=settings) for helper in self.helpers]

    def check(self, model_identity: str) -> None:
        """Wait until the other ranks have loaded.

        Raises:
            IdentityError: one has another model.
            PacevlmError: whatever loading it raised there.
        """
        for helper, loaded in zip(self.helpers, self._loaded[1], strict=True):
            found = loaded.result()[0]["model"]
            if found != model_identity:
                raise IdentityError(
                    f"{helper._name} loaded another model: {found!r}, not {model_identity!r}; give all machines the "
                    "same model directory, elastic.json included"
                )

    # Work -------------------------------------------------------------------------------------------------------------

    def run(
        self,
        work: SharedWork[RowKey, Place],
        limits: BatchLimits,
        run_here: Callable[[list[RowKey]], None],
        run_there: Callable[[HelperRank, list[RowKey]], None],
        num_threads: int,
    ) -> Iterator[list[RowKey]]:
        """Run all of the work, here on some threads and on every other rank; yields chunks as they are done.

        What has begun ends before an error or an interrupt goes on.
        """
        done: SimpleQueue[list[RowKey] | BaseException | None] = SimpleQueue()
        is_over = Event()

        def member(rank: int, run: Callable[[list[RowKey]], None], threads: int) -> None:
            share = replace(limits, max_tokens=max(1, limits.max_tokens // threads))
            try:
                while not is_over.is_set() and (chunk := work.take(rank, share.max_rows, share.max_tokens, threads)):
                    started = time.monotonic()
                    run(chunk)
                    seconds = time.monotonic() - started
                    work.took(rank, chunk, seconds)
                    done.put(chunk)
            except BaseException as error:
                is_over.set()
                done.put(error)
            else:
                done.put(None)

        with ThreadPoolExecutor(num_threads) as pool:
            members = [pool.submit(member, 0, run_here, num_threads) for _ in range(num_threads)]
            members += [h.pool.submit(member, h.number, partial(run_there, h), 1) for h in self.helpers]
            failure: BaseException | None = None
            try:
                num_left = len(members)
                while num_left:
                    ended = done.get()
                    if isinstance(ended, list):
                        yield ended
                        continue
                    num_left -= 1
                    failure = failure or ended
            finally:
                is_over.set()
                wait(members)
        if failure is not None:
            raise failure

    def note(self, num_rollouts: int, seconds: float, device: torch.device) -> None:
        """Work that rank 0 did itself."""
        self.work[0].num_rollouts += num_rollouts
        self.work[0].busy_seconds += seconds
        self.work[0].peak_bytes = peak_bytes(device)

    def new_metrics(self) -> dict[str, float]:
        """What every rank did since this was last asked, under the metrics' names."""
        before, self._told = self._told, self.totals()
        return {
            f"ranks/{rank}/{name}": float(value)
            for rank, (now, earlier) in enumerate(zip(self._told, before, strict=True))
            for name, value in asdict(now.since(earlier)).items()
        }

    def totals(self) -> list[RankWork]:
        """What every rank has done so far, rank 0 first."""
        return [replace(work) for work in self.work]

    def close(self) -> None:
        """Let every rank that is left end, once it has done what it was asked."""
        for helper in self.helpers:
            helper.pool.shutdown(cancel_futures=True)
            with suppress(RankError):
                self.wire.send(helper.number, {"do": "end"})
        self.wire.leave([helper.number for helper in self.helpers])


_ranks: Ranks | None = None


def current_ranks() -> Ranks | None:
    """The ranks that this process leads; None for a process on its own."""
    return _ranks


@contextmanager
def leading(wire: Wire) -> Iterator[Ranks]:
    """Lead the other ranks while the block runs; they end behind it, however it ends.

    Raises:
        RankError: one is gone.
    """
    global _ranks
    _ranks = Ranks(wire)
    try:
        try:
            yield _ranks
        finally:
            ranks, _ranks = _ranks, None
            ranks.close()
    except (Stopped, RankError) as error:
        # torchrun stops the others when one is gone, so which of the two is seen first is chance.
        if ranks.lost is not None:
            raise RankError(ranks.lost) from error
        raise


def _remade(known: type[PacevlmError], message: str) -> PacevlmError:
    """An error of another rank; one that holds more than a message is not for rank 0 to act on."""
    try:
        return known(message)
    except TypeError:
        return RankError(message)


def _picture_bytes(example: Example) -> tuple[list[int] | None, Tensor]:
    """A picture as it travels: a file's bytes with no size, or RGB pixels with width and height."""
    if isinstance(example.source, bytes | str | Path):
        with example.naming():
            _ = example.picture  # raises for a file that is gone
        data = example.source if isinstance(example.source, bytes) else Path(example.source).read_bytes()
        return None, torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image = example.image
    return list(image.size), torch.from_numpy(np.array(image).reshape(-1))
