#!/usr/bin/env python3
"""The server under load: deadlines met, goodput, overhead, what is lost, memory, and ten times its capacity.

Four servers with the same queue answer the test questions of a finished run: with its bundle, with its lookup table,
with full knobs, and with full knobs where a request is admitted by its prediction instead of its bound. Loads are
multiples of what full knobs answer; arrivals are Poisson, from this process; budgets are drawn evenly from 1, 1.5, 2
and 4 x the full configuration's median. Slices of all loads and servers follow each other in random order, with the
same arrivals, questions and budgets for all servers, so that goodput is compared second by second. Every finished slice
is kept: a second start goes on. Two minutes of each load and server take 46 in all. Prints tables and, last, one JSON
line; the same goes to RESULTS/serving-cpu.json. The device should be idle but for this.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from load import Ask, Client, Sent, closed_loop, open_loop
from result_file import provenance, write_result
from rich.console import Console
from rich.table import Table

from pacevlm.data.splits import load_splits
from pacevlm.evaluation.statistics import bootstrap_mean, percentile_interval
from pacevlm.latency.profile import collect_device_facts
from pacevlm.pacer import bundle_folder, read_bundle
from pacevlm.partial import PartialFile
from pacevlm.pipeline.run_config import load_run_config

# Policy and admission of each.
SERVERS = {
    "pacevlm": ("bundle", "bounds"),
    "table": ("lookup_table", "bounds"),
    "full": ("full", "bounds"),
    "full_by_prediction": ("full", "predictions"),
}
OTHERS = tuple(name for name in SERVERS if name != "pacevlm")
SHOWN = "{mean:.2f} ({low:.2f} to {high:.2f})"
LOADS = (0.3, 0.7, 1.0, 1.5, 3.0)
BUDGETS = (1.0, 1.5, 2.0, 4.0)
LONG_MS = 60_000.0
NUM_RESAMPLES = 10_000
MAX_PICTURE_BYTES = 100_000
CONSOLE = Console(stderr=True)


class Server:
    """A server process.

    Args:
        run_dir: what it serves.
        name: one of `SERVERS`.
        folder: where its log and its drift go.
        checkout: whose package serves; the one that is installed, if None.
    """

    def __init__(self, run_dir: Path, name: str, folder: Path, checkout: Path | None = None) -> None:
        self.log = (folder / f"{name}.log").open("ab")
        policy, admission = SERVERS[name]
        command = [sys.executable, "-m", "pacevlm", "serve", "--run-dir", str(run_dir), "--policy", policy]
        if admission != "bounds":  # which older checkouts know alone
            command += ["--admission", admission]
        command += ["--port", "0", "--drift-path", str(folder / f"{name}-drift.json"), "--log-level", "warning"]
        environment = os.environ | ({} if checkout is None else {"PYTHONPATH": str(checkout)})
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment, cwd=checkout
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r":(\d+)\s*$", line)
        if found is None:
            raise SystemExit(f"the server {name} did not start: {Path(self.log.name).read_text()[-2000:]}")
        self.port = int(found[1])
        self.client = Client(self.port)

    @property
    def worker_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        names = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        (worker,) = (pid for pid, name in names.items() if b"pacevlm.server.worker" in name)
        return worker

    @property
    def rss_mb(self) -> float:
        """Of both processes."""
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in (self.process.pid, self.worker_pid)]
        return sum(int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0]) for text in texts) / 1024

    async def count(self, name: str) -> float:
        """A number of `/metrics`."""
        _, content = await self.client.get("/metrics")
        found = re.search(rf"^pacevlm:{name}(?:_total)? ([0-9.e+]+)$", content.decode(), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    async def until_ready(self) -> None:
        while (await self.client.get("/health"))[0] != 200:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.log.close()


@contextmanager
def serving(run_dir: Path, names: Sequence[str], folder: Path) -> Iterator[dict[str, Server]]:
    """Servers by name, for as long as the block runs."""
    with ExitStack() as stack:
        servers = {}
        for name in names:
            servers[name] = server = Server(run_dir, name, folder)
            stack.callback(server.stop)
        yield servers


# What is measured ----------------------------------------------------------------------------------------------------


async def measure_capacity(server: Server, asks: Sequence[Ask], seconds: float) -> float:
    """Requests a second that full knobs answer, the next one always waiting."""
    await closed_loop(server.client, asks, LONG_MS, 40, 2)
    start_s, number, took_s = time.perf_counter(), 0, 0.0
    while time.perf_counter() - start_s < seconds:
        results, span_s = await closed_loop(server.client, asks, LONG_MS, 40, 2)
        number, took_s = number + len(results), took_s + span_s
    return number / took_s


async def counted_load(
    server: Server, asks: Sequence[Ask], budgets_ms: Sequence[float], rate: float, seconds: float, seed: Any
) -> tuple[list[Sent], int]:
    """An open-loop load, and how many of its requests the server accepted."""
    before = await server.count("requests_accepted")
    sent = await open_loop(server.client, asks, budgets_ms, rate, seconds, seed)
    return sent, int(await server.count("requests_accepted") - before)


def overhead_ms(sent: Sent) -> float:
    """What an answered request took besides the queue and the answer."""
    return round(sent.client_ms - sent.report["queue_ms"] - sent.report["answer_ms"], 3)


def summarise_slice(sent: Sequence[Sent], accepted: int, seconds: int) -> dict[str, Any]:
    """What a slice counts, ready for JSON."""
    answered = [one for one in sent if one.status == 200]
    # Accepted and not answered: the deadline passed in the queue, or no worker was there.
    dropped = accepted - len(answered)
    good_by_s = np.zeros(seconds)
    for one in answered:
        good_by_s[min(int(one.sent_s), len(good_by_s) - 1)] += one.right * one.is_met
    return {
        "seconds": seconds,
        "offered": len(sent),
        "accepted": accepted,
        "dropped": dropped,
        "lost": sum(one.status == 0 for one in sent),
        "late": sum(not one.is_met for one in answered) + dropped,
        "late_at_client": sum(one.client_ms > one.budget_ms for one in answered) + dropped,
        "right": sum(one.right for one in answered),
        "good": float(good_by_s.sum()),
        "good_by_s": good_by_s.tolist(),
        "overhead_ms": [overhead_ms(one) for one in answered],
        "statuses": {str(status): sum(one.status == status for one in sent) for status in {one.status for one in sent}},
    }


async def measure_slices(
    servers: dict[str, Server],
    asks: Sequence[Ask],
    budgets_ms: Sequence[float],
    capacity: float,
    options: argparse.Namespace,
    kept: PartialFile,
) -> list[dict[str, Any]]:
    """All slices: for each round, load and server one."""
    records = list(kept.records)
    done = {(record["round"], record["load"], record["server"]) for record in records if record["what"] == "slice"}
    num_rounds = max(round(60 * options.minutes / options.slice_s), 2)
    for number in range(num_rounds):
        rng = np.random.default_rng([options.seed, number])
        cells = [(load, name) for load in options.loads for name in SERVERS]
        for place in rng.permutation(len(cells)):
            load, name = cells[int(place)]
            if (number, load, name) in done:
                continue
            seed = [options.seed, number, round(100 * load)]
            loaded = await counted_load(servers[name], asks, budgets_ms, load * capacity, options.slice_s, seed)
            record = {"what": "slice", "round": number, "load": load, "server": name}
            record |= summarise_slice(*loaded, options.slice_s)
            kept.append(record)
            records.append(record)
        CONSOLE.print(f"round {number + 1} of {num_rounds} is done")
    return [record for record in records if record["what"] == "slice"]


async def measure_kills(
    server: Server, asks: Sequence[Ask], budgets_ms: Sequence[float], rate: float
) -> dict[str, Any]:
    """Load with long and short budgets while the worker is killed twice: what was accepted, and what came of it."""
    before = {name: await server.count(name) for name in ("requests_accepted", "worker_restarts")}

    async def kill() -> None:
        for _ in range(2):
            await asyncio.sleep(6)
            os.kill(server.worker_pid, signal.SIGKILL)
            await asyncio.sleep(1)
            await server.until_ready()

    loads = (open_loop(server.client, asks, [*budgets_ms, LONG_MS], rate, 30, [7]), kill())
    sent, _ = await asyncio.gather(*loads)
    statuses = {str(status): sum(one.status == status for one in sent) for status in {one.status for one in sent}}
    long = [one for one in sent if one.budget_ms == LONG_MS]
    return {
        "offered": len(sent),
        "statuses": statuses,
        "accepted": await server.count("requests_accepted") - before["requests_accepted"],
        "restarts": await server.count("worker_restarts") - before["worker_restarts"],
        "lost": sum(one.status == 0 for one in sent),
        "long_unanswered": sum(one.status not in (200, 429) for one in long),
    }


async def measure_shutdown(server: Server, asks: Sequence[Ask]) -> dict[str, Any]:
    """Stop a server with forty requests in its queue: all must be answered."""
    before = await server.count("requests_accepted")
    number = 40
    asking = [asyncio.create_task(server.client.ask(asks[i % len(asks)], LONG_MS, 0.0)) for i in range(number)]
    other = Client(server.port)
    while True:
        _, content = await other.get("/metrics")
        found = re.search(r"^pacevlm:requests_accepted_total ([0-9.e+]+)$", content.decode(), re.MULTILINE)
        if found is not None and float(found[1]) - before >= number:
            break
    server.process.send_signal(signal.SIGTERM)
    sent = await asyncio.gather(*asking)
    while server.process.poll() is None:
        await asyncio.sleep(0.05)
    return {"accepted": number, "lost": sum(one.status != 200 for one in sent), "exit_code": server.process.returncode}


async def measure_memory(server: Server, asks: Sequence[Ask], first: int, last: int) -> dict[str, float]:
    """Resident memory of both processes behind so many requests."""
    await closed_loop(server.client, asks, LONG_MS, first, 4)
    before = server.rss_mb
    await closed_loop(server.client, asks, LONG_MS, last - first, 4)
    return {"first_mb": before, "last_mb": server.rss_mb, "growth_mb": server.rss_mb - before}


async def measure_flood(
    server: Server, asks: Sequence[Ask], budgets_ms: Sequence[float], capacity: float, seconds: int
) -> dict[str, Any]:
    """Ten times the capacity, and how soon afterwards a request is answered in time again."""
    sent, accepted = await counted_load(server, asks, budgets_ms, 10 * capacity, seconds, [11])
    over_s = time.perf_counter()
    recovered_s = None
    while recovered_s is None and time.perf_counter() - over_s < 30:
        one = await server.client.ask(asks[0], budgets_ms[-1], 0.0)
        if one.status == 200 and one.is_met:
            recovered_s = time.perf_counter() - over_s
    found = summarise_slice(sent, accepted, seconds)
    found.pop("good_by_s")
    overhead = found.pop("overhead_ms")
    lag_ms = [one.client_ms for one in sent if one.status == 429]
    return {
        **found,
        "recovered_s": recovered_s,
        "refusal_ms": dict(zip(("p50", "p99"), np.percentile(lag_ms, [50, 99]).tolist(), strict=True))
        if lag_ms
        else None,
        "overhead_p50_ms": float(np.median(overhead)) if overhead else None,
    }


# What it amounts to --------------------------------------------------------------------------------------------------


def share(slices: Sequence[dict[str, Any]], above: str, below: str) -> dict[str, float]:
    """A ratio of sums over slices, with the interval of resampled slices."""
    counts = np.array([[record[above], record[below]] for record in slices], dtype=float)
    rng = np.random.default_rng(0)
    sums = counts[rng.integers(len(counts), size=(NUM_RESAMPLES, len(counts)))].sum(axis=1)
    ratios = sums[:, 0] / np.maximum(sums[:, 1], 1.0)  # a resample without any counts as one
    mean = float(counts[:, 0].sum() / max(counts[:, 1].sum(), 1e-9))
    return percentile_interval(mean, ratios).to_dict()


def compare_goodput(slices: Sequence[dict[str, Any]], load: float, other: str) -> dict[str, dict[str, float]]:
    """Goodput over and less another server's on the same arrivals, with intervals of resampled seconds of arrival."""
    by_s = {(record["server"], record["round"]): record["good_by_s"] for record in slices if record["load"] == load}
    rounds = sorted({number for name, number in by_s if name == other})
    both = np.array([np.concatenate([by_s[name, number] for number in rounds]) for name in ("pacevlm", other)]).T
    pairs = [{"above": above, "below": below} for above, below in both.tolist()]
    difference = bootstrap_mean(both[:, 0] - both[:, 1])
    return {"ratio": share(pairs, "above", "below"), "difference_rps": difference.to_dict()}


def summarise(slices: Sequence[dict[str, Any]], loads: Sequence[float]) -> dict[str, Any]:
    rows, ratios, differences = [], [], []
    for load in loads:
        for name in SERVERS:
            own = [record for record in slices if (record["load"], record["server"]) == (load, name)]
            seconds = sum(record["seconds"] for record in own)
            answered = sum(record["accepted"] - record["dropped"] for record in own)
            rows.append(
                {
                    "load": load,
                    "server": name,
                    "seconds": seconds,
                    "offered": sum(record["offered"] for record in own),
                    "accepted": sum(record["accepted"] for record in own),
                    "late_of_accepted": share(own, "late", "accepted"),
                    "late_at_client": share(own, "late_at_client", "accepted"),
                    "accuracy": sum(record["right"] for record in own) / max(answered, 1),
                    "goodput_rps": sum(record["good"] for record in own) / seconds,
                }
            )
        compared = {other: compare_goodput(slices, load, other) for other in OTHERS}
        for kind, kept in (("ratio", ratios), ("difference_rps", differences)):
            kept.append({"load": load} | {f"over_{other}": found[kind] for other, found in compared.items()})
    light = [record for record in slices if (record["load"], record["server"]) == (min(loads), "pacevlm")]
    overhead = [ms for record in light for ms in record["overhead_ms"]]
    p50, p99 = np.percentile(overhead, [50, 99]).tolist()
    return {
        "loads": rows,
        "goodput_ratios": ratios,
        "goodput_differences_rps": differences,
        "overhead_ms": {"p50": p50, "p99": p99, "n": len(overhead)},
    }


def print_tables(found: dict[str, Any]) -> None:
    table = Table(title=f"capacity at full knobs {found['capacity_rps']:.1f} requests a second")
    for name in ("load", "server", "offered", "accepted", "late, %", "late at client, %", "accuracy", "goodput/s"):
        table.add_column(name, justify="right")
    for row in found["loads"]:
        late, at_client = (
            [100 * row[name][end] for end in ("mean", "low", "high")] for name in ("late_of_accepted", "late_at_client")
        )
        table.add_row(
            f"{row['load']:g}",
            row["server"],
            f"{row['offered']:,}",
            f"{row['accepted']:,}",
            "{:.1f} ({:.1f} to {:.1f})".format(*late),
            f"{at_client[0]:.1f}",
            f"{row['accuracy']:.3f}",
            f"{row['goodput_rps']:.2f}",
        )
    CONSOLE.print(table)
    for name, what in (("goodput_ratios", "over"), ("goodput_differences_rps", "less")):
        for row in found[name]:
            parts = [f"{what} {other} " + SHOWN.format(**row[f"over_{other}"]) for other in OTHERS]
            CONSOLE.print(f"load {row['load']:g}: goodput {', '.join(parts)}")


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = load_run_config(options.run_dir)
    splits = load_splits(config.data, config.picture)
    bundle = read_bundle(bundle_folder(options.run_dir))
    asks = [Ask.of(example, splits.metric) for example in splits.test[: options.num_questions]]
    asks = [ask for ask in asks if len(ask.tail) <= MAX_PICTURE_BYTES]
    # So that ten thousand answers take two minutes.
    cheap = [Ask.of(ask.example, ask.metric, knobs=str(bundle["knob_space"].cheapest)) for ask in asks]
    full_p50_ms = float(bundle["full_p50_ms"])
    budgets_ms = [factor * full_p50_ms for factor in BUDGETS]
    header = {
        "run_dir": str(options.run_dir),
        "seed": options.seed,
        "slice_s": options.slice_s,
        "full_p50_ms": full_p50_ms,
    }
    kept = PartialFile(options.results / "serving.partial.jsonl", header, "interrupted benchmark of the server")
    known = {record["what"]: record for record in kept.records}
    found: dict[str, Any] = {"full_p50_ms": full_p50_ms, "budgets_ms": budgets_ms}
    with serving(options.run_dir, list(SERVERS), folder) as servers:
        if "capacity" not in known:
            known["capacity"] = {
                "what": "capacity",
                "rps": await measure_capacity(servers["full"], asks, options.slice_s),
            }
            kept.append(known["capacity"])
        capacity = known["capacity"]["rps"]
        CONSOLE.print(f"full knobs answer {capacity:.1f} requests a second")
        slices = await measure_slices(servers, asks, budgets_ms, capacity, options, kept)
    found |= {"capacity_rps": capacity, **summarise(slices, options.loads)}
    parts = {
        "flood": lambda server: measure_flood(server, asks, budgets_ms, capacity, options.flood_s),
        "kills": lambda server: measure_kills(server, asks, budgets_ms, 0.7 * capacity),
        "memory": lambda server: measure_memory(server, cheap, *options.memory),
        "shutdown": lambda server: measure_shutdown(server, asks),
    }
    for name, part in parts.items():
        if name not in known:
            with serving(options.run_dir, ["pacevlm"], folder) as servers:
                known[name] = {"what": name} | await part(servers["pacevlm"])
            kept.append(known[name])
        found[name] = {key: value for key, value in known[name].items() if key != "what"}
        CONSOLE.print(name, found[name])
    found["lost"] = sum(found[name]["lost"] for name in ("flood", "kills", "shutdown"))
    found["lost"] += sum(record["lost"] for record in slices)
    found["rss_growth_mb"] = found["memory"]["growth_mb"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"), help="an evaluated run")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--minutes", type=float, default=2.0, help="of each load and server")
    parser.add_argument("--slice-s", type=int, default=15, help="seconds of a slice")
    parser.add_argument("--flood-s", type=int, default=60, help="seconds at ten times the capacity")
    parser.add_argument("--memory", type=int, nargs=2, default=(2000, 10_000), help="requests between two looks")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="multiples of capacity at full knobs")
    parser.add_argument("--num-questions", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.run_dir = options.run_dir.resolve()
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(options, Path(folder)))
    import torch

    print_tables(found)
    facts = provenance(collect_device_facts("cpu", torch.float32))
    write_result(
        {**facts, "settings": vars(options) | {"run_dir": options.run_dir.name, "results": None}, **found},
        options.results,
        "serving",
        CONSOLE,
    )
    (options.results / "serving.partial.jsonl").unlink()


if __name__ == "__main__":
    main()
