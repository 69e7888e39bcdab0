#!/usr/bin/env python3
"""Whether another version of the code is as fast as this one: requests, rollouts and latency tokens, in turns.

Give the folder of another checkout, for example one that `git worktree add ../before COMMIT` makes. Each version runs
in a process of its own that keeps its model; they take turns at every single piece of work, and have to give the same
answers. A ratio above 1 says that this version is faster. Prints a table and, last, one JSON line; the same goes to
RESULTS/versions-DEVICE.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_file import provenance, write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pacevlm.data.digits import DigitVQA
from pacevlm.evaluation.statistics import ratio_interval, resampled_means
from pacevlm.knobs import Knobs
from pacevlm.latency.profile import collect_device_facts
from pacevlm.models.elastic import ElasticModel
from pacevlm.rollout.engine import RolloutEngine

HERE = Path(__file__).resolve().parents[1]
# Examples of one piece of rollouts, and of one piece of a sweep.
NUM_FRESH, NUM_SWEEP = 12, 2
# Examples whose paced requests are compared.
NUM_PACED = 100
KINDS = {
    "request": "requests",
    "paced": "requests with guardrail and controller",
    "fresh": "fresh rollouts",
    "sweep": "exhaustive sweep",
    "tokens": "latency tokens, forwards and backwards",
}


class Worker:
    """A process that runs one version of the code."""

    def __init__(self, checkout: Path, arguments: argparse.Namespace) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, str(Path(__file__).resolve()), "--work", "--model", arguments.model]
        command += ["--num-threads", str(arguments.num_threads)]
        self.process = subprocess.Popen(
            command, env=environment, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.source = self.ask({"kind": "hello"})["source"]

    def ask(self, work: dict[str, Any]) -> dict[str, Any]:
        """Let the process do a piece of work; its answers, and the milliseconds that it took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.process.args} ended; see its message above")
        result: dict[str, Any] = json.loads(line)
        return result


def work(arguments: argparse.Namespace) -> None:
    """Do what is asked for, line by line; uses only what all versions have."""
    torch.set_num_threads(arguments.num_threads)
    model = ElasticModel.from_pretrained(arguments.model)
    try:
        from pacevlm.request.profiling import profiling_run
        from pacevlm.request.run import run_forced as forced
    except ImportError:  # versions in which a request was a method of the model
        forced = ElasticModel.run_static  # type: ignore[attr-defined]
        from pacevlm.rollout.profiling import profiling_run
    space, data = model.knob_space, DigitVQA("val", 100_000)
    paced = profiling_run(model, [(data[i].image, data[i].question) for i in range(NUM_PACED)])
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["kind"] == "hello":
            print(json.dumps({"source": str(Path(sys.modules["pacevlm"].__file__ or "").parent)}), flush=True)
            continue
        answers: list[str] = []
        if asked["kind"] == "request":
            example, knobs = data[asked["number"]], Knobs.parse(asked["knobs"])
            image = example.image
            started = time.perf_counter()
            answers.append(forced(model, image, example.question, knobs).answer)
        elif asked["kind"] == "paced":
            started = time.perf_counter()
            answers.append(paced(asked["number"], Knobs.parse(asked["knobs"]), None).answer)
        elif asked["kind"] == "tokens":
            examples = [data[asked["number"] * 8 + i] for i in range(8)]
            engine, tiers = RolloutEngine(model), [tier for tier in space.tiers for _ in range(4)]
            tokens = torch.randn(8 * len(tiers), model.d_model, generator=torch.Generator().manual_seed(0))
            rows = [(example, tier) for example in examples for tier in tiers]
            engine.latency_token_outputs(*zip(*rows, strict=True), tokens)  # the prompts' own work
            started = time.perf_counter()
            outputs = engine.latency_token_outputs(*zip(*rows, strict=True), tokens.requires_grad_())
            outputs.square().sum().backward()
        else:
            count = NUM_FRESH if asked["kind"] == "fresh" else NUM_SWEEP
            examples = [data[asked["number"] * count + i] for i in range(count)]
            rng = np.random.default_rng(asked["number"])
            jobs = [(e, space[int(i)]) for e in examples for i in rng.integers(0, len(space), 16)]
            if asked["kind"] == "sweep":
                jobs = [(example, knobs) for example in examples for knobs in space]
            engine = RolloutEngine(model)
            started = time.perf_counter()
            answers += [outcome.answer for outcome in engine.run(jobs)]
        milliseconds = (time.perf_counter() - started) * 1e3
        print(json.dumps({"ms": milliseconds, "answers": answers}), flush=True)


def compare(workers: Sequence[Worker], arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Both versions on the same pieces of work, in random order within each pair."""
    model = ElasticModel.from_pretrained(arguments.model)
    space, rng = model.knob_space, np.random.default_rng(arguments.seed)
    pieces: list[dict[str, Any]] = []
    for number in range(arguments.num_requests):
        for kind, knobs in itertools.product(("request", "paced"), (space.full, space.cheapest)):
            pieces.append({"kind": kind, "number": number % NUM_PACED, "knobs": str(knobs)})
    for kind in ("fresh", "sweep", "tokens"):
        pieces += [{"kind": kind, "number": number} for number in range(arguments.num_batches)]
    warm = [*pieces[:4], *({"kind": kind, "number": 900} for kind in ("fresh", "sweep", "tokens"))]
    for piece in warm * 2:
        for worker in workers:
            worker.ask(piece)
    times: dict[str, list[list[float]]] = {}
    num_same = 0
    task = progress.add_task("pieces of work", total=len(pieces))
    for place in rng.permutation(len(pieces)):
        piece, results = pieces[place], [{}, {}]
        for which in rng.permutation(2):
            results[which] = workers[which].ask(piece)
        num_same += results[0]["answers"] == results[1]["answers"]
        name = KINDS[piece["kind"]] + (f", {piece['knobs']}" if "knobs" in piece else "")
        times.setdefault(name, []).append([result["ms"] for result in results])
        progress.advance(task)
    rows = {}
    for name in sorted(times):
        both = np.array(times[name])
        ratio = ratio_interval(both.mean(axis=0), resampled_means(both))
        assert ratio is not None
        median = np.median(both, axis=0)
        rows[name] = {
            "n": len(both),
            "before_ms": float(median[0]),
            "now_ms": float(median[1]),
            "speed_ratio": ratio.to_dict(),
            "speed_ratio_of_medians": float(median[0] / median[1]),
        }
    return {"rows": rows, "num_same_answers": num_same, "num_pieces": len(pieces)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", nargs="?", type=Path, help="folder of the other checkout")
    # Each version's own by default: other weights must be copied into the other checkout, in the form that it reads.
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--num-requests", type=int, default=100)
    parser.add_argument("--num-batches", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return
    if arguments.before is None or not (arguments.before / "pacevlm").is_dir():
        parser.error("give the folder of another checkout, one that holds the folder pacevlm")
    console = Console(stderr=True)
    workers = [Worker(checkout.resolve(), arguments) for checkout in (arguments.before, HERE)]
    with Progress(console=console) as progress:
        compared = compare(workers, arguments, progress)
    commit = subprocess.run(["git", "-C", str(arguments.before), "rev-parse", "HEAD"], capture_output=True, text=True)
    torch.set_num_threads(arguments.num_threads)
    results = {
        **provenance(collect_device_facts("cpu", torch.float32, compiler="numba")),
        "before": commit.stdout.strip() or "unknown",
        "model": arguments.model,
        "seed": arguments.seed,
        **compared,
    }
    table = Table(title=f"this version against {results['before'][:7]}; times are medians")
    for column in ("work", "n", "before ms", "now ms", "before / now [95 %]"):
        table.add_column(column)
    for name, row in results["rows"].items():
        ratio = row["speed_ratio"]
        text = f"{ratio['mean']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        table.add_row(name, str(row["n"]), f"{row['before_ms']:.2f}", f"{row['now_ms']:.2f}", text)
    Console().print(table)
    Console().print(f"same answers in {results['num_same_answers']} of {results['num_pieces']} pieces")
    write_result(results, arguments.results, "versions", console)


if __name__ == "__main__":
    main()
