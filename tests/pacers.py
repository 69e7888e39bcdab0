"""Pacers of the tiny model with made-up latencies, for tests of what is built on them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacings import make_controller

from pacevlm.evaluation.prices import PricePoint, PriceTable
from pacevlm.evaluation.statistics import Interval
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.picture_fit import READ_TERMS, PictureFit
from pacevlm.latency.profile import collect_device_facts
from pacevlm.latency.stage_fit import StageFit
from pacevlm.latency.stage_terms import STAGE_TERMS
from pacevlm.pacer import Pacer
from pacevlm.request.pacing import Pacing

if TYPE_CHECKING:
    from pacevlm.models.elastic import ElasticModel

NUM_THREADS = 1
PRICES = PriceTable(
    tuple(
        PricePoint(price, Interval(cost, cost - 1.0, cost + 1.0), Interval(share, share - 0.1, share + 0.1))
        for price, cost, share in ((0.0, 0.0, 0.9), (2.0, 0.1, 0.7), (9.0, 0.4, 0.5), (40.0, 4.0, 0.3))
    ),
    num_examples=200,
    full_ms=100.0,
)


def make_estimator(model: ElasticModel, coefficient: float = 1e-4) -> LatencyEstimator:
    stages = {stage: StageFit((coefficient,) * len(terms), 1, 0, 0.0, 0.0) for stage, terms in STAGE_TERMS.items()}
    facts = dataclasses.replace(
        collect_device_facts("cpu", model.dtype, compiler=model.adapter.compiler), num_threads=NUM_THREADS
    )
    read = StageFit((coefficient,) * len(READ_TERMS), 1, 0, 0.0, 0.0)
    pictures = {"memory": PictureFit(read, 100_000, 0, 0), "jpeg": PictureFit(read, 100_000, 100_000, 50_000)}
    return LatencyEstimator(
        model.identity, model.knob_space, facts, model.trained_top_k, model.stage2_after, stages, pictures, 100
    )


def make_pacer(model: ElasticModel, folder: Path, *, lengths: bool = True, **parts: Any) -> Pacer:
    estimator = parts.get("estimator", make_estimator(model))
    calibration = Calibration(0.1, {}, math.log(1.5), {})
    guardrail = Guardrail(estimator, "none", {"e2e": calibration, "ttft": calibration}, calibration)
    weights = (0.0,) * model.d_model
    output_length = OutputLengthModel(model.identity, weights, None, 4.0, 0, model.max_new_tokens, 0.1)
    controller = make_controller(model, parts.get("fingerprint", estimator.fingerprint))
    return Pacer(
        model,
        controller,
        Pacing(guardrail, output_length if lengths else None, model.max_new_tokens),
        full_p50_ms=parts.get("full_p50_ms", 100.0),
        model_path=folder,
        num_threads=NUM_THREADS,
        prices=parts.get("prices", PRICES),
        drift=parts.get("drift"),
        predictor=parts.get("predictor"),
    )
