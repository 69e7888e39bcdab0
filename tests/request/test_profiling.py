"""Profile, bound and measurement cover the same span: from the source given to the answer."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from pacevlm import pacer as pacer_module
from pacevlm.baselines.full import FullPolicy
from pacevlm.config import EvaluateConfig
from pacevlm.controller.policy import Controller, ControllerConfig
from pacevlm.errors import ImageError, ProfileError, QuestionError
from pacevlm.evaluation.timed import time_requests
from pacevlm.images import TURNED, Picture, open_picture
from pacevlm.latency import profiler
from pacevlm.latency.calibrate import fit_latency
from pacevlm.latency.profiler import ProfileProgress, ProfilerSettings, profile_requests
from pacevlm.pacer import Pacer
from pacevlm.request import clock as clock_module
from pacevlm.request.pacing import Pacing
from pacevlm.request.profiling import measure_profile, profiling_run, questions_of_all_lengths
from pacevlm.request.run import run_forced
from pacevlm.types import Example, Objective

if TYPE_CHECKING:
    from pacevlm.latency.profile import Profile
    from pacevlm.models.elastic import ElasticModel

QUESTION = "How many red digits are there?"
MAX_PIXELS = 12_000
# What reading a picture takes on the counted clock: milliseconds once and per pixel.
READING = {"memory": (0.0, 0.0), "jpeg": (5.0, 1e-3), "progressive jpeg": (5.0, 2e-3), "png": (7.0, 3e-3)}
READING["webp"] = (4.0, 4e-3)
TURNING = 5e-4
READING |= {f"{TURNED}{kind}": (first, each + TURNING) for kind, (first, each) in READING.items() if kind != "memory"}
# Every look at the counted clock takes so long, so that no stage takes no time.
TICK_S = 1e-4


class CountedClock:
    """A clock that only stands still or is put on: by its own ticks, and by reading pictures."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.reads: list[str] = []

    def perf_counter(self) -> float:
        self.now_s += TICK_S
        return self.now_s

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def clock() -> Iterator[CountedClock]:
    """The clock of everything that times requests, on which a picture takes as long to decode as `READING` says."""
    counted, decode = CountedClock(), Picture.decode

    def slow(picture: Picture) -> Image.Image:
        constant, per_pixel = READING.get(picture.kind, (50.0, 0.0))
        counted.now_s += (constant + per_pixel * picture.width * picture.height) / 1e3
        counted.reads.append(picture.kind)
        return decode(picture)

    with pytest.MonkeyPatch.context() as patch:
        for module in (clock_module, profiler, pacer_module):
            patch.setattr(module, "time", counted)
        patch.setattr(Picture, "decode", slow)
        yield counted


def picture_file(path: Path, width: int, height: int, kind: str = "JPEG") -> Path:
    shapes = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    shapes.resize((width, height)).save(path, kind)
    return path


def make_profile(model: ElasticModel, requests: list[tuple[Any, str]], **options: Any) -> Profile:
    settings = ProfilerSettings(
        num_requests=len(requests), num_samples=20, repeats=1, max_warmup=0, max_output_tokens=2, max_reruns=0
    )
    return measure_profile(model, requests, settings, max_pixels=MAX_PIXELS, alpha=0.2, **options)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture's file."""
    return picture_file(tmp_path_factory.mktemp("pictures") / "a.jpg", 120, 90)


@pytest.fixture(scope="module")
def requests(law_examples: list[Example], path: Path) -> list[tuple[Any, str]]:
    """Requests of a data set: one picture is a file, the others are in memory."""
    return [(path, QUESTION), *((example.source, example.question) for example in law_examples)]


@pytest.fixture(scope="module")
def profile(clock: CountedClock, tiny_elastic: ElasticModel, requests: list[tuple[Any, str]]) -> Profile:
    return make_profile(tiny_elastic, requests)


def make_pacer(model: ElasticModel, profile: Profile) -> Pacer:
    fit = fit_latency(profile, trained_top_k=model.trained_top_k, alpha=0.2, group_by="none")
    controller = Controller(
        ControllerConfig(reference_ms=10.0, embedding_scale=1.0),
        model_identity=model.identity,
        knob_space=model.knob_space,
        estimator_fingerprint=fit.estimator.fingerprint,
        d_model=model.d_model,
    )
    return Pacer(model, controller, Pacing(fit.guardrail, None, model.max_new_tokens), full_p50_ms=10.0)


def test_profile_bound_and_measurement_hold_the_reading(
    profile: Profile, tiny_elastic: ElasticModel, tmp_path: Path
) -> None:
    for sample in profile.all_samples:
        constant, per_pixel = READING[sample.picture_kind]
        assert sample.stages.read_ms >= constant + per_pixel * sample.num_pixels
    assert {sample.picture_kind for sample in profile.picture_samples} == set(READING)
    pacer = make_pacer(tiny_elastic, profile)
    for name, kind in (("a.jpg", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP")):
        path = picture_file(tmp_path / name, 120, 90, kind)
        picture = open_picture(path)
        constant, per_pixel = READING[picture.kind]
        read_ms = constant + per_pixel * 120 * 90
        in_memory = {entry.knobs: entry for entry in pacer.estimate(picture.decode(), QUESTION)}
        for entry in pacer.estimate(path, QUESTION):
            other = in_memory[entry.knobs]
            assert entry.predicted_ms == pytest.approx(other.predicted_ms + read_ms, abs=0.1 * read_ms)
            assert entry.upper_bound_ms > other.upper_bound_ms + 0.9 * read_ms
        for source in (path, path.read_bytes()):
            answer = pacer.answer(source, QUESTION, 1e6)
            assert answer.feasible
            assert answer.why_infeasible is None
            assert answer.times.read_ms == pytest.approx(read_ms, abs=1.0)
            assert answer.measured_ms >= read_ms
            # Nothing varies on this clock, so that the bound is what the model takes.
            assert answer.times.e2e_ms <= answer.upper_bound_ms * 1.02
        # A budget that only the model would keep is not feasible.
        short = pacer.answer(path, QUESTION, 0.9 * read_ms)
        assert not short.feasible
        assert short.why_infeasible is not None
        assert "lowest bound" in short.why_infeasible


def test_every_caller_begins_with_the_source(profile: Profile, tiny_elastic: ElasticModel, path: Path) -> None:
    of_file = [sample for sample in profile.samples if sample.picture_kind == "jpeg"]
    assert of_file
    assert all(sample.num_bytes == path.stat().st_size for sample in of_file)
    assert all(sample.stages.read_ms >= 5.0 + 1e-3 * 120 * 90 for sample in of_file)
    pacer = make_pacer(tiny_elastic, profile)
    policy, example = FullPolicy(tiny_elastic.knob_space), Example("file", path, QUESTION, ("1",))
    timed = time_requests(
        tiny_elastic, [policy], [example], [Objective(1e6)], pacer.pacing, EvaluateConfig(num_timed=1, num_warmup=0)
    )
    (run,) = timed.runs.values()
    assert run.times.read_ms >= 5.0 + 1e-3 * 120 * 90
    assert (run.sizes.picture_kind, run.sizes.num_bytes) == ("jpeg", path.stat().st_size)


def test_nothing_is_promised_beyond_the_profile(profile: Profile, tiny_elastic: ElasticModel, tmp_path: Path) -> None:
    pacer = make_pacer(tiny_elastic, profile)
    drift = pacer.track_drift()
    large, moving = picture_file(tmp_path / "large.jpg", 140, 100), picture_file(tmp_path / "a.gif", 30, 30, "GIF")
    for source, words in ((large, "14,000 pixels"), (moving, "no gif picture")):
        assert all(np.isposinf(entry.upper_bound_ms) for entry in pacer.estimate(source, QUESTION))
        assert all(np.isfinite(entry.predicted_ms) for entry in pacer.estimate(source, QUESTION))
        answer = pacer.answer(source, QUESTION, 1e6)
        assert not answer.feasible
        assert not answer.budget_met
        assert answer.knobs == tiny_elastic.knob_space.cheapest
        assert answer.why_infeasible is not None
        assert words in answer.why_infeasible
        assert np.isposinf(answer.upper_bound_ms)
        # Nothing is known of how long it should take, so that it tells nothing of the machine.
        assert drift.num_observations == 0
    assert pacer.answer(picture_file(tmp_path / "small.jpg", 100, 75), QUESTION, 1e6).feasible
    assert drift.num_observations == 1


def test_what_the_model_cannot_take_is_refused_before_it_is_decoded(
    clock: CountedClock, tiny_elastic: ElasticModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ImageError("a shape that the model cannot take")

    monkeypatch.setattr(tiny_elastic.adapter, "vision_sizes", refuse)
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    clock.reads.clear()
    with pytest.raises(ImageError, match="cannot take"):
        run_forced(tiny_elastic, file.getvalue(), QUESTION, tiny_elastic.knob_space.full)
    assert clock.reads == []


def test_an_interrupted_profile_goes_on_with_the_same_pictures(
    profile: Profile, tiny_elastic: ElasticModel, requests: list[tuple[Any, str]], tmp_path: Path
) -> None:
    def stop(state: ProfileProgress) -> None:
        if state.num_done == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_profile(tiny_elastic, requests, path=tmp_path / "p.json", progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["p.json.partial.jsonl"]
    resumed = make_profile(tiny_elastic, requests, path=tmp_path / "p.json")
    # The counted clock gives every run the same times, but for where in a tick a request begins.
    for sample, other in zip(resumed.all_samples, profile.all_samples, strict=True):
        assert dataclasses.replace(sample, stages=other.stages) == other
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_questions_reach_from_short_to_the_longest_that_fits(tiny_elastic: ElasticModel) -> None:
    adapter, space = tiny_elastic.adapter, tiny_elastic.knob_space
    questions = questions_of_all_lengths(tiny_elastic, [QUESTION, "Which number is the largest?"], 6)
    lengths = [adapter.encode_question(question).num_text_tokens for question in questions]
    assert min(lengths) < 20
    assert len(set(lengths)) >= 5
    picture = np.zeros((300, 400, 3), np.uint8)
    for question in questions:
        run_forced(tiny_elastic, picture, question, space.full)
    longest = max(questions, key=len)
    with pytest.raises(QuestionError):
        run_forced(tiny_elastic, picture, f"{longest} {QUESTION}", space.full, max_new_tokens=6)


def test_a_request_holds_its_pictures_size_in_the_result(tiny_elastic: ElasticModel, tmp_path: Path) -> None:
    path = picture_file(tmp_path / "a.jpg", 60, 40)
    result = run_forced(tiny_elastic, path, QUESTION, tiny_elastic.knob_space.cheapest)
    sizes = result.sizes
    assert (sizes.num_pixels, sizes.picture_kind, sizes.num_bytes) == (2400, "jpeg", path.stat().st_size)
    assert result.times.read_ms > 0


def test_the_profiler_times_what_is_served(tiny_elastic: ElasticModel, law_examples: list[Example]) -> None:
    requests = [(example.image, example.question) for example in law_examples]
    state = torch.random.get_rng_state()
    profiled = profiling_run(tiny_elastic, requests)
    assert torch.equal(torch.random.get_rng_state(), state)
    settings = ProfilerSettings(num_requests=4, num_samples=12, repeats=1, max_warmup=2, max_output_tokens=3)
    profile = profile_requests(
        profiled, tiny_elastic.knob_space, settings, model_identity=tiny_elastic.identity, device="cpu", dtype="float32"
    )
    assert len(profile.samples) == 12
    space = tiny_elastic.knob_space
    forced_lengths = [s.num_output_tokens for s in profile.samples if s.knobs not in (space.cheapest, space.full)]
    assert all(length <= 3 for length in forced_lengths)
    assert all(sample.stages.stage1_ms > 0 for sample in profile.samples)
    # The forced knobs do not change what comes out.
    knobs = tiny_elastic.knob_space[7]
    forced = profiled(1, knobs, None)
    assert forced.token_ids == run_forced(tiny_elastic, *requests[1], knobs).token_ids
    with pytest.raises(ProfileError, match="no requests"):
        profiling_run(tiny_elastic, [])
