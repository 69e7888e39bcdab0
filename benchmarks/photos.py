#!/usr/bin/env python3
"""Whether budgets are kept on photographs: files of a phone's sizes, answered by a finished run's Pacer, one at a time.

Pictures of 4 and 12 megapixels lie on the disk as JPEGs of varied content and quality, upright and lying, some of them
turned by their EXIF orientation. Every picture is asked a question of the run's test split, at every budget, in random
order. Budgets are fractions of the median bound on the full configuration of the large pictures. Prints a table and,
last, one JSON line; the same goes to RESULTS/photos-DEVICE.json. The device should be idle.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from result_file import provenance, write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pacevlm.data.splits import load_splits
from pacevlm.evaluation.statistics import proportion_interval
from pacevlm.latency.measuring import without_garbage_collection
from pacevlm.pacer import Answer, Pacer
from pacevlm.pipeline.run_config import load_run_config

SIZES = {"4 megapixels": (2304, 1728), "12 megapixels": (4032, 3024)}
ORIENTATION, ORIENTATIONS = 0x0112, (1, 3, 6, 8)
NUM_WARMUP, WINDOW = 10, 20


def make_photo(path: Path, width: int, height: int, rng: np.random.Generator) -> None:
    """Write a JPEG of blurred shapes with edges and grain, as much of each as chance has it."""
    canvas = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    for _ in range(int(rng.integers(10, 60))):
        left, top = int(rng.integers(0, width - 8)), int(rng.integers(0, height - 8))
        right = int(min(width, left + rng.integers(8, width // 2)))
        bottom = int(min(height, top + rng.integers(8, height // 2)))
        texture = rng.integers(0, 256, (int(rng.integers(2, 24)), int(rng.integers(2, 24)), 3), dtype=np.uint8)
        canvas.paste(Image.fromarray(texture).resize((right - left, bottom - top)), (left, top))
    if rng.random() < 0.5:
        canvas = canvas.filter(ImageFilter.BoxBlur(int(rng.integers(1, 6))))
    pixels = np.asarray(canvas, dtype=np.int16)
    grain = rng.normal(0.0, rng.uniform(0.0, 14.0), (height, width)).astype(np.int16)
    photo = Image.fromarray(np.clip(pixels + grain[..., None], 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        photo = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ORIENTATION] = ORIENTATIONS[int(rng.integers(len(ORIENTATIONS)))]
    photo.save(path, "JPEG", quality=int(rng.integers(75, 96)), exif=exif)


def make_photos(folder: Path, num_each: int, seed: int, progress: Progress) -> dict[Path, str]:
    """So many files of each size, with the size's name."""
    rng, photos = np.random.default_rng(seed), {}
    task = progress.add_task("pictures", total=num_each * len(SIZES))
    for (name, (width, height)), i in itertools.product(SIZES.items(), range(num_each)):
        path = folder / f"{width}x{height}-{i}.jpg"
        make_photo(path, width, height, rng)
        photos[path] = name
        progress.advance(task)
    return photos


def share(hits: int, n: int) -> dict[str, float | int | None]:
    """A share with its 95 % Wilson interval."""
    if not n:
        return {"share": None, "low": None, "high": None, "hits": 0, "n": 0}
    found = proportion_interval(hits, n, method="wilson")
    return {"share": hits / n, "low": found.low, "high": found.high, "hits": hits, "n": n}


def summarise(answers: Sequence[Answer]) -> dict[str, Any]:
    """How often nothing was feasible, and how often an answer was late where something was."""
    feasible = [answer for answer in answers if answer.feasible]
    reasons = {answer.why_infeasible.split(",")[0] for answer in answers if answer.why_infeasible}
    return {
        "infeasible": share(len(answers) - len(feasible), len(answers)),
        "late": share(sum(answer.measured_ms > answer.budget_ms for answer in feasible), len(feasible)),
        "beyond": sum("nothing is promised" in (answer.why_infeasible or "") for answer in answers),
        "reasons": sorted(reasons)[:5],
        "measured_p50_ms": float(np.median([answer.measured_ms for answer in answers])),
        "read_p50_ms": float(np.median([answer.times.read_ms for answer in answers])),
        "prepare_p50_ms": float(np.median([answer.times.prepare_ms for answer in answers])),
        "predicted_error_p50": float(np.median([a.predicted_ms / (a.measured_ms - a.waited_ms) - 1 for a in answers])),
        "over_bound": share(
            sum(answer.measured_ms > answer.upper_bound_ms for answer in feasible),
            len(feasible),
        ),
    }


def run_benchmark(arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Answer all requests; returns the results."""
    config = load_run_config(arguments.run_dir)
    questions = [example.question for example in load_splits(config.data, config.picture).test]
    pacer = Pacer.from_pretrained(arguments.run_dir, device=config.model.device)
    rng = np.random.default_rng([arguments.seed, 1])
    with tempfile.TemporaryDirectory() as folder:
        photos = make_photos(Path(folder), arguments.num_pictures, arguments.seed, progress)
        large = [path for path, name in photos.items() if name == max(SIZES, key=lambda one: SIZES[one][0])]
        bounds_ms = [pacer.estimate(path, questions[0])[-1].upper_bound_ms for path in large]
        full_bound_ms = float(np.median([bound_ms for bound_ms in bounds_ms if np.isfinite(bound_ms)]))
        budgets_ms = arguments.budgets_ms or [fraction * full_bound_ms for fraction in arguments.fractions]
        paths = [list(photos)[i % len(photos)] for i in rng.permutation(arguments.num)]
        asked = [(path, questions[int(rng.integers(len(questions)))]) for path in paths]
        requests = list(itertools.product(asked, budgets_ms))
        requests = [requests[i] for i in rng.permutation(len(requests))]
        for (path, question), budget_ms in requests[:NUM_WARMUP]:
            pacer.answer(path, question, budget_ms)
        if arguments.track_drift:
            pacer.track_drift()
        answers: list[tuple[str, Answer]] = []
        task = progress.add_task("requests", total=len(requests))
        for start in range(0, len(requests), WINDOW):
            with without_garbage_collection():
                for (path, question), budget_ms in requests[start : start + WINDOW]:
                    answers.append((photos[path], pacer.answer(path, question, budget_ms)))
            progress.update(task, completed=len(answers))
    return {
        **provenance(pacer.pacing.guardrail.estimator.device),
        "seed": arguments.seed,
        "num": arguments.num,
        "track_drift": arguments.track_drift,
        "full_bound_ms": full_bound_ms,
        "drift_factor": None if pacer.drift is None else pacer.drift.factor,
        "budgets": [
            {
                "fraction": budget_ms / full_bound_ms,
                "budget_ms": budget_ms,
                **summarise([answer for _, answer in answers if answer.budget_ms == budget_ms]),
                "sizes": {
                    name: summarise([answer for of, answer in answers if of == name and answer.budget_ms == budget_ms])
                    for name in sorted({of for of, _ in answers})
                },
            }
            for budget_ms in budgets_ms
        ],
    }


def print_table(results: dict[str, Any]) -> None:
    """One row for every budget, and for every size under it."""
    table = Table(title=f"photographs, {results['num']} requests at each budget")
    for column in ("budget (ms)", "pictures", "n", "infeasible %", "late where feasible %", "measured p50 (ms)"):
        table.add_column(column)
    for budget in results["budgets"]:
        for name, row in {"all": budget, **budget["sizes"]}.items():
            cells = [_percent(row["infeasible"]), _percent(row["late"]), f"{row['measured_p50_ms']:.0f}"]
            table.add_row(f"{budget['budget_ms']:.0f}", name, str(row["infeasible"]["n"]), *cells)
    Console().print(table)


def _percent(value: dict[str, Any]) -> str:
    if value["share"] is None:
        return "-"
    return f"{100 * value['share']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run-dir", type=Path, required=True, help="a finished run, or a bundle beside its config.json"
    )
    parser.add_argument("--num", type=int, default=200, help="requests at every budget")
    parser.add_argument("--num-pictures", type=int, default=20, help="files of each size")
    parser.add_argument(
        "--fractions",
        type=float,
        nargs="+",
        default=(0.5, 0.95, 1.1),
        help="budgets, as fractions of the median bound on the full configuration of the large pictures",
    )
    parser.add_argument("--budgets-ms", type=float, nargs="+", help="budgets in milliseconds, in place of fractions")
    parser.add_argument("--track-drift", action="store_true", help="correct bounds by how slow the machine turns out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        results = run_benchmark(arguments, progress)
    print_table(results)
    write_result(results, arguments.results, "photos", console)


if __name__ == "__main__":
    main()
