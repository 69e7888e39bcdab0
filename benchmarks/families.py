#!/usr/bin/env python3
"""How fast families from transformers run here, against transformers' own `generate` on the same weights.

Models are random, of stated sizes. With full knobs, a request and the processor with `generate` give the same tokens in
turns within one run. Rollouts run in one batch, and some of them alone: `generate` on the model with its blocks taken
out and its top_k lowered. Prints a table and, last, one JSON line; the same goes to RESULTS/families-DEVICE.json.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_families import FAMILIES, MAX_NEW_TOKENS, SIZES, random_model
from result_file import provenance, write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rollouts import sample_jobs, timed_run
from timing import Interleaved, bootstrap_ratio

from pacevlm.knobs import Knobs
from pacevlm.latency.measuring import use_num_threads
from pacevlm.latency.profile import collect_device_facts
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.run import run_forced
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.types import Example

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Which number is the largest?"
SIDES = [(480, 640), (320, 320), (600, 300), (200, 350), (768, 1024), (256, 400)]


def folder_lines(family: str) -> int:
    """Lines of a family's folder."""
    files = (ROOT / "pacevlm" / "models" / family).glob("*.py")
    return sum(len(file.read_text().splitlines()) for file in files)


def laws(family: str) -> int:
    """How many laws of a family pass on the CPU; raises CalledProcessError if one does not."""
    chosen = "qwen3_vl and not qwen3_vl_moe" if family == "qwen3_vl" else family
    files = ["tests/models/test_decoder.py", "tests/models/test_graph_decode.py", "tests/test_families.py"]
    files += [f"tests/models/{family}"] if (ROOT / "tests" / "models" / family).is_dir() else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"({chosen}) and not xpu", *files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    return int(passed[1]) if passed else 0


def make_examples(count: int, seed: int) -> list[Example]:
    """Random pictures of several sizes, each with the same question."""
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (*SIDES[i % len(SIDES)], 3), dtype=np.uint8) for i in range(count)]
    return [Example(f"{seed}-{i}", Image.fromarray(p), QUESTION, ("x",)) for i, p in enumerate(pictures)]


def generate_alone(family: str, model: ElasticModel, example: Example, knobs: Knobs) -> list[int]:
    """Ids that transformers' `generate` gives for an example, the picture prepared as pacevlm prepares it."""
    adapter: Any = model.adapter
    prompt = adapter.encode_question(example.question)
    prepared = adapter.prepare(example.image, prompt, model.vision_budgets[knobs.tier])
    inputs = {name: value.to(model.device) for name, value in FAMILIES[family].inputs(prepared).items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    kept = model.order.kept(knobs.num_blocks)
    top_ks = [model.trained_top_k if b < model.stage2_after else knobs.top_k for b in range(adapter.num_blocks)]
    removed = [block for block in range(adapter.num_blocks) if block not in kept]
    with FAMILIES[family].edited(adapter, removed, top_ks):
        ids = adapter.model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=sorted(adapter.end_token_ids),
            pad_token_id=0,
        )  # fmt: skip
    found: list[int] = ids[0, len(prepared.input_ids) :].tolist()
    return found


def full_knobs(family: str, model: ElasticModel, repeats: int, progress: Progress) -> dict[str, Any]:
    """Time of `generate` over that of a request with full knobs, in turns."""
    examples, full = make_examples(6, 0), model.knob_space.full
    ways = {
        "generate": lambda example: generate_alone(family, model, example, full),
        "ours": lambda example: list(run_forced(model, example.image, example.question, full).token_ids),
    }
    timed = Interleaved(ways, model.synchronise)
    timed.run(examples, repeats, progress, family, num_warmup=len(examples))
    ratio, last = bootstrap_ratio(timed, "generate", "ours"), timed.last_results
    pairs = list(zip(last["generate"], last["ours"], strict=True))
    return {
        "mean": ratio.mean,
        "low": ratio.low,
        "high": ratio.high,
        "num_timed": repeats * len(examples),
        "ours_ms": timed.p50_ms("ours"),
        "generate_ms": timed.p50_ms("generate"),
        "same_answers": sum(one == other for one, other in pairs),
        "num_answers": len(pairs),
        "num_parameters": sum(weight.numel() for weight in model.adapter.model.parameters()),
    }


def rollouts(family: str, model: ElasticModel, rounds: int, group: int) -> dict[str, Any]:
    """Rollouts a second in a batch of fresh examples over those of `generate`, one by one with the same knobs."""
    ratios, same, compared = [], 0, 0
    timed_run(RolloutEngine(model), sample_jobs(model, make_examples(4, 99), 4, seed=99))
    for number in range(rounds):
        examples = make_examples(8, 1 + number)
        jobs = sample_jobs(model, examples, group, seed=number)
        alone = [jobs[i] for i in np.random.default_rng(number).permutation(len(jobs))[:8]]
        lone_s, answers = 0.0, []
        for half in (alone[:4], alone[4:]):
            model.synchronise()
            started = time.perf_counter()
            answers += [generate_alone(family, model, example, knobs) for example, knobs in half]
            model.synchronise()
            lone_s += time.perf_counter() - started
            if half == alone[:4]:
                engine = RolloutEngine(model)
                batch_s = timed_run(engine, jobs)
        ratios.append(lone_s / len(alone) * len(jobs) / batch_s)
        decoded = [model.adapter.decode(ids) for ids in answers]
        same += sum(o.answer == text for o, text in zip(engine.run(alone), decoded, strict=True))
        compared += len(alone)
    return {
        "rollouts_over_alone": float(np.median(ratios)),
        "rollouts_over_alone_range": [min(ratios), max(ratios)],
        "rollouts": {"rounds": rounds, "in_batch": len(jobs), "same_answers": same, "num_answers": compared},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small", "large"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--laws", action="store_true", help="run the tests of every family too, and count what passed")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    console, families = Console(stderr=True), {}
    dtype = getattr(torch, arguments.dtype)
    with Progress(console=console) as progress, use_num_threads(arguments.num_threads), torch.inference_mode():
        for family in arguments.family:
            families[family] = found = {"folder_lines": folder_lines(family), "generate_over_full": {}}
            for size in arguments.size:
                with torch.inference_mode(False):
                    model = random_model(family, size, arguments.device, dtype)
                found["generate_over_full"][size] = full_knobs(family, model, arguments.repeats, progress)
                if size == arguments.size[-1]:
                    found |= rollouts(family, model, arguments.rounds, arguments.group_size)
                facts = collect_device_facts(model.device, model.dtype, compiler=model.adapter.compiler)
                del model
    if arguments.laws:
        for family in arguments.family:
            families[family]["laws"] = laws(family)
    results = {**provenance(facts), "families": families}
    table = Table(title=f"families on {results['device']['name']}, {results['dtype']}")
    for column in ("family", "size", "generate ms", "ours ms", "ratio", "same answers", "rollouts over alone"):
        table.add_column(column)
    for family, found in families.items():
        for size, row in found["generate_over_full"].items():
            table.add_row(
                family,
                size,
                f"{row['generate_ms']:.1f}",
                f"{row['ours_ms']:.1f}",
                f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
                f"{row['same_answers']} of {row['num_answers']}",
                f"{found['rollouts_over_alone']:.1f}",
            )
    Console().print(table)
    write_result(results, arguments.results, "families", console)


if __name__ == "__main__":
    main()
