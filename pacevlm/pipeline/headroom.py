"""What a run's training examples say of its headroom, gathered from what its directory holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pacevlm.config import HeadroomConfig
from pacevlm.controller.features import size_features, thumbnail_features
from pacevlm.controller.policy import ControllerPolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import ConfigError
from pacevlm.evaluation.headroom import measure_headroom
from pacevlm.evaluation.headroom_summary import write_headroom
from pacevlm.evaluation.held_out import SweptExamples
from pacevlm.evaluation.sweep import build_requests, exhaustive_sweep, feasible_table
from pacevlm.pipeline.artefacts import GUARDRAIL_NAME, PROFILE_GUARDRAIL_NAME
from pacevlm.pipeline.context import Reporter, RunContext
from pacevlm.pipeline.lock import one_writer
from pacevlm.pipeline.outputs import HEADROOM_NAME
from pacevlm.pipeline.run_config import load_run_config
from pacevlm.pipeline.step_log import StepLog
from pacevlm.pipeline.steps import new_controller
from pacevlm.types import Example, Objective

# Metadata of more values is no grouping.
MAX_GROUPS = 20
# Examples whose first blocks run between two reports of progress.
CHUNK = 64


def run_headroom(run_dir: Path, config: HeadroomConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Measure the headroom of a run's training examples and write `headroom.json` into its directory.

    Outcomes that are not known yet are computed and stored, so that a stopped measurement goes on with them; the rest
    takes minutes. Masks are those of the guardrail that an evaluation would use: as calibrated on the controller's
    choices where that was done, else as profiled.

    Raises:
        ConfigError: the directory holds no run, or no finished profile, or is in use.
        ModuleNotFoundError: scikit-learn is missing.
        PacevlmError: the model or the data set cannot be loaded, or a file of the run is missing or damaged.
    """
    import sklearn  # noqa: F401  # before anything long runs

    run = RunContext(load_run_config(run_dir), reporter)
    if StepLog(run_dir).get("profile") is None:
        raise ConfigError(f"{run_dir} holds no finished profile; run `pacevlm profile --run-dir {run_dir}` first")
    with one_writer(run_dir):
        number = config.num_examples or run.config.lookup.num_examples
        swept, about = gather(run, config, list(run.splits.train[:number]))
        fractions = run.config.evaluate.budgets
        measured = measure_headroom(swept, fractions, seed=config.seed, progress=run.count("fits"))
        results = {**about, **measured}
        write_headroom(run_dir / HEADROOM_NAME, results)
    return results


def gather(
    run: RunContext, config: HeadroomConfig, examples: Sequence[Example]
) -> tuple[SweptExamples, dict[str, str]]:
    """What the headroom of a run's examples is measured on, and what it belongs to; raises as its parts."""
    kind, space = run.config.train.budget_kind, run.model.knob_space
    is_calibrated = (run.run_dir / GUARDRAIL_NAME).is_file()
    pacing = run.pacing(GUARDRAIL_NAME if is_calibrated else PROFILE_GUARDRAIL_NAME)
    guardrail = "calibrated guardrail" if is_calibrated else "guardrail as profiled"
    if config.margin is not None:
        pacing = dataclasses.replace(pacing, guardrail=pacing.guardrail.with_margin(config.margin))
        guardrail = f"bounds {config.margin:g} times the predictions"
    objectives = [Objective(fraction * run.full_p50_ms, kind) for fraction in run.config.evaluate.budgets]
    accuracy = exhaustive_sweep(run.engine, examples, run.count("answers"))
    requests = build_requests(run.engine, examples, objectives, pacing)
    views = [request.view for request in requests[0]]
    # At the output length that the guardrail reckons with: of a request to come no other is known.
    lengths = pacing.output_tokens_upper(views)
    predicted_ms = pacing.guardrail.estimator.predict_many([view.sizes for view in views], lengths, kind)
    predicted_ms = predicted_ms.reshape(len(examples), len(space))
    swept = SweptExamples(
        space=space,
        budgets_ms=np.array([objective.budget_ms for objective in objectives]),
        accuracy=accuracy,
        feasible=feasible_table(requests),
        predicted_ms=predicted_ms,
        features=_stage1_features(requests[0], thumbnail=run.config.controller.thumbnail),
        token_outputs=_token_outputs(run, examples, requests[-1], config.seed) if config.latency_token else None,
        num_pixels=np.array([view.sizes.num_pixels for view in views], dtype=np.float64),
        pictures=np.array([example.picture_id for example in examples]),
        example_ids=np.array([example.example_id for example in examples]),
        groups=group_labels([example.metadata for example in examples]),
        moved_accuracy=_moved_accuracy(run, examples, config.num_moved),
    )
    about = {
        "model": Path(run.config.model.path).absolute().name,
        "dataset": run.splits.name,
        "metric": run.splits.metric.name,
        "guardrail": guardrail,
    }
    return swept, about


def _stage1_features(requests: Sequence[PolicyInput], *, thumbnail: bool) -> dict[str, NDArray[np.float64]]:
    """What `Controller.stage1_feature_array` holds, without the budget and the masks that follow from it."""
    blocks = {
        "sizes": np.array([size_features(request) for request in requests]),
        "question": np.stack([request.view.question_embedding.double().cpu().numpy() for request in requests]),
    }
    if thumbnail:
        blocks["thumbnail"] = np.stack([thumbnail_features(request).astype(np.float64) for request in requests])
    return blocks


@torch.no_grad()
def _token_outputs(
    run: RunContext, examples: Sequence[Example], requests: Sequence[PolicyInput], seed: int
) -> NDArray[np.float64]:
    """An untrained latency token behind the first block at every tier, `(examples, tiers, d_model)`.

    It holds one budget, the largest, because what is wanted is what it gathers of picture and question.
    """
    tiers = run.model.knob_space.tiers
    token = ControllerPolicy(new_controller(run, seed).eval()).latency_token(requests[0])
    found = []
    for start in range(0, len(examples), CHUNK):
        part = [example for example in examples[start : start + CHUNK] for _ in tiers]
        outputs = run.engine.latency_token_outputs(
            part, [*tiers] * (len(part) // len(tiers)), token.expand(len(part), -1)
        )
        found.append(outputs.double().cpu().numpy().reshape(-1, len(tiers), run.model.d_model))
        run.reporter.progress("latency tokens", start + len(part) // len(tiers), len(examples))
    return np.concatenate(found)


def group_labels(metadata: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.str_]]:
    """Labels of the traffic by key, from metadata that every example has and that takes few values."""
    keys = set(metadata[0]).intersection(*metadata) if metadata else set()
    labels = {
        key: np.array([str(values[key]) for values in metadata])
        for key in sorted(keys)
        if all(isinstance(values[key], (str, int)) for values in metadata)
    }
    return {key: column for key, column in labels.items() if 1 < len(np.unique(column)) <= MAX_GROUPS}


def move_by_one_pixel(image: Image.Image) -> Image.Image:
    """The picture moved right by one pixel, its left edge repeated; sizes, and so latencies, stay."""
    pixels = np.asarray(image)
    return Image.fromarray(np.concatenate([pixels[:, :1], pixels[:, :-1]], axis=1))


def _moved_accuracy(run: RunContext, examples: Sequence[Example], number: int) -> NDArray[np.float64] | None:
    """Accuracy of some examples, of random pictures, when the picture is moved by a pixel; NaN rows for the others."""
    if not number:
        return None
    # A picture's name is a digest, so the first ones are a random part, whatever the order of the examples.
    chosen = sorted(range(len(examples)), key=lambda i: (examples[i].picture_id, examples[i].example_id))[:number]
    moved = [
        dataclasses.replace(examples[i], source=move_by_one_pixel(examples[i].image), known_picture_id=None)
        for i in chosen
    ]
    accuracy = np.full((len(examples), len(run.model.knob_space)), np.nan)
    accuracy[chosen] = exhaustive_sweep(run.engine, moved, run.count("moved pictures"))
    return accuracy
