#!/usr/bin/env python3
"""How well latencies are measured, predicted, bounded, carried over and corrected, all in one run.

Prints a table against the bars and, last, one JSON line; the same goes to RESULTS/latency-DEVICE.json. Figures go to
the folder that --plots names. The device should be idle; how steady it was is part of the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency_models import MODELS, LinearModel
from latency_plots import (
    plot_calibration,
    plot_drift,
    plot_error_by_knob,
    plot_predicted_measured,
    plot_stage_shares,
)
from latency_serving import (
    ALPHA,
    Bench,
    DearestFeasible,
    coverage_of_picks,
    interval,
    measure_drift,
    median_samples,
    times,
    wilson,
)
from result_file import provenance, write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pacevlm.controller.policy import ControllerPolicy
from pacevlm.data.digits import DigitVQA
from pacevlm.knobs import Knobs
from pacevlm.latency.calibrate import fit_latency, full_p50_ms
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.profile import Profile, Sample
from pacevlm.latency.profile_summary import stage_sums_ms, summarise_profile
from pacevlm.models.elastic import ElasticModel
from pacevlm.pacer import Pacer
from pacevlm.request.pacing import Pacing

FILLER = "Look at the picture with care."
# Prompt tokens and knobs that fitting never sees: a gap in the middle, the longest prompts, and three tenths of the
# space.
GAP_QUANTILES, TOP_QUANTILE, HELD_OUT_KNOBS = (0.4, 0.6), 0.8, 0.3
BARS = {
    "e2e_mape": ("<=", 0.05),
    "ttft_mape": ("<=", 0.05),
    "tpot_mape": ("<=", 0.08),
    "within_10pct": (">=", 0.95),
    "extrapolation_ratio": ("<=", 1.0),
    "coverage_picked": (">=", 0.95),
    "bound_over_p95": ("<=", 1.10),
    "violations_after_drift": ("<=", 0.05),
    "transfer_ratio": ("<=", 1.5),
    "stage_sum_ratio": ("within", (0.98, 1.02)),
    "estimator_share_of_request": ("<=", 0.005),
}


def make_requests(split: str, num_requests: int, seed: int, max_filler: int) -> list[tuple[Any, str]]:
    """Scenes of all canvases, their questions stretched by up to `max_filler` sentences."""
    rng = np.random.default_rng([seed, 7])
    requests = []
    for example in DigitVQA(split, num_requests, seed=seed):
        filler = " ".join([FILLER] * int(rng.integers(0, max_filler + 1)))
        requests.append((example.source, f"{filler} {example.question}".strip()))
    return requests


# Held-out requests ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Samples for fitting, and samples whose knobs *and* prompt length fitting has not seen."""

    fit: list[Sample]
    gap: list[Sample]
    top: list[Sample]


def hold_out(profile: Profile, seed: int) -> HeldOut:
    """Split a profile by knobs and by prompt tokens; samples with only one of the two unseen are left out."""
    space, rng = profile.knob_space, np.random.default_rng([seed, 11])
    inner = [knobs for knobs in space if knobs not in (space.cheapest, space.full)]
    unseen = {inner[i] for i in rng.permutation(len(inner))[: round(HELD_OUT_KNOBS * len(space))]}
    tokens = np.array([sample.num_prompt_tokens for sample in profile.samples])
    low, high = np.quantile(tokens, GAP_QUANTILES)
    top = np.quantile(tokens, TOP_QUANTILE)
    parts: dict[str, list[Sample]] = {"fit": [], "gap": [], "top": []}
    for sample in profile.samples:
        n = sample.num_prompt_tokens
        place = "gap" if low <= n <= high else "top" if n > top else "fit"
        if (place == "fit") == (sample.knobs not in unseen):
            parts[place].append(sample)
    return HeldOut(**parts)


def tpot_ms(samples: Sequence[Sample]) -> np.ndarray:
    """Mean milliseconds per decoded token, NaN where none was decoded."""
    return np.array([np.mean(s.stages.decode_ms) if s.stages.decode_ms else np.nan for s in samples])


def predicted_tpot_ms(estimator: LatencyEstimator, samples: Sequence[Sample]) -> np.ndarray:
    """The estimator's milliseconds per decoded token."""
    steps = np.array([max(sample.num_output_tokens - 1, 1) for sample in samples])
    return (estimator.predict_samples(samples, "e2e") - estimator.predict_samples(samples, "ttft")) / steps


def relative_errors(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Signed relative errors where there is something to compare."""
    known = np.isfinite(measured)
    return (predicted[known] - measured[known]) / measured[known]


def mape(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Mean absolute relative error."""
    return float(np.abs(relative_errors(predicted, measured)).mean())


def compare_models(split: HeldOut, model: ElasticModel) -> dict[str, dict[str, float]]:
    """End-to-end error of every competitor on gap and top, fitted to the same samples."""
    rows = {}
    for name, make in {**MODELS, "linear, relative error": lambda _: LinearModel(relative=True)}.items():
        fitted = make(model).fit(split.fit, model.trained_top_k, model.stage2_after)
        rows[name] = {
            part: mape(fitted.predict(samples, "e2e"), times(samples)["e2e"])
            for part, samples in (("gap", split.gap), ("top", split.top))
        }
    return rows


# The whole -----------------------------------------------------------------------------------------------------------


def run_benchmark(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """All measurements; returns the results and what the figures show."""
    seed, threads = arguments.seed, arguments.num_threads
    model = ElasticModel.from_pretrained(
        arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype)
    )
    bench = Bench(model, threads, progress, seed)
    requests = make_requests("train", arguments.num_requests, seed, max_filler=12)
    natural = make_requests("val", arguments.num_requests, seed, max_filler=0)

    profile = bench.profile(requests, arguments.num_samples, threads, "profile", arguments.repeats)
    summary = summarise_profile(profile)
    # Predictions are of the usual latency, so they are judged by the median of a point's repeats. How far single
    # requests stray from it is what bounds are for; that is reported beside it.
    split = hold_out(profile, seed)
    single, split = [*split.gap, *split.top], HeldOut(split.fit, median_samples(split.gap), median_samples(split.top))
    fit_profile = dataclasses.replace(profile, samples=tuple(split.fit))
    settings = {"trained_top_k": model.trained_top_k, "stage2_after": model.stage2_after}
    estimator = LatencyEstimator.fit(fit_profile, **settings)
    held_out = [*split.gap, *split.top]
    measured = times(held_out)
    errors = relative_errors(estimator.predict_samples(held_out), measured["e2e"])
    ttft_errors = relative_errors(estimator.predict_samples(held_out, "ttft"), measured["ttft"])
    tpot_errors = relative_errors(predicted_tpot_ms(estimator, held_out), tpot_ms(held_out))
    single_errors = relative_errors(estimator.predict_samples(single), times(single)["e2e"])
    repeats_ms = np.array(profile.noise_floor.repeats_ms)
    floor = repeats_ms / np.median(repeats_ms) - 1
    # The same for medians of as many of them, drawn at random as the repeats of a point lie anywhere in the run.
    drawn_ms = np.random.default_rng(seed).choice(repeats_ms, (1000, arguments.repeats))
    median_floor = np.sort(drawn_ms, axis=1)[:, arguments.repeats // 2] / np.median(repeats_ms) - 1
    models = compare_models(split, model)
    ours = {
        part: mape(estimator.predict_samples(samples), times(samples)["e2e"])
        for part, samples in (("gap", split.gap), ("top", split.top))
    }
    best = min(rows["top"] for rows in models.values())

    sizes = model.view(*requests[0]).sizes
    started, num_calls = time.perf_counter(), 2000
    for _ in range(num_calls):
        estimator.predict_all(sizes, 4)
    predict_ms = (time.perf_counter() - started) / num_calls * 1e3

    fit = fit_latency(profile, **settings, alpha=ALPHA, seed=seed)
    full_ms = full_p50_ms(bench.profile(natural, 200, threads, "natural requests"))
    picks = coverage_of_picks(bench, fit.guardrail, full_ms, natural, arguments.num_picked)
    pacing = Pacing(picks.pop("guardrail"), None, model.max_new_tokens)

    if arguments.run_dir is None:
        drift = measure_drift(
            bench, lambda p: DearestFeasible(model.knob_space, p), pacing, full_ms, natural, arguments.phase
        )
        drift_policy = DearestFeasible.name
    else:
        pacer = Pacer.from_pretrained(arguments.run_dir)
        drift = measure_drift(
            Bench(pacer.model, threads, progress, seed),
            lambda _: ControllerPolicy(pacer.controller),
            pacer.pacing,
            pacer.full_p50_ms,
            natural,
            arguments.phase,
        )
        drift_policy = ControllerPolicy.name

    transfer = {}
    if model.device.type == "cpu":
        other = bench.profile(requests, arguments.num_transfer, arguments.other_threads, "other number of threads")
        other_split = hold_out(other, seed)
        few = _few_with_decoding(other_split.fit, 25, seed)
        moved = estimator.transfer(dataclasses.replace(other, samples=tuple(few)))
        refit = LatencyEstimator.fit(dataclasses.replace(other, samples=tuple(other_split.fit)), **settings)
        other_held_out = [*other_split.gap, *other_split.top]
        truth = times(other_held_out)["e2e"]
        transfer = {
            "transfer_mape": mape(moved.predict_samples(other_held_out), truth),
            "refit_mape": mape(refit.predict_samples(other_held_out), truth),
            "untransferred_mape": mape(estimator.predict_samples(other_held_out), truth),
            "num_transfer_samples": len(few),
            "other_threads": arguments.other_threads,
        }
        transfer["transfer_ratio"] = transfer["transfer_mape"] / transfer["refit_mape"]

    busy = drift["corrected"]["phases"]["busy"]
    device = profile.device
    results = {
        **provenance(device),
        "seed": seed,
        "model": arguments.model,
        "num_samples": len(profile.samples),
        "num_fit": len(split.fit),
        "num_held_out": len(held_out),
        "repeats": arguments.repeats,
        "e2e_mape": float(np.abs(errors).mean()),
        "e2e_mape_interval": interval(np.abs(errors)),
        "ttft_mape": float(np.abs(ttft_errors).mean()),
        "ttft_mape_interval": interval(np.abs(ttft_errors)),
        "tpot_mape": float(np.abs(tpot_errors).mean()),
        "tpot_mape_interval": interval(np.abs(tpot_errors)),
        "within_10pct": float((np.abs(errors) <= 0.1).mean()),
        "within_10pct_interval": wilson(int((np.abs(errors) <= 0.1).sum()), len(errors)),
        "single_request_mape": float(np.abs(single_errors).mean()),
        "single_request_within_10pct": float((np.abs(single_errors) <= 0.1).mean()),
        "models": {"pacevlm": ours, **models},
        "extrapolation_ratio": ours["top"] / best,
        **{key: value for key, value in picks.items() if key != "curve"},
        "violations_after_drift": busy["violations_from_101st"],
        "violations_after_drift_interval": busy["interval"],
        "drift_policy": drift_policy,
        "drift": {name: row["phases"] for name, row in drift.items()},
        **transfer,
        "stage_sum_ratio": summary.stage_sum_ratio,
        "stage_sum_ratio_range": [summary.stage_sum_ratio_min, summary.stage_sum_ratio_max],
        "noise_floor_cv": summary.noise_cv,
        "noise_floor_mape": float(np.abs(floor).mean()),
        "noise_floor_within_10pct": float((np.abs(floor) <= 0.1).mean()),
        "median_noise_floor_mape": float(np.abs(median_floor).mean()),
        "median_noise_floor_within_10pct": float((np.abs(median_floor) <= 0.1).mean()),
        "num_noisy_windows": summary.num_noisy_windows,
        "estimator_ms_per_request": predict_ms,
        "estimator_share_of_request": predict_ms / full_ms,
        "full_p50_ms": full_ms,
    }
    figures = {
        "held_out": held_out,
        "predicted": estimator.predict_samples(held_out),
        "measured": measured["e2e"],
        "errors": errors,
        "profile": profile,
        "curve": picks["curve"],
        "num_picked": picks["num_picked"],
        "drift": drift["corrected"],
        "phase": arguments.phase,
    }
    return results, figures


def _few_with_decoding(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    order = np.random.default_rng([seed, 13]).permutation(len(samples))
    return [samples[i] for i in order[:count]]


def draw(figures: dict[str, Any], folder: Path) -> None:
    """Write the five figures."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = figures["held_out"]
    tiers = [sample.knobs.tier for sample in held_out]
    plot_predicted_measured(figures["predicted"], figures["measured"], tiers, folder / "predicted-measured")
    plot_error_by_knob([sample.knobs for sample in held_out], figures["errors"], folder / "error-by-knob")
    profile = figures["profile"]
    space = profile.knob_space
    middle = Knobs(space.tiers[1], space.top_ks[len(space.top_ks) // 2], space.num_blocks[len(space.num_blocks) // 2])
    shares = {}
    for knobs in (space.cheapest, middle, space.full):
        rows = [stage_sums_ms(sample.stages) for sample in profile.samples if sample.knobs == knobs]
        if rows:
            shares[str(knobs)] = {stage: float(np.mean([row[stage] for row in rows])) for stage in rows[0]}
    plot_stage_shares(shares, folder / "stage-shares")
    curve = figures["curve"]
    plot_calibration(curve["nominal"], curve["empirical"], figures["num_picked"], folder / "calibration")
    row, phase = figures["drift"], figures["phase"]
    plot_drift(row["measured_over_budget"], row["factor"], row["predicted_ms"], [(phase, 2 * phase)], folder / "drift")


def show(results: dict[str, Any], console: Console) -> None:
    """Print the figures beside their bars, and the competitors."""
    table = Table(title=f"latency on {results['device']['name']}, {results['device']['num_threads']} thread(s)")
    for column in ("figure", "value", "95 % interval", "bar", "met"):
        table.add_column(column)
    for name, (relation, bar) in BARS.items():
        value = results.get(name)
        if value is None:
            table.add_row(name, "not measured", "", f"{relation} {bar}", "-")
            continue
        low_high = results.get(f"{name}_interval")
        met = value <= bar if relation == "<=" else value >= bar if relation == ">=" else bar[0] <= value <= bar[1]
        shown = "" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}"
        table.add_row(name, f"{value:.4f}", shown, f"{relation} {bar}", "yes" if met else "NO")
    for name in (
        *("median_noise_floor_mape", "median_noise_floor_within_10pct"),
        *("noise_floor_cv", "noise_floor_mape", "noise_floor_within_10pct"),
    ):
        table.add_row(name, f"{results[name]:.4f}", "", "the floor", "")
    for name in ("single_request_mape", "single_request_within_10pct"):
        table.add_row(name, f"{results[name]:.4f}", "", "", "")
    console.print(table)
    table = Table(title="end-to-end MAPE on unseen knobs and unseen prompt lengths")
    for column in ("model", "in a gap of lengths", "beyond the longest"):
        table.add_column(column)
    for name, row in results["models"].items():
        table.add_row(name, f"{row['gap']:.4f}", f"{row['top']:.4f}")
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a model directory, or 'embedded'")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--other-threads", type=int, default=2, help="threads to carry the estimator over to")
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument("--num-samples", type=int, default=1200, help="pairs of request and knobs")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each pair")
    parser.add_argument("--num-transfer", type=int, default=1200)
    parser.add_argument("--num-picked", type=int, default=1500)
    parser.add_argument("--phase", type=int, default=500, help="requests in each of the three phases of the drift test")
    parser.add_argument("--run-dir", type=Path, help="a finished run whose controller serves the drift test")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plots", type=Path, help="folder for the five figures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        results, figures = run_benchmark(arguments, progress)
    show(results, Console())
    if arguments.plots is not None:
        draw(figures, arguments.plots)
        console.print(f"figures written to {arguments.plots}")
    write_result(results, arguments.results, "latency", console)


if __name__ == "__main__":
    main()
