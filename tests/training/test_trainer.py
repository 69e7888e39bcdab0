"""The trainer: what it learns, what it never does, and that stopping it changes nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pacevlm.controller.policy import ControllerPolicy
from pacevlm.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    IdentityError,
    PacevlmError,
    StorageError,
)
from pacevlm.knobs import Knobs
from pacevlm.request.pacing import policy_inputs
from pacevlm.training.checkpoint import load_checkpoint
from pacevlm.training.metrics_log import MetricsLog
from pacevlm.training.rollouts import build_contexts, draw_budgets_ms, draw_examples, draw_prices, sample_knobs
from pacevlm.training.train_config import ConstraintConfig, GRPOConfig, TrainConfig
from pacevlm.training.trainer import Trainer
from pacevlm.types import Example, Objective, StageTimes

# Metrics that come from a clock or from what happens to be remembered: a resumed run does not repeat them.
CLOCK_PREFIXES = ("speed/", "latency/")
SMALL = GRPOConfig(group_size=4, entropy_coef=0.02)
WITH_REFERENCE = dataclasses.replace(SMALL, beta=0.05)


def records(run_dir: Path) -> list[dict[str, float]]:
    """All metrics of a run but for those that a clock decides."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(CLOCK_PREFIXES)}
        for line in lines
    ]


def same_weights(one: Trainer, other: Trainer) -> bool:
    first, second = one.controller.state_dict(), other.controller.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What a step does ----------------------------------------------------------------------------------------------------


def test_every_example_comes_once_an_epoch(tmp_path: Path) -> None:
    config = TrainConfig(tmp_path, batch_size=12, budgets_per_example=4)
    drawn = [index for step in range(14) for index in draw_examples(7, config, step)]
    epochs = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("scale", ["uniform", "log-uniform"])
def test_budgets_cover_their_range_for_each_example(tmp_path: Path, scale: Any) -> None:
    config = TrainConfig(
        tmp_path, batch_size=12, budgets_per_example=4, min_budget=0.25, max_budget=4.0, budget_scale=scale
    )
    budgets_ms = np.concatenate([draw_budgets_ms(10.0, config, step) for step in range(50)])
    edges = np.linspace(2.5, 40, 5) if scale == "uniform" else np.geomspace(2.5, 40, 5)
    assert budgets_ms.shape == (150, 4)
    assert ((budgets_ms >= edges[:-1]) & (budgets_ms <= edges[1:])).all()
    assert (draw_budgets_ms(10.0, config, 3) == draw_budgets_ms(10.0, config, 3)).all()
    assert (draw_budgets_ms(10.0, config, 3) != draw_budgets_ms(10.0, config, 4)).all()


def test_prices_cover_their_range_for_each_example_and_some_are_none(tmp_path: Path) -> None:
    config = TrainConfig(tmp_path, budgets_per_example=4, min_price=0.5, max_price=32.0, unpriced_share=0.25)
    prices = np.concatenate([draw_prices((8, 4), config, step) for step in range(50)])
    assert (np.sort(prices, axis=1)[:, 0] == 0).all()  # of four contexts of an example one has no price
    assert ((prices > 0).sum(axis=1) == 3).all()
    assert 0.5 <= prices[prices > 0].min() < 0.6
    assert 28.0 < prices.max() <= 32.0
    assert np.median(prices[prices > 0]) == pytest.approx(4.0, rel=0.15)  # in the middle of the logarithm
    assert ((prices == 0).mean(axis=0) > 0.2).all()  # whatever the budget's part
    assert (draw_prices((8, 4), config, 3) == draw_prices((8, 4), config, 3)).all()
    assert (draw_prices((8, 4), config, 3) != draw_prices((8, 4), config, 4)).any()
    assert not draw_prices((8, 4), TrainConfig(tmp_path), 3).any()
    assert not draw_prices((8, 4), TrainConfig(tmp_path, max_price=9.0, unpriced_share=1.0), 3).any()


def test_prices_to_judge_at_reach_from_none_to_the_highest(tmp_path: Path) -> None:
    prices = TrainConfig(tmp_path, min_price=0.5, max_price=32.0).prices
    assert (prices[0], prices[1], prices[-1]) == (0.0, 0.5, 32.0)
    assert list(prices) == sorted(set(prices))
    assert TrainConfig(tmp_path).prices == (0.0,)
    assert TrainConfig(tmp_path, min_price=2.0, max_price=2.0).prices == (0.0, 2.0)


def test_masked_knobs_are_never_sampled(synthetic: ModuleType, tmp_path: Path) -> None:
    trainer = synthetic.make_trainer(tmp_path, min_budget=0.05)
    controller, engine, config = trainer.controller, trainer.engine, trainer.config
    with torch.no_grad():  # a policy that wants the dearest knobs by far
        controller.stage1.head.bias.copy_(torch.tensor([0.0, 50.0, 100.0]))
        controller.stage2.pair_head.bias.copy_(torch.arange(25.0) * 20)
    allowed_shares, unmet = set(), 0
    for step in range(4):
        examples = [trainer.dataset[index] for index in draw_examples(24, config, step)]
        budgets_ms = draw_budgets_ms(trainer.reference_ms, config, step)
        contexts = build_contexts(examples, budgets_ms, engine, trainer.pacing, config)
        features = controller.stage1_features(contexts.requests)
        actions = sample_knobs(controller, engine, contexts, features, config, step)
        rows = torch.arange(len(contexts.mask)).unsqueeze(1)
        assert contexts.mask[rows, actions.tier, actions.compute].all()
        assert torch.isfinite(actions.log_prob).all()
        nothing_fits = ~contexts.any_feasible
        assert not actions.tier[nothing_fits].any()  # only the cheapest is left
        assert not actions.compute[nothing_fits].any()
        allowed_shares.update(contexts.mask.double().mean(dim=(1, 2)).tolist())
        unmet += int(nothing_fits.sum())
    assert len(allowed_shares) > 5
    assert unmet


def test_tightened_bounds_are_those_of_smaller_budgets(synthetic: ModuleType, tmp_path: Path) -> None:
    trainer = synthetic.make_trainer(tmp_path)
    examples, parts = trainer.dataset[:4], (trainer.engine, trainer.pacing)
    budgets_ms = np.tile(np.linspace(40.0, 160.0, 4), (4, 1))
    plain = build_contexts(examples, budgets_ms, *parts, trainer.config)
    config = dataclasses.replace(trainer.config, max_tightening=1.5)
    tight = [build_contexts(examples, budgets_ms, *parts, config, step) for step in range(8)]
    tightest = build_contexts(examples, budgets_ms / 1.5, *parts, trainer.config)
    for contexts in tight:  # where nothing fits, the mask holds the cheapest knobs
        assert torch.equal(contexts.budgets_ms, plain.budgets_ms)
        assert (contexts.mask <= plain.mask | ~contexts.any_feasible[:, None, None]).all()
        assert (tightest.mask <= contexts.mask | ~tightest.any_feasible[:, None, None]).all()
    assert len({contexts.mask.sum().item() for contexts in tight}) > 1
    assert torch.equal(build_contexts(examples, budgets_ms, *parts, config, 3).mask, tight[3].mask)


def test_the_ratio_is_1_at_the_first_update(synthetic: ModuleType, tmp_path: Path) -> None:
    trainer = synthetic.make_trainer(tmp_path, epochs_per_batch=1, grpo=SMALL)
    steps = [trainer.train_step() for _ in range(4)]
    assert all(metrics["ratio_max"] == 1.0 for metrics in steps)
    assert any(metrics["grad_norm"] > 0 for metrics in steps)
    several = synthetic.make_trainer(tmp_path, epochs_per_batch=3, grpo=SMALL)
    assert max(several.train_step()["ratio_max"] for _ in range(4)) > 1.0


def test_equal_rollouts_run_once(synthetic: ModuleType, tmp_path: Path) -> None:
    trainer = synthetic.make_trainer(tmp_path)
    metrics = trainer.train_step()
    (jobs,) = trainer.engine.jobs
    keys = [(example.example_id, knobs) for example, knobs in jobs]
    assert len(set(keys)) == len(keys)
    assert metrics["speed/distinct_frac"] == len(keys) / (8 * 16)
    assert metrics["speed/remembered_frac"] == 0
    assert trainer.train_step()["speed/remembered_frac"] == 0  # other examples
    trainer.step = 0
    assert trainer.train_step()["speed/remembered_frac"] > 0


def test_metrics_have_their_names_and_add_up(synthetic: ModuleType, tmp_path: Path) -> None:
    metrics = synthetic.make_trainer(tmp_path, grpo=WITH_REFERENCE, max_price=0.0).train_step()
    names = {"reward", "reward_std", "frac_reward_zero_std", "entropy", "kl", "loss", "grad_norm", "learning_rate"}
    names |= {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "accuracy"}
    names |= {"cost/violation_rate", "cost/lambda", "mask/feasible_frac", "mask/budget_unmet_frac"}
    assert names <= metrics.keys()
    assert metrics["reward"] == metrics["accuracy"]
    for knob in ("tier", "top_k", "num_blocks"):
        shares = [value for name, value in metrics.items() if name.startswith(f"knobs/{knob}/")]
        assert sum(shares) == pytest.approx(1.0)
    assert all(np.isfinite(value) for value in metrics.values())
    priced = synthetic.make_trainer(tmp_path / "priced", grpo=SMALL, min_price=20.0, unpriced_share=0.0).train_step()
    assert priced["accuracy"] - 0.3 < priced["reward"] < priced["accuracy"] - 0.03
    assert priced["frac_reward_zero_std"] < priced["frac_accuracy_zero_std"]


def test_budgets_that_nothing_meets_teach_nothing_and_cost_nothing(synthetic: ModuleType, tmp_path: Path) -> None:
    trainer = synthetic.make_trainer(tmp_path, min_budget=0.001, max_budget=0.01)
    before = {name: value.clone() for name, value in trainer.controller.state_dict().items()}
    metrics = trainer.train_step()
    assert metrics["mask/budget_unmet_frac"] == 1.0
    assert "cost/violation_rate" not in metrics
    assert metrics["cost/lambda"] == 0.0
    assert metrics["knobs/tier/low"] == metrics["knobs/top_k/4"] == metrics["knobs/num_blocks/12"] == 1.0
    assert all(torch.equal(before[name], value) for name, value in trainer.controller.state_dict().items())


def test_predictions_are_compared_with_measurements(synthetic: ModuleType, tmp_path: Path) -> None:
    measured: list[tuple[str, Knobs]] = []
    estimator, engine = synthetic.make_estimator(), synthetic.SyntheticEngine()

    def measure(example: Example, knobs: Knobs) -> StageTimes:
        measured.append((example.content_id, knobs))
        e2e_ms = 1.25 * estimator.predict(engine.view(example).sizes, knobs, 4).e2e_ms
        return StageTimes(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, (0.1, 0.1, 0.1), e2e_ms)

    trainer = synthetic.make_trainer(tmp_path, measure=measure, measure_every_steps=2, num_measured=5)
    steps = [trainer.train_step() for _ in range(4)]
    assert ["latency/ape_p50" in metrics for metrics in steps] == [False, True, False, True]
    assert steps[1]["latency/ape_p50"] == pytest.approx(0.2)
    assert len(set(measured)) == len(measured) == 10
    assert set(measured) <= set(trainer.engine.store.outcomes)


def test_a_gradient_that_is_not_finite_is_an_error(synthetic: ModuleType, tmp_path: Path) -> None:
    class Broken(synthetic.SyntheticEngine):  # type: ignore[name-defined,misc]
        def latency_token_outputs(
            self, examples: Sequence[Example], tiers: Sequence[str], tokens: torch.Tensor
        ) -> torch.Tensor:
            outputs = super().latency_token_outputs(examples, tiers, tokens)
            if outputs.requires_grad:
                outputs.register_hook(lambda gradient: gradient * torch.nan)
            return outputs

    trainer = synthetic.make_trainer(tmp_path, parts={"engine": Broken()})
    with pytest.raises(PacevlmError, match="gradient of step 1 is nan"):
        trainer.run()
    assert load_checkpoint(trainer.checkpoint_path, trainer.identity).step == 0


# What it learns ------------------------------------------------------------------------------------------------------


def test_the_policy_learns_to_answer_within_the_budget(synthetic: ModuleType, tmp_path: Path) -> None:
    trainer = synthetic.make_trainer(tmp_path, steps=40, batch_size=16, grpo=GRPOConfig(entropy_coef=0.01))
    while trainer.step < 40:
        metrics = trainer.train_step()
    assert metrics["cost/violation_rate"] <= 0.1

    # Requests that it has not met in this combination: an even grid of budgets.
    budgets_ms = np.tile(np.linspace(0.3, 1.1, 9) * trainer.reference_ms, (12, 1))
    examples = synthetic.make_dataset(12)
    contexts = build_contexts(examples, budgets_ms, trainer.engine, trainer.pacing, trainer.config)
    policy = ControllerPolicy(trainer.controller)
    space = trainer.controller.knob_space
    chosen, random, best = [], [], []
    for example, request in zip(contexts.examples, contexts.requests, strict=True):
        tier = policy.choose_tier(request)
        output = trainer.engine.latency_token_outputs([example], [tier], policy.latency_token(request)[None])
        knobs = Knobs(tier, *policy.choose_compute(request, tier, output[0]))
        feasible = [synthetic.accuracy_of(example, k) for k in space if request.feasible.reshape(-1)[space.index(k)]]
        chosen.append(synthetic.accuracy_of(example, knobs))
        random.append(np.mean(feasible))
        best.append(max(feasible))
    assert np.mean(random) < np.mean(best) - 0.2
    assert np.mean(chosen) > np.mean(random) + 0.7 * (np.mean(best) - np.mean(random))


def test_one_controller_learns_to_be_fast_at_a_price_and_right_without(synthetic: ModuleType, tmp_path: Path) -> None:
    settings = {"max_price": 1000.0, "min_price": 500.0, "unpriced_share": 0.5, "min_budget": 1.0, "max_budget": 1.5}
    trainer = synthetic.make_trainer(tmp_path, steps=120, batch_size=32, **settings)
    trainer.run()
    views = [trainer.engine.view(example) for example in trainer.dataset]
    bounds_ms = trainer.pacing.upper_bounds_ms(views, "e2e")
    policy = ControllerPolicy(trainer.controller)
    gave = {}
    for price in (0.0, 1000.0):
        objectives = [Objective(1.3 * trainer.reference_ms, price=price)] * len(views)
        requests = policy_inputs(views, objectives, bounds_ms, [example.example_id for example in trainer.dataset])
        tiers = [policy.choose_tier(request) for request in requests]
        tokens = torch.stack([policy.latency_token(request) for request in requests])
        outputs = trainer.engine.latency_token_outputs(trainer.dataset, tiers, tokens)
        knobs = [
            Knobs(tier, *policy.choose_compute(request, tier, output))
            for request, tier, output in zip(requests, tiers, outputs, strict=True)
        ]
        accuracy = [synthetic.accuracy_of(*pair) for pair in zip(trainer.dataset, knobs, strict=True)]
        latency_ms = [
            trainer.estimator.predict(view.sizes, one, 3).e2e_ms for view, one in zip(views, knobs, strict=True)
        ]
        gave[price] = np.mean(accuracy), np.mean(latency_ms)
    assert gave[0.0][0] > 0.95
    assert gave[1000.0][1] < 0.75 * gave[0.0][1]


def test_without_the_mask_the_multiplier_keeps_latency_down(synthetic: ModuleType, tmp_path: Path) -> None:
    late_rates = {}
    for gain in (0.0, 1.0):
        trainer = synthetic.make_trainer(
            tmp_path,
            steps=24,
            batch_size=16,
            mask=False,
            max_budget=0.8,
            grpo=GRPOConfig(entropy_coef=0.02, scale_rewards="none"),
            constraint=ConstraintConfig(k_p=gain, k_i=gain / 10),
        )
        steps = [trainer.train_step() for _ in range(24)]
        assert steps[0]["mask/feasible_frac"] == 1.0
        assert (steps[-1]["cost/lambda"] > 0) == (gain > 0)
        late_rates[gain] = np.mean([metrics["cost/violation_rate"] for metrics in steps[-8:]])
    assert late_rates[0.0] > 0.6
    assert late_rates[1.0] < 0.6 * late_rates[0.0]


# Stop and resume = never stopped -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def never_stopped(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer: Trainer = synthetic.make_trainer(tmp_path_factory.mktemp("never"))
    trainer.run()
    return trainer


def assert_same_run(trainer: Trainer, never_stopped: Trainer) -> None:
    assert same_weights(trainer, never_stopped)
    assert trainer.multiplier.state_dict() == never_stopped.multiplier.state_dict()
    assert records(trainer.config.run_dir) == records(never_stopped.config.run_dir)
    assert [record["step"] for record in records(trainer.config.run_dir)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_stopped_goes_on_to_the_bit(
    synthetic: ModuleType, tmp_path: Path, never_stopped: Trainer
) -> None:
    assert synthetic.make_trainer(tmp_path).run(until_step=2) == 2
    torch.manual_seed(99)  # the global random state must not matter
    assert synthetic.make_trainer(tmp_path).run(until_step=5) == 5
    trainer = synthetic.make_trainer(tmp_path)
    assert trainer.run() == 6
    assert_same_run(trainer, never_stopped)
    assert trainer.run() == 6  # there is nothing left to do
    assert_same_run(trainer, never_stopped)


def test_the_reference_policy_survives(synthetic: ModuleType, tmp_path: Path) -> None:
    whole = synthetic.make_trainer(tmp_path / "whole", grpo=WITH_REFERENCE)
    whole.run()
    synthetic.make_trainer(tmp_path / "parts", grpo=WITH_REFERENCE).run(until_step=3)
    resumed = synthetic.make_trainer(tmp_path / "parts", grpo=WITH_REFERENCE)
    resumed.run()
    assert_same_run(resumed, whole)
    assert records(tmp_path / "whole")[-1]["kl"] > 0


def test_the_average_is_of_all_weights_and_survives(synthetic: ModuleType, tmp_path: Path) -> None:
    whole = synthetic.make_trainer(tmp_path / "whole", ema_decay=0.5)
    expected = [p.detach().clone() for p in whole.controller.parameters()]

    def follow(step: int, *_: Any) -> None:
        decay = min(0.5, step / (step + 9))
        for mean, new in zip(expected, whole.controller.parameters(), strict=True):
            mean.mul_(decay).add_(new.detach(), alpha=1 - decay)

    whole.run(on_step=follow)
    assert whole.result is not whole.controller
    for mean, kept in zip(expected, whole.result.parameters(), strict=True):
        torch.testing.assert_close(kept, mean)
    synthetic.make_trainer(tmp_path / "parts", ema_decay=0.5).run(until_step=3)
    resumed = synthetic.make_trainer(tmp_path / "parts", ema_decay=0.5)
    resumed.run()
    assert_same_run(resumed, whole)
    for one, other in zip(resumed.result.parameters(), whole.result.parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_an_average_the_last_weights_are_the_result(never_stopped: Trainer) -> None:
    assert never_stopped.result is never_stopped.controller


def test_steps_behind_the_last_checkpoint_are_done_again(
    synthetic: ModuleType, tmp_path: Path, never_stopped: Trainer
) -> None:
    class Stopped(BaseException):
        pass

    def stop(step: int, metrics: Any, seconds_left: float) -> None:
        if step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        synthetic.make_trainer(tmp_path, checkpoint_every_steps=3).run(on_step=stop)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5]
    trainer = synthetic.make_trainer(tmp_path)
    assert load_checkpoint(trainer.checkpoint_path).step == 3
    trainer.run()
    assert_same_run(trainer, never_stopped)


def test_what_a_kill_leaves_half_written_is_cleared_away(
    synthetic: ModuleType, tmp_path: Path, never_stopped: Trainer
) -> None:
    first = synthetic.make_trainer(tmp_path)
    first.run(until_step=3)
    # Killed while the checkpoint of step 4 was written, and step 4 again while its metrics were.
    half = first.checkpoint_path.with_name(f".{first.checkpoint_path.name}.00000000.tmp")
    half.write_bytes(first.checkpoint_path.read_bytes()[:1000])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "accuracy": 0.5}\n{"step": 5, "accur')
    trainer = synthetic.make_trainer(tmp_path)
    trainer.run()
    assert_same_run(trainer, never_stopped)
    assert not half.exists()


def test_a_killed_process_loses_at_most_its_step(synthetic: ModuleType, tmp_path: Path, never_stopped: Trainer) -> None:
    command = [sys.executable, str(Path(__file__).with_name("synthetic_run.py")), str(tmp_path), "6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reported = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    trainer = synthetic.make_trainer(tmp_path)
    assert load_checkpoint(trainer.checkpoint_path, trainer.identity).step >= reported[-1] == 2
    trainer.run()
    assert_same_run(trainer, never_stopped)


def test_a_full_disk_is_said_and_the_run_goes_on_later(
    synthetic: ModuleType, tmp_path: Path, never_stopped: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.make_trainer(tmp_path).run(until_step=3)
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "checkpoint.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match="No space left"):
            synthetic.make_trainer(tmp_path).run()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    trainer = synthetic.make_trainer(tmp_path)
    assert load_checkpoint(trainer.checkpoint_path, trainer.identity).step == 3
    trainer.run()
    assert_same_run(trainer, never_stopped)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.5}, r"config\.lr was 0\.01, now 0\.5"),
        ({"seed": 1}, r"config\.seed"),
        ({"grpo": SMALL}, r"config\.grpo\.group_size was 16, now 4"),
        ({"num_examples": 9}, "dataset"),
        ({"hidden_dim": 8}, r"controller\.settings\.hidden_dim"),
        ({"parts": {"reference_ms": 77.0}}, "reference_ms"),
        ({"max_price": 31.0}, r"config\.max_price was 30\.0, now 31\.0"),
    ],
)
def test_another_run_is_not_gone_on_with(
    synthetic: ModuleType, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    synthetic.make_trainer(tmp_path).run(until_step=1)
    checkpoint = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(IdentityError, match=named):
        synthetic.make_trainer(tmp_path, **change).run()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == checkpoint
    assert len(records(tmp_path)) == 1


def test_another_data_set_is_not_gone_on_with(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.make_trainer(tmp_path).run(until_step=1)
    changed = synthetic.make_dataset()
    changed[5].image.putpixel((0, 0), (1, 2, 3))
    with pytest.raises(IdentityError, match="dataset"):
        synthetic.make_trainer(tmp_path, dataset=changed).run()


def test_how_a_run_is_watched_may_change(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.make_trainer(tmp_path).run(until_step=1)
    trainer = synthetic.make_trainer(tmp_path, checkpoint_every_steps=5, checkpoint_every_seconds=60.0)
    assert trainer.run(until_step=2) == 2


def test_metrics_without_a_checkpoint_are_not_overwritten(synthetic: ModuleType, tmp_path: Path) -> None:
    trainer = synthetic.make_trainer(tmp_path)
    trainer.run(until_step=1)
    trainer.checkpoint_path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        synthetic.make_trainer(tmp_path).run()
    assert len(records(tmp_path)) == 1


def test_parts_of_different_models_are_refused(synthetic: ModuleType, tmp_path: Path) -> None:
    trainer = synthetic.make_trainer(tmp_path)
    other_engine = synthetic.SyntheticEngine()
    other_engine.store.model_identity = "other"
    other_estimator = dataclasses.replace(trainer.estimator, trained_top_k=7)
    other_guardrail = dataclasses.replace(trainer.pacing.guardrail, estimator=other_estimator)
    for parts, named in (
        ({"engine": other_engine}, "another model"),
        ({"pacing": dataclasses.replace(trainer.pacing, guardrail=other_guardrail)}, "another latency estimator"),
    ):
        with pytest.raises(IdentityError, match=named):
            synthetic.make_trainer(tmp_path, parts=parts)


def test_bad_data_and_budgets_are_refused(synthetic: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        synthetic.make_trainer(tmp_path, dataset=[])
    with pytest.raises(DataError, match="share an id"):
        synthetic.make_trainer(tmp_path, dataset=synthetic.make_dataset(2) + synthetic.make_dataset(1))
    with pytest.raises(BudgetError):
        synthetic.make_trainer(tmp_path, parts={"reference_ms": 0.0})


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"ema_decay": 1.0},
        {"final_lr": -1e-4},
        {"max_tightening": 0.9},
        {"batch_size": 6},
        {"seed": -1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"min_budget": 2.0},
        {"budget_scale": "log"},
        {"budget_kind": "ttfb"},
        {"num_examples": 0},
        {"final_entropy_coef": -0.1},
        {"checkpoint_every_seconds": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        TrainConfig(tmp_path, **settings)


def test_the_entropy_bonus_falls_linearly(tmp_path: Path) -> None:
    config = TrainConfig(tmp_path, steps=5, grpo=GRPOConfig(entropy_coef=0.04), final_entropy_coef=0.0)
    assert [config.entropy_coef(step) for step in range(5)] == pytest.approx([0.04, 0.03, 0.02, 0.01, 0.0])
    assert dataclasses.replace(config, final_entropy_coef=None).entropy_coef(4) == 0.04


def test_the_learning_rate_falls_linearly(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.make_trainer(tmp_path, lr=0.005, final_lr=0.0).run()
    assert [record["learning_rate"] for record in records(tmp_path)] == pytest.approx(
        [0.005, 0.004, 0.003, 0.002, 0.001, 0.0]
    )


# What it leaves behind -----------------------------------------------------------------------------------------------


def test_the_run_directory_says_how_to_repeat_the_run(synthetic: ModuleType, tmp_path: Path) -> None:
    first = synthetic.make_trainer(tmp_path / "a", grpo=SMALL)
    first.run(until_step=2)
    synthetic.make_trainer(tmp_path / "a", grpo=SMALL).run()
    record = json.loads((tmp_path / "a" / "run.json").read_text(encoding="utf-8"))
    assert [start["step"] for start in record["starts"]] == [0, 2]
    for start in record["starts"]:
        assert start["versions"]["torch"]
        assert start["device"]["device_type"] == "cpu"
        assert "commit" in start
    assert record["config"]["seed"] == 0

    config = TrainConfig.from_dict({**record["config"], "run_dir": str(tmp_path / "b")})
    again = synthetic.make_trainer(tmp_path / "b", parts={"config": config})
    again.run()
    assert records(tmp_path / "a") == records(tmp_path / "b")
    repeated = json.loads((tmp_path / "b" / "run.json").read_text(encoding="utf-8"))
    assert repeated["initial_weights_sha256"] == record["initial_weights_sha256"]
    assert repeated["identity"] == record["identity"]
    with pytest.raises(ConfigError, match="learning"):
        TrainConfig.from_dict({**record["config"], "learning": 1})


def test_progress_is_reported(synthetic: ModuleType, tmp_path: Path) -> None:
    steps: list[tuple[int, float]] = []
    rollouts: list[tuple[int, int]] = []
    synthetic.make_trainer(tmp_path, steps=3).run(
        on_step=lambda step, metrics, seconds_left: steps.append((step, seconds_left)),
        on_rollouts=lambda done, total: rollouts.append((done, total)),
    )
    assert [step for step, _ in steps] == [1, 2, 3]
    assert steps[0][1] > 0 == steps[-1][1]
    assert rollouts[-1][0] == rollouts[-1][1] > 0


def test_a_damaged_log_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n', encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="damaged at byte 12"):
        MetricsLog(path, 2)
    assert path.read_bytes() == before


def test_tensorboard_shows_no_step_twice(synthetic: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl", 0, tmp_path / "events")
    for step in (1, 2, 3):
        log.write(step, {"accuracy": step / 10})
    log.close()
    log = MetricsLog(tmp_path / "metrics.jsonl", 1, tmp_path / "events")
    log.write(2, {"accuracy": 0.9})
    log.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("accuracy")] == [(1, 0.1), (2, 0.9)]
    assert records(tmp_path) == [{"step": 1, "accuracy": 0.1}, {"step": 2, "accuracy": 0.9}]
