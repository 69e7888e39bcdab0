#!/usr/bin/env python3
"""Outcome stores of growing size: how long they take to open, to add to and to look up, and how much memory.

Every store holds 75 answers about each content, and is added to in batches of 300. It is opened, and then asked twice
for every answer, as a sweep does (is it there, then what is it), each in a fresh process of its own; a dictionary of
the same answers is asked the same, in turns with it. Then the rollout engine runs a whole sweep whose answers are all
there, with both. Prints two tables and, last, one JSON line; the same goes to RESULTS/outcome-store-cpu.json.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result_file import provenance, write_result
from rich.console import Console
from rich.table import Table

from pacevlm.data.digits import DigitVQA
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.profile import collect_device_facts
from pacevlm.models.elastic import ElasticModel
from pacevlm.rollout import outcome_store
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.rollout.outcome_store import OutcomeStore, StoredAnswer

SPACE = list(KnobSpace())
CONTENTS_OF_BATCH = 4
MODEL = "0" * 64
Answers = list[tuple[str, Knobs, StoredAnswer]]


def rss_mb() -> float:
    """The most memory that this process had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def content_ids(num_outcomes: int) -> list[str]:
    """Ids like those of real contents, enough for so many outcomes."""
    return [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(num_outcomes // len(SPACE))]


def answer_all(contents: Sequence[str], rng: random.Random) -> Answers:
    """Short answers with all configurations, each a text of its own as if it had been read."""
    return [
        (content, knobs, StoredAnswer(str(rng.randrange(10 ** rng.randint(1, 8))), rng.randint(100, 1500), 2))
        for content in contents
        for knobs in SPACE
    ]


def batches(num_outcomes: int) -> Iterator[Answers]:
    """Answers about some contents at a time."""
    rng, contents = random.Random(0), content_ids(num_outcomes)
    for start in range(0, len(contents), CONTENTS_OF_BATCH):
        yield answer_all(contents[start : start + CONTENTS_OF_BATCH], rng)


def timed_add(path: Path, num_outcomes: int) -> dict[str, float]:
    """Fill a new store, and synchronise a file of a few bytes in turns with it: how busy the disk is.

    Returns:
        Seconds of all batches, and milliseconds of the median batch, the slowest, and the median synchronisation.
    """
    store, seconds, syncs = OutcomeStore(MODEL, path), [], []
    with path.with_suffix(".probe").open("wb", buffering=0) as probe:
        for number, batch in enumerate(batches(num_outcomes)):
            started = time.perf_counter()
            store.add(batch)
            seconds.append(time.perf_counter() - started)
            if number % 8 == 0:
                started = time.perf_counter()
                probe.write(b"0" * 100)
                os.fsync(probe.fileno())
                syncs.append(time.perf_counter() - started)
    return {
        "add_s": sum(seconds),
        "add_batch_ms": median(seconds) * 1000,
        "add_batch_most_ms": max(seconds) * 1000,
        "fsync_ms": median(syncs) * 1000,
    }


def opened(path: Path, num_outcomes: int) -> dict[str, float]:
    """Open a store in a process that did nothing before."""
    before, started = rss_mb(), time.perf_counter()
    OutcomeStore(MODEL, path)
    return {"open_s": time.perf_counter() - started, "open_rss_mb": rss_mb(), "start_rss_mb": before}


def looked_up(path: Path, num_outcomes: int) -> dict[str, float]:
    """Open a store and ask for all that it holds."""
    store = OutcomeStore(MODEL, path)
    return {"lookup_s": ask_twice(store.__contains__, store.get, num_outcomes), "lookup_rss_mb": rss_mb()}


def in_dictionary(path: Path, num_outcomes: int) -> dict[str, float]:
    """The same questions to a dictionary."""
    known = {(content, knobs): answer for batch in batches(num_outcomes) for content, knobs, answer in batch}
    seconds = ask_twice(known.__contains__, lambda content, knobs: known.get((content, knobs)), num_outcomes)
    return {"dictionary_lookup_s": seconds, "dictionary_rss_mb": rss_mb()}


def ask_twice(
    contains: Callable[[tuple[str, Knobs]], bool], get: Callable[[str, Knobs], StoredAnswer | None], num_outcomes: int
) -> float:
    """Seconds to hear that every outcome is there and what it is."""
    contents, started = content_ids(num_outcomes), time.perf_counter()
    if not all(contains((content, knobs)) for content in contents for knobs in SPACE):
        raise SystemExit("an outcome that was stored is not found")
    if any(get(content, knobs) is None for content in contents for knobs in SPACE):
        raise SystemExit("an outcome that was stored is not found")
    return time.perf_counter() - started


def _work(action: Callable[[Path, int], dict[str, float]], path: Path, num_outcomes: int, out: Any) -> None:
    out.put(action(path, num_outcomes))


def alone(action: Callable[[Path, int], dict[str, float]], path: Path, num_outcomes: int) -> dict[str, float]:
    """What an action measures in a fresh process."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_work, args=(action, path, num_outcomes, out))
    process.start()
    found: dict[str, float] = out.get()
    process.join()
    return found


def measure(folder: Path, num_outcomes: int, rounds: int) -> dict[str, float]:
    """One size; the median of the rounds."""
    path = folder / f"{num_outcomes}.sqlite"
    row: dict[str, float] = {"outcomes": num_outcomes, **alone(timed_add, path, num_outcomes)}
    row["file_mb"] = path.stat().st_size / 1e6
    row["bytes_per_outcome"] = path.stat().st_size / num_outcomes
    found = [
        {k: v for action in (opened, looked_up, in_dictionary) for k, v in alone(action, path, num_outcomes).items()}
        for _ in range(rounds)
    ]
    row |= {name: median(each[name] for each in found) for name in found[0]}
    row["lookup_ratio"] = median(each["lookup_s"] / each["dictionary_lookup_s"] for each in found)
    # What a start with this store takes: open it, and hear all that it holds.
    row["seconds"], row["rss_mb"] = row["open_s"] + row["lookup_s"], row["lookup_rss_mb"]
    return row


class InDictionary(OutcomeStore):
    """What the file is compared with: all answers in a dictionary."""

    def __init__(self, answers: Answers, model_identity: str) -> None:
        super().__init__(model_identity)
        self.answers = {(content, knobs): answer for content, knobs, answer in answers}

    def __contains__(self, key: tuple[str, Knobs]) -> bool:
        return key in self.answers

    def get(self, content_id: str, knobs: Knobs) -> StoredAnswer | None:
        """What was answered, or None."""
        return self.answers.get((content_id, knobs))


def remembered_sweeps(folder: Path, num_examples: int, rounds: int) -> list[dict[str, float | str]]:
    """Rollouts a second of the engine where all are remembered, by where they are.

    `kept` has read the file before, `read` has not, and `beyond what is kept` reads every content twice, as for a sweep
    that is larger than what a store keeps.
    """
    model = ElasticModel.from_pretrained("embedded", knob_space=KnobSpace(), block_order="early_exit")
    examples = list(DigitVQA("train", num_examples))
    jobs = [(example, knobs) for example in examples for knobs in SPACE]
    answers = answer_all(list(dict.fromkeys(example.content_id for example in examples)), random.Random(0))
    path = folder / "sweep.sqlite"
    OutcomeStore(model.identity, path).add(answers)
    kept = OutcomeStore(model.identity, path)
    ways: dict[str, Callable[[], OutcomeStore]] = {
        "dictionary": lambda: in_memory,
        "kept": lambda: kept,
        "read": lambda: OutcomeStore(model.identity, path),
        "beyond what is kept": lambda: OutcomeStore(model.identity, path),
    }
    in_memory, most = InDictionary(answers, model.identity), outcome_store.MAX_KEPT
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, make in ways.items():
            engine = RolloutEngine(model, store=make())
            outcome_store.MAX_KEPT = 1000 if way == "beyond what is kept" else most
            gc.collect()
            started = time.perf_counter()
            engine.run(jobs)
            if number:  # the first round reads what `kept` keeps
                seconds[way].append(time.perf_counter() - started)
            if engine.num_run:
                raise SystemExit("an outcome that was stored was run again")
    outcome_store.MAX_KEPT = most
    return [
        {
            "way": way,
            "rollouts_per_s": len(jobs) / median(taken),
            "times_dictionary": median(t / d for t, d in zip(taken, seconds["dictionary"], strict=True)),
        }
        for way, taken in seconds.items()
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_050, 100_050, 1_000_050], help="outcomes")
    parser.add_argument("--num-examples", type=int, default=2000, help="examples of the remembered sweep")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the stores go; a temporary folder if left out")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = [measure(Path(folder), size, arguments.rounds) for size in arguments.sizes]
        sweeps = remembered_sweeps(Path(folder), arguments.num_examples, arguments.rounds)
    shown = {
        "outcomes": "outcomes",
        "file_mb": "file, MB",
        "open_s": "open, s",
        "open_rss_mb": "memory, MB",
        "lookup_s": "ask twice for all, s",
        "lookup_rss_mb": "memory, MB",
        "dictionary_lookup_s": "dictionary, s",
        "lookup_ratio": "ratio",
        "dictionary_rss_mb": "memory, MB",
        "add_s": "add all, s",
        "add_batch_ms": "a batch, ms",
        "fsync_ms": "one fsync, ms",
    }
    table = Table(*shown.values())
    for row in rows:
        table.add_row(*(f"{row[name]:,.0f}" if row[name] >= 1000 else f"{row[name]:.3g}" for name in shown))
    Console(width=140).print(table)
    table = Table("remembered sweep", "rollouts/s", "times as long as a dictionary")
    for sweep in sweeps:
        table.add_row(sweep["way"], f"{sweep['rollouts_per_s']:,.0f}", f"{sweep['times_dictionary']:.2f}")
    Console().print(table)
    results = {
        **provenance(collect_device_facts("cpu", torch.float32)),
        "rounds": arguments.rounds,
        "store": rows,
        "num_examples": arguments.num_examples,
        "remembered_sweeps": sweeps,
    }
    write_result(results, arguments.results, "outcome-store", console)


if __name__ == "__main__":
    main()
