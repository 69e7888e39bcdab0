#!/usr/bin/env python3
"""How many rollouts a second training gets, against each rollout alone: processor, generate, batch 1.

Alone, rollouts run with transformers' own experts module as it is, and once more with this project's. All ways answer
the same (example, knobs) pairs, in turns within one run, and have to give the same tokens. Prints tables and, last, one
JSON line; the same goes to RESULTS/rollouts-DEVICE.json. The device should be idle.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from other_experts import transformers_experts
from result_file import provenance, write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pacevlm.data.digits import DigitVQA
from pacevlm.knobs import Knobs
from pacevlm.latency.measuring import use_num_threads
from pacevlm.latency.profile import collect_device_facts
from pacevlm.models.elastic import ElasticModel
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.types import Example

Jobs = list[tuple[Example, Knobs]]
# Whose experts a rollout alone runs with.
ALONE: dict[str, Callable[[ElasticModel], AbstractContextManager[None]]] = {
    "alone": transformers_experts,
    "alone_own_experts": lambda _: nullcontext(),
}


def sample_jobs(model: ElasticModel, examples: Sequence[Example], group: int, seed: int) -> Jobs:
    """`group` rollouts of every example with uniformly drawn knobs: what a controller without training samples."""
    rng, space = np.random.default_rng(seed), model.knob_space
    return [(e, space[int(i)]) for e in examples for i in rng.integers(0, len(space), group)]


def run_alone(model: ElasticModel, example: Example, knobs: Knobs) -> str:
    """One rollout as transformers would do it: the processor at a tier, then `generate` with the knobs."""
    adapter = model.adapter
    inputs = adapter.processor(images=example.image, text=example.question, max_crops=model.vision_budgets[knobs.tier])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    kept = model.order.kept(knobs.num_blocks)
    top_ks = [model.trained_top_k if block < model.stage2_after else knobs.top_k for block in range(adapter.num_blocks)]
    ids = adapter.model.generate(
        **inputs,
        max_new_tokens=model.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(adapter.end_token_ids),
        top_k_per_block=top_ks,
        removed_blocks=[block for block in range(adapter.num_blocks) if block not in kept],
    )
    return adapter.decode(ids[0, inputs["input_ids"].shape[1] :].tolist())


def timed_run(engine: RolloutEngine, jobs: Jobs) -> float:
    """Seconds that the engine takes for some rollouts."""
    engine.model.synchronise()
    started = time.perf_counter()
    engine.run(jobs)
    engine.model.synchronise()
    return time.perf_counter() - started


def timed_alone(model: ElasticModel, jobs: Jobs, way: str) -> tuple[float, list[str]]:
    """Seconds that rollouts take one by one, and their answers."""
    with ALONE[way](model):
        model.synchronise()
        started = time.perf_counter()
        answers = [run_alone(model, example, knobs) for example, knobs in jobs]
        model.synchronise()
        return time.perf_counter() - started, answers


def compare(
    model: ElasticModel, arguments: argparse.Namespace, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Rounds of one fresh batch on the engine, the same batch remembered, its next epoch, and a part of it alone."""
    data = DigitVQA("train", arguments.rounds * arguments.num_examples, seed=arguments.seed + 1)
    rounds, num_same, num_compared = [], 0, 0
    task = progress.add_task("rounds", total=arguments.rounds * 3)
    for number in range(arguments.rounds):
        start = number * arguments.num_examples
        examples = [data[i] for i in range(start, start + arguments.num_examples)]
        jobs = sample_jobs(model, examples, arguments.group_size, seed=number)
        rng = np.random.default_rng(number)
        alone = [jobs[i] for i in rng.permutation(len(jobs))[: arguments.num_alone]]
        engine = RolloutEngine(model)
        parts: dict[str, float] = {"num_rollouts": len(jobs)}
        # Half of the lone rollouts before the engine's, half behind.
        half = len(alone) // 2
        before = {way: timed_alone(model, alone[:half], way) for way in ALONE}
        progress.advance(task)
        parts["fresh_s"] = timed_run(engine, jobs)
        parts["num_distinct"] = engine.num_run
        parts["remembered_s"] = timed_run(engine, jobs)
        anew = sample_jobs(model, examples, arguments.group_size, seed=1000 + number)
        parts["next_epoch_s"] = timed_run(engine, anew)
        parts["next_epoch_run"] = engine.num_run - parts["num_distinct"]
        progress.advance(task)
        behind = {way: timed_alone(model, alone[half:], way) for way in ALONE}
        progress.advance(task)
        outcomes = engine.run(alone)
        for way in ALONE:
            parts[f"{way}_s_per_rollout"] = (before[way][0] + behind[way][0]) / len(alone)
            answers = before[way][1] + behind[way][1]
            num_same += sum(outcome.answer == answer for outcome, answer in zip(outcomes, answers, strict=True))
            num_compared += len(alone)
        rounds.append(parts)
    results: dict[str, Any] = {"same_tokens": num_same == num_compared, "num_compared": num_compared}
    for name, key in (("fresh", "fresh_s"), ("remembered", "remembered_s"), ("next_epoch", "next_epoch_s")):
        results[f"{name}_rollouts_per_s"] = float(np.median([r["num_rollouts"] / r[key] for r in rounds]))
        for way in ALONE:
            ratios = np.array([r[f"{way}_s_per_rollout"] * r["num_rollouts"] / r[key] for r in rounds])
            suffix = way.removeprefix("alone")
            results[f"speedup_{name}{suffix}"] = float(np.median(ratios))
            results[f"speedup_{name}{suffix}_range"] = [float(ratios.min()), float(ratios.max())]
    for way in ALONE:
        results[f"{way}_rollouts_per_s"] = float(np.median([1 / r[f"{way}_s_per_rollout"] for r in rounds]))
    results["distinct_share"] = float(np.mean([r["num_distinct"] / r["num_rollouts"] for r in rounds]))
    results["next_epoch_run_share"] = float(np.mean([r["next_epoch_run"] / r["num_rollouts"] for r in rounds]))
    return results, rounds


def sweep_speed(model: ElasticModel, num_examples: int, seed: int) -> dict[str, float]:
    """Rollouts a second of an exhaustive sweep: all configurations of every example."""
    examples = list(DigitVQA("val", num_examples, seed=seed))
    engine = RolloutEngine(model)
    jobs = [(example, knobs) for example in examples for knobs in model.knob_space]
    seconds = timed_run(engine, jobs)
    return {"num_rollouts": len(jobs), "rollouts_per_s": len(jobs) / seconds}


def growth(model: ElasticModel, arguments: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Rollouts a second against rows in a batch, and against the rollouts of each example."""
    rows: list[dict[str, Any]] = []
    examples = list(DigitVQA("val", 16, seed=arguments.seed))
    jobs = sample_jobs(model, examples, 16, seed=7)
    # Untimed, so that every setting finds the memory that batches need already taken from the system.
    timed_run(RolloutEngine(model), jobs)
    task = progress.add_task("growth", total=12)
    for max_rows in (1, 4, 16, 64, 128, 256):
        engine = RolloutEngine(model, max_rows=max_rows)
        seconds = timed_run(engine, jobs)
        rows.append({"axis": "rows in a batch", "at": max_rows, "rollouts_per_s": engine.num_run / seconds})
        progress.advance(task)
    for group in (1, 2, 4, 8, 16, 64):
        engine = RolloutEngine(model)
        some = sample_jobs(model, examples, group, seed=8)
        seconds = timed_run(engine, some)
        rows.append({"axis": "rollouts of an example", "at": group, "rollouts_per_s": len(some) / seconds})
        progress.advance(task)
    return rows


def _work(model_path: str, seed: int, num_threads: int, ready: Any, go: Any, out: Any) -> None:
    torch.set_num_threads(num_threads)
    model = ElasticModel.from_pretrained(model_path)
    examples = list(DigitVQA("val", 24, seed=seed))
    timed_run(RolloutEngine(model), sample_jobs(model, examples[:4], 8, seed=9))
    jobs = sample_jobs(model, examples, 16, seed=seed)
    ready.release()
    go.wait()
    out.put(len(jobs) / timed_run(RolloutEngine(model), jobs))


def processes(arguments: argparse.Namespace, num_threads: int) -> list[dict[str, Any]]:
    """Rollouts a second of one process with all threads, and of several processes that share them out."""
    context, rows = multiprocessing.get_context("spawn"), []
    for count in dict.fromkeys((1, num_threads)):
        ready, go, out = context.Semaphore(0), context.Event(), context.Queue()
        workers = [
            context.Process(target=_work, args=(arguments.model, seed, max(1, num_threads // count), ready, go, out))
            for seed in range(count)
        ]
        for worker in workers:
            worker.start()
        for _ in workers:
            ready.acquire()
        go.set()
        rows.append({"axis": "processes", "at": count, "rollouts_per_s": sum(out.get() for _ in workers)})
        for worker in workers:
            worker.join()
    return rows


def show(results: dict[str, Any], console: Console) -> None:
    """Print what the JSON line holds."""
    device = results["device"]
    table = Table(title=f"rollouts on {device['name']}, {device['num_threads']} thread(s), {results['dtype']}")
    for column in ("way", "rollouts/s", "times one alone", "range over rounds", "times one alone, own experts"):
        table.add_column(column)
    table.add_row("alone (processor, generate)", f"{results['alone_rollouts_per_s']:.1f}", "1", "", "")
    table.add_row("the same, own experts", f"{results['alone_own_experts_rollouts_per_s']:.1f}", "", "", "1")
    for name, label in (
        ("fresh", "fresh batch"),
        ("next_epoch", "same examples, sampled anew"),
        ("remembered", "same batch, remembered"),
    ):
        low, high = results[f"speedup_{name}_range"]
        speed, ratio = results[f"{name}_rollouts_per_s"], results[f"speedup_{name}"]
        own = results[f"speedup_{name}_own_experts"]
        table.add_row(label, f"{speed:.1f}", f"{ratio:.1f}", f"{low:.1f} to {high:.1f}", f"{own:.1f}")
    table.add_row("exhaustive sweep", f"{results['sweep']['rollouts_per_s']:.1f}", "", "")
    console.print(table)
    table = Table(title="growth")
    for column in ("axis", "at", "rollouts/s"):
        table.add_column(column)
    for row in results["growth"]:
        table.add_row(row["axis"], str(row["at"]), f"{row['rollouts_per_s']:.1f}")
    console.print(table)
    console.print(f"same answers in all {results['num_compared']} compared: {results['same_tokens']}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a model directory, or 'embedded'")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--num-examples", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--num-alone", type=int, default=128, help="rollouts of each round that also run alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-sweep", type=int, default=24, help="examples of the exhaustive sweep")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    dtype = getattr(torch, arguments.dtype)
    model = ElasticModel.from_pretrained(arguments.model, device=arguments.device, dtype=dtype)
    with Progress(console=console) as progress, use_num_threads(arguments.num_threads), torch.inference_mode():
        device = collect_device_facts(model.device, model.dtype, compiler=model.adapter.compiler)
        warm = sample_jobs(model, list(DigitVQA("val", 4)), 8, seed=3)
        timed_run(RolloutEngine(model), warm)
        for way in ALONE:
            timed_alone(model, warm[:4], way)
        compared, rounds = compare(model, arguments, progress)
        sweep = sweep_speed(model, arguments.num_sweep, arguments.seed)
        rows = growth(model, arguments, progress)
        if model.device.type == "cpu":
            rows += processes(arguments, arguments.num_threads)
    results = {
        **provenance(device),
        "model": arguments.model,
        "seed": arguments.seed,
        "num_examples": arguments.num_examples,
        "group_size": arguments.group_size,
        **compared,
        "rounds": rounds,
        "sweep": sweep,
        "growth": rows,
    }
    show(results, Console())
    write_result(results, arguments.results, "rollouts", console)


if __name__ == "__main__":
    main()
