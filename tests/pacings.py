"""Pacings with known coefficients, for tests of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pacevlm.controller.policy import Controller, ControllerConfig
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.picture_fit import READ_TERMS, PictureFit
from pacevlm.latency.profile import collect_device_facts
from pacevlm.latency.stage_fit import StageFit
from pacevlm.latency.stage_terms import STAGE_TERMS
from pacevlm.request.pacing import Pacing
from pacevlm.types import Objective, RequestView

if TYPE_CHECKING:
    from pacevlm.models.elastic import ElasticModel
    from pacevlm.types import Example


def make_controller(model: ElasticModel, fingerprint: str, **settings: Any) -> Controller:
    """An untrained controller of a model and an estimator, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Controller(
            ControllerConfig(**{"reference_ms": 100.0, "embedding_scale": 1.0, **settings}),
            model_identity=model.identity,
            knob_space=model.knob_space,
            estimator_fingerprint=fingerprint,
            d_model=model.d_model,
        )


def make_pacing(model: ElasticModel, output_length: OutputLengthModel | None = None) -> Pacing:
    """A guardrail with one millisecond per unit of everything."""
    stages = {stage: StageFit((1.0,) * len(terms), 1, 0, 0.0, 0.0) for stage, terms in STAGE_TERMS.items()}
    facts = collect_device_facts("cpu", model.dtype, compiler=model.adapter.compiler)
    read = StageFit((1.0,) * len(READ_TERMS), 1, 0, 0.0, 0.0)
    pictures = {"memory": PictureFit(read, 100_000, 0, 0), "jpeg": PictureFit(read, 100_000, 100_000, 50_000)}
    estimator = LatencyEstimator(
        model.identity, model.knob_space, facts, model.trained_top_k, model.stage2_after, stages, pictures, 100
    )
    calibration = Calibration(0.1, {}, float(np.log(1.5)), {})
    guardrail = Guardrail(estimator, "none", {"e2e": calibration, "ttft": calibration}, calibration)
    return Pacing(guardrail, output_length, model.max_new_tokens)


def constant_length(model: ElasticModel, tokens: int, text_weight: float | None = None) -> OutputLengthModel:
    weights = (0.0,) * model.d_model
    return OutputLengthModel(model.identity, weights, text_weight, float(tokens), 0, model.max_new_tokens, 0.1)


def bounds_of(pacing: Pacing, view: RequestView, kind: Any = "e2e") -> np.ndarray:
    """The bounds on one request."""
    return pacing.upper_bounds_ms([view], kind)[0]


def middle_objective(model: ElasticModel, example: Example, pacing: Pacing, kind: Any = "e2e") -> Objective:
    """What some configurations keep and others do not."""
    return Objective(float(np.median(bounds_of(pacing, model.view(example.image, example.question), kind))), kind)
