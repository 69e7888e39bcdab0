"""The profiler: what it measures, in which order, and what it makes of it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pacevlm.errors import ConfigError, IdentityError, ProfileError
from pacevlm.identity import Identity
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.calibrate import coverage, fit_latency, full_p50_ms, split_pictures, split_samples
from pacevlm.latency.measuring import use_num_threads
from pacevlm.latency.profile import NoiseFloor, Profile, Sample
from pacevlm.latency.profiler import (
    Measurement,
    ProfileProgress,
    ProfilerSettings,
    noisy_windows,
    plan_workload,
    profile_requests,
)
from pacevlm.types import Answer, RequestSizes, VisionSizes

SMALL = KnobSpace(("low", "high"), (2, 4), (3, 4, 6))
TOKENS_PER_CROP = 144


@pytest.fixture(autouse=True)
def small_heap() -> Iterator[None]:
    """Keep collections from walking through all that the libraries have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass
class FakeModel:
    """Runs requests on the simulated device and keeps a record of the circumstances."""

    device: Any
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    calls: list[tuple[int, Knobs]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    collecting: list[bool] = field(default_factory=list)
    fail_after: int | None = None

    def __call__(self, index: int, knobs: Knobs, num_output_tokens: int | None) -> Any:
        if self.fail_after is not None and len(self.calls) == self.fail_after:
            raise KeyboardInterrupt
        self.calls.append((index, knobs))
        self.threads.add(torch.get_num_threads())
        self.collecting.append(gc.isenabled())
        crops = 1 + index % 5 if knobs.tier == "low" else 2 + index % 10
        sizes = {
            "num_units": crops,
            "num_image_tokens": crops * TOKENS_PER_CROP,
            "num_text_tokens": 8 + index,
            "num_pixels": 50_000 + 1000 * index,
            "picture_kind": "memory",
            "num_bytes": 0,
            "num_output_tokens": num_output_tokens or 1 + index % 4,
        }
        vision = VisionSizes(sizes["num_units"], sizes["num_image_tokens"])
        return Answer(
            answer="7",
            token_ids=(7,) * sizes["num_output_tokens"],
            knobs=knobs,
            sizes=RequestSizes((vision,), sizes["num_text_tokens"], sizes["num_pixels"]),
            vision=vision,
            times=self.device.stages(self.rng, sizes, knobs),
        )


def profile(run: Callable[..., Any], settings: ProfilerSettings, space: KnobSpace = SMALL, **options: Any) -> Profile:
    return profile_requests(run, space, settings, model_identity="weights-a", device="cpu", dtype="float32", **options)


def samples_of(workload: Any) -> list[Measurement]:
    return [entry for entry in workload.schedule if not entry.is_reference]


@pytest.mark.parametrize("num_samples", [2, 7, 60, 400])
@pytest.mark.parametrize("seed", range(5))
def test_a_workload_has_distinct_points_and_both_ends_of_every_knob(
    space: KnobSpace, num_samples: int, seed: int
) -> None:
    settings = ProfilerSettings(num_requests=16, num_samples=num_samples, repeats=3, seed=seed)
    counts = Counter((entry.request, entry.knobs) for entry in samples_of(plan_workload(space, settings)))
    assert len(counts) == num_samples
    assert set(counts.values()) == {3}
    for name, values in (("tier", space.tiers), ("top_k", space.top_ks), ("num_blocks", space.num_blocks)):
        measured = {getattr(knobs, name) for _, knobs in counts}
        assert {values[0], values[-1]} <= measured
    assert all(knobs in space and 0 <= request < 16 for request, knobs in counts)


def test_a_workload_fills_the_space_evenly(space: KnobSpace) -> None:
    settings = ProfilerSettings(num_requests=20, num_samples=1000, repeats=1)
    inner = [
        entry for entry in samples_of(plan_workload(space, settings)) if entry.knobs not in (space.cheapest, space.full)
    ]
    for name, num_values in (("tier", 3), ("top_k", 5), ("num_blocks", 5)):
        counts = Counter(getattr(entry.knobs, name) for entry in inner)
        assert len(counts) == num_values
        assert max(counts.values()) < 1.3 * min(counts.values())
    per_request = Counter(entry.request for entry in inner)
    assert len(per_request) == 20
    assert max(per_request.values()) < 1.5 * min(per_request.values())


def test_self_made_pictures_come_among_the_requests(space: KnobSpace) -> None:
    settings = ProfilerSettings(num_requests=5, num_pictures=12, samples_per_picture=4, num_samples=40, repeats=2)
    entries = samples_of(plan_workload(space, settings))
    pictures = [entry for entry in entries if entry.request >= 5]
    assert Counter(entry.request for entry in pictures) == dict.fromkeys(range(5, 17), 4)
    assert len({(entry.request, entry.knobs) for entry in pictures}) == len(pictures)
    # What budgets count from are the data set's own requests.
    assert not {space.cheapest, space.full} & {entry.knobs for entry in pictures}
    assert entries != sorted(entries, key=lambda entry: entry.request >= 5)
    without = samples_of(plan_workload(space, dataclasses.replace(settings, num_pictures=0)))
    assert Counter(without) == Counter(entry for entry in entries if entry.request < 5)


def test_a_profile_tells_self_made_pictures_apart(make_device: Callable[..., Any], tmp_path: Path) -> None:
    settings = ProfilerSettings(num_requests=3, num_pictures=4, num_samples=20, repeats=1, max_warmup=0)
    result = profile(FakeModel(make_device()), settings, path=tmp_path / "p.json")
    assert {sample.num_text_tokens - 8 for sample in result.samples} == {0, 1, 2}
    assert {sample.num_text_tokens - 8 for sample in result.picture_samples} == {3, 4, 5, 6}
    assert result.all_samples == result.samples + result.picture_samples
    assert Profile.load(tmp_path / "p.json") == result
    other = dataclasses.replace(settings, num_pictures=5)
    with pytest.raises(KeyboardInterrupt):
        profile(FakeModel(make_device(), fail_after=9), settings, path=tmp_path / "q.json")
    with pytest.raises(ProfileError, match="begun for another"):
        profile(FakeModel(make_device()), other, path=tmp_path / "q.json")


def test_answers_are_made_all_lengths_evenly_but_at_the_ends(space: KnobSpace) -> None:
    settings = ProfilerSettings(num_requests=20, num_samples=1000, repeats=1, max_output_tokens=8)
    entries = samples_of(plan_workload(space, settings))
    ends = [entry for entry in entries if entry.knobs in (space.cheapest, space.full)]
    assert {entry.num_output_tokens for entry in ends} == {None}
    lengths = Counter(entry.num_output_tokens for entry in entries if entry.num_output_tokens is not None)
    assert set(lengths) == set(range(1, 9))
    assert max(lengths.values()) < 1.4 * min(lengths.values())
    # Length says nothing about the knobs.
    blocks = [entry.knobs.num_blocks for entry in entries if entry.num_output_tokens is not None]
    tokens = [entry.num_output_tokens for entry in entries if entry.num_output_tokens is not None]
    assert abs(np.corrcoef(blocks, tokens)[0, 1]) < 0.05


def test_a_request_of_another_length_is_refused(make_device: Callable[..., Any]) -> None:
    model = FakeModel(make_device())
    settings = ProfilerSettings(num_requests=5, num_samples=20, max_output_tokens=8)
    with pytest.raises(ProfileError, match="was to generate"):
        profile(lambda i, knobs, length: model(i, knobs, None if length is None else length + 1), settings)


def test_noisy_windows_are_measured_again(make_device: Callable[..., Any], tmp_path: Path) -> None:
    settings = ProfilerSettings(num_requests=4, num_samples=20, repeats=1, reference_every=5, max_warmup=0)
    schedule = plan_workload(SMALL, settings).schedule
    references = [place for place, entry in enumerate(schedule) if entry.is_reference]
    slow = range(references[1], references[2])  # the second window and the reference that opens it

    def busy(model: FakeModel) -> Callable[..., Any]:
        def run(index: int, knobs: Knobs, length: int | None) -> Any:
            result = model(index, knobs, length)
            if len(model.calls) - 1 in slow:
                slower = {name: 3 * getattr(result.times, name) for name in ("prefill_ms", "e2e_ms")}
                return dataclasses.replace(result, times=dataclasses.replace(result.times, **slower))
            return result

        return run

    quiet = profile(FakeModel(make_device()), settings)
    model = FakeModel(make_device())
    result = profile(busy(model), settings)
    assert result.samples == quiet.samples
    assert result.noise_floor == quiet.noise_floor
    # The slow reference opens one window and closes another: both are measured again, references included.
    again = list(schedule[references[0] : references[2] + 1])
    assert model.calls[len(schedule) :] == [(entry.request, entry.knobs) for entry in again]
    without = profile(busy(FakeModel(make_device())), dataclasses.replace(settings, max_reruns=0))
    assert without.samples != quiet.samples
    # Stopped while measuring again, it goes on there.
    stopped = FakeModel(make_device(), fail_after=len(schedule) + 3)
    with pytest.raises(KeyboardInterrupt):
        profile(busy(stopped), settings, path=tmp_path / "p.json")
    resumed = FakeModel(make_device())
    assert profile(resumed, settings, path=tmp_path / "p.json").samples == quiet.samples
    assert len(resumed.calls) == len(again) - 3


def test_a_small_workload_is_the_whole_product() -> None:
    settings = ProfilerSettings(num_requests=3, num_samples=10_000, repeats=1)
    points = {(entry.request, entry.knobs) for entry in samples_of(plan_workload(SMALL, settings))}
    assert points == set(itertools.product(range(3), SMALL))


def test_the_order_is_random_and_the_seed_decides_it(space: KnobSpace) -> None:
    def plan(seed: int) -> Any:
        return plan_workload(space, ProfilerSettings(num_samples=100, repeats=2, seed=seed))

    assert plan(3) == plan(3)
    assert plan(3) != plan(4)
    # Repeats of one point are not measured side by side, nor are the ends of the space at the start.
    entries = samples_of(plan(3))
    neighbours = sum(a == b for a, b in itertools.pairwise(entries))
    assert neighbours < 10
    assert any(entry.knobs not in (space.cheapest, space.full) for entry in entries[:10])


def test_the_reference_is_interleaved(space: KnobSpace) -> None:
    workload = plan_workload(space, ProfilerSettings(num_samples=45, repeats=1, reference_every=10))
    places = [i for i, entry in enumerate(workload.schedule) if entry.is_reference]
    assert places == [0, 11, 22, 33, 44, 50]
    assert {workload.schedule[i] for i in places} == {workload.reference}


def test_a_profile_holds_what_was_measured(make_device: Callable[..., Any], tmp_path: Path) -> None:
    model = FakeModel(make_device(noise=0.02))
    settings = ProfilerSettings(num_requests=8, num_samples=30, repeats=2, reference_every=10, max_warmup=12)
    before = torch.get_num_threads()
    result = profile(model, settings, path=tmp_path / "profile.json")
    workload = plan_workload(SMALL, settings)
    assert [sample.knobs for sample in result.samples] == [entry.knobs for entry in samples_of(workload)]
    assert [sample.num_text_tokens - 8 for sample in result.samples] == [e.request for e in samples_of(workload)]
    assert len(result.noise_floor.repeats_ms) == sum(entry.is_reference for entry in workload.schedule)
    assert result.noise_floor.knobs == SMALL.full
    assert 0 < result.noise_floor.cv < 0.05
    assert model.calls[-len(workload.schedule) :] == [(entry.request, entry.knobs) for entry in workload.schedule]
    # What was set for measuring is put back.
    assert model.threads == {1} == {result.device.num_threads}
    assert torch.get_num_threads() == before
    assert not any(model.collecting[-len(workload.schedule) :])
    assert gc.isenabled()
    assert Profile.load(tmp_path / "profile.json") == result
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_warm_up_ends_when_times_have_settled(make_device: Callable[..., Any]) -> None:
    def num_warmup(slowdown: Callable[[int], float], max_warmup: int) -> int:
        model = FakeModel(make_device())
        settings = ProfilerSettings(num_requests=2, num_samples=2, repeats=1, max_warmup=max_warmup)

        def run(index: int, knobs: Knobs, limit: int | None) -> Any:
            result = model(index, knobs, limit)
            factor = slowdown(len(model.calls))
            times = {name: getattr(result.times, name) * factor for name in ("prepare_ms", "e2e_ms")}
            return dataclasses.replace(result, times=dataclasses.replace(result.times, **times))

        profile(run, settings)
        return len(model.calls) - len(plan_workload(SMALL, settings).schedule)

    assert num_warmup(lambda call: 1.0, 50) == 10
    assert 10 < num_warmup(lambda call: 1.0 + 20.0 * 0.7**call, 50) < 50
    assert num_warmup(lambda call: 1.0 + call, 15) == 15
    assert num_warmup(lambda call: 1.0, 0) == 0


def test_progress_tells_the_time_left(make_device: Callable[..., Any]) -> None:
    ticks = itertools.count()
    seen: list[ProfileProgress] = []
    settings = ProfilerSettings(num_requests=3, num_samples=20, repeats=1, reference_every=5, max_warmup=0)
    profile(
        FakeModel(make_device()), settings, progress=seen.append, clock=lambda: 2.0 * next(ticks)
    )  # every look at the clock is one measurement of two seconds
    total = len(plan_workload(SMALL, settings).schedule)
    assert [step.num_done for step in seen] == list(range(1, total + 1))
    assert [step.seconds_left for step in seen] == pytest.approx([2.0 * (total - i) for i in range(1, total + 1)])


def test_an_interrupted_profile_goes_on(make_device: Callable[..., Any], tmp_path: Path) -> None:
    settings = ProfilerSettings(num_requests=4, num_samples=20, repeats=1, reference_every=5, max_warmup=0)
    path = tmp_path / "profile.json"
    stopped = FakeModel(make_device(), fail_after=13)
    with pytest.raises(KeyboardInterrupt):
        profile(stopped, settings, path=path)
    assert gc.isenabled()
    assert not path.exists()
    resumed = FakeModel(make_device())
    result = profile(resumed, settings, path=path)
    schedule = plan_workload(SMALL, settings).schedule
    assert stopped.calls + resumed.calls == [(entry.request, entry.knobs) for entry in schedule]
    # Without noise, a stopped and resumed run gives what one that was never stopped gives.
    whole = profile(FakeModel(make_device()), settings)
    assert (result.samples, result.noise_floor) == (whole.samples, whole.noise_floor)


def test_another_runs_measurements_are_refused(make_device: Callable[..., Any], tmp_path: Path) -> None:
    settings = ProfilerSettings(num_requests=4, num_samples=20, repeats=1)
    with pytest.raises(KeyboardInterrupt):
        profile(FakeModel(make_device(), fail_after=14), settings, path=tmp_path / "p.json")
    other = ProfilerSettings(num_requests=4, num_samples=20, repeats=1, seed=1)
    with pytest.raises(ProfileError, match="begun for another settings;"):
        profile(FakeModel(make_device()), other, path=tmp_path / "p.json")
    with pytest.raises(ProfileError, match="begun for another requests;"):
        profile(FakeModel(make_device()), settings, path=tmp_path / "p.json", request_ids=["a", "b", "c", "d"])


def test_a_request_with_other_knobs_is_refused(make_device: Callable[..., Any]) -> None:
    model = FakeModel(make_device())
    with pytest.raises(ProfileError, match="was to run with"):
        profile(lambda i, knobs, limit: model(i, SMALL.cheapest, limit), ProfilerSettings())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_requests": 0},
        {"num_samples": 1},
        {"repeats": 0},
        {"num_threads": 0},
        {"seed": -1},
        {"repeats": True},
        {"max_output_tokens": 0},
        {"max_reruns": -1},
        {"num_pictures": -1},
        {"samples_per_picture": 0},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ProfilerSettings(**settings)


def test_threads_are_put_back_after_an_error() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with use_num_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="num_threads"), use_num_threads(0):
        pass


def test_noisy_windows_are_those_beside_a_slow_reference(space: KnobSpace) -> None:
    assert noisy_windows(NoiseFloor(space.full, (10.0, 10.4, 9.9, 10.1))) == ()
    assert noisy_windows(NoiseFloor(space.full, (10.0, 10.1, 14.0, 10.0, 10.1, 13.0))) == (1, 2, 4)


# Fitting -------------------------------------------------------------------------------------------------------------


def one_window(**settings: Any) -> ProfilerSettings:
    """Settings for a profile in one go."""
    return ProfilerSettings(**{"num_samples": 300, "repeats": 1, "reference_every": 10_000, "max_warmup": 0} | settings)


def request_key(sample: Sample) -> tuple[int, int]:
    return sample.num_text_tokens, sample.num_pixels


def test_no_request_is_on_both_sides_of_a_split(make_device: Callable[..., Any]) -> None:
    samples = profile(FakeModel(make_device()), one_window(num_requests=30, num_samples=200, repeats=2)).samples
    for share, seed in itertools.product((0.2, 0.5, 0.7), range(4)):
        fit, calibration = split_samples(samples, share, seed)
        assert not {request_key(sample) for sample in fit} & {request_key(sample) for sample in calibration}
        assert sorted(map(id, fit + calibration)) == sorted(map(id, samples))
        assert len(calibration) == pytest.approx(share * len(samples), abs=0.06 * len(samples))


def test_pictures_are_split_in_pairs(make_device: Callable[..., Any]) -> None:
    base = make_device().measure(np.random.default_rng(0), 1)[0]
    samples = [
        dataclasses.replace(base, picture_kind=kind, num_pixels=size, num_bytes=size // (2 + twin), num_text_tokens=9)
        for kind in ("jpeg", "png")
        for size in (100, 1_000, 10_000)
        for twin in range(2)
        for _ in range(3)
    ]
    halves = set()
    for seed in range(20):
        fit, calibration = split_pictures(samples, seed)
        for part in (fit, calibration):
            counts = Counter((sample.picture_kind, sample.num_pixels) for sample in part)
            assert counts == dict.fromkeys(((k, s) for k in ("jpeg", "png") for s in (100, 1_000, 10_000)), 3)
        assert not {s.num_bytes for s in fit if s.picture_kind == "png"} & {
            s.num_bytes for s in calibration if s.picture_kind == "png"
        }
        halves.add(tuple(sorted({(s.picture_kind, s.num_bytes) for s in fit})))
    assert len(halves) > 5
    assert split_pictures([]) == ((), ())


def test_a_single_request_cannot_be_split(make_device: Callable[..., Any]) -> None:
    result = profile(FakeModel(make_device()), one_window(num_requests=1, num_samples=10))
    with pytest.raises(ProfileError, match="1 distinct requests"):
        split_samples(result.samples)
    with pytest.raises(ConfigError, match="calibration_share"):
        split_samples(result.samples, 1.0)


def test_a_fitted_profile_predicts_and_bounds_new_requests(make_device: Callable[..., Any], space: KnobSpace) -> None:
    device = make_device(noise=0.05)
    result = profile(FakeModel(device), one_window(num_requests=60, num_samples=600), space)
    estimator, guardrail, report = fit_latency(result, trained_top_k=8, alpha=0.1)
    assert report.num_fit + report.num_calibration == len(result.samples)
    assert report.mape_e2e < 0.05
    assert report.ape_p50 <= report.ape_p95
    assert report.coverage == pytest.approx(0.9, abs=0.04)
    fresh = profile(FakeModel(device, np.random.default_rng(7)), one_window(num_requests=60, seed=7), space)
    held_out = coverage(guardrail, fresh.samples)
    assert held_out == pytest.approx(0.9, abs=0.05)
    assert guardrail.estimator is estimator
    assert full_p50_ms(result) == pytest.approx(
        np.median([sample.stages.e2e_ms for sample in result.samples if sample.knobs == space.full])
    )


def test_the_report_is_of_requests_that_the_fit_did_not_see(make_device: Callable[..., Any], space: KnobSpace) -> None:
    result = profile(FakeModel(make_device(noise=0.3)), one_window(), space)
    estimator, _, report = fit_latency(result, trained_top_k=8, alpha=0.1, seed=5)
    held_out = split_samples(result.samples, 0.5, 5).calibration
    measured = np.array([sample.stages.e2e_ms for sample in held_out])
    errors = np.abs(estimator.predict_samples(held_out) / measured - 1)
    assert report.mape_e2e == pytest.approx(errors.mean())
    assert report.num_calibration == len(held_out)


def test_a_profile_of_something_else_is_refused(make_device: Callable[..., Any], space: KnobSpace) -> None:
    result = profile(FakeModel(make_device()), one_window(num_requests=10, num_samples=150), space)
    faster = dataclasses.replace(result.device, num_threads=8)
    for wrong in (Identity("weights-b"), Identity(knob_space=SMALL), Identity(device=faster.identity)):
        with pytest.raises(IdentityError):
            fit_latency(result, trained_top_k=8, alpha=0.1, wanted=wrong)


def test_coverage_is_left_out_where_halves_are_too_small(make_device: Callable[..., Any], space: KnobSpace) -> None:
    result = profile(FakeModel(make_device()), one_window(num_requests=10, num_samples=150), space)
    assert fit_latency(result, trained_top_k=8, alpha=0.02).report.coverage is None
