"""Profile, bound and measurement cover the same span: from the source given to the answer."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from pacevlm.baselines.full import FullPolicy
from pacevlm.config import EvaluateConfig
from pacevlm.controller.policy import Controller, ControllerConfig
from pacevlm.evaluation.timed import time_requests
from pacevlm.images import Picture, open_picture
from pacevlm.latency import profiler
from pacevlm.latency.calibrate import fit_latency, full_p50_ms
from pacevlm.latency.profiler import ProfilerSettings
from pacevlm.models import stage_clock
from pacevlm.pacer import Pacer
from pacevlm.rollout import request as request_module
from pacevlm.rollout.profiling import measure_profile, questions_of_all_lengths
from pacevlm.rollout.request import Pacing, run_with_policy
from pacevlm.types import Example

if TYPE_CHECKING:
    from pacevlm.latency.profile import Profile
    from pacevlm.models.elastic import ElasticModel

QUESTION = "How many red digits are there?"
MAX_PIXELS = 12_000
# What reading a picture takes on the counted clock: milliseconds once and per pixel.
READING = {"memory": (0.0, 0.0), "jpeg": (5.0, 1e-3), "progressive jpeg": (5.0, 2e-3), "png": (7.0, 3e-3)}
READING["webp"] = (4.0, 4e-3)
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> CountedClock:
    """The clock of everything that times requests, on which a picture takes as long to decode as `READING` says."""
    counted = CountedClock()
    for module in (stage_clock, request_module, profiler):
        monkeypatch.setattr(module, "time", counted)
    monkeypatch.setattr("pacevlm.pacer.time", counted)
    decode = Picture.decode

    def slow(picture: Picture) -> Image.Image:
        constant, per_pixel = READING.get(picture.kind, (50.0, 0.0))
        counted.now_s += (constant + per_pixel * picture.width * picture.height) / 1e3
        counted.reads.append(picture.kind)
        return decode(picture)

    monkeypatch.setattr(Picture, "decode", slow)
    return counted


def jpeg(path: Path, width: int, height: int, kind: str = "JPEG") -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, kind)
    return path


def make_profile(model: ElasticModel, requests: list[tuple[Any, str]], **options: Any) -> Profile:
    settings = ProfilerSettings(
        num_requests=len(requests), num_samples=20, repeats=1, max_warmup=0, max_output_tokens=2, max_reruns=0
    )
    return measure_profile(model, requests, settings, max_pixels=MAX_PIXELS, alpha=0.2, **options)


@pytest.fixture
def requests(law_examples: list[Example]) -> list[tuple[Any, str]]:
    return [(example.source, example.question) for example in law_examples]


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
    clock: CountedClock, tiny_elastic: ElasticModel, requests: list[tuple[Any, str]], tmp_path: Path
) -> None:
    profile = make_profile(tiny_elastic, requests)
    for sample in profile.all_samples:
        constant, per_pixel = READING[sample.picture_kind]
        assert sample.stages.read_ms >= constant + per_pixel * sample.num_pixels
    assert {sample.picture_kind for sample in profile.picture_samples} == set(READING)
    # What budgets count from are the data set's requests, which hold no file here.
    assert full_p50_ms(profile) < min(s.stages.e2e_ms for s in profile.picture_samples if s.picture_kind == "png")

    pacer = make_pacer(tiny_elastic, profile)
    for name, kind in (("a.jpg", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP")):
        path = jpeg(tmp_path / name, 120, 90, kind)
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
            assert answer.measured_ms <= answer.upper_bound_ms
        # A budget that only the model would keep is not feasible.
        short = pacer.answer(path, QUESTION, 0.9 * read_ms)
        assert not short.feasible
        assert short.why_infeasible is not None
        assert "lowest bound" in short.why_infeasible


def test_every_caller_begins_with_the_source(
    clock: CountedClock, tiny_elastic: ElasticModel, requests: list[tuple[Any, str]], tmp_path: Path
) -> None:
    path = jpeg(tmp_path / "a.jpg", 120, 90)
    profile = make_profile(tiny_elastic, [(path, QUESTION), *requests])
    of_file = [sample for sample in profile.samples if sample.picture_kind == "jpeg"]
    assert of_file
    assert all(sample.num_bytes == path.stat().st_size for sample in of_file)
    assert all(sample.stages.read_ms >= 5.0 + 1e-3 * 120 * 90 for sample in of_file)
    pacer = make_pacer(tiny_elastic, profile)
    policy, example = FullPolicy(tiny_elastic.knob_space), Example("file", path, QUESTION, ("1",))
    timed = time_requests(
        tiny_elastic, [policy], [example], [1e6], pacer.pacing, EvaluateConfig(num_timed=1, num_warmup=0)
    )
    (run,) = timed.runs.values()
    assert run.result.times.read_ms >= 5.0 + 1e-3 * 120 * 90
    assert (run.result.picture_kind, run.result.num_bytes) == ("jpeg", path.stat().st_size)


def test_nothing_is_promised_beyond_the_profile(
    clock: CountedClock, tiny_elastic: ElasticModel, requests: list[tuple[Any, str]], tmp_path: Path
) -> None:
    pacer = make_pacer(tiny_elastic, make_profile(tiny_elastic, requests))
    drift = pacer.track_drift()
    large, moving = jpeg(tmp_path / "large.jpg", 140, 100), jpeg(tmp_path / "a.gif", 30, 30, "GIF")
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
    assert pacer.answer(jpeg(tmp_path / "small.jpg", 100, 75), QUESTION, 1e6).feasible
    assert drift.num_observations == 1


def test_what_the_model_cannot_take_is_refused_before_it_is_decoded(
    clock: CountedClock, tiny_elastic: ElasticModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pacevlm.errors import ImageError

    def refuse(*_: object) -> None:
        raise ImageError("a shape that the model cannot take")

    monkeypatch.setattr(tiny_elastic.adapter, "vision_sizes", refuse)
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    with pytest.raises(ImageError, match="cannot take"):
        tiny_elastic.run_static(file.getvalue(), QUESTION, tiny_elastic.knob_space.full)
    assert clock.reads == []


def test_an_interrupted_profile_goes_on_with_the_same_pictures(
    tiny_elastic: ElasticModel, requests: list[tuple[Any, str]], tmp_path: Path
) -> None:
    done = []

    def stop(state: Any) -> None:
        done.append(state.num_done)
        if state.num_done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_profile(tiny_elastic, requests, path=tmp_path / "p.json", progress=stop)
    resumed = make_profile(tiny_elastic, requests, path=tmp_path / "p.json")
    whole = make_profile(tiny_elastic, requests)

    def without_times(profile: Profile) -> list[Any]:
        return [
            dataclasses.replace(
                s, stages=profile.samples[0].stages, num_output_tokens=len(profile.samples[0].stages.decode_ms) + 1
            )
            for s in profile.all_samples
        ]

    assert [dataclasses.astuple(s)[:5] for s in without_times(resumed)] == [
        dataclasses.astuple(s)[:5] for s in without_times(whole)
    ]
    assert [(s.picture_kind, s.num_bytes) for s in resumed.all_samples] == [
        (s.picture_kind, s.num_bytes) for s in whole.all_samples
    ]


def test_questions_reach_from_short_to_the_longest_that_fits(tiny_elastic: ElasticModel) -> None:
    adapter = tiny_elastic.adapter
    questions = questions_of_all_lengths(tiny_elastic, [QUESTION, "Which number is the largest?"], 6)
    lengths = [adapter.encode_question(question).num_text_tokens for question in questions]
    most = min(adapter.max_positions - tiny_elastic.max_image_tokens - 6, max(lengths))
    assert max(lengths) == most
    assert min(lengths) < 20
    assert len(set(lengths)) >= 5
    # A word more is too much, for the model's positions or for its processor.
    longer = max(questions, key=len) + " " + " ".join(["Which number"] * 4)
    try:
        assert (
            adapter.encode_question(longer).num_text_tokens > adapter.max_positions - tiny_elastic.max_image_tokens - 6
        )
    except Exception as error:
        assert type(error).__name__ == "QuestionError"
    for question in questions:
        tiny_elastic.run_static(np.zeros((300, 400, 3), np.uint8), question, tiny_elastic.knob_space.full)


def test_a_request_holds_its_pictures_size_in_the_result(tiny_elastic: ElasticModel, tmp_path: Path) -> None:
    pacing_path = jpeg(tmp_path / "a.jpg", 60, 40)
    result = tiny_elastic.run_static(pacing_path, QUESTION, tiny_elastic.knob_space.cheapest)
    assert (result.num_pixels, result.picture_kind, result.num_bytes) == (2400, "jpeg", pacing_path.stat().st_size)
    assert result.times.read_ms > 0
    assert run_with_policy is request_module.run_with_policy
