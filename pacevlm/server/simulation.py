"""The server's queue under load that is made up: how many devices hold how many requests a second to their deadlines.

Nothing is run. Questions are those of a run's test split, whose outcomes are known with every configuration, and a
request takes what it is predicted to, off by what the profile's own measurements were off by. What is left out: the
time that the front takes, pauses of the machine that last longer than a request, and drift.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pacevlm.baselines.full import FullPolicy
from pacevlm.baselines.lookup_table import LookupTable
from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.controller.policy_interface import Policy, PolicyInput
from pacevlm.errors import ConfigError
from pacevlm.evaluation.prices import PriceTable
from pacevlm.evaluation.sweep import choose_knobs, exhaustive_sweep
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.profile import Profile
from pacevlm.latency.replay import ReplayedClock
from pacevlm.pipeline.artefacts import LOOKUP_NAME, PRICES_NAME, PROFILE_NAME
from pacevlm.pipeline.context import Reporter, RunContext
from pacevlm.pipeline.lock import one_writer
from pacevlm.pipeline.run_config import load_run_config
from pacevlm.pipeline.step_log import StepLog
from pacevlm.request.pacing import policy_inputs
from pacevlm.server.config import PolicyName
from pacevlm.server.schedule import Entry, Schedule
from pacevlm.types import Objective, RequestView

Array = NDArray[np.float64]
# What passes on a worker between two requests: the pipe, and the front's turn.
GAP_MS = 1.0


@dataclass(frozen=True)
class Traffic:
    """Questions whose outcomes are known with every configuration.

    Attributes:
        space: the knob space.
        views: of the requests.
        bounds_ms: upper bounds, `(requests, tiers, top_ks, num_blocks)`.
        expected_ms: predictions for the longest answer that is expected, of the same shape.
        real_ms: predictions for the answers that were given, of the same shape.
        accuracy: of the same shape.
        ratios: how many times its prediction a request takes, as the profile has it, in no order.
        choose: by policy, the knobs for a request and what the policy is told of it.
        full_p50_ms: median of the full configuration.
        price: of time, where a client names none.
    """

    space: KnobSpace
    views: Sequence[RequestView]
    bounds_ms: Array
    expected_ms: Array
    real_ms: Array
    accuracy: Array
    ratios: Array
    choose: dict[PolicyName, Callable[[int, PolicyInput], Knobs]]
    full_p50_ms: float
    price: float

    @classmethod
    def of_run(cls, run_dir: Path, reporter: Reporter | None = None) -> Self:
        """The test questions of an evaluated run; answers that are not known yet are computed and stored.

        Raises:
            ConfigError: the directory holds no evaluated run, its budgets are not of whole requests, or it is in use.
            PacevlmError: the model or the data set cannot be loaded, or a file of the run is missing or damaged.
        """
        run = RunContext(load_run_config(run_dir), reporter)
        if run.config.train.budget_kind != "e2e":
            raise ConfigError(f"the budgets of {run_dir} are of the first token; capacity is told for whole requests")
        if StepLog(run_dir).get("evaluate") is None:
            raise ConfigError(f"{run_dir} was not evaluated; run `pacevlm evaluate --run-dir {run_dir}` first")
        with one_writer(run_dir):
            return cls._gather(run)

    @classmethod
    def _gather(cls, run: RunContext) -> Self:
        space, pacing, engine = run.model.knob_space, run.pacing(), run.engine
        estimator = pacing.guardrail.estimator
        inside = [example for example in run.splits.test if estimator.beyond(engine.view(example).sizes) is None]
        shape = (len(inside), *space.shape)
        accuracy = exhaustive_sweep(engine, inside, run.count("every configuration")).reshape(shape)
        views = [engine.view(example) for example in inside]
        sizes = [view.sizes for view in views]
        outcomes = engine.run([(example, knobs) for example in inside for knobs in space])
        lengths = np.array([outcome.num_output_tokens for outcome in outcomes]).reshape(len(inside), -1)
        real_ms = np.empty_like(accuracy).reshape(len(inside), -1)
        for place in range(len(space)):
            predicted = estimator.predict_many(sizes, lengths[:, place], "e2e").reshape(len(inside), -1)
            real_ms[:, place] = predicted[:, place]

        def chooser(policy: Policy) -> Callable[[int, PolicyInput], Knobs]:
            if isinstance(policy, OneChoicePolicy):
                return lambda place, request: policy.choose(request)
            return lambda place, request: choose_knobs(policy, engine, [inside[place]], [request])[0]

        policies: dict[PolicyName, Policy] = {
            "bundle": run.policy(),
            "lookup_table": LookupTable.load(run.run_dir / LOOKUP_NAME, space),
            "full": FullPolicy(space),
        }
        return cls(
            space=space,
            views=views,
            bounds_ms=pacing.upper_bounds_ms(views, "e2e"),
            expected_ms=estimator.predict_many(sizes, pacing.output_tokens_upper(views), "e2e"),
            real_ms=real_ms.reshape(shape),
            accuracy=accuracy,
            ratios=ReplayedClock(estimator, Profile.load(run.run_dir / PROFILE_NAME).samples).ratios,
            choose={name: chooser(policy) for name, policy in policies.items()},
            full_p50_ms=run.full_p50_ms,
            price=PriceTable.load(run.run_dir / PRICES_NAME).default_price,
        )

    @property
    def capacity_per_s(self) -> float:
        """Requests a second that one device can answer with full knobs, one after another."""
        return 1e3 / (float(self.real_ms[:, -1, -1, -1].mean() * self.ratios.mean()) + GAP_MS)


@dataclass(frozen=True)
class Load:
    """What arrives, and what is there for it.

    Attributes:
        requests_per_s: mean of a Poisson stream.
        budgets_ms: each is drawn as often as the others.
        policy: what chooses the knobs.
        num_devices: each with a queue of its own; a request goes to the shorter queue of two drawn.
        num_requests: offered in all.
        seed: of arrivals, questions, budgets and latencies.
    """

    requests_per_s: float
    budgets_ms: tuple[float, ...]
    policy: PolicyName = "bundle"
    num_devices: int = 1
    num_requests: int = 4000
    seed: int = 0


@dataclass(frozen=True)
class Tally:
    """What became of a load.

    Attributes:
        offered, accepted: requests.
        late: accepted ones that did not keep their deadline, or whose deadline passed in the queue.
        right: sum of accuracies of the answers.
        good: sum of accuracies of those in time.
        span_s: how long requests arrived.
        busy: share of the time that devices were busy.
    """

    offered: int
    accepted: int
    late: int
    right: float
    good: float
    span_s: float
    busy: float

    @property
    def goodput_per_s(self) -> float:
        """Right answers in time, a second."""
        return self.good / self.span_s

    @property
    def late_share(self) -> float:
        """Of accepted requests; 0 without any."""
        return self.late / self.accepted if self.accepted else 0.0

    @property
    def kept_share(self) -> float:
        """Answers in time, of all requests."""
        return (self.accepted - self.late) / self.offered

    @property
    def accuracy(self) -> float:
        """Of the answers; 0 without any."""
        return self.right / self.accepted if self.accepted else 0.0


class _Device:
    """One worker and its queue."""

    def __init__(self) -> None:
        self.schedule = Schedule()
        self.schedule.gap_ms = GAP_MS
        self.busy_s = 0.0
        self.free_s: float | None = None  # when what runs is over

    @property
    def num_held(self) -> int:
        return len(self.schedule.waiting) + (self.free_s is not None)


def simulate(traffic: Traffic, load: Load) -> Tally:
    """Play a load through the queues of some devices."""
    rng = np.random.default_rng(load.seed)
    number, space = load.num_requests, traffic.space
    arrivals_s = np.cumsum(rng.exponential(1 / load.requests_per_s, number))
    questions = rng.integers(len(traffic.views), size=number)
    budgets_s = rng.choice(np.array(load.budgets_ms), number) / 1e3
    ratios = rng.choice(traffic.ratios, number)
    routes = rng.integers(load.num_devices, size=(number, 2))
    choose = traffic.choose[load.policy]
    least = (-1, -1, -1) if load.policy == "full" else (0, 0, 0)
    devices = [_Device() for _ in range(load.num_devices)]
    right = good = 0.0
    accepted = late = 0
    # Arrivals and ends, in the order of time; the number breaks ties.
    events: list[tuple[float, int, int]] = [(float(time_s), i, -1) for i, time_s in enumerate(arrivals_s)]
    heapq.heapify(events)

    def begin(place: int, now_s: float) -> None:
        nonlocal right, good, late
        device = devices[place]
        late += len(device.schedule.expire(now_s))
        turn = device.schedule.start(now_s)
        if turn is None:
            return
        i = int(turn.entry.key)
        question = int(questions[i])
        given_ms = max(min(turn.until_s, turn.entry.deadline_s) - now_s, 1e-9) * 1e3
        bounds_ms = traffic.bounds_ms[question]
        objective = Objective(given_ms, "e2e", max(traffic.price, turn.price))
        (request,) = policy_inputs([traffic.views[question]], [objective], bounds_ms[None], [turn.entry.key])
        at = space.place(choose(question, request))
        took_ms = float(traffic.real_ms[question][at] * ratios[i])
        device.schedule.expect(now_s + float(bounds_ms[at]) / 1e3)
        device.schedule.learn(float(traffic.expected_ms[question][at]), took_ms)
        end_s = now_s + took_ms / 1e3
        accuracy = float(traffic.accuracy[question][at])
        right += accuracy
        late += end_s > turn.entry.deadline_s
        good += accuracy * (end_s <= turn.entry.deadline_s)
        device.free_s = end_s + GAP_MS / 1e3
        device.busy_s += device.free_s - now_s
        heapq.heappush(events, (device.free_s, number + i, place))

    while events:
        now_s, i, place = heapq.heappop(events)
        if place >= 0:
            devices[place].schedule.end(now_s)
            devices[place].free_s = None
            begin(place, now_s)
            continue
        first, second = routes[i]
        place = int(min(first, second, key=lambda place: devices[place].num_held))
        question = int(questions[i])
        entry = Entry(
            str(i),
            now_s + float(budgets_s[i]),
            float(traffic.expected_ms[question][least]),
            float(traffic.bounds_ms[question][least]),
            float(traffic.bounds_ms[question].max()),
        )
        if devices[place].schedule.admit(entry, now_s) is None:
            accepted += 1
            if devices[place].free_s is None:
                begin(place, now_s)
    span_s = float(arrivals_s[-1])
    busy = sum(device.busy_s for device in devices) / (span_s * len(devices))
    return Tally(number, accepted, late, right, good, span_s, busy)
