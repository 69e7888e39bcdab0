#!/usr/bin/env python3
"""How near a request of MolmoE-1B's size comes to what a GPU can do, and what knobs and rollouts cost there.

Needs a checkpoint of that size; `random_checkpoint.py` writes one. Prints a table and, last, one JSON line; the same
goes to RESULTS/real-size-DEVICE.json, part by part, so that a run which is cut short leaves what it had. The device
should be idle.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ceilings import decode_bytes, measure_bandwidth, measure_flops, prefill_flops
from request import controller_cost, decode_against_loop, one_at_a_time, stage_spans
from result_file import keep_result, provenance, write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rollouts import sample_jobs, timed_alone, timed_run
from timing import Interleaved, bootstrap_ratio

from pacevlm.latency.profile import collect_device_facts
from pacevlm.latency.sample_pictures import NUM_SIZES, make_sample_pictures
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.run import run_forced
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.types import Example

QUESTION = "Which number is the largest?"
STAGES = ("read_ms", "prepare_ms", "stage1_ms", "vision_ms", "first_block_ms", "prefill_ms", "e2e_ms")


def make_examples(count: int, max_pixels: int = 1_000_000) -> list[Example]:
    """JPEG files of up to so many pixels, the largest first, each with the same question."""
    pictures = [picture for picture in make_sample_pictures(max_pixels) if isinstance(picture, bytes)]
    jpegs = [picture for picture in pictures if picture.startswith(b"\xff\xd8")][: 2 * NUM_SIZES]
    return [Example(str(i), picture, QUESTION, ("x",)) for i, picture in enumerate(jpegs[::-1][:count])]


def time_requests(model: ElasticModel, examples: list[Example], repeats: int, progress: Progress) -> dict[str, Any]:
    """Every knob lowered alone, on the same pictures, and the stages of each."""
    ways: dict[str, Callable[[Example], Any]] = {
        str(knobs): lambda e, knobs=knobs: run_forced(model, e.source, e.question, knobs)  # type: ignore[misc]
        for knobs in one_at_a_time(model.knob_space)
    }
    timed = Interleaved(ways, model.synchronise)
    timed.run(examples, repeats, progress, "requests")
    full, rows = str(model.knob_space.full), {}
    for name in ways:
        ratio, answers = bootstrap_ratio(timed, name, full), timed.all_results[name]
        rows[name] = {
            "p50_ms": timed.p50_ms(name),
            "over_full": [ratio.mean, ratio.low, ratio.high],
            **{stage: float(np.median([getattr(a.times, stage) for a in answers])) for stage in STAGES},
            "decode_step_ms": stage_spans(timed, name)["decode_step_ms"],
            "num_image_tokens": float(np.median([a.vision.num_image_tokens for a in answers])),
        }
    return rows


def against_the_limit(model: ElasticModel, progress: Progress) -> dict[str, Any]:
    """Decode steps and prefill behind 1,200 image tokens, against what bandwidth and products allow."""
    picture = np.random.default_rng(0).integers(0, 256, (800, 1100, 3), dtype=np.uint8)
    example, full = Example("0", picture, QUESTION, ("x",)), model.knob_space.full
    timed = Interleaved(
        {"full": lambda e: run_forced(model, e.source, e.question, full, num_output_tokens=16)}, model.synchronise
    )
    timed.run([example], 20, progress, "against the limit")
    spans, answer = stage_spans(timed, "full"), timed.all_results["full"][0]
    tokens = answer.vision.num_image_tokens + answer.sizes.num_text_tokens
    bandwidth, flops = measure_bandwidth(model, 1 << 30), measure_flops(model)
    limits = {
        "decode": decode_bytes(model, full, tokens) / bandwidth * 1e3,
        "prefill": prefill_flops(model, full, tokens) / flops * 1e3,
    }
    return {
        "num_image_tokens": answer.vision.num_image_tokens,
        **spans,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "tflops_per_s": flops / 1e12,
        "decode_limit_ms": limits["decode"],
        "prefill_limit_ms": limits["prefill"],
        "decode_over_limit": spans["decode_step_ms"] / limits["decode"],
        "prefill_over_limit": spans["prefill_ms"] / limits["prefill"],
        **decode_against_loop(model, [example], progress),
    }


def rollouts_against_alone(model: ElasticModel, examples: list[Example], group: int, rounds: int) -> dict[str, Any]:
    """Rollouts a second in a batch of fresh examples, and one by one with processor and `generate`."""
    # As many as are timed: what kernels and memory of these shapes need is set up by their first batch alone.
    timed_run(RolloutEngine(model), sample_jobs(model, examples, group, seed=99))
    timed_alone(model, sample_jobs(model, examples[:1], 1, seed=99), "alone")
    ratios, speeds = [], []
    for number in range(rounds):
        jobs = sample_jobs(model, examples, group, seed=number)
        alone = [jobs[i] for i in np.random.default_rng(number).permutation(len(jobs))[: len(examples)]]
        alone_s, _ = timed_alone(model, alone, "alone")
        speeds.append(len(jobs) / timed_run(RolloutEngine(model), jobs))
        ratios.append(speeds[-1] * alone_s / len(alone))
    return {
        "num_rollouts": len(jobs),
        "rounds": rounds,
        "rollouts_per_s": float(np.median(speeds)),
        "rollouts_over_alone": float(np.median(ratios)),
        "rollouts_over_alone_range": [float(min(ratios)), float(max(ratios))],
    }


def time_capture(model: ElasticModel) -> dict[str, Any]:
    """What capturing all graphs takes before the first request."""
    graph = model.decoder.graph
    if graph is None:
        return {}
    started, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
    model.capture_graphs()
    return {
        "num_graphs": graph.num_graphs,
        "capture_s": time.perf_counter() - started,
        "capture_gb": (free - torch.cuda.mem_get_info()[0]) / 1e9,
    }


def measured_parts(
    model: ElasticModel, examples: list[Example], arguments: argparse.Namespace, progress: Progress
) -> Iterator[dict[str, Any]]:
    """All that is measured, what has a bar first."""
    yield time_capture(model)
    yield against_the_limit(model, progress)
    yield rollouts_against_alone(model, examples, arguments.group_size, arguments.rounds)
    if arguments.run_dir is not None:
        yield {"controller_parts_ms": controller_cost(arguments.run_dir, examples, progress, arguments.device)}
    yield {"requests": time_requests(model, examples, arguments.repeats, progress)}


def show(results: dict[str, Any], console: Console) -> None:
    """Print what the JSON line holds."""
    table = Table(title=f"one request on {results['device']['name']}, {results['dtype']}")
    for column in ("knobs", "p50 ms", "over full", "prepare", "vision", "first block", "prefill", "decode step"):
        table.add_column(column)
    for name, row in results["requests"].items():
        mean, low, high = row["over_full"]
        stages = [f"{row[stage]:.2f}" for stage in ("prepare_ms", "vision_ms", "first_block_ms", "prefill_ms")]
        table.add_row(
            name, f"{row['p50_ms']:.2f}", f"{mean:.3f} [{low:.3f}, {high:.3f}]", *stages, f"{row['decode_step_ms']:.3f}"
        )
    console.print(table)
    console.print({name: value for name, value in results.items() if name not in ("requests", "versions", "device")})


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a model directory")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-examples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run-dir", type=Path, help="a finished run of the model, whose controller is timed too")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    console = Console(stderr=True)
    started = time.perf_counter()
    model = ElasticModel.from_pretrained(
        arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype)
    )
    load_s, examples = time.perf_counter() - started, make_examples(arguments.num_examples)
    results: dict[str, Any] = {
        **provenance(collect_device_facts(model.device, model.dtype, compiler=model.adapter.compiler)),
        "num_parameters": sum(weight.numel() for weight in model.adapter.model.parameters()),
        "num_examples": len(examples),
        "repeats": arguments.repeats,
        "load_s": load_s,
    }
    with Progress(console=console) as progress, torch.inference_mode():
        for part in measured_parts(model, examples, arguments, progress):
            results |= part
            keep_result(results, arguments.results, "real-size")
    if model.device.type == "cuda":
        results["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    show(results, Console())
    write_result(results, arguments.results, "real-size", console)


if __name__ == "__main__":
    main()
