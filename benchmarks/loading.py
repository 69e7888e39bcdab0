#!/usr/bin/env python3
"""How much memory loading a checkpoint of MolmoE-1B's widths takes at its peak, and how long it takes.

Each case writes random weights to FOLDER (they are removed again), and loads them in a process of its own, whose
anonymous memory is polled: what it allocated, Python, torch and compiled code included, without the pages of mapped
files, which the system can drop at any time. Writes RESULTS/loading.json. `--load PATH` is that process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import write_random_checkpoint
from result_file import provenance
from rich.console import Console
from rich.table import Table

from pacevlm.files import write_json_atomic
from pacevlm.latency.profile import collect_device_facts
from pacevlm.models.elastic import ElasticModel
from pacevlm.models.molmoe.layouts import PUBLISHED, TRAINING

# Checkpoints of up to so many blocks are written in both layouts and loaded in both dtypes; larger ones are published,
# and loaded in bfloat16.
SMALL_BLOCKS = 4


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not count anonymous memory apart")


class PeakMemory:
    """The most anonymous memory seen while the block runs, polled every few milliseconds."""

    def __enter__(self) -> PeakMemory:
        self.peak_bytes, self._over = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def _poll(self) -> None:
        while not self._over.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def load(path: str, dtype: str, device: str) -> dict[str, Any]:
    """Load a checkpoint in this process as every command does, and say what that took."""
    before = anonymous_bytes()
    with PeakMemory() as memory:
        started = time.perf_counter()
        model = ElasticModel.from_pretrained(path, dtype=getattr(torch, dtype), device=device)
        seconds = time.perf_counter() - started
    weights = {weight.data_ptr(): weight for weight in model.adapter.model.parameters()}.values()
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "model_bytes": sum(weight.nbytes for weight in weights),
        "peak_anonymous_bytes": memory.peak_bytes,
        "anonymous_bytes_before": before,
        "anonymous_bytes_after": anonymous_bytes(),
        "seconds": seconds,
    }


def main() -> None:
    """Write, load, remove, case by case; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/molmoe"), help="where checkpoints are written")
    parser.add_argument(
        "--num-blocks", type=int, nargs="+", default=[2, 4], help="cases with so many blocks; 16 are 29 GB"
    )
    parser.add_argument("--add", action="store_true", help="keep what loading.json holds, and add to it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--load", help="load this checkpoint here, and print what it took")
    parser.add_argument("--dtype", default="float32", help="of the weights in memory, with --load")
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.dtype, arguments.device)))
        return
    console, made = Console(), provenance(collect_device_facts(torch.device(arguments.device), torch.float32))
    loads: list[dict[str, Any]] = []
    for blocks, layout in product(arguments.num_blocks, (PUBLISHED, TRAINING)):
        if blocks > SMALL_BLOCKS and layout != PUBLISHED:
            continue
        try:
            num_bytes = write_random_checkpoint(arguments.folder, blocks, torch.float32, layout)
            for dtype in ("float32", "bfloat16") if blocks <= SMALL_BLOCKS else ("bfloat16",):
                console.print(f"{blocks} blocks, {layout}, float32 to {dtype}")
                words = [sys.executable, __file__, "--load", str(arguments.folder), "--dtype", dtype]
                done = subprocess.run([*words, "--device", arguments.device], check=True, stdout=subprocess.PIPE)
                facts = {"blocks": blocks, "layout": layout, "stored_dtype": "float32", "dtype": dtype}
                loads.append({**made, **facts, "stored_bytes": num_bytes, **json.loads(done.stdout)})
        finally:
            shutil.rmtree(arguments.folder, ignore_errors=True)
    console.print(as_table(loads))
    arguments.results.mkdir(parents=True, exist_ok=True)
    target = arguments.results / "loading.json"
    if arguments.add and target.exists():
        loads = json.loads(target.read_text()) + loads
    write_json_atomic(target, loads)
    console.print(f"written to {arguments.results / 'loading.json'}")


def as_table(loads: list[dict[str, Any]]) -> Table:
    """What the file holds, a line a load."""
    table = Table("blocks", "layout", "on disk", "in memory", "model GB", "peak GB", "peak / model", "seconds")
    for row in loads:
        model, peak = row["model_bytes"] / 1e9, row["peak_anonymous_bytes"] / 1e9
        words = [str(row[name]) for name in ("blocks", "layout", "stored_dtype", "dtype")]
        table.add_row(*words, f"{model:.2f}", f"{peak:.2f}", f"{peak / model:.3f}", f"{row['seconds']:.1f}")
    return table


if __name__ == "__main__":
    main()
