"""The profiler: times requests alone, in random order, over a space-filling part of knobs × requests."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pacevlm.errors import ConfigError, ProfileError
from pacevlm.files import append_jsonl, read_jsonl
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.measuring import use_num_threads, without_garbage_collection
from pacevlm.latency.profile import NoiseFloor, Profile, Sample, collect_device_facts
from pacevlm.types import StageTimes

if TYPE_CHECKING:
    import torch

# A share of all points goes to either end of the knob space, so that a fit never extrapolates and the full
# configuration's median latency rests on many requests.
END_SHARE = 0.1
# Warm-up has settled when the medians of two runs of so many reference requests differ by no more than this.
WARMUP_WINDOW = 5
WARMUP_TOLERANCE = 0.05
# A reference request slower than the median one by this share says that something else was running.
NOISY_TOLERANCE = 0.2


class MeasuredRequest(Protocol):
    """What running one request must tell."""

    @property
    def knobs(self) -> Knobs:
        """The configuration that ran."""

    @property
    def num_crops(self) -> int:
        """Image crops."""

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of the prompt."""

    @property
    def num_text_tokens(self) -> int:
        """Other tokens of the prompt, BOS included."""

    @property
    def num_pixels(self) -> int:
        """Pixels of the image as given."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated, end-of-text included."""

    @property
    def times(self) -> StageTimes:
        """Wall-clock milliseconds of every stage."""


RunRequest = Callable[[int, Knobs, int | None], MeasuredRequest]
"""Runs request number i with given knobs and most new tokens (None: the model's own limit), alone, and times it."""


@dataclass(frozen=True)
class ProfilerSettings:
    """How much is measured, and how.

    Attributes:
        num_requests: requests to draw from; they are numbered from 0, and number 0 is the reference.
        num_samples: distinct (request, knobs) to measure; all of them where there are no more.
        repeats: measurements of each.
        reference_every: measurements between two runs of the reference request.
        max_warmup: most runs of the reference request before measuring; fewer once their median has settled.
        num_threads: CPU threads while measuring; one is steadiest for small models. None leaves it as it is.
        max_new_tokens: most generated tokens; None leaves it to the model.
        seed: decides which points are measured, and in which order.

    Raises:
        ConfigError: a value is outside its range.
    """

    num_requests: int = 64
    num_samples: int = 400
    repeats: int = 2
    reference_every: int = 20
    max_warmup: int = 50
    num_threads: int | None = 1
    max_new_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        minimum = {
            "num_requests": 1,
            "num_samples": 2,
            "repeats": 1,
            "reference_every": 1,
            "max_warmup": 0,
            "seed": 0,
        }
        optional = [name for name in ("num_threads", "max_new_tokens") if getattr(self, name) is not None]
        for name, least in {**minimum, **dict.fromkeys(optional, 1)}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from {least}")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One entry of the schedule; `is_reference` marks the fixed request that tells the noise."""

    request: int
    knobs: Knobs
    is_reference: bool = False


@dataclass(frozen=True)
class Workload:
    """What is measured, in this order.

    Attributes:
        reference: the request and knobs that warm up, and that are run again and again in between.
        schedule: all measurements; the first and the last are the reference.
    """

    reference: Measurement
    schedule: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True)
class ProfileProgress:
    """How far a profiler has come; `seconds_left` is None until something has been measured."""

    num_done: int
    num_total: int
    seconds_left: float | None


def plan_workload(space: KnobSpace, settings: ProfilerSettings) -> Workload:
    """Choose what to measure and shuffle it.

    A tenth of the points has the cheapest configuration and a tenth the full one, so both ends of every knob are
    always there. The rest fills knobs × requests evenly. Every point comes `repeats` times, at random times of the
    run, so that slow drifts of the machine hit all configurations alike.

    Method: additive recurrence with a random start (Roberts, "The Unreasonable Effectiveness of Quasirandom
    Sequences", 2018), kept to distinct points.
    """
    rng = np.random.default_rng(settings.seed)
    num_points = min(settings.num_samples, len(space) * settings.num_requests)
    num_ends = min(settings.num_requests, max(1, round(END_SHARE * num_points)))
    points: dict[tuple[int, Knobs], None] = {}
    for end in (space.cheapest, space.full):
        points.update(dict.fromkeys((int(i), end) for i in rng.permutation(settings.num_requests)[:num_ends]))
    if num_points == len(space) * settings.num_requests:
        points.update(dict.fromkeys((i, knobs) for i in range(settings.num_requests) for knobs in space))
    levels = np.array([*space.shape, settings.num_requests])
    # The positive root of x^5 = x + 1; its powers are the directions in which the sequence spreads most evenly.
    root = float(np.roots([1, 0, 0, 0, -1, -1]).real.max())
    directions = root ** -np.arange(1.0, 5.0)
    place = rng.random(4)
    while len(points) < num_points:
        place = (place + directions) % 1.0
        tier, top_k, num_blocks, request = (place * levels).astype(int).tolist()
        points[request, Knobs(space.tiers[tier], space.top_ks[top_k], space.num_blocks[num_blocks])] = None
    ordered = [Measurement(*point) for point in points] * settings.repeats
    shuffled = [ordered[i] for i in rng.permutation(len(ordered))]
    reference = Measurement(0, space.full, is_reference=True)
    schedule = [reference]
    for start in range(0, len(shuffled), settings.reference_every):
        schedule += [*shuffled[start : start + settings.reference_every], reference]
    return Workload(reference, tuple(schedule))


def profile_requests(
    run: RunRequest,
    space: KnobSpace,
    settings: ProfilerSettings,
    *,
    model_identity: str,
    device: str | torch.device,
    dtype: str | torch.dtype,
    path: str | os.PathLike[str] | None = None,
    progress: Callable[[ProfileProgress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Profile:
    """Measure a model on this device.

    The reference request is run until its time has settled, or `max_warmup` times; then the workload is measured with
    garbage collection off and the set number of threads, which is put back at the end.

    Args:
        run: runs and times one request; whatever a served request spends, it must spend too.
        space: the knobs to measure over.
        settings: how much, and how.
        model_identity: names the model's weights and settings.
        device: where the model runs.
        dtype: of its weights.
        path: where the profile is written. Meanwhile measurements are appended to `<path>.partial.jsonl`, from which an
            interrupted run with the same settings goes on.
        progress: called after every measurement.
        clock: seconds, for the time left.

    Raises:
        ProfileError: a request ran with other knobs than asked for or told impossible times, or the partial file is of
            another run.
        StorageError: a file could not be written.
    """
    workload = plan_workload(space, settings)
    with use_num_threads(settings.num_threads):
        facts = collect_device_facts(device, dtype)
        header = {
            "model_identity": model_identity,
            "knob_space": space.to_dict(),
            "device": list(facts.identity),
            "settings": asdict(settings),
        }
        partial = None if path is None else Path(f"{os.fspath(path)}.partial.jsonl")
        measured = _open_partial(partial, header)
        num_total, num_before = len(workload.schedule), len(measured)
        if num_before < num_total:
            _warm_up(run, workload.reference, settings)
        started = clock()
        while len(measured) < num_total:
            # One window: garbage waits until it is over.
            window = workload.schedule[len(measured) : len(measured) + settings.reference_every]
            with without_garbage_collection():
                for measurement in window:
                    sample = _measure(run, measurement, settings.max_new_tokens)
                    measured.append(sample)
                    if partial is not None:
                        append_jsonl(partial, sample.to_dict())
                    if progress is not None:
                        num_left = num_total - len(measured)
                        seconds_each = (clock() - started) / (len(measured) - num_before)
                        progress(ProfileProgress(len(measured), num_total, num_left * seconds_each))
    entries = list(zip(workload.schedule, measured, strict=True))
    references_ms = tuple(sample.stages.e2e_ms for entry, sample in entries if entry.is_reference)
    profile = Profile(
        model_identity=model_identity,
        knob_space=space,
        device=facts,
        samples=tuple(sample for entry, sample in entries if not entry.is_reference),
        noise_floor=NoiseFloor(workload.reference.knobs, references_ms),
    )
    if path is not None:
        profile.save(Path(path))
        assert partial is not None
        partial.unlink(missing_ok=True)
    return profile


def noisy_windows(noise_floor: NoiseFloor, tolerance: float = NOISY_TOLERANCE) -> tuple[int, ...]:
    """Numbers of the windows between two reference requests, either of which was slow.

    Slow means more than `tolerance` above the median reference, which something else on the machine causes. Such
    windows are reported, not dropped: a bound that has to hold when others work too must have seen it.
    """
    limit_ms = statistics.median(noise_floor.repeats_ms) * (1.0 + tolerance)
    slow = [value > limit_ms for value in noise_floor.repeats_ms]
    return tuple(i for i, ends in enumerate(pairwise(slow)) if any(ends))


def _warm_up(run: RunRequest, reference: Measurement, settings: ProfilerSettings) -> None:
    times_ms: list[float] = []
    for _ in range(settings.max_warmup):
        times_ms.append(_measure(run, reference, settings.max_new_tokens).stages.e2e_ms)
        if len(times_ms) >= 2 * WARMUP_WINDOW:
            earlier = statistics.median(times_ms[-2 * WARMUP_WINDOW : -WARMUP_WINDOW])
            if abs(statistics.median(times_ms[-WARMUP_WINDOW:]) - earlier) <= WARMUP_TOLERANCE * earlier:
                return


def _measure(run: RunRequest, measurement: Measurement, max_new_tokens: int | None) -> Sample:
    result = run(measurement.request, measurement.knobs, max_new_tokens)
    if result.knobs != measurement.knobs:
        raise ProfileError(
            f"request {measurement.request} was to run with {measurement.knobs} but ran with {result.knobs}"
        )
    return sample_of(result)


def _open_partial(path: Path | None, header: Mapping[str, Any]) -> list[Sample]:
    """Measurements of an interrupted run; starts the file if there is none."""
    if path is None:
        return []
    if not path.exists():
        append_jsonl(path, header)
        return []
    records: Sequence[dict[str, Any]] = read_jsonl(path, "interrupted profile", ProfileError)
    if not records or records[0] != header:
        raise ProfileError(
            f"{path} was begun for another model, device or settings; remove it, or go on with what it was begun with"
        )
    return [Sample.from_dict(record) for record in records[1:]]


def sample_of(result: MeasuredRequest) -> Sample:
    """What a profile keeps of a measured request."""
    return Sample(
        knobs=result.knobs,
        num_crops=result.num_crops,
        num_image_tokens=result.num_image_tokens,
        num_text_tokens=result.num_text_tokens,
        num_pixels=result.num_pixels,
        num_output_tokens=result.num_output_tokens,
        stages=result.times,
    )
