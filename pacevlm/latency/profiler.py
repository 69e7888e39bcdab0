"""The profiler: times requests alone, in random order, over a space-filling part of knobs × requests."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pacevlm.checks import MAX_COUNT, MAX_SEED, check_whole
from pacevlm.errors import ProfileError
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.measuring import use_num_threads, without_garbage_collection
from pacevlm.latency.profile import NoiseFloor, Profile, Sample, collect_device_facts
from pacevlm.partial import PartialFile
from pacevlm.types import Answer

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


RunRequest = Callable[[int, Knobs, int | None], Answer]
"""Runs request number i with given knobs, alone, and times it; the third argument is how many tokens it generates,
None for as many as its answer has."""


@dataclass(frozen=True)
class ProfilerSettings:
    """How much is measured, and how.

    Attributes:
        num_requests: the data set's requests to draw from; they are numbered from 0, and number 0 is the reference.
        num_pictures: requests with self-made pictures, numbered behind those.
        samples_per_picture: distinct knobs to measure each of them with, neither the cheapest nor the full ones.
        num_samples: distinct (request, knobs) to measure; all of them where there are no more.
        repeats: measurements of each.
        reference_every: measurements between two runs of the reference request.
        max_warmup: most runs of the reference request before measuring; fewer once their median has settled.
        num_threads: CPU threads while measuring; one is steadiest for small models. None leaves it as it is.
        max_output_tokens: answers are made 1 to so many tokens long, evenly, but for the cheapest and the full
            configuration, which tell what real answers take; None leaves all lengths to the model.
        max_reruns: how often a window between two reference requests is measured again when either of them was slow,
            which something else on the machine causes.
        seed: decides which points are measured, and in which order.

    Raises:
        ConfigError: a value is outside its range.
    """

    num_requests: int = 64
    num_pictures: int = 0
    samples_per_picture: int = 3
    num_samples: int = 400
    repeats: int = 2
    reference_every: int = 20
    max_warmup: int = 50
    num_threads: int | None = 1
    max_output_tokens: int | None = None
    max_reruns: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, 1, MAX_COUNT, "num_requests", "samples_per_picture", "repeats", "reference_every")
        check_whole(self, 2, MAX_COUNT, "num_samples")
        check_whole(self, 0, MAX_COUNT, "num_pictures", "max_warmup", "max_reruns")
        check_whole(self, 0, MAX_SEED, "seed")
        check_whole(self, 1, MAX_COUNT, "num_threads", "max_output_tokens", optional=True)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One entry of the schedule.

    Attributes:
        request: number of the request.
        knobs: what it runs with.
        num_output_tokens: tokens that it generates; None for as many as its answer has.
        is_reference: whether it is the fixed request that tells the noise.
    """

    request: int
    knobs: Knobs
    num_output_tokens: int | None = None
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
    always there. The rest fills knobs × requests × output lengths evenly. Every point comes `repeats` times, at random
    times of the run, so that slow drifts of the machine hit all configurations alike. Self-made pictures come among
    them, with knobs and output lengths drawn at random.

    Method: additive recurrence with a random start (Roberts, "The Unreasonable Effectiveness of Quasirandom
    Sequences", 2018), kept to distinct points.
    """
    rng = np.random.default_rng(settings.seed)
    num_points = min(settings.num_samples, len(space) * settings.num_requests)
    num_ends = min(settings.num_requests, max(1, round(END_SHARE * num_points)))
    points: dict[tuple[int, Knobs], int | None] = {}
    for end in (space.cheapest, space.full):
        points.update(dict.fromkeys(((int(i), end) for i in rng.permutation(settings.num_requests)[:num_ends]), None))
    levels = np.array([*space.shape, settings.num_requests, settings.max_output_tokens or 1])
    # The positive root of x^6 = x + 1; its powers are the directions in which the sequence spreads most evenly.
    root = float(np.roots([1, 0, 0, 0, 0, -1, -1]).real.max())
    directions = root ** -np.arange(1.0, 6.0)
    place = rng.random(5)
    if num_points == len(space) * settings.num_requests:
        for request, knobs in itertools.product(range(settings.num_requests), space):
            place = (place + directions) % 1.0
            points.setdefault((request, knobs), _length(knobs, space, place[4], settings))
    while len(points) < num_points:
        place = (place + directions) % 1.0
        tier, top_k, num_blocks, request = (place * levels).astype(int).tolist()[:4]
        knobs = Knobs(space.tiers[tier], space.top_ks[top_k], space.num_blocks[num_blocks])
        points.setdefault((request, knobs), _length(knobs, space, place[4], settings))
    ordered = [Measurement(*point, length) for point, length in points.items()] * settings.repeats
    inner = [knobs for knobs in space if knobs not in (space.cheapest, space.full)] or list(space)
    num_knobs = min(settings.samples_per_picture, len(inner))
    for picture in range(settings.num_requests, settings.num_requests + settings.num_pictures):
        for i in rng.permutation(len(inner))[:num_knobs]:
            ordered.append(Measurement(picture, inner[i], _length(inner[i], space, rng.random(), settings)))
    shuffled = [ordered[i] for i in rng.permutation(len(ordered))]
    reference = Measurement(0, space.full, is_reference=True)
    schedule = [reference]
    for start in range(0, len(shuffled), settings.reference_every):
        schedule += [*shuffled[start : start + settings.reference_every], reference]
    return Workload(reference, tuple(schedule))


def _length(knobs: Knobs, space: KnobSpace, place: float, settings: ProfilerSettings) -> int | None:
    """The output length at a place from 0 to 1."""
    if settings.max_output_tokens is None or knobs in (space.cheapest, space.full):
        return None
    return 1 + int(place * settings.max_output_tokens)


def profile_requests(
    run: RunRequest,
    space: KnobSpace,
    settings: ProfilerSettings,
    *,
    model_identity: str,
    device: str | torch.device,
    dtype: str | torch.dtype,
    compiler: str | None = None,
    request_ids: Sequence[str] = (),
    path: str | os.PathLike[str] | None = None,
    keep_partial: bool = False,
    progress: Callable[[ProfileProgress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Profile:
    """Measure a model on this device.

    The reference request is run until its time has settled, or `max_warmup` times; then the workload is measured with
    garbage collection off and the set number of threads, which is put back at the end. Last, windows between two
    reference requests of which one was slow are measured again, and what was measured first is forgotten.

    Args:
        run: runs and times one request; whatever a served request spends, it must spend too.
        space: the knobs to measure over.
        settings: how much, and how.
        model_identity: names the model's weights and settings.
        device: where the model runs.
        dtype: of its weights.
        compiler: what compiled what runs between its matrix products there, if anything did.
        request_ids: what tells the requests from others; an interrupted run with other ones is not gone on with.
        path: where the profile is written. Meanwhile measurements are appended to `<path>.partial.jsonl`, from which an
            interrupted run with the same settings goes on.
        keep_partial: leave that file to the caller, who removes it once what is made of the profile is written, too.
        progress: called after every measurement.
        clock: seconds, for the time left.

    Raises:
        ProfileError: a request ran with other knobs than asked for or told impossible times, or the partial file is of
            another run.
        StorageError: a file could not be written.
    """
    workload = plan_workload(space, settings)
    with use_num_threads(settings.num_threads):
        facts = collect_device_facts(device, dtype, compiler=compiler)
        header = {
            "model_identity": model_identity,
            "knob_space": space.to_dict(),
            "device": list(facts.identity),
            "settings": asdict(settings),
            "requests": list(request_ids),
        }
        partial_path = None if path is None else Path(f"{os.fspath(path)}.partial.jsonl")
        partial = PartialFile(partial_path, header, "interrupted profile", ProfileError, keep_other=True)
        session = _Session(run, workload.reference, settings, partial, progress, clock)
        samples = session.measure(workload.schedule)
        for _ in range(settings.max_reruns):
            again = _noisy_entries(workload.schedule, samples)
            for place, sample in zip(again, session.measure([workload.schedule[i] for i in again]), strict=True):
                samples[place] = sample
    entries = list(zip(workload.schedule, samples, strict=True))
    measured = [(entry.request < settings.num_requests, sample) for entry, sample in entries if not entry.is_reference]
    profile = Profile(
        model_identity=model_identity,
        knob_space=space,
        device=facts,
        samples=tuple(sample for is_of_data, sample in measured if is_of_data),
        picture_samples=tuple(sample for is_of_data, sample in measured if not is_of_data),
        noise_floor=NoiseFloor(
            workload.reference.knobs, tuple(sample.stages.e2e_ms for entry, sample in entries if entry.is_reference)
        ),
    )
    if path is not None:
        profile.save(Path(path))
        if not keep_partial:
            partial.remove()
    return profile


def noisy_windows(noise_floor: NoiseFloor, tolerance: float = NOISY_TOLERANCE) -> tuple[int, ...]:
    """Numbers of the windows between two reference requests of which either was slow.

    Slow means more than `tolerance` above the median reference, which something else on the machine causes.
    """
    limit_ms = statistics.median(noise_floor.repeats_ms) * (1.0 + tolerance)
    slow = [value > limit_ms for value in noise_floor.repeats_ms]
    return tuple(i for i, ends in enumerate(itertools.pairwise(slow)) if any(ends))


def _noisy_entries(schedule: Sequence[Measurement], samples: Sequence[Sample]) -> list[int]:
    """Places in the schedule of all that was measured in a noisy window, its two references included."""
    references = [place for place, entry in enumerate(schedule) if entry.is_reference]
    noise_floor = NoiseFloor(schedule[0].knobs, tuple(samples[place].stages.e2e_ms for place in references))
    windows = noisy_windows(noise_floor)
    return sorted({place for i in windows for place in range(references[i], references[i + 1] + 1)})


class _Session:
    """Measures one part of a schedule after the other; what an interrupted run left is not measured again."""

    def __init__(
        self,
        run: RunRequest,
        reference: Measurement,
        settings: ProfilerSettings,
        partial: PartialFile,
        progress: Callable[[ProfileProgress], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self.run, self.reference, self.settings = run, reference, settings
        self.partial, self.progress, self.clock = partial, progress, clock
        self.earlier = partial.read(Sample.from_dict)
        self.is_warm = False

    def measure(self, schedule: Sequence[Measurement]) -> list[Sample]:
        """One sample per entry, garbage collected between windows only."""
        samples, self.earlier = self.earlier[: len(schedule)], self.earlier[len(schedule) :]
        num_before, started = len(samples), self.clock()
        if num_before < len(schedule) and not self.is_warm:
            self._warm_up()
        while len(samples) < len(schedule):
            window = schedule[len(samples) : len(samples) + self.settings.reference_every]
            with without_garbage_collection():
                for measurement in window:
                    samples.append(_measure(self.run, measurement))
                    self.partial.append(samples[-1].to_dict())
                    if self.progress is not None:
                        seconds_each = (self.clock() - started) / (len(samples) - num_before)
                        seconds_left = (len(schedule) - len(samples)) * seconds_each
                        self.progress(ProfileProgress(len(samples), len(schedule), seconds_left))
        return samples

    def _warm_up(self) -> None:
        self.is_warm = True
        times_ms: list[float] = []
        for _ in range(self.settings.max_warmup):
            times_ms.append(_measure(self.run, self.reference).stages.e2e_ms)
            if len(times_ms) >= 2 * WARMUP_WINDOW:
                earlier = statistics.median(times_ms[-2 * WARMUP_WINDOW : -WARMUP_WINDOW])
                if abs(statistics.median(times_ms[-WARMUP_WINDOW:]) - earlier) <= WARMUP_TOLERANCE * earlier:
                    return


def _measure(run: RunRequest, measurement: Measurement) -> Sample:
    result = run(measurement.request, measurement.knobs, measurement.num_output_tokens)
    if result.knobs != measurement.knobs:
        raise ProfileError(
            f"request {measurement.request} was to run with {measurement.knobs} but ran with {result.knobs}"
        )
    if measurement.num_output_tokens not in (None, result.num_output_tokens):
        raise ProfileError(
            f"request {measurement.request} was to generate {measurement.num_output_tokens} tokens but generated "
            f"{result.num_output_tokens}"
        )
    return sample_of(result)


def sample_of(answer: Answer) -> Sample:
    """What a profile keeps of a measured request."""
    return Sample(
        knobs=answer.knobs,
        num_units=answer.vision.num_units,
        num_image_tokens=answer.vision.num_image_tokens,
        num_text_tokens=answer.sizes.num_text_tokens,
        num_pixels=answer.sizes.num_pixels,
        num_output_tokens=answer.num_output_tokens,
        stages=answer.times,
        picture_kind=answer.sizes.picture_kind,
        num_bytes=answer.sizes.num_bytes,
        num_unit_pairs=answer.vision.num_unit_pairs,
    )
