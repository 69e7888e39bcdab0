"""Runs as every rank of a launch: `rank_program.py MODEL_DIR RUN_DIR PROFILE [OTHER_MODEL_DIR]`, see `test_ranks.py`.

Rank 0 prints what it found as one JSON line. The others load OTHER_MODEL_DIR if it is given, and say to stderr which
files they opened to write.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pacevlm.config import DataConfig, LookupConfig, ModelConfig, PictureConfig, ProfileConfig
from pacevlm.errors import PacevlmError
from pacevlm.evaluation.importance import measure_importance
from pacevlm.knobs import Knobs
from pacevlm.launch import read_launch
from pacevlm.models.elastic import ElasticModel
from pacevlm.pipeline import RunConfig, helper_rank
from pacevlm.pipeline.loading import load_elastic_model, load_on_ranks
from pacevlm.pipeline.run import run_pipeline
from pacevlm.rollout.engine import RolloutEngine
from pacevlm.rollout.ranks import leading
from pacevlm.rollout.wire import Wire
from pacevlm.training.train_config import GRPOConfig, TrainConfig
from pacevlm.types import Example

STEPS = 20


def make_examples() -> list[Example]:
    """Pictures of several sizes, in memory and as files' bytes."""
    rng = np.random.default_rng(0)
    examples = []
    for number, (height, width) in enumerate([(24, 24), (40, 56), (64, 33), (90, 70), (30, 90), (25, 25)]):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        source: Image.Image | bytes = image
        if number % 2:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            source = buffer.getvalue()
        examples.append(Example(f"e{number}", source, f"Which number is the largest? {number}", (str(number),)))
    return examples


def jobs_of(model: ElasticModel, examples: list[Example]) -> list[tuple[Example, Knobs]]:
    """Every example with every configuration."""
    return [(example, knobs) for example in examples for knobs in model.knob_space]


def run_config(run_dir: Path, model_dir: Path, profile: Path | None = None) -> RunConfig:
    """A tiny run, up to a controller."""
    return RunConfig(
        run_dir=run_dir,
        model=ModelConfig(path=str(model_dir), max_new_tokens=2, vision_budgets=(1, 1, 2)),
        data=DataConfig(num_train=24, num_val=8, num_test=6),
        profile=ProfileConfig(
            num_requests=6,
            num_samples=24,
            repeats=1,
            max_warmup=1,
            num_lengths=24,
            alpha=0.3,
            max_megapixels=0.02,
            source=None if profile is None else str(profile),
        ),
        lookup=LookupConfig(num_examples=12),
        train=TrainConfig(
            run_dir=Path("train"), steps=STEPS, batch_size=8, budgets_per_example=2, grpo=GRPOConfig(group_size=4)
        ),
    )


def token_gradients(engine: RolloutEngine, examples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and gradients of latency tokens of every example at two tiers, two at one of them."""
    asked = [(example, tier) for example in examples for tier in ("low", "high", "low")]
    tokens = torch.randn(len(asked), engine.model.d_model, generator=torch.Generator().manual_seed(0))
    tokens.requires_grad_()
    outputs = engine.latency_token_outputs([e for e, _ in asked], [tier for _, tier in asked], tokens)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    (gradients,) = torch.autograd.grad((outputs * weights).sum(), tokens)
    return outputs.detach(), gradients


def furthest(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def lead(model_dir: Path, run_dir: Path, profile: Path) -> dict[str, Any]:
    """Work on all ranks, beside the same on one."""
    launch = read_launch()
    assert launch is not None
    found: dict[str, Any] = {}
    with leading(Wire(launch)) as ranks:
        model = load_on_ranks(ModelConfig(path=str(model_dir)), PictureConfig(), "digits")
        examples = make_examples()
        jobs = jobs_of(model, examples)
        alone, together = RolloutEngine(model), RolloutEngine(model, ranks=ranks)
        expected = alone.run(jobs)
        progress: list[tuple[int, int]] = []
        found["same_outcomes"] = together.run(jobs, lambda done, total: progress.append((done, total))) == expected
        found["progress"] = [progress[-1], sorted(progress) == progress]
        found["num_rollouts"] = [work.num_rollouts for work in ranks.totals()]
        found["num_distinct"] = alone.num_run
        sent = ranks.totals()[1].num_bytes_sent
        found["tokens_differ"] = furthest(token_gradients(together, examples), token_gradients(alone, examples))
        found["sent_once"] = ranks.totals()[1].num_bytes_sent - sent
        try:
            ranks.helpers[0].answer("another model", [], [])
        except PacevlmError as error:
            found["remote_error"] = [type(error).__name__, str(error)]
        orders = [
            measure_importance(model, examples, 4, num_candidates=2, ranks=given).to_dict() for given in (None, ranks)
        ]
        found["same_importance"] = orders[0] == orders[1]
        run_pipeline(run_config(run_dir, model_dir, profile), "train")
        found["work"] = [work.num_rollouts for work in ranks.totals()]
    return found


def main() -> None:
    model_dir, run_dir, profile, *other = map(Path, sys.argv[1:])
    launch = read_launch()
    assert launch is not None
    if launch.rank == 0:
        started = time.monotonic()
        try:
            found = lead(model_dir, run_dir, profile)
        except PacevlmError as error:
            found = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps({**found, "seconds": time.monotonic() - started}))
        return
    if other:
        helper_rank.load_elastic_model = lambda config, *rest: load_elastic_model(  # type: ignore[attr-defined]
            ModelConfig(path=str(other[0])), *rest
        )

    def say(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            print(f"wrote {arguments[0]}", file=sys.stderr)

    sys.addaudithook(say)
    Path(os.devnull).write_bytes(b"")  # which shows that the hook hears
    helper_rank.help_rank_0(launch)


if __name__ == "__main__":
    main()
