"""The work of each step; every one leaves its artefacts in the run directory and returns what it found."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pacevlm.baselines.fixed import FixedPolicy
from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.baselines.predictor import PredictorPolicy
from pacevlm.config import config_from_dict, config_to_dict
from pacevlm.controller.policy import Controller, ControllerConfig, ControllerPolicy
from pacevlm.controller.policy_interface import Policy
from pacevlm.evaluation.fronts import summarise_fronts
from pacevlm.evaluation.learnable import evaluation_warnings, sweep_warnings, training_warnings
from pacevlm.evaluation.prices import PriceTable
from pacevlm.evaluation.summary import RunFacts
from pacevlm.evaluation.sweep import (
    build_requests,
    evaluate,
    exhaustive_sweep,
    fit_baselines,
    fit_fixed_front,
    run_prices,
    summarise_answers,
)
from pacevlm.evaluation.timed import time_requests
from pacevlm.files import sha256_file
from pacevlm.identity import Identity
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.calibrate import coverage, fit_latency, full_p50_ms
from pacevlm.latency.conformal import min_num_scores
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail
from pacevlm.latency.measuring import use_num_threads, without_garbage_collection
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.profile import Profile, Sample, collect_device_facts
from pacevlm.latency.profile_summary import summarise_profile
from pacevlm.latency.profiler import ProfilerSettings, sample_of
from pacevlm.pacer import Pacer
from pacevlm.partial import PartialFile
from pacevlm.pipeline.artefacts import (
    BUNDLE_FOLDER,
    CONTROLLER_NAME,
    ESTIMATOR_NAME,
    FIXED_NAME,
    GUARDRAIL_NAME,
    LOOKUP_NAME,
    OUTPUT_LENGTH_NAME,
    PARTIAL_NAMES,
    PREDICTOR_NAME,
    PRICES_NAME,
    PROFILE_GUARDRAIL_NAME,
    PROFILE_NAME,
    remove_file,
    remove_training,
)
from pacevlm.pipeline.context import RunContext, saying_how_to_go_on
from pacevlm.pipeline.outputs import HEADROOM_NAME, write_outputs
from pacevlm.pipeline.run_config import RunConfig
from pacevlm.pipeline.step_log import StepLog
from pacevlm.request.pacing import Pacing
from pacevlm.request.profiling import measure_profile
from pacevlm.request.run import run_request
from pacevlm.training.checkpoint import load_checkpoint
from pacevlm.training.metrics_log import read_metrics
from pacevlm.training.run_record import installed_versions, source_commit, weights_sha256
from pacevlm.training.trainer import METRICS_NAME, Trainer
from pacevlm.types import Answer, BudgetKind, Example, Objective

# Requests before the clock counts, and between two garbage collections.
NUM_WARMUP, WINDOW = 5, 20
# Measurements that carry an estimator over to another device.
NUM_TRANSFER = 25
# Examples of the sweep that a profile times, to tell how long the rest will take.
NUM_MEASURED = 8
# Policies that heed a price of time.
HEEDING = (ControllerPolicy.name, PredictorPolicy.name, LookupTable.name)


def profile_step(run: RunContext) -> dict[str, Any]:
    """Time requests, fit and calibrate the estimator, and learn how long answers get."""
    remove_file(run.run_dir / HEADROOM_NAME)  # which is of an earlier profile
    config = run.config.profile
    settings = profiler_settings(run.config, len(run.splits.train), run.model.max_new_tokens)
    if settings is None:
        assert config.source is not None
        profile = Profile.load(config.source)
        profile.made_for.check(f"the profile {config.source}", _wanted(run))
        profile.save(run.run_dir / PROFILE_NAME)
        return fit_profile(run)
    if config.transfer:
        _fit_source(run)  # before anything is measured, or it may turn out to fit nothing here
    _measure_profile(run, settings)
    return fit_profile(run)


def profiler_settings(
    config: RunConfig, num_train: int, max_output_tokens: int | None = None
) -> ProfilerSettings | None:
    """How a run's requests are timed, self-made pictures aside; None if an existing profile is taken as it is.

    Args:
        num_train: training examples that there are.
    """
    profile = config.profile
    num_samples, repeats = profile.num_samples, profile.repeats
    if profile.source is not None:
        if not profile.transfer:
            return None
        num_samples, repeats = num_transferred(profile.alpha), 1
    return ProfilerSettings(
        num_requests=min(profile.num_requests, num_train),
        num_samples=num_samples,
        repeats=repeats,
        max_warmup=profile.max_warmup,
        num_threads=profile.num_threads,
        max_output_tokens=max_output_tokens,
        seed=profile.seed,
    )


def fit_profile(run: RunContext) -> dict[str, Any]:
    """Make all that a profile gives from the one in the run directory: estimator, bounds and output lengths."""
    config, model = run.config.profile, run.model
    profile = Profile.load(run.run_dir / PROFILE_NAME)
    settings: dict[str, Any] = {}
    if config.transfer:
        settings["transfer_from"] = _fit_source(run)
    fit = fit_latency(
        profile,
        alpha=config.alpha,
        group_by=config.group_by,
        seed=config.seed,
        trained_top_k=model.trained_top_k,
        stage2_after=model.stage2_after,
        wanted=_wanted(run),
        **settings,
    )
    fit.estimator.save(run.run_dir / ESTIMATOR_NAME)
    fit.guardrail.save(run.run_dir / PROFILE_GUARDRAIL_NAME)
    run.__dict__.pop("estimator", None)
    num_lengths = _fit_output_length(run)
    full = model.knob_space.full
    return {
        "full_p50_ms": {
            "e2e": full_p50_ms(profile),
            "ttft": float(np.median([sample.stages.ttft_ms for sample in profile.samples if sample.knobs == full])),
        },
        "num_samples": len(profile.samples),
        "num_lengths": num_lengths,
        "rollouts_per_s": _measure_rollouts(run),
        **dataclasses.asdict(summarise_profile(profile)),
        **dataclasses.asdict(fit.report),
    }


def _wanted(run: RunContext) -> Identity:
    """What a profile has to be made for to be this run's."""
    with use_num_threads(run.config.profile.num_threads):
        facts = collect_device_facts(run.model.device, run.model.dtype, compiler=run.model.adapter.compiler)
    return dataclasses.replace(run.model.made_for, device=facts.identity)


def _fit_source(run: RunContext) -> LatencyEstimator:
    """The estimator of the device whose profile is carried over."""
    model, path = run.model, run.config.profile.source
    assert path is not None
    source = Profile.load(path)
    source.made_for.check(f"the profile {path}", model.made_for)
    return LatencyEstimator.fit(source, trained_top_k=model.trained_top_k, stage2_after=model.stage2_after)


def num_transferred(alpha: float) -> int:
    """Requests that are timed to carry an estimator over to this device."""
    # As many to carry the estimator over as that needs at least, and as many for the bounds.
    return 2 * max(NUM_TRANSFER, min_num_scores(alpha))


def _measure_profile(run: RunContext, settings: ProfilerSettings) -> None:
    config, model = run.config.profile, run.model
    requests = [(example.source, example.question) for example in run.splits.train[: settings.num_requests]]
    # The controller that will be trained, as far as its cost goes.
    stand_in = ControllerConfig(reference_ms=1.0, embedding_scale=1.0, **config_to_dict(run.config.controller))
    measure_profile(
        model,
        requests,
        settings,
        max_pixels=round(1e6 * config.max_megapixels),
        alpha=config.alpha,
        controller_config=stand_in,
        path=run.run_dir / PROFILE_NAME,
        keep_partial=True,
        progress=lambda state: run.reporter.progress("timed requests", state.num_done, state.num_total),
    )


def _fit_output_length(run: RunContext) -> int:
    """Learn output lengths from answers given with random knobs; returns their number."""
    config, model = run.config.profile, run.model
    jobs = length_jobs(run.config, run.splits.train, model.knob_space)
    examples = [example for example, _ in jobs]
    outcomes = run.engine.run(jobs, run.count("answers"))
    views = [run.engine.view(example) for example in examples]
    lengths = OutputLengthModel.fit(
        torch.stack([view.question_embedding for view in views]).detach().double().cpu().numpy(),
        [outcome.num_output_tokens for outcome in outcomes],
        model.max_new_tokens,
        config.alpha,
        model_identity=model.identity,
        num_text_tokens=[view.sizes.num_text_tokens for view in views],
        seed=config.seed,
    )
    lengths.save(run.run_dir / OUTPUT_LENGTH_NAME)
    return len(examples)


def length_jobs(config: RunConfig, train: Sequence[Example], space: KnobSpace) -> list[tuple[Example, Knobs]]:
    """Training examples whose answers tell how long answers get, each with knobs of its own."""
    rng = np.random.default_rng(config.profile.seed)
    examples = train[: config.profile.num_lengths]
    return [(example, space[int(rng.integers(len(space)))]) for example in examples]


def swept_examples(config: RunConfig, train: Sequence[Example]) -> list[Example]:
    """Training examples that run with every configuration."""
    return list(train[: config.lookup.num_examples])


def _measure_rollouts(run: RunContext) -> float | None:
    """Rollouts a second in the first examples of the sweep, which finds them answered; None if they were known."""
    before, started = run.engine.num_run, time.monotonic()
    exhaustive_sweep(run.engine, swept_examples(run.config, run.splits.train)[:NUM_MEASURED], run.count("answers"))
    num_run = run.engine.num_run - before
    return num_run / (time.monotonic() - started) if num_run else None


def lookup_step(run: RunContext) -> dict[str, Any]:
    """Run training examples with every configuration; the answers are stored."""
    examples = swept_examples(run.config, run.splits.train)
    accuracy = exhaustive_sweep(run.engine, examples, run.count("answers"))
    space = run.model.knob_space
    (first,) = run.engine.run([(examples[0], space.full)])  # is remembered by now
    return {
        "num_examples": len(examples),
        "accuracy_full": float(accuracy[:, space.index(space.full)].mean()),
        "accuracy_cheapest": float(accuracy[:, space.index(space.cheapest)].mean()),
        "warnings": sweep_warnings(accuracy, examples[0], first.answer),
    }


def train_step(run: RunContext) -> dict[str, Any]:
    """Train the controller, or go on with its training."""
    config, pacing = run.config.train_config, run.pacing(PROFILE_GUARDRAIL_NAME)
    controller = new_controller(run, config.seed)
    trainer = Trainer(
        controller,
        run.engine,
        pacing,
        run.splits.train,
        config,
        run.full_bound_ms,
        more_metrics=None if run.engine.ranks is None else run.engine.ranks.new_metrics,
    )

    _remove_outdated_training(trainer)

    def on_step(step: int, metrics: Mapping[str, float], seconds_left: float) -> None:
        note = f"reward {metrics['reward']:.3f}, entropy {metrics['entropy']:.2f}"
        run.reporter.progress("training steps", step, config.steps, note)

    trainer.run(on_step=on_step)
    trainer.result.save_pretrained(run.run_dir / CONTROLLER_NAME)
    # From the file, because a run that was finished before has no step left to report.
    metrics = read_metrics(config.run_dir / METRICS_NAME)
    shown = ("reward", "accuracy", "entropy", "cost/violation_rate", "cost/lambda")
    last = {name: metrics[-1][name] for name in shown if name in metrics[-1]}
    return {"num_steps": trainer.step, **last, "warnings": training_warnings(metrics)}


def _remove_outdated_training(trainer: Trainer) -> None:
    """Clear the folder of a training that nothing can go on from: its profile was made again, or half of it is gone."""
    folder, path = trainer.config.run_dir, trainer.checkpoint_path
    if path.exists():
        with saying_how_to_go_on():
            checkpoint = load_checkpoint(path)
        wanted = json.loads(json.dumps(trainer.identity))
        of_profile = ("pacing", "reference_ms")
        is_profile_same = all(checkpoint.identity.get(name) == wanted[name] for name in of_profile)
        is_complete = checkpoint.step < trainer.config.steps or (folder / METRICS_NAME).exists()
        if is_profile_same and is_complete:
            return
    remove_training(folder)


def new_controller(run: RunContext, seed: int) -> Controller:
    """An untrained controller of this run; its weights follow from the seed alone."""
    model = run.model
    example = run.splits.train[0]
    prompt = model.adapter.encode_question(example.question)
    prepared = model.adapter.prepare(example.image, prompt, model.vision_budgets[model.knob_space.tiers[0]])
    with torch.no_grad():
        scale = float(model.adapter.embed_tokens(prepared.input_ids.to(model.device)).float().square().mean().sqrt())
    config = ControllerConfig(
        reference_ms=run.full_p50_ms, embedding_scale=scale, **config_to_dict(run.config.controller)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controller = Controller(
            config,
            model_identity=model.identity,
            knob_space=model.knob_space,
            estimator_fingerprint=run.estimator.fingerprint,
            d_model=model.d_model,
        )
    inputs = {"question": controller.stage1.question, "latency_token": controller.stage2.output}
    for name in run.config.train.blind_to:
        torch.nn.init.zeros_(inputs[name].weight).requires_grad_(False)
    # Behind the draw of its weights, so that a seed means the same weights on every device.
    return controller.to(model.device)


def calibrate_step(run: RunContext) -> dict[str, Any]:
    """Fit the predictor, calibrate the guardrail again on the knobs of what answers, measure prices, write the bundle.

    A bound that was calibrated on knobs drawn evenly promises nothing about those that a policy prefers, because it
    prefers what just fits. The requests are of the validation split, each at a random budget and without a price, which
    would leave it room. Every policy is judged under the guardrail that comes of this, and so is what prices cost and
    save, on all validation examples.
    """
    config, profile_config, model = run.config.calibrate, run.config.profile, run.model
    pacing = run.pacing(PROFILE_GUARDRAIL_NAME)
    fit_predictor(run, pacing)
    policy = run.policy()
    rng = np.random.default_rng([config.seed, 1])
    order = rng.permutation(len(run.splits.val))
    train = run.config.train
    budgets_ms = run.full_bound_ms * rng.uniform(train.min_budget, train.max_budget, config.num_requests)
    header = {
        "model_identity": model.identity,
        "policy": [policy.name, weights_sha256(run.controller()), sha256_file(run.run_dir / PREDICTOR_NAME)],
        "pacing": pacing.identity,
        "examples": [run.splits.val[int(place)].content_id for place in order[: config.num_requests]],
        "num_threads": profile_config.num_threads,
        "settings": config_to_dict(config),
        "budgets_ms": budgets_ms.tolist(),
        "budget_kind": train.budget_kind,
    }
    partial = PartialFile(run.run_dir / PARTIAL_NAMES["calibrate"][0], header, "interrupted calibration")
    runs = partial.read(lambda record: config_from_dict(Answer, record))

    def run_one(number: int) -> Answer:
        example = run.splits.val[int(order[number % len(order)])]
        objective = Objective(float(budgets_ms[number]), train.budget_kind)
        return run_request(model, policy, example.source, example.question, objective, pacing)

    model.capture_graphs()
    with use_num_threads(profile_config.num_threads):
        for number in range(min(NUM_WARMUP, config.num_requests - len(runs))):
            run_one(number)
        for start in range(len(runs), config.num_requests, WINDOW):
            with without_garbage_collection():
                for number in range(start, min(start + WINDOW, config.num_requests)):
                    runs.append(run_one(number))
                    partial.append(config_to_dict(runs[-1]))
            run.reporter.progress("timed requests", len(runs), config.num_requests)
    samples = [sample_of(answer) for answer in runs]
    guardrail = recalibrate(pacing.guardrail, samples, profile_config.alpha)
    guardrail.save(run.run_dir / GUARDRAIL_NAME)
    prices = measure_prices(run, policy)
    prices.save(run.run_dir / PRICES_NAME)
    write_bundle(run)
    kept = [answer.budget_met for answer in runs if answer.feasible]
    calibration = guardrail.calibrations[train.budget_kind]
    return {
        "num_requests": len(runs),
        "violation_rate_before": 1.0 - float(np.mean(kept)) if kept else None,
        "coverage_before": coverage(pacing.guardrail, samples),
        "factors": {"picture": guardrail.picture.factor("all")}
        | {group: calibration.factor(group) for group in calibration.num_samples},
        "default_price": prices.default_price,
    }


def fit_predictor(run: RunContext, pacing: Pacing) -> None:
    """Fit the predictor to the swept training examples, whose outcomes are known by now."""
    examples = swept_examples(run.config, run.splits.train)
    accuracy = exhaustive_sweep(run.engine, examples, run.count("answers"))
    (requests,) = build_requests(run.engine, examples, [run.loose_objective], pacing)
    PredictorPolicy.fit(run.model.knob_space, requests, accuracy).save(run.run_dir / PREDICTOR_NAME)


def measure_prices(run: RunContext, policy: Policy) -> PriceTable:
    """What prices of time cost and save on the validation examples, where the budget hardly ever binds."""
    prices, examples = run.config.train.prices, list(run.splits.val)
    front = run_prices(
        policy, run.engine, examples, run.loose_objective, prices, run.pacing(), run.count("prices of time")
    )
    return PriceTable.measure(prices, front, run.full_p50_ms, seed=run.config.calibrate.seed)


def write_bundle(run: RunContext) -> None:
    """Write all that answering needs into one folder; raises StorageError."""
    pacer = Pacer(
        run.model,
        run.controller(),
        run.pacing(),
        kind=run.config.train.budget_kind,
        full_p50_ms=run.full_p50_ms,
        model_path=run.config.model.path,
        num_threads=run.config.profile.num_threads,
        prices=PriceTable.load(run.run_dir / PRICES_NAME),
        predictor=run.predictor() if run.config.calibrate.policy == "predictor" else None,
    )
    pacer.save_pretrained(run.run_dir / BUNDLE_FOLDER)


def recalibrate(guardrail: Guardrail, samples: Sequence[Sample], alpha: float) -> Guardrail:
    """A guardrail calibrated on new samples; groups of which they hold too few keep the bound that they had.

    Raises:
        ProfileError: all samples together are too few for this alpha.
    """
    # Pictures keep the profile's bounds, which were calibrated on all kinds and sizes.
    fresh = Guardrail.from_samples(guardrail.estimator, samples, alpha, guardrail.group_by, guardrail.picture)
    calibrations: dict[BudgetKind, Calibration] = {}
    for kind, new in fresh.calibrations.items():
        old = guardrail.calibrations.get(kind)
        # The usual stand-in for a small group, the largest value of all samples, would shut out what is picked rarely,
        # and with it, since bounds never fall, everything dearer.
        kept = {} if old is None else dict(old.log_margins)
        calibrations[kind] = dataclasses.replace(new, log_margins=kept | dict(new.log_margins))
    return Guardrail(guardrail.estimator, guardrail.group_by, calibrations, guardrail.picture)


def evaluate_step(run: RunContext) -> dict[str, Any]:
    """Fit the baselines, run every policy on the test examples and write results, figures and report."""
    config, model, pacing = run.config.evaluate, run.model, run.pacing()
    objectives = [Objective(fraction * run.full_p50_ms, run.config.train.budget_kind) for fraction in config.budgets]
    baselines = fit_baselines(
        run.engine,
        swept_examples(run.config, run.splits.train),
        objectives,
        pacing,
        full_ms=run.full_p50_ms,
        prices=run.config.train.prices,
        seed=config.seed,
        progress=run.count("training answers"),
    )
    for policy in baselines:
        if isinstance(policy, LookupTable):
            policy.save(run.run_dir / LOOKUP_NAME)
        elif isinstance(policy, FixedPolicy):
            policy.save(run.run_dir / FIXED_NAME)
    examples = list(run.splits.test)
    controller = ControllerPolicy(run.controller().eval())
    evaluation = evaluate(
        model,
        run.engine,
        [controller, *baselines],
        examples,
        objectives,
        pacing,
        config,
        full_ms=run.full_p50_ms,
        num_threads=run.config.profile.num_threads,
        progress=run.reporter.progress,
        partial_dir=run.run_dir,
    )
    priced = [policy for policy in (controller, *baselines) if policy.name in HEEDING]
    fronts = measure_fronts(run, priced, examples)
    device = run.estimator.device
    warnings = evaluation_warnings(evaluation.records, examples)
    earlier = [StepLog(run.run_dir).get(name) for name in ("lookup", "train")]
    facts = RunFacts(
        commit=source_commit() or "unknown",
        device=f"{device.device_name}, {device.num_threads} thread{'s' if device.num_threads > 1 else ''}",
        model=Path(run.config.model.path).absolute().name,
        dataset_name=run.splits.name,
        dataset_split="test",
        dtype=device.dtype,
        versions={name: version for name, version in installed_versions().items() if version},
        seeds={
            "data": run.config.data.seed,
            "profile": run.config.profile.seed,
            "train": run.config.train.seed,
            "calibrate": run.config.calibrate.seed,
            "evaluate": config.seed,
        },
        warnings=[*(sentence for step in earlier if step for sentence in step.facts.get("warnings", ())), *warnings],
        metric=run.splits.metric.name,
        summaries=summarise_answers(run.splits.metric, evaluation.records, examples),
    )
    results = write_outputs(run.config, evaluation.records, facts, examples, run.command, fronts)
    return {
        "num_examples": len(examples),
        "num_timed_requests": evaluation.num_timed_requests,
        "num_disagreements": evaluation.num_disagreements,
        "controller_vs_lookup_table": results["average"].get("controller"),
        "gap_closed": results["gap_closed"],
        "warnings": warnings,
    }


def measure_fronts(run: RunContext, policies: Sequence[Policy], examples: Sequence[Example]) -> dict[str, Any]:
    """Accuracy against mean latency along the prices of time: policies that heed them, and the best fixed knobs."""
    prices, objective, pacing = run.config.train.prices, run.loose_objective, run.pacing()
    trained_on = swept_examples(run.config, run.splits.train)
    fixed = fit_fixed_front(run.engine, trained_on, objective, pacing, full_ms=run.full_p50_ms, prices=prices)
    fronts = {
        name: run_prices(policy, run.engine, examples, objective, prices, pacing, run.count(f"prices of time, {name}"))
        for name, policy in ({policy.name: policy for policy in policies} | {FixedPolicy.name: fixed}).items()
    }
    full = run.engine.run([(example, run.model.knob_space.full) for example in examples])
    default_price = PriceTable.load(run.run_dir / PRICES_NAME).default_price
    return summarise_fronts(
        fronts,
        [outcome.accuracy for outcome in full],
        prices,
        budget_ms=objective.budget_ms,
        own=run.config.calibrate.policy,
        default_price=default_price,
        measured_ms=_time_default_price(run, policies, examples, default_price) if default_price else None,
        seed=run.config.evaluate.seed,
    )


def _time_default_price(
    run: RunContext, policies: Sequence[Policy], examples: Sequence[Example], price: float
) -> dict[str, NDArray[np.float64]]:
    """Times of policies without a price and at one, by policy, `(2, examples)`, milliseconds."""
    config, loose = run.config.evaluate, run.loose_objective
    if not config.num_timed:
        return {}
    with use_num_threads(run.config.profile.num_threads):
        timed = time_requests(
            run.model,
            policies,
            examples,
            [loose, dataclasses.replace(loose, price=price)],
            run.pacing(),
            # Everything is warm by now.
            dataclasses.replace(config, num_warmup=0),
            run.count("timed requests at prices"),
            run.run_dir / PARTIAL_NAMES["evaluate"][2],
        )
    drawn = sorted({place for _, _, place in timed.runs})
    return {
        name: np.array([[timed.runs[name, at, place].measured_ms for place in drawn] for at in range(2)])
        for name in sorted({name for name, _, _ in timed.runs})
    }
