#!/usr/bin/env python3
"""What the server adds to an answer: the client's time less the queue and the answer, of this checkout and another's.

One request at a time, each to both servers in random order, with a pause before it. Prints a table and one JSON line;
the same goes to RESULTS/serving-overhead-cpu.json. The other checkout is a folder with the package in it, such as
`git worktree add --detach /tmp/before main` makes; without one this checkout is measured alone.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from load import Ask
from result_file import provenance, write_result
from rich.console import Console
from rich.table import Table
from serving import LONG_MS, MAX_PICTURE_BYTES, Server, overhead_ms

from pacevlm.data.splits import load_splits
from pacevlm.evaluation.statistics import ratio_interval, resampled_means
from pacevlm.latency.profile import collect_device_facts
from pacevlm.pipeline.run_config import load_run_config

CONSOLE = Console(stderr=True)
HERE = Path(__file__).resolve().parents[1]


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = load_run_config(options.run_dir)
    splits = load_splits(config.data, config.picture)
    asks = [Ask.of(example, splits.metric) for example in splits.test]
    asks = [ask for ask in asks if len(ask.tail) <= MAX_PICTURE_BYTES]
    checkouts = {"here": HERE} | ({} if options.other is None else {"other": options.other.resolve()})
    rng = np.random.default_rng(0)
    found_ms: dict[str, list[float]] = {name: [] for name in checkouts}
    with ExitStack() as stack:
        servers = {}
        for name, checkout in checkouts.items():
            (folder / name).mkdir()
            servers[name] = server = Server(options.run_dir, "pacevlm", folder / name, checkout)
            stack.callback(server.stop)
        for number in range(options.num_requests + 20):
            for name in rng.permutation(list(servers)):
                await asyncio.sleep(rng.uniform(0.01, 0.03))
                sent = await servers[name].client.ask(asks[number % len(asks)], LONG_MS, 0.0)
                if sent.status != 200:
                    raise SystemExit(f"a request was answered {sent.status}")
                if number >= 20:  # what runs first is not warm
                    found_ms[name].append(overhead_ms(sent))
    found: dict[str, Any] = {
        name: dict(zip(("p50", "p90", "p99"), np.percentile(times, [50, 90, 99]).tolist(), strict=True))
        for name, times in found_ms.items()
    }
    if options.other is not None:
        both = np.stack([found_ms["here"], found_ms["other"]], axis=1)
        interval = ratio_interval(both.mean(axis=0), resampled_means(both))
        found["ratio_of_means"] = None if interval is None else interval.to_dict()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"), help="an evaluated run")
    parser.add_argument("--other", type=Path, help="another checkout of the repository")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--num-requests", type=int, default=400)
    options = parser.parse_args()
    options.run_dir = options.run_dir.resolve()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(options, Path(folder)))
    import torch

    table = Table(title="overhead, ms")
    for name in ("checkout", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for name in ("here", "other")[: 1 + (options.other is not None)]:
        table.add_row(name, *(f"{found[name][end]:.2f}" for end in ("p50", "p90", "p99")))
    CONSOLE.print(table)
    settings = {"run_dir": options.run_dir.name, "num_requests": options.num_requests}
    facts = provenance(collect_device_facts("cpu", torch.float32))
    write_result({**facts, "settings": settings, "overhead_ms": found}, options.results, "serving-overhead", CONSOLE)


if __name__ == "__main__":
    main()
