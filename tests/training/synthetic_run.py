"""Training against a made-up model: accuracy and latency follow known laws, and a step takes milliseconds.

Run as a script it trains in the directory given, for tests that kill it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pacevlm.controller.policy import Controller, ControllerConfig
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.picture_fit import READ_TERMS, PictureFit
from pacevlm.latency.profile import DeviceFacts
from pacevlm.latency.stage_fit import StageFit
from pacevlm.latency.stage_terms import STAGE_TERMS
from pacevlm.request.pacing import Pacing
from pacevlm.training.train_config import TrainConfig
from pacevlm.training.trainer import Trainer
from pacevlm.types import Example, Outcome, RequestSizes, RequestView, VisionSizes

MODEL = "synthetic"
SPACE = KnobSpace()
D_MODEL = 16
FACTS = DeviceFacts("cpu", "counted", 1, "float32", "0", "0", None, "3", "none", None, None, "counted")
USUAL_TOKENS, LONG_TOKENS = 3, 5

# Milliseconds per unit: tier and compute cost about the same, so that a budget makes them compete.
COEFFICIENTS = {
    "prepare_ms": {"constant": 1.0},
    "vision_ms": {"constant": 1.0, "units": 4.0},
    "prefill_ms": {"constant": 1.0, "later_blocks": 1.0, "later_blocks*top_k": 0.3},
    "decode_ms_per_token": {"constant": 0.2, "blocks": 0.1},
}


def make_estimator() -> LatencyEstimator:
    stages = {
        stage: StageFit(tuple(COEFFICIENTS.get(stage, {}).get(term, 0.0) for term in terms), 1, 0, 0.0, 0.0)
        for stage, terms in STAGE_TERMS.items()
    }
    pictures = {"memory": PictureFit(StageFit((0.0,) * len(READ_TERMS), 1, 0, 0.0, 0.0), 10**9, 10**9, 0)}
    return LatencyEstimator(MODEL, SPACE, FACTS, 8, 1, stages, pictures, 10**6)


def make_dataset(num_examples: int = 24) -> list[Example]:
    """Kinds take turns: fine print needs the high tier, reasoning needs compute, the rest needs nothing."""
    kinds = ("print", "reasoning", "easy")
    images = [Image.new("RGB", (40, 30), (index % 256, 0, 0)) for index in range(num_examples)]
    return [Example(f"e{i}", image, f"{kinds[i % 3]} {i}?", ("yes",)) for i, image in enumerate(images)]


def accuracy_of(example: Example, knobs: Knobs) -> float:
    kind = example.question.split()[0]
    if kind == "print":
        return float(knobs.tier == "high")
    return float(knobs.top_k >= 6 and knobs.num_blocks >= 15) if kind == "reasoning" else 1.0


def num_output_tokens_of(example: Example) -> int:
    """Few answers are longer than the output length model's bound, so that some violations slip past the mask."""
    return LONG_TOKENS if int(example.example_id[1:]) % 12 == 0 else USUAL_TOKENS


class SyntheticStore:
    def __init__(self) -> None:
        self.model_identity = MODEL
        self.outcomes: dict[tuple[str, Knobs], Outcome] = {}

    def __contains__(self, key: tuple[str, Knobs]) -> bool:
        return key in self.outcomes


class SyntheticEngine:
    """Answers by law; the latency token's output tells the kind of question and the tier besides the budget."""

    def __init__(self) -> None:
        self.store, self.metric_name = SyntheticStore(), "law"
        self.num_run = 0
        self.jobs: list[list[tuple[Example, Knobs]]] = []
        generator = torch.Generator().manual_seed(7)
        self.kinds = torch.randn(3, D_MODEL, generator=generator)
        self.tiers = torch.randn(3, D_MODEL, generator=generator)
        self.mix = torch.randn(D_MODEL, D_MODEL, generator=generator) / D_MODEL**0.5

    def view(self, example: Example) -> RequestView:
        sizes = RequestSizes((VisionSizes(1, 20), VisionSizes(3, 60), VisionSizes(6, 120)), 12, 1200)
        return RequestView(self.kinds[int(example.example_id[1:]) % 3], sizes, (30, 40), example.picture)

    def latency_token_outputs(self, examples: Sequence[Example], tiers: Sequence[str], tokens: Tensor) -> Tensor:
        kinds = torch.stack([self.kinds[int(example.example_id[1:]) % 3] for example in examples])
        places = self.tiers[[SPACE.tiers.index(tier) for tier in tiers]]
        return torch.tanh(tokens @ self.mix) + kinds + places

    def run(self, jobs: Sequence[tuple[Example, Knobs]], progress: Callable[[int, int], None] | None = None) -> Any:
        self.jobs.append(list(jobs))
        outcomes = []
        for example, knobs in jobs:
            key = (example.content_id, knobs)
            if key not in self.store.outcomes:
                self.num_run += 1
                accuracy, num_tokens = accuracy_of(example, knobs), num_output_tokens_of(example)
                answer = "yes" if accuracy else "no"
                self.store.outcomes[key] = Outcome(example.example_id, knobs, answer, accuracy, 32, num_tokens)
            outcomes.append(self.store.outcomes[key])
            if progress is not None:
                progress(len(outcomes), len(jobs))
        return outcomes


def make_trainer(
    run_dir: Path,
    *,
    dataset: Sequence[Example] | None = None,
    hidden_dim: int = 32,
    parts: dict[str, Any] | None = None,
    measure: Any = None,
    **settings: Any,
) -> Trainer:
    """A trainer on the made-up model; `parts` replaces arguments of the trainer, `settings` those of its config."""
    estimator = make_estimator()
    full_p50_ms = estimator.predict(SyntheticEngine().view(make_dataset(1)[0]).sizes, SPACE.full, USUAL_TOKENS).e2e_ms
    torch.manual_seed(3)
    controller = Controller(
        ControllerConfig(reference_ms=full_p50_ms, embedding_scale=1.0, hidden_dim=hidden_dim),
        model_identity=MODEL,
        knob_space=SPACE,
        estimator_fingerprint=estimator.fingerprint,
        d_model=D_MODEL,
    )
    calibration = Calibration(0.1, {"all": 0.05}, 0.05, {"all": 100})
    arguments: dict[str, Any] = {
        "controller": controller,
        "engine": SyntheticEngine(),
        "pacing": Pacing(
            Guardrail(estimator, "none", {"e2e": calibration, "ttft": calibration}, calibration),
            OutputLengthModel(MODEL, (0.0,) * D_MODEL, None, float(USUAL_TOKENS), 0, 8, 0.1),
            8,
        ),
        "dataset": make_dataset() if dataset is None else dataset,
        "config": TrainConfig(
            **{"run_dir": run_dir, "steps": 6, "batch_size": 8, "lr": 1e-2, "max_price": 30.0, **settings}
        ),
        "reference_ms": full_p50_ms,
    }
    return Trainer(**{**arguments, **(parts or {})}, measure=measure)


if __name__ == "__main__":
    make_trainer(Path(sys.argv[1]), steps=int(sys.argv[2])).run(
        on_step=lambda step, metrics, seconds_left: print(step, flush=True)
    )
