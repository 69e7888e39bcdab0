"""What a run will take, before it starts: counted by what plans its steps, timed by a profile; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from pacevlm.checks import as_float
from pacevlm.config import EvaluateConfig
from pacevlm.errors import ConfigError
from pacevlm.evaluation.records import EvaluationRecord
from pacevlm.evaluation.summary import POLICY_ORDER
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.calibrate import full_p50_ms
from pacevlm.latency.profile import Profile, Sample
from pacevlm.latency.profiler import WARMUP_WINDOW, Workload, plan_workload
from pacevlm.latency.sample_pictures import num_sample_pictures
from pacevlm.models.elastic import read_knob_space
from pacevlm.pipeline.artefacts import PRICES_NAME, PROFILE_NAME
from pacevlm.pipeline.checks import check_settings
from pacevlm.pipeline.context import Reporter, RunContext
from pacevlm.pipeline.loading import knob_lists
from pacevlm.pipeline.run import STEPS, finished_steps
from pacevlm.pipeline.run_config import RunConfig
from pacevlm.pipeline.step_log import StepLog
from pacevlm.pipeline.steps import HEEDING, NUM_MEASURED, length_jobs, profiler_settings, swept_examples
from pacevlm.request.profiling import with_pictures
from pacevlm.rollout.outcome_store import BYTES_PER_OUTCOME
from pacevlm.training.rollouts import draw_examples
from pacevlm.training.train_config import TrainConfig
from pacevlm.types import Example, StageTimes

# An answer's characters and decode times, for the room that its records take.
ANSWER_CHARS, NUM_DECODE_TIMES = 12, 8


@dataclass(frozen=True)
class Figure:
    """A number that is known beforehand.

    Attributes:
        value: the number.
        is_most: whether it is the most that it can be; otherwise a count is exact, and a time an estimate.
    """

    value: float
    is_most: bool = False

    def __add__(self, other: Figure) -> Figure:
        return Figure(self.value + other.value, self.is_most or other.is_most)


NOTHING = Figure(0)


@dataclass(frozen=True)
class PlannedStep:
    """What one step of a run will take.

    Attributes:
        name: of the step.
        is_done: whether the run directory holds it already, with these settings.
        num_timed: requests timed alone. Warm-up and noisy windows that are timed again come on top.
        num_rollouts: answers asked for in batches; what an earlier step asked for as well is left out.
        num_run: those of them that the model gives: repeated and stored ones cost nothing.
        num_prompts: prompts whose first blocks run for a latency token, unless they are still kept.
        num_bytes: what the step leaves on the disk, roughly.
        seconds: how long it takes; None if no profile tells.
    """

    name: str
    is_done: bool = False
    num_timed: Figure = NOTHING
    num_rollouts: Figure = NOTHING
    num_run: Figure = NOTHING
    num_prompts: Figure = NOTHING
    num_bytes: float = 0.0
    seconds: Figure | None = None


@dataclass(frozen=True)
class RunPlan:
    """What a run will take.

    Attributes:
        config: its settings.
        space: its configurations.
        num_examples: of the parts train, val and test.
        steps: in order, finished ones included.
        latencies: where latencies come from; None if they come from nowhere.
        full_ms: the full configuration's median there, milliseconds.
        rollouts_per_s: as measured there in a sweep; None if unknown: then rollouts take no longer than requests alone.
    """

    config: RunConfig
    space: KnobSpace
    num_examples: tuple[int, int, int]
    steps: tuple[PlannedStep, ...]
    latencies: str | None
    full_ms: float | None
    rollouts_per_s: float | None

    @property
    def total(self) -> PlannedStep:
        """All steps that are not done together."""
        left = [step for step in self.steps if not step.is_done]
        return PlannedStep(
            "total",
            not left,
            sum((step.num_timed for step in left), NOTHING),
            sum((step.num_rollouts for step in left), NOTHING),
            sum((step.num_run for step in left), NOTHING),
            sum((step.num_prompts for step in left), NOTHING),
            sum(step.num_bytes for step in left),
            _sum(step.seconds for step in left),
        )


def plan_run(
    config: RunConfig, until: str = STEPS[-1], *, fresh: bool = False, reporter: Reporter | None = None
) -> RunPlan:
    """What `run_pipeline` with the same arguments would do; the data set is read, the model's weights are not.

    Latencies are those of the run directory's profile, else of `profile.source`.

    Raises:
        ConfigError: there is no such step, the run directory was made with other settings, or the run would be refused
            for its settings.
        DataError: the data set has too few examples for the run.
        PacevlmError: the data set, the profile or what describes the model cannot be read.
    """
    if until not in STEPS:
        raise ConfigError(f"there is no step {until!r}; the steps are {', '.join(STEPS)}")
    run = RunContext(config, reporter)
    space = read_knob_space(config.model.path, knob_lists(config.model))
    done = set[str]() if fresh else finished_steps(run, space)
    wanted = STEPS[: STEPS.index(until) + 1]
    check_settings(run, [name for name in wanted if name not in done])
    clock = _Clock.of(config, fresh=fresh)
    counted = _Counter(run, space, has_prices="calibrate" in done)
    steps = [replace(getattr(counted, name)(clock), is_done=name in done) for name in wanted]
    splits = run.splits
    return RunPlan(
        config,
        space,
        (len(splits.train), len(splits.val), len(splits.test)),
        tuple(steps),
        clock.source,
        None if clock.profile is None else full_p50_ms(clock.profile),
        clock.rollouts_per_s,
    )


@dataclass(frozen=True)
class _Clock:
    """How long things take, as a profile says.

    Attributes:
        profile: the profile; None if there is none.
        source: where it is.
        rollouts_per_s: as measured beside it.
    """

    profile: Profile | None = None
    source: str | None = None
    rollouts_per_s: float | None = None

    @classmethod
    def of(cls, config: RunConfig, *, fresh: bool) -> _Clock:
        own = config.run_dir / PROFILE_NAME
        path = own if own.is_file() and not fresh else config.profile.source and Path(config.profile.source)
        if not path:
            return cls()
        step = StepLog(path.parent).get("profile")
        return cls(Profile.load(path), str(path), None if step is None else as_float(step.facts.get("rollouts_per_s")))

    def seconds(self, timed_ms: float, num_run: Figure, num_prompts: Figure = NOTHING) -> Figure | None:
        """Requests that take so many milliseconds together, rollouts, and prompts whose first blocks run."""
        if self.profile is None:
            return None
        stages = [sample.stages for sample in self.profile.samples]
        alone_s = fmean(times.e2e_ms for times in stages) / 1000
        prompt_s = fmean(t.read_ms + t.prepare_ms + t.vision_ms + t.first_block_ms for t in stages) / 1000
        each_s = alone_s if self.rollouts_per_s is None else 1 / self.rollouts_per_s
        is_most = num_run.is_most or bool(num_prompts.value) or (self.rollouts_per_s is None and bool(num_run.value))
        return Figure(timed_ms / 1000 + num_run.value * each_s + num_prompts.value * prompt_s, is_most)

    def workload_ms(self, workload: Workload, num_requests: int, max_warmup: int) -> float:
        """A profile's requests, and the fewest that warm up."""
        if self.profile is None:
            return 0.0
        of_data = fmean(sample.stages.e2e_ms for sample in self.profile.samples)
        pictures = [sample.stages.e2e_ms for sample in self.profile.picture_samples]
        of_pictures, reference = fmean(pictures) if pictures else of_data, median(self.profile.noise_floor.repeats_ms)
        return min(max_warmup, 2 * WARMUP_WINDOW) * reference + sum(
            reference if entry.is_reference else of_data if entry.request < num_requests else of_pictures
            for entry in workload.schedule
        )

    def budgets_ms(self, fractions: Iterable[float]) -> float:
        """Requests that each take its budget, and no longer than the full configuration does."""
        full_ms = 0.0 if self.profile is None else full_p50_ms(self.profile)
        return full_ms * sum(min(1.0, fraction) for fraction in fractions)


class _Counter:
    """Counts the steps, which have to be asked in order: what one runs, a later one finds stored."""

    def __init__(self, run: RunContext, space: KnobSpace, *, has_prices: bool) -> None:
        self.config, self.splits, self.space = run.config, run.splits, space
        self.configurations = list(space)
        # Prices that are measured already say whether a default price will be timed.
        self.has_price: bool | None = None
        if has_prices:
            from pacevlm.evaluation.prices import PriceTable

            self.has_price = PriceTable.load(run.run_dir / PRICES_NAME).default_price > 0
        elif self.config.train.prices == (0.0,):
            self.has_price = False
        self.stored: set[tuple[str, Knobs]] = set()

    def profile(self, clock: _Clock) -> PlannedStep:
        config, train = self.config, self.splits.train
        lengths = {(example.content_id, knobs) for example, knobs in length_jobs(config, train, self.space)}
        measured = swept_examples(config, train)[:NUM_MEASURED]
        num_run = self._new(lengths) + self._sweep(measured)
        num_rollouts = len(train[: config.profile.num_lengths]) + len(measured) * len(self.space)
        settings = profiler_settings(config, len(train))
        if settings is None:
            num_timed, timed_ms = 0, 0.0
        else:
            settings = with_pictures(settings, num_sample_pictures(), config.profile.alpha)
            workload = plan_workload(self.space, settings)
            num_timed = len(workload.schedule)
            timed_ms = clock.workload_ms(workload, settings.num_requests, settings.max_warmup)
        return PlannedStep(
            "profile",
            num_timed=Figure(num_timed),
            num_rollouts=Figure(num_rollouts),
            num_run=Figure(num_run),
            num_bytes=num_timed * _sample_bytes() + num_run * BYTES_PER_OUTCOME,
            seconds=clock.seconds(timed_ms, Figure(num_run)),
        )

    def lookup(self, clock: _Clock) -> PlannedStep:
        examples = swept_examples(self.config, self.splits.train)
        return self._rollouts("lookup", clock, Figure(self._sweep(examples)), len(examples) * len(self.space))

    def train(self, clock: _Clock) -> PlannedStep:
        train = self.config.train
        visited, num_visits = self._visits(train)
        num_rollouts = train.steps * train.batch_size * train.grpo.group_size
        unknown = {(example.content_id, knobs) for example in visited for knobs in self.configurations} - self.stored
        num_run = Figure(min(num_rollouts, len(unknown)), is_most=bool(unknown))
        # The second half of a step finds the first blocks that the first half ran.
        prompts = Figure(num_visits * len(self.space.tiers), is_most=True)
        return self._rollouts("train", clock, num_run, num_rollouts, prompts)

    def calibrate(self, clock: _Clock) -> PlannedStep:
        config, num_prices = self.config.calibrate, len(self.config.train.prices)
        prompts = Figure(num_prices * len(self.splits.val) if config.policy == "controller" else 0, is_most=True)
        step = self._rollouts(
            "calibrate", clock, self._at_most(self.splits.val, num_prices), num_prices * len(self.splits.val), prompts
        )
        train = self.config.train
        mean = (train.min_budget + train.max_budget) / 2
        timed = clock.seconds(clock.budgets_ms([mean] * config.num_requests), NOTHING)
        return replace(step, num_timed=Figure(config.num_requests), seconds=_sum([step.seconds, timed]))

    def evaluate(self, clock: _Clock) -> PlannedStep:
        config, test = self.config.evaluate, self.splits.test
        policies = [name for name in POLICY_ORDER if config.oracle or name != "oracle"]
        num_records = len(policies) * len(config.budgets) * len(test)
        num_priced = (len(HEEDING) + 1) * len(self.config.train.prices) * len(test)
        num_cells = len(policies) * len(config.budgets) + num_priced // len(test) + 1
        num_rollouts = num_records + num_priced + (len(test) * len(self.space) if config.oracle else 0)
        run = Figure(self._sweep(test)) if config.oracle else self._at_most(test, num_cells)
        prompts = Figure((len(config.budgets) + len(self.config.train.prices)) * len(test), is_most=True)
        step = self._rollouts("evaluate", clock, run, num_rollouts, prompts)
        num_timed, timed_ms = self._timed(config, len(policies), clock)
        return replace(
            step,
            num_timed=num_timed,
            num_bytes=step.num_bytes + num_records * _record_bytes(),
            seconds=_sum([step.seconds, clock.seconds(timed_ms, NOTHING)]),
        )

    def _timed(self, config: EvaluateConfig, num_policies: int, clock: _Clock) -> tuple[Figure, float]:
        """Timed requests of an evaluation, and their milliseconds, warm-up included."""
        drawn = min(config.num_timed, len(self.splits.test))
        fractions = [fraction for fraction in config.budgets for _ in range(drawn * num_policies)]
        at_prices = 0 if self.has_price is False else 2 * drawn * len(HEEDING)
        warm_up = [1.0] * (config.num_warmup if drawn else 0)
        timed_ms = clock.budgets_ms([*fractions, *[1.0] * at_prices, *warm_up])
        return Figure(len(fractions) + at_prices, is_most=self.has_price is None and bool(at_prices)), timed_ms

    def _visits(self, train: TrainConfig) -> tuple[list[Example], int]:
        """The examples that training visits, and how often it visits one."""
        num_examples = min(len(self.splits.train), train.num_examples or len(self.splits.train))
        drawn = [draw_examples(num_examples, train, step) for step in range(train.steps)]
        return [self.splits.train[i] for i in sorted(set().union(*drawn))], sum(len(set(places)) for places in drawn)

    def _rollouts(
        self, name: str, clock: _Clock, num_run: Figure, num_rollouts: int, prompts: Figure = NOTHING
    ) -> PlannedStep:
        return PlannedStep(
            name,
            num_rollouts=Figure(num_rollouts),
            num_run=num_run,
            num_prompts=prompts,
            num_bytes=num_run.value * BYTES_PER_OUTCOME,
            seconds=clock.seconds(0.0, num_run, prompts),
        )

    def _sweep(self, examples: Sequence[Example]) -> int:
        """Rollouts of every configuration that are not stored yet; they are from now on."""
        return self._new({(example.content_id, knobs) for example in examples for knobs in self.configurations})

    def _at_most(self, examples: Sequence[Example], num_choices: int) -> Figure:
        """What answering examples with so many choices of knobs takes at most."""
        return Figure(len({example.content_id for example in examples}) * min(num_choices, len(self.space)), True)

    def _new(self, keys: set[tuple[str, Knobs]]) -> int:
        fresh = keys - self.stored
        self.stored |= fresh
        return len(fresh)


def _sum(seconds: Iterable[Figure | None]) -> Figure | None:
    """Times together; None if one is unknown."""
    total = NOTHING
    for figure in seconds:
        if figure is None:
            return None
        total += figure
    return total


# A knob space's longest words would change little.
_KNOBS, _ID = Knobs("medium", 8, 16), "0" * 32
_MS = 12.345678901234
_TIMES = StageTimes(_MS, _MS, _MS, _MS, _MS, _MS, (_MS,) * NUM_DECODE_TIMES, _MS)


def _sample_bytes() -> int:
    sample = Sample(_KNOBS, 10, 1000, 20, 1_000_000, NUM_DECODE_TIMES + 1, _TIMES, "jpeg", 100_000)
    return len(json.dumps(sample.to_dict(), indent=2))


def _record_bytes() -> int:
    kept = {"answer": "x" * ANSWER_CHARS, "num_output_tokens": 10, "drift_factor": _MS}
    record = EvaluationRecord("lookup_table", 0.85, _MS, _ID, _KNOBS, 1.0, None, _MS, True, "x", kept)
    return len(json.dumps(record.to_dict())) + 1
