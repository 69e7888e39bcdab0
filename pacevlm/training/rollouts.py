"""One step's rollouts: which contexts (example, objective), which knobs the policy samples for them, what they gave.

Shapes: `batch` counts contexts, `group` the rollouts of each, `visits` the distinct (context, tier)
combinations that were sampled: the latency token is computed once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pacevlm.controller.policy import Controller
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import DataError
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.request.pacing import Pacing, policy_inputs
from pacevlm.training.grpo import joint_log_prob, masked_log_softmax, sample_actions
from pacevlm.training.train_config import TrainConfig
from pacevlm.types import BudgetKind, Example, Objective, Outcome, RequestView

RolloutProgress = Callable[[int, int], None]

# Streams of random numbers: each use draws from (seed, stream, index) and from nothing else, so that a step can be
# drawn again without the steps before it.
_ORDER, _BUDGETS, _ACTIONS, _MEASURED, _TIGHTENING, _PRICES = range(6)


class Outcomes(Protocol):
    """Answers that need not be computed again."""

    @property
    def model_identity(self) -> str:
        """Identity of the frozen model that they are of."""

    def __contains__(self, key: tuple[str, Knobs]) -> bool:
        """Whether the answer of (content id, knobs) is stored."""


class Rollouts(Protocol):
    """What training needs of the frozen model.

    What it answers must depend on picture, question and knobs alone, not on what was asked, batched or cached before,
    and an outcome's accuracy on the answer and the example's references: only then does a run that was stopped go on to
    the bit.
    """

    @property
    def store(self) -> Outcomes:
        """Answers that need not be computed again, and which model they are of."""

    @property
    def metric_name(self) -> str:
        """What the outcomes' accuracies are scores of."""

    def view(self, example: Example) -> RequestView:
        """What is known of an example before the vision encoder runs."""

    def latency_token_outputs(self, examples: Sequence[Example], tiers: Sequence[str], tokens: Tensor) -> Tensor:
        """Latency tokens behind the first block, `(n, d_model)`, differentiable in `tokens` `(n, d_model)`."""

    def run(self, jobs: Sequence[tuple[Example, Knobs]], progress: RolloutProgress | None = None) -> list[Outcome]:
        """Run examples with knobs; one outcome per job, in order."""


def stream(seed: int, name: int, index: int) -> np.random.Generator:
    """Random numbers that depend on a seed, the use they are put to, and an index such as the step."""
    return np.random.default_rng([seed, name, index])


# Contexts -------------------------------------------------------------------------------------------------------------


def draw_examples(num_examples: int, config: TrainConfig, step: int) -> list[int]:
    """Indices of a step's examples: the data set in a new random order each epoch, with no example left out."""
    count = config.batch_size // config.budgets_per_example
    orders: dict[int, NDArray[np.int64]] = {}
    indices = []
    for position in range(step * count, (step + 1) * count):
        epoch, offset = divmod(position, num_examples)
        if epoch not in orders:
            orders[epoch] = stream(config.seed, _ORDER, epoch).permutation(num_examples)
        indices.append(int(orders[epoch][offset]))
    return indices


def draw_budgets_ms(reference_ms: float, config: TrainConfig, step: int) -> NDArray[np.float64]:
    """A step's budgets, `(examples, budgets_per_example)`, milliseconds.

    The range is cut into equal parts and each example gets one budget from every part, so that it always meets tight
    and loose ones; each single budget is still distributed as the settings say.
    """
    count, parts = config.batch_size // config.budgets_per_example, config.budgets_per_example
    place = (np.arange(parts) + stream(config.seed, _BUDGETS, step).random((count, parts))) / parts
    low, high = config.min_budget, config.max_budget
    fraction = low + (high - low) * place if config.budget_scale == "uniform" else low * (high / low) ** place
    return np.asarray(reference_ms * fraction)


def draw_prices(shape: tuple[int, int], config: TrainConfig, step: int) -> NDArray[np.float64]:
    """A step's prices of time, `(examples, budgets_per_example)`, points of accuracy per full latency.

    Each example gets one price from every equal part of what may be drawn, in an order that the budgets do not know.
    """
    if not config.max_price:
        return np.zeros(shape)
    random = stream(config.seed, _PRICES, step)
    parts = random.permuted(np.broadcast_to(np.arange(shape[1]), shape), axis=1)
    place = (parts + random.random(shape)) / shape[1]
    priced = np.clip((place - config.unpriced_share) / max(1 - config.unpriced_share, 1e-12), 0, 1)
    prices = config.min_price * (config.max_price / config.min_price) ** priced
    return np.where(place < config.unpriced_share, 0.0, prices)


@dataclass(frozen=True, eq=False)
class Contexts:
    """A step's contexts, that is examples with objectives, as the policy sees them.

    Attributes:
        examples: one per context; those of one example repeat it.
        requests: one per context.
        mask: knobs that may be sampled, boolean `(batch, tiers, computes)`, on the CPU.
        any_feasible: whether anything fits the budget, boolean `(batch,)`.
    """

    examples: list[Example]
    requests: list[PolicyInput]
    mask: Tensor
    any_feasible: Tensor

    @property
    def objectives(self) -> list[Objective]:
        """One per context."""
        return [request.objective for request in self.requests]

    @property
    def budgets_ms(self) -> Tensor:
        """Milliseconds, float64 `(batch, 1)`."""
        return torch.tensor([[objective.budget_ms] for objective in self.objectives], dtype=torch.float64)

    @property
    def prices(self) -> Tensor:
        """Points of accuracy per full latency, float64 `(batch, 1)`."""
        return torch.tensor([[objective.price] for objective in self.objectives], dtype=torch.float64)


def build_contexts(
    examples: Sequence[Example],
    budgets_ms: NDArray[np.float64],
    engine: Rollouts,
    pacing: Pacing,
    config: TrainConfig,
    step: int = 0,
) -> Contexts:
    """Look at every example once and ask the guardrail for the mask of each of its budgets.

    Args:
        budgets_ms: `(examples, budgets_per_example)`.
        step: decides each context's price, and how much tighter its bounds are, if the settings say so.

    Raises:
        ProfileError: the artefacts do not fit each other or the model.
    """
    views, repeats = [engine.view(example) for example in examples], budgets_ms.shape[1]
    bounds_ms = pacing.upper_bounds_ms(views, config.budget_kind).repeat(repeats, axis=0)
    examples = [example for example in examples for _ in range(repeats)]
    prices = draw_prices((len(views), repeats), config, step)
    requests = policy_inputs(
        [view for view in views for _ in range(repeats)],
        [Objective(ms, config.budget_kind, price) for ms, price in zip(budgets_ms.flat, prices.flat, strict=True)],
        bounds_ms,
        [example.example_id for example in examples],
        tightening=config.max_tightening ** stream(config.seed, _TIGHTENING, step).random(len(examples)),
        masked=config.mask,
    )
    mask = torch.from_numpy(np.array([request.feasible for request in requests])).flatten(2)
    return Contexts(examples, requests, mask, torch.tensor([request.any_feasible for request in requests]))


# The policy ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Visits:
    """The distinct (context, tier) combinations among a step's rollouts.

    Attributes:
        context: index of the context, `(visits,)`.
        tier: tier index, `(visits,)`.
        of_rollout: which visit a rollout belongs to, `(batch, group)`.
    """

    context: Tensor
    tier: Tensor
    of_rollout: Tensor

    @classmethod
    def of(cls, tiers: Tensor, num_tiers: int) -> Visits:
        """Distinct combinations of sampled tiers `(batch, group)`."""
        codes = torch.arange(len(tiers)).unsqueeze(1) * num_tiers + tiers
        visited, of_rollout = codes.unique(return_inverse=True)
        return cls(visited // num_tiers, visited % num_tiers, of_rollout)


def tier_log_probs(controller: Controller, features: Tensor, contexts: Contexts) -> Tensor:
    """Tiers' log-probabilities under the stored masks, `(batch, tiers)`, on the CPU."""
    return masked_log_softmax(controller.stage1_logits(features).cpu(), contexts.mask.any(dim=-1))


def compute_log_probs(controller: Controller, engine: Rollouts, contexts: Contexts, visits: Visits) -> Tensor:
    """Log-probabilities of stage 2's choices at each rollout's own tier, `(batch, group, computes)`, on the CPU."""
    visited_contexts, visited_tiers = visits.context.tolist(), visits.tier.tolist()
    tokens = controller.latency_tokens(contexts.objectives)
    outputs = engine.latency_token_outputs(
        [contexts.examples[context] for context in visited_contexts],
        [controller.knob_space.tiers[tier] for tier in visited_tiers],
        tokens.index_select(0, visits.context.to(tokens.device)),
    )
    requests = [contexts.requests[context] for context in visited_contexts]
    logits = controller.stage2_logits(outputs, requests, visits.tier)
    log_probs = masked_log_softmax(logits.flatten(1).cpu(), contexts.mask[visits.context, visits.tier])
    # index_select: the gradient of plain indexing adds up in an order that depends on the threads.
    return log_probs.index_select(0, visits.of_rollout.flatten()).view(*visits.of_rollout.shape, -1)


class Actions(NamedTuple):
    """Sampled actions of a step.

    `tier` and `compute` are indices `(batch, group)`, `tier_log_prob` is log π₁ of the sampled tiers `(batch, group)`
    and `log_prob` that of both stages, when they were sampled.
    """

    tier: Tensor
    compute: Tensor
    visits: Visits
    tier_log_prob: Tensor
    log_prob: Tensor


@torch.no_grad()
def sample_knobs(
    controller: Controller, engine: Rollouts, contexts: Contexts, features: Tensor, config: TrainConfig, step: int
) -> Actions:
    """Sample a group of configurations for every context; masked ones are never drawn."""
    generator = torch.Generator().manual_seed(int(stream(config.seed, _ACTIONS, step).integers(2**63)))
    group = config.grpo.group_size
    log_pi1 = tier_log_probs(controller, features, contexts).unsqueeze(1).expand(-1, group, -1)
    tier = sample_actions(log_pi1, generator)
    visits = Visits.of(tier, log_pi1.shape[-1])
    log_pi2 = compute_log_probs(controller, engine, contexts, visits)
    compute = sample_actions(log_pi2, generator)
    tier_log_prob = log_pi1.gather(-1, tier.unsqueeze(-1)).squeeze(-1)
    return Actions(tier, compute, visits, tier_log_prob, joint_log_prob(log_pi1, tier, log_pi2, compute))


# Outcomes ------------------------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """What the sampled configurations gave.

    Attributes:
        accuracy: `(batch, group)`.
        latency_ms: predicted with the number of tokens that the answer really had, float64 `(batch, group)`.
        num_jobs: distinct (example, knobs).
        num_remembered: how many of them the engine knew already.
    """

    accuracy: Tensor
    latency_ms: Tensor
    num_jobs: int
    num_remembered: int


def run_knobs(
    engine: Rollouts,
    estimator: LatencyEstimator,
    contexts: Contexts,
    knob_indices: Tensor,
    kind: BudgetKind,
    progress: RolloutProgress | None = None,
) -> Results:
    """Run every distinct (example, knobs) among a step's rollouts once.

    Args:
        knob_indices: positions in the knob space, `(batch, group)`.

    Raises:
        DataError: the engine answered another job than it was given.
    """
    space = estimator.knob_space
    job_of: dict[tuple[str, int], int] = {}
    jobs: list[tuple[Example, Knobs]] = []
    sizes = []
    of_rollout = []
    for example, request, indices in zip(contexts.examples, contexts.requests, knob_indices.tolist(), strict=True):
        for index in indices:
            key = (example.example_id, index)
            if key not in job_of:
                job_of[key] = len(jobs)
                jobs.append((example, space[index]))
                sizes.append(request.view.sizes)
            of_rollout.append(job_of[key])
    num_remembered = sum((example.content_id, knobs) in engine.store for example, knobs in jobs)
    outcomes = engine.run(jobs, progress)
    if [(outcome.example_id, outcome.knobs) for outcome in outcomes] != [(e.example_id, knobs) for e, knobs in jobs]:
        raise DataError("the rollout engine gave outcomes of other jobs than it was asked for")
    predicted_ms = estimator.predict_many(sizes, [outcome.num_output_tokens for outcome in outcomes], kind)
    job_knobs = np.array([index for _, index in job_of])
    job_ms = predicted_ms.reshape(len(jobs), -1)[np.arange(len(jobs)), job_knobs]
    place = torch.tensor(of_rollout).view(knob_indices.shape)
    accuracy = torch.tensor([outcome.accuracy for outcome in outcomes], dtype=torch.float32)
    return Results(accuracy[place], torch.from_numpy(job_ms)[place], len(jobs), num_remembered)


def knob_shares(knob_indices: Tensor, space: KnobSpace) -> Iterator[tuple[str, float]]:
    """Share of the rollouts that took each value of each knob, under the metrics' names."""
    counts = torch.bincount(knob_indices.flatten(), minlength=len(space)).double().view(space.shape)
    shares = counts / counts.sum()
    knobs = (("tier", space.tiers), ("top_k", space.top_ks), ("num_blocks", space.num_blocks))
    for axis, (name, values) in enumerate(knobs):
        others = [other for other in range(3) if other != axis]
        for value, share in zip(values, shares.sum(dim=others).tolist(), strict=True):
            yield f"knobs/{name}/{value}", share


def draw_measured(
    contexts: Contexts, knob_indices: Tensor, space: KnobSpace, config: TrainConfig, step: int
) -> list[int]:
    """Flat positions of the rollouts whose latency is to be measured, each of another (example, knobs)."""
    order = stream(config.seed, _MEASURED, step).permutation(knob_indices.numel())
    chosen: dict[tuple[str, int], int] = {}
    flat, group = knob_indices.flatten().tolist(), knob_indices.shape[1]
    for position in order.tolist():
        chosen.setdefault((contexts.examples[position // group].example_id, flat[position]), position)
    return list(chosen.values())[: config.num_measured]
