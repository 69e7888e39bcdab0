"""The trainer: rollouts of the controller's own choices, and clipped policy updates from what they gave."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pacevlm.controller.policy import Controller
from pacevlm.errors import CheckpointError, ConfigError, DataError, PacevlmError
from pacevlm.identity import Identity
from pacevlm.knobs import Knobs, check_budget_ms
from pacevlm.latency.profile import collect_device_facts
from pacevlm.request.pacing import Pacing
from pacevlm.training.checkpoint import load_checkpoint, remove_leftovers, save_checkpoint
from pacevlm.training.constraint import PIDLagrangian
from pacevlm.training.grpo import group_advantages, grpo_loss, joint_log_prob, sampled_entropy, sampled_kl
from pacevlm.training.metrics_log import MetricsLog
from pacevlm.training.reward import RewardTerms, compute_reward, relative_cost
from pacevlm.training.rollouts import (
    Actions,
    Contexts,
    Results,
    RolloutProgress,
    Rollouts,
    build_contexts,
    compute_log_probs,
    draw_budgets_ms,
    draw_examples,
    draw_measured,
    knob_shares,
    run_knobs,
    sample_knobs,
    tier_log_probs,
)
from pacevlm.training.run_record import dataset_identity, weights_sha256, write_run_record
from pacevlm.training.train_config import TrainConfig
from pacevlm.types import Example, StageTimes

CHECKPOINT_NAME = "checkpoint.safetensors"
METRICS_NAME = "metrics.jsonl"
RUN_NAME = "run.json"
TENSORBOARD_NAME = "tensorboard"

Metrics = dict[str, float]
# Called after each step with its number from 1, its metrics, and the seconds that the remaining steps will take.
OnStep = Callable[[int, Mapping[str, float], float], None]
# Runs one request alone, batch 1, and tells how long its stages took.
Measure = Callable[[Example, Knobs], StageTimes]


class Trainer:
    """Trains a controller by group-relative policy optimisation under a latency constraint.

    A step draws contexts (example, budget), samples a group of configurations for each from the controller under the
    guardrail's masks, runs the frozen model with them, and updates the controller towards what scored above the rest
    of its group. Latencies are the estimator's; violations that the masks let through are priced by a multiplier.

    All randomness derives from `config.seed` and the step, and each step ends in a consistent state, so a run that
    was stopped, however hard, goes on as if it had not been.

    Args:
        controller: is trained in place.
        engine: runs the frozen model.
        pacing: the guardrail, whose estimator predicts latencies, and bounds on the number of output tokens.
        dataset: examples to train on.
        config: the settings; `config.run_dir` gets checkpoint, metrics and `run.json`.
        reference_ms: latency that budgets are fractions of, for example the full configuration's bound.
        measure: measures one request, for the metric `latency/ape_p50`; None leaves it out.
        more_metrics: what else is to be logged of a step, asked for at its end.

    Raises:
        IdentityError: the parts were made for different models, knob spaces or estimators.
        DataError: the data set is empty, or two examples share an id.
        BudgetError: `reference_ms` is not a positive, finite number.
        ConfigError: the controller has nothing to train.
    """

    def __init__(
        self,
        controller: Controller,
        engine: Rollouts,
        pacing: Pacing,
        dataset: Sequence[Example],
        config: TrainConfig,
        reference_ms: float,
        *,
        measure: Measure | None = None,
        more_metrics: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        estimator = pacing.guardrail.estimator
        Identity(engine.store.model_identity).check("the outcome store", pacing.made_for)
        controller.made_for.check("the controller", pacing.made_for)
        self.controller, self.engine, self.config = controller, engine, config
        self.pacing, self.estimator = pacing, estimator
        self.dataset, self.measure, self.more_metrics = dataset, measure, more_metrics
        self.reference_ms = check_budget_ms(reference_ms)
        self.num_examples = min(len(dataset), config.num_examples or len(dataset))
        examples = [dataset[index] for index in range(self.num_examples)]
        if not examples:
            raise DataError("the data set is empty; training needs at least one example")
        if len({example.example_id for example in examples}) != len(examples):
            raise DataError("two examples of the data set share an id; outcomes are told apart by it")
        self.identity: dict[str, Any] = {
            "model": engine.store.model_identity,
            "dataset": dataset_identity(examples),
            "metric": engine.metric_name,
            "controller": {
                "settings": controller.config.to_dict(),
                "d_model": controller.d_model,
                "knob_space": controller.knob_space.to_dict(),
            },
            "pacing": pacing.identity,
            "reference_ms": self.reference_ms,
            "config": config.identity(),
        }
        self.step = 0
        self.multiplier = PIDLagrangian(config.constraint)
        self._device = next(controller.parameters()).device
        parameters = [parameter for parameter in controller.parameters() if parameter.requires_grad]
        if not parameters:
            raise ConfigError("every weight of the controller is frozen; there is nothing to train")
        self._parameters = parameters
        self._optimizer = torch.optim.Adam(parameters, lr=config.lr)
        self._modules: dict[str, nn.Module] = {"controller": controller}
        # The policy that the KL divergence is taken from: the controller as it was before the first step.
        self._reference: Controller | None = None
        if config.grpo.beta > 0:
            self._reference = copy.deepcopy(controller).requires_grad_(False)
            self._modules["reference"] = self._reference
        self._average: Controller | None = None
        if config.ema_decay > 0:
            self._average = copy.deepcopy(controller).requires_grad_(False)
            self._modules["average"] = self._average
        self._knob_cost = torch.tensor([relative_cost(knobs, estimator.knob_space) for knobs in estimator.knob_space])

    @property
    def result(self) -> Controller:
        """What training gives: the moving average of the weights, or the controller itself without one."""
        return self.controller if self._average is None else self._average

    @property
    def checkpoint_path(self) -> Path:
        """Where the state of the run is kept."""
        return self.config.run_dir / CHECKPOINT_NAME

    # Run -------------------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        until_step: int | None = None,
        on_step: OnStep | None = None,
        on_rollouts: RolloutProgress | None = None,
    ) -> int:
        """Train from wherever the run directory is to the end; returns the number of steps done.

        Args:
            until_step: stop early, behind this step, with a checkpoint.
            on_step: called after each step, when its checkpoint is written.
            on_rollouts: called while a step's rollouts run, with how many of them are done.

        Raises:
            IdentityError: the run directory belongs to another run: other settings, data, model or controller.
            CheckpointError: the checkpoint is damaged, or the directory holds metrics without one.
            StorageError: a file could not be written; the checkpoint before it is untouched.
            PacevlmError: the gradient is not finite any more.
        """
        config = self.config
        self._start()
        last = config.steps if until_step is None else min(until_step, config.steps)
        tensorboard_dir = config.run_dir / TENSORBOARD_NAME if config.tensorboard else None
        log = MetricsLog(config.run_dir / METRICS_NAME, self.step, tensorboard_dir)
        started, first = time.monotonic(), self.step
        saved_at, saved_step = started, self.step
        try:
            while self.step < last:
                metrics = self.train_step(on_rollouts)
                log.write(self.step, metrics)
                due = self.step - saved_step >= config.checkpoint_every_steps or self.step == last
                if config.checkpoint_every_seconds is not None:
                    due = due or time.monotonic() - saved_at >= config.checkpoint_every_seconds
                if due:
                    log.sync()
                    self.save()
                    saved_at, saved_step = time.monotonic(), self.step
                if on_step is not None:
                    per_step = (time.monotonic() - started) / (self.step - first)
                    on_step(self.step, metrics, per_step * (last - self.step))
        finally:
            log.close()
        return self.step

    def save(self) -> None:
        """Write the checkpoint of the steps done; raises StorageError, and leaves the one before, if it fails."""
        save_checkpoint(
            self.checkpoint_path,
            step=self.step,
            identity=self.identity,
            multiplier=self.multiplier.state_dict(),
            modules=self._modules,
            optimizer=self._optimizer,
        )

    def _start(self) -> None:
        """Go on from the run directory's checkpoint, or make the directory a new run's."""
        run_dir, initial = self.config.run_dir, weights_sha256(self.controller)
        remove_leftovers(self.checkpoint_path)
        if self.checkpoint_path.exists():
            checkpoint = load_checkpoint(self.checkpoint_path, self.identity)
            checkpoint.restore(self._modules, self._optimizer)
            self.multiplier.load_state_dict(checkpoint.multiplier)
            self.step = checkpoint.step
        else:
            metrics = run_dir / METRICS_NAME
            if metrics.exists() and metrics.stat().st_size:
                raise CheckpointError(
                    f"{run_dir} holds the metrics of a run, but no checkpoint to go on from; choose another run_dir"
                )
            self.save()
        write_run_record(
            run_dir / RUN_NAME,
            config=self.config,
            identity=self.identity,
            initial_weights_sha256=initial,
            device=collect_device_facts(self._device, self._parameters[0].dtype),
            step=self.step,
        )

    # One step --------------------------------------------------------------------------------------------------------

    def train_step(self, on_rollouts: RolloutProgress | None = None) -> Metrics:
        """Do one step and return its metrics; raises PacevlmError if the gradient is not finite."""
        config, step = self.config, self.step
        started = time.monotonic()
        examples = [self.dataset[index] for index in draw_examples(self.num_examples, config, step)]
        budgets_ms = draw_budgets_ms(self.reference_ms, config, step)
        contexts = build_contexts(examples, budgets_ms, self.engine, self.pacing, config, step)
        with torch.no_grad():
            features = self.controller.stage1_features(contexts.requests)
        actions = sample_knobs(self.controller, self.engine, contexts, features, config, step)
        knob_indices = actions.tier * self.controller.knob_space.num_stage2 + actions.compute
        running = time.monotonic()
        results = run_knobs(self.engine, self.estimator, contexts, knob_indices, config.budget_kind, on_rollouts)
        run_seconds = time.monotonic() - running
        terms = compute_reward(
            results.accuracy,
            results.latency_ms,
            contexts.budgets_ms,
            config.reward,
            prices=contexts.prices,
            full_ms=self.controller.config.reference_ms,
            knob_cost=self._knob_cost[knob_indices],
        )
        # Where nothing fits, the violation is the budget's doing, not the policy's: no price can lower it.
        if contexts.any_feasible.any():
            self.multiplier.update(terms.cost[contexts.any_feasible].mean().item())
        metrics = self._update(contexts, features, actions, terms)
        metrics |= self._rollout_metrics(contexts, knob_indices, results, terms)
        self.step += 1
        seconds = time.monotonic() - started
        metrics |= {
            "speed/step_seconds": seconds,
            "speed/rollouts_per_second": knob_indices.numel() / max(run_seconds, 1e-9),
            "speed/distinct_frac": results.num_jobs / knob_indices.numel(),
            "speed/remembered_frac": results.num_remembered / results.num_jobs,
        }
        if self.more_metrics is not None:
            metrics |= self.more_metrics()
        return metrics | self._measured_metrics(contexts, knob_indices)

    def _update(self, contexts: Contexts, features: Tensor, actions: Actions, terms: RewardTerms) -> Metrics:
        """Several clipped updates from one batch of rollouts; metrics are means over the updates."""
        config = self.config
        coef, lr = config.entropy_coef(self.step), config.learning_rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        grpo = dataclasses.replace(config.grpo, entropy_coef=coef)
        advantages, keep = group_advantages(terms.reward, grpo, costs=terms.cost, multiplier=self.multiplier.multiplier)
        reference = self._reference_log_probs(features, contexts, actions)
        totals: Metrics = {}
        for _ in range(config.epochs_per_batch):
            log_pi1 = tier_log_probs(self.controller, features, contexts)
            log_pi2 = compute_log_probs(self.controller, self.engine, contexts, actions.visits)
            of_rollout = log_pi1.unsqueeze(1).expand(-1, actions.tier.shape[1], -1)
            log_prob = joint_log_prob(of_rollout, actions.tier, log_pi2, actions.compute)
            tier_log_prob = of_rollout.gather(-1, actions.tier.unsqueeze(-1)).squeeze(-1)
            tier_ratio = (tier_log_prob - actions.tier_log_prob).exp()
            kl = None if reference is None else sampled_kl(log_pi1, log_pi2, *reference, tier_ratio)
            entropy = sampled_entropy(log_pi1, log_pi2, tier_ratio)
            loss, metrics = grpo_loss(
                log_prob, actions.log_prob, advantages, keep, grpo, entropy=entropy, kl=kl, rewards=terms.reward
            )
            metrics |= {
                "loss": loss.item(),
                "ratio_max": (log_prob - actions.log_prob).detach().abs().max().exp().item(),
                "grad_norm": self._step_optimizer(loss) if bool(keep.any()) or coef > 0 or grpo.beta > 0 else 0.0,
            }
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / config.epochs_per_batch
        self._update_average()
        return totals | {"learning_rate": lr, "entropy_coef": coef}

    def _step_optimizer(self, loss: Tensor) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise PacevlmError(
                f"the gradient of step {self.step + 1} is {norm}; lower lr (now {self.config.lr}) and go on from the "
                "last checkpoint in another run directory"
            )
        self._optimizer.step()
        return norm

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is None:
            return
        # Early averages forget faster, or they would hold the first weights for long.
        decay = min(self.config.ema_decay, (self.step + 1) / (self.step + 10))
        for kept, new in zip(self._average.parameters(), self.controller.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)

    @torch.no_grad()
    def _reference_log_probs(
        self, features: Tensor, contexts: Contexts, actions: Actions
    ) -> tuple[Tensor, Tensor] | None:
        if self._reference is None:
            return None
        log_pi1 = tier_log_probs(self._reference, features, contexts)
        return log_pi1, compute_log_probs(self._reference, self.engine, contexts, actions.visits)

    # Metrics ---------------------------------------------------------------------------------------------------------

    def _rollout_metrics(
        self, contexts: Contexts, knob_indices: Tensor, results: Results, terms: RewardTerms
    ) -> Metrics:
        feasible = contexts.any_feasible
        metrics = {
            "accuracy": results.accuracy.mean().item(),
            "frac_accuracy_zero_std": (results.accuracy == results.accuracy[:, :1]).all(dim=1).double().mean().item(),
            "cost/lambda": self.multiplier.multiplier,
            "cost/budget_used": (results.latency_ms / contexts.budgets_ms).mean().item(),
            "mask/feasible_frac": contexts.mask.double().mean().item(),
            "mask/budget_unmet_frac": 1.0 - feasible.double().mean().item(),
        }
        if feasible.any():
            metrics["cost/violation_rate"] = terms.violation[feasible].mean().item()
            metrics["cost/mean"] = terms.cost[feasible].mean().item()
        return metrics | dict(knob_shares(knob_indices, self.estimator.knob_space))

    def _measured_metrics(self, contexts: Contexts, knob_indices: Tensor) -> Metrics:
        """How far predictions lie from measurements of a few of the step's rollouts."""
        config, space = self.config, self.estimator.knob_space
        if self.measure is None or not config.measure_every_steps or self.step % config.measure_every_steps:
            return {}
        errors = []
        for position in draw_measured(contexts, knob_indices, space, config, self.step):
            context, rollout = divmod(position, knob_indices.shape[1])
            knobs = space[int(knob_indices[context, rollout])]
            times = self.measure(contexts.examples[context], knobs)
            predicted = self.estimator.predict(contexts.requests[context].view.sizes, knobs, len(times.decode_ms) + 1)
            measured_ms = times.covered_ms(config.budget_kind)
            errors.append(abs(predicted.covered_ms(config.budget_kind) - measured_ms) / measured_ms)
        return {"latency/ape_p50": float(np.median(errors))}
