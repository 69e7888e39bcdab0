"""Requests served one after the other under budgets: whether bounds hold for what policies pick, and under drift."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.controller.policy_interface import Policy, PolicyInput
from pacevlm.evaluation.statistics import bootstrap_mean, proportion_interval
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.drift import DriftCorrection, DriftSettings
from pacevlm.latency.guardrail import Guardrail, group_of
from pacevlm.latency.measuring import use_num_threads, without_garbage_collection
from pacevlm.latency.profile import Profile, Sample
from pacevlm.latency.profiler import ProfilerSettings, profile_requests, sample_of
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.pacing import Pacing
from pacevlm.request.profiling import profiling_run
from pacevlm.request.run import run_request
from pacevlm.types import Answer, Objective, StageTimes

ALPHA = 0.05
# Budgets, as shares of the full configuration's median. The picks are bounded for the longest answers, which take
# longer than the median; a core that is shared takes more than twice as long.
PICK_BUDGETS, DRIFT_BUDGETS = (0.8, 2.2), (1.2, 3.2)


class DearestFeasible(OneChoicePolicy):
    """Takes the configuration whose bound comes closest to the budget: the hardest choice for a bound."""

    name = "dearest_feasible"

    def __init__(self, space: KnobSpace, pacing: Pacing) -> None:
        super().__init__(space)
        self.pacing = pacing

    def choose(self, request: PolicyInput) -> Knobs:
        """The feasible configuration with the highest predicted latency."""
        estimator = self.pacing.guardrail.estimator
        predicted_ms = estimator.predict_all(request.view.sizes, 4, request.objective.kind).ravel()
        return self.space[int(np.argmax(np.where(self.feasible(request), predicted_ms, -1.0)))]


def interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean."""
    found = bootstrap_mean(values)
    return [found.low, found.high]


def wilson(hits: int, n: int) -> list[float]:
    """95 % Wilson interval of a share."""
    found = proportion_interval(hits, n, method="wilson")
    return [found.low, found.high]


def times(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """End-to-end time and time to the first token, milliseconds."""
    return {
        "e2e": np.array([sample.stages.e2e_ms for sample in samples]),
        "ttft": np.array([sample.stages.ttft_ms for sample in samples]),
    }


def median_samples(samples: Sequence[Sample]) -> list[Sample]:
    """One sample for each request and knobs, with the median of its repeats for every stage and for the whole."""
    groups: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        sizes = (sample.num_text_tokens, sample.num_pixels, sample.num_units, sample.num_output_tokens)
        groups.setdefault((sample.knobs, *sizes), []).append(sample)
    return [
        dataclasses.replace(
            group[0],
            stages=StageTimes(
                **{
                    field.name: _median_ms([getattr(sample.stages, field.name) for sample in group])
                    for field in dataclasses.fields(StageTimes)
                }
            ),
        )
        for group in groups.values()
    ]


def _median_ms(values: Sequence[Any]) -> Any:
    """Median of times, or of the times of every decode step."""
    medians = np.median(np.array(values), axis=0)
    return tuple(medians.tolist()) if medians.ndim else float(medians)


# Running -------------------------------------------------------------------------------------------------------------


class Bench:
    """A model, its requests, and a progress bar."""

    def __init__(self, model: ElasticModel, num_threads: int, progress: Progress, seed: int) -> None:
        self.model, self.num_threads, self.progress, self.seed = model, num_threads, progress, seed

    def profile(
        self, requests: Sequence[tuple[Any, str]], num_samples: int, num_threads: int, what: str, repeats: int = 1
    ) -> Profile:
        """Measure a profile with answers of all lengths; repeats of a point lie anywhere in the run."""
        settings = ProfilerSettings(
            num_requests=len(requests),
            num_samples=num_samples,
            repeats=repeats,
            num_threads=num_threads,
            max_output_tokens=2 * self.model.max_new_tokens,
            seed=self.seed,
        )
        task = self.progress.add_task(what)
        return profile_requests(
            profiling_run(self.model, requests),
            self.model.knob_space,
            settings,
            model_identity=self.model.identity,
            device=self.model.device,
            dtype=self.model.dtype,
            progress=lambda state: self.progress.update(task, completed=state.num_done, total=state.num_total),
        )

    def serve(
        self,
        policy: Policy,
        pacing: Pacing,
        requests: Sequence[tuple[Any, str]],
        budgets_ms: np.ndarray,
        what: str,
        drift: DriftCorrection | None = None,
        before: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Run one request after the other, each under its own budget."""
        results: list[Answer] = []
        task = self.progress.add_task(what, total=len(budgets_ms))
        with use_num_threads(self.num_threads):
            for start in range(0, len(budgets_ms), 20):
                with without_garbage_collection():
                    for i in range(start, min(start + 20, len(budgets_ms))):
                        if before is not None:
                            before(i)
                        image, question = requests[i % len(requests)]
                        objective = Objective(float(budgets_ms[i]))
                        results.append(run_request(self.model, policy, image, question, objective, pacing, drift=drift))
                self.progress.update(task, completed=len(results))
        return results


def coverage_of_picks(
    bench: Bench, guardrail: Guardrail, full_ms: float, requests: Sequence[tuple[Any, str]], num_picked: int
) -> dict[str, Any]:
    """Calibrate on what a policy picks, then see on new requests whether the bound holds, and how tight it is."""
    model, rng = bench.model, np.random.default_rng([bench.seed, 3])
    results: dict[str, Any] = {}
    nominal = Pacing(guardrail, None, model.max_new_tokens)
    budgets = full_ms * rng.uniform(*PICK_BUDGETS, num_picked)
    first = bench.serve(DearestFeasible(model.knob_space, nominal), nominal, requests, budgets, "picks to calibrate on")
    picked = [sample_of(run) for run in first]
    fresh = Guardrail.from_samples(guardrail.estimator, picked, ALPHA, guardrail.group_by, guardrail.picture)
    pacing = Pacing(fresh, None, model.max_new_tokens)
    budgets = full_ms * rng.uniform(*PICK_BUDGETS, num_picked)
    second = bench.serve(
        DearestFeasible(model.knob_space, pacing), pacing, requests[::-1], budgets, "picks to judge the bound on"
    )
    samples = [sample_of(run) for run in second]
    measured, predicted = times(samples)["e2e"], guardrail.estimator.predict_samples(samples)
    bounds = fresh.bound_samples_ms(samples)
    groups = np.array([group_of(sample.knobs, fresh.group_by) for sample in samples])
    covered = measured <= bounds
    results["coverage_picked"] = float(covered.mean())
    results["coverage_picked_interval"] = wilson(int(covered.sum()), len(covered))
    ratios = measured / predicted
    # The bound of a request over the 95th percentile that requests like it really had.
    factors = bounds / predicted
    tightness = {
        g: factors[groups == g].mean() / np.quantile(ratios[groups == g], 1 - ALPHA) for g in np.unique(groups)
    }
    results["bound_over_p95"] = float(np.mean([tightness[group] for group in groups]))
    results["bound_over_p95_by_tier"] = {str(group): float(value) for group, value in tightness.items()}
    pooled = Guardrail.from_samples(guardrail.estimator, picked, ALPHA, "none", guardrail.picture)
    results["coverage_pooled"] = float((measured <= pooled.bound_samples_ms(samples)).mean())
    feasible = np.array([run.feasible for run in second])
    late = np.array([run.measured_ms > run.budget_ms for run in second])
    results["violation_rate_picked"] = float(late[feasible].mean())
    results["num_picked"] = len(samples)
    # Nominal against empirical coverage, for the curve.
    levels = np.array([0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975])
    curve = []
    for level in levels:
        # Both parts at this level, where the guardrail itself keeps the picture's of the profile.
        at = Guardrail.from_samples(guardrail.estimator, picked, float(1 - level), fresh.group_by)
        curve.append(float(np.mean(measured <= at.bound_samples_ms(samples))))
    results["curve"] = {"nominal": levels.tolist(), "empirical": curve}
    results["guardrail"] = fresh
    return results


# Drift ---------------------------------------------------------------------------------------------------------------


def _burn(core: int) -> None:
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, {core})
    while True:
        sum(range(10_000))


class Contention:
    """A second process that burns the core which the requests run on."""

    def __init__(self, core: int) -> None:
        self.core = core
        self.process: Any = None

    def switch(self, on: bool) -> None:
        """Start or end the process; nothing if it is as wanted."""
        if on and self.process is None:
            self.process = multiprocessing.get_context("spawn").Process(target=_burn, args=(self.core,), daemon=True)
            self.process.start()
        elif not on and self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this process on one core, as far as the system lets it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure_drift(
    bench: Bench,
    policy_of: Callable[[Pacing], Policy],
    pacing: Pacing,
    full_ms: float,
    requests: Sequence[tuple[Any, str]],
    phase: int,
) -> dict[str, Any]:
    """Serve requests while a second process burns the same core in the second of three phases; with and without."""
    rng = np.random.default_rng([bench.seed, 5])
    budgets = full_ms * rng.uniform(*DRIFT_BUDGETS, 3 * phase)
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    rows: dict[str, Any] = {}
    for name, drift in (
        ("uncorrected", None),
        ("corrected", DriftCorrection.for_guardrail(pacing.guardrail, "e2e", DriftSettings(alpha=ALPHA))),
    ):
        contention = Contention(core)

        def before(i: int, contention: Contention = contention) -> None:
            wanted = phase <= i < 2 * phase
            if wanted != (contention.process is not None):
                contention.switch(wanted)
                time.sleep(1.0 if wanted else 0.2)  # the process has to have started

        with pinned(core):
            try:
                runs = bench.serve(policy_of(pacing), pacing, requests, budgets, f"drift, {name}", drift, before)
            finally:
                contention.switch(False)
        late = np.array([run.measured_ms > run.budget_ms for run in runs])
        feasible = np.array([run.feasible for run in runs])
        predicted = np.array([run.predicted_ms for run in runs])
        phases = {}
        for label, start in (("quiet", 0), ("busy", phase), ("quiet_again", 2 * phase)):
            later = slice(start + 100, start + phase)
            kept = feasible[later]
            hits, n = int(late[later][kept].sum()), int(kept.sum())
            phases[label] = {
                "violations_from_101st": hits / n if n else None,
                "interval": wilson(hits, n) if n else None,
                "n": n,
                "infeasible_rate": float(1 - kept.mean()),
                "violations_first_100": float(late[start : start + 100][feasible[start : start + 100]].mean()),
                "predicted_ms": float(predicted[later].mean()),
                "num_blocks": float(np.mean([run.knobs.num_blocks for run in runs[later]])),
                "factor": float(np.mean([run.drift_factor for run in runs[later]])),
            }
        rows[name] = {
            "phases": phases,
            "measured_over_budget": [run.measured_ms / run.budget_ms for run in runs],
            "factor": [run.drift_factor for run in runs],
            "predicted_ms": predicted.tolist(),
        }
    return rows
