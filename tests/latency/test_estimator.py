"""The estimator is monotone, recovers a known law and predicts the same however it is asked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pacevlm.errors import ConfigError, IdentityError, KnobError, ProfileError
from pacevlm.identity import Identity
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.profile import Sample
from pacevlm.types import RequestSizes, VisionSizes

KINDS = ("e2e", "ttft")


def request_of(sample: Sample) -> RequestSizes:
    """What was known of a measured request, with its crops at every tier."""
    vision = (VisionSizes(sample.num_units, sample.num_image_tokens),) * 3
    return RequestSizes(vision, sample.num_text_tokens, sample.num_pixels, sample.picture_kind, sample.num_bytes)


@pytest.mark.parametrize("kind", KINDS)
def test_dearer_knobs_and_larger_requests_never_predict_less(
    kind: Any, random_estimator: Any, random_sizes: Any
) -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        estimator, sizes = random_estimator(rng, int(rng.integers(1, 4))), random_sizes(rng)
        num_output_tokens = int(rng.integers(1, 40))
        table = estimator.predict_all(sizes, num_output_tokens, kind)
        for axis in range(table.ndim):
            assert (np.diff(table, axis=axis) >= 0).all()  # exact: rounding must not break it either
        vision = tuple(VisionSizes(v.num_units + 1, v.num_image_tokens + 7) for v in sizes.vision)
        for larger in (
            dataclasses.replace(sizes, num_text_tokens=sizes.num_text_tokens + 1),
            dataclasses.replace(sizes, num_pixels=sizes.num_pixels + 1),
            dataclasses.replace(sizes, num_bytes=sizes.num_bytes + 1),
            dataclasses.replace(sizes, vision=vision),
        ):
            assert (estimator.predict_all(larger, num_output_tokens, kind) >= table).all()
        assert (estimator.predict_all(sizes, num_output_tokens + 1, kind) >= table).all()


@pytest.mark.parametrize("stage2_after", [1, 3])
def test_the_whole_space_at_once_equals_one_by_one(
    space: KnobSpace, random_estimator: Any, random_sizes: Any, stage2_after: int
) -> None:
    rng = np.random.default_rng(2)
    for _ in range(5):
        estimator = random_estimator(rng, stage2_after)
        sizes = [random_sizes(rng) for _ in range(4)]
        lengths = rng.integers(1, 30, size=4)
        many = {kind: estimator.predict_many(sizes, lengths, kind) for kind in KINDS}
        for row, (request, length) in enumerate(zip(sizes, lengths.tolist(), strict=True)):
            single = [estimator.predict(request, knobs, length) for knobs in space]
            np.testing.assert_allclose(many["e2e"][row].ravel(), [p.e2e_ms for p in single], rtol=1e-12)
            np.testing.assert_allclose(many["ttft"][row].ravel(), [p.ttft_ms for p in single], rtol=1e-12)
            for kind in KINDS:
                np.testing.assert_array_equal(many[kind][row], estimator.predict_all(request, length, kind))
                assert many[kind][row].shape == space.shape


def test_what_was_not_profiled_is_named(random_estimator: Any, random_sizes: Any) -> None:
    rng = np.random.default_rng(12)
    estimator = random_estimator(rng)
    inside = dataclasses.replace(random_sizes(rng), picture_kind="png", num_pixels=5_000_000, num_bytes=4_000_000)
    assert estimator.beyond(inside) is None
    for change, words in (
        ({"picture_kind": "gif"}, ("no gif picture", "jpeg, memory, png")),
        ({"num_pixels": 13_000_000}, ("13,000,000 pixels", "5,000,000")),
        ({"num_bytes": 5_000_000}, ("5,000,000 bytes", "4,000,000")),
        ({"num_text_tokens": 900}, ("900 text tokens", "200")),
    ):
        why = estimator.beyond(dataclasses.replace(inside, **change))
        assert all(word in why for word in words), why
    # A kind that was not profiled is guessed to take as long as the dearest that was.
    unknown = estimator.predict_all(dataclasses.replace(inside, picture_kind="gif"), 2)
    known = [estimator.predict_all(dataclasses.replace(inside, picture_kind=kind), 2) for kind in estimator.pictures]
    np.testing.assert_array_equal(unknown, np.max(known, axis=0))


def test_a_fit_reaches_as_far_as_its_profile(make_device: Any, make_profile: Any) -> None:
    samples = make_device().measure(np.random.default_rng(13), 100)
    estimator = LatencyEstimator.fit(make_profile(samples), trained_top_k=8)
    for kind in ("memory", "jpeg", "png"):
        of_kind = [sample for sample in samples if sample.picture_kind == kind]
        fit = estimator.pictures[kind]
        assert fit.max_pixels == max(sample.num_pixels for sample in of_kind)
        assert fit.max_bytes == max(sample.num_bytes for sample in of_kind)
    assert estimator.max_text_tokens == max(sample.num_text_tokens for sample in samples)
    # Self-made pictures count as well as the data set's, and a kind that only they have is known by them.
    split = dataclasses.replace(
        make_profile(tuple(s for s in samples if s.picture_kind == "memory")),
        picture_samples=tuple(s for s in samples if s.picture_kind != "memory"),
    )
    both = LatencyEstimator.fit(split, trained_top_k=8)
    assert both.pictures == estimator.pictures
    without = LatencyEstimator.fit(dataclasses.replace(split, picture_samples=()), trained_top_k=8)
    assert set(without.pictures) == {"memory"}
    assert all(without.beyond(request_of(sample)) is not None for sample in split.picture_samples)


def test_a_batch_of_nothing_predicts_nothing(space: KnobSpace, random_estimator: Any) -> None:
    assert random_estimator(np.random.default_rng(0)).predict_many([], []).shape == (0, *space.shape)


def test_samples_are_predicted_as_requests_are(make_device: Any, random_estimator: Any) -> None:
    rng = np.random.default_rng(3)
    samples, estimator = make_device().measure(rng, 40), random_estimator(rng)
    for kind in KINDS:
        predicted = estimator.predict_samples(samples, kind)
        for value, sample in zip(predicted, samples, strict=True):
            sizes = request_of(sample)
            one = estimator.predict(sizes, sample.knobs, sample.num_output_tokens)
            assert value == pytest.approx(getattr(one, f"{kind}_ms"), rel=1e-12)


@pytest.mark.parametrize(
    ("noise", "outlier_rate", "num_samples", "tolerance"),
    [(0.0, 0.0, 150, 1e-6), (0.05, 0.0, 600, 0.02), (0.03, 0.03, 600, 0.02)],
)
def test_fit_recovers_the_law(
    make_device: Any, make_profile: Any, noise: float, outlier_rate: float, num_samples: int, tolerance: float
) -> None:
    measured = make_device(noise=noise, outlier_rate=outlier_rate).measure(np.random.default_rng(4), num_samples)
    estimator = LatencyEstimator.fit(make_profile(measured), trained_top_k=8)
    exact = make_device().measure(np.random.default_rng(5), 300)
    truth_ms = {
        "e2e": np.array([sample.stages.e2e_ms for sample in exact]),
        "ttft": np.array([sample.stages.ttft_ms for sample in exact]),
    }
    for kind in KINDS:
        errors = np.abs(estimator.predict_samples(exact, kind) / truth_ms[kind] - 1)
        assert errors.max() < tolerance
    # The stages one by one, so that errors cannot cancel.
    for sample in exact[:50]:
        sizes = request_of(sample)
        stages = estimator.predict(sizes, sample.knobs, sample.num_output_tokens)
        for name in ("read_ms", "prepare_ms", "stage1_ms", "vision_ms", "first_block_ms", "prefill_ms"):
            assert getattr(stages, name) == pytest.approx(getattr(sample.stages, name), rel=max(2 * tolerance, 1e-6))
        assert stages.decode_ms == pytest.approx(sum(sample.stages.decode_ms), rel=max(2 * tolerance, 1e-6))


def test_outliers_are_dropped_and_counted(make_device: Any, make_profile: Any) -> None:
    rng = np.random.default_rng(6)
    clean = LatencyEstimator.fit(make_profile(make_device(noise=0.02).measure(rng, 300)), trained_top_k=8)
    dirty_samples = make_device(noise=0.02, outlier_rate=0.05).measure(rng, 300)
    dirty = LatencyEstimator.fit(make_profile(dirty_samples), trained_top_k=8)
    assert clean.stages["prefill_ms"].num_dropped == 0
    assert dirty.stages["prefill_ms"].num_dropped >= 8
    assert dirty.stages["prefill_ms"].ape_p50 < 0.03


def test_fit_needs_both_ends_of_every_knob_and_decoding(make_device: Any, make_profile: Any) -> None:
    samples = make_device().measure(np.random.default_rng(7), 100)
    for kept, message in (
        ([s for s in samples if s.knobs.tier != "low"], "low"),
        ([s for s in samples if s.knobs.top_k < 8], "top_k"),
        ([s for s in samples if s.knobs.num_blocks > 12], "num_blocks"),
    ):
        with pytest.raises(ProfileError, match=message):
            LatencyEstimator.fit(make_profile(tuple(kept)), trained_top_k=8)
    single = make_device().measure(np.random.default_rng(7), 100, max_output_tokens=1)[2:]
    with pytest.raises(ProfileError, match="output token"):
        LatencyEstimator.fit(make_profile(single), trained_top_k=8)


def test_round_trip_predicts_bit_for_bit(
    tmp_path: Path, make_device: Any, make_profile: Any, random_sizes: Any
) -> None:
    rng = np.random.default_rng(8)
    estimator = LatencyEstimator.fit(make_profile(make_device(noise=0.1).measure(rng, 80)), trained_top_k=8)
    path = tmp_path / "estimator.json"
    estimator.save(path)
    loaded = LatencyEstimator.load(path)
    assert loaded == estimator
    assert loaded.fingerprint == estimator.fingerprint
    for _ in range(10):
        sizes, length = random_sizes(rng), int(rng.integers(1, 20))
        for kind in KINDS:
            np.testing.assert_array_equal(
                loaded.predict_all(sizes, length, kind), estimator.predict_all(sizes, length, kind)
            )


def test_foreign_estimators_are_refused(tmp_path: Path, space: KnobSpace, random_estimator: Any) -> None:
    estimator = random_estimator(np.random.default_rng(9))
    path = tmp_path / "estimator.json"
    estimator.save(path)
    facts = estimator.device
    LatencyEstimator.load(path, Identity("weights-a", space, device=facts.identity))
    for wrong in (
        Identity("weights-b"),
        Identity(knob_space=KnobSpace(num_blocks=(14, 15, 16))),
        Identity(device=dataclasses.replace(facts, dtype="bfloat16").identity),
    ):
        with pytest.raises(IdentityError):
            LatencyEstimator.load(path, wrong)


def test_damaged_estimators_are_refused(tmp_path: Path, random_estimator: Any, reseal: Any) -> None:
    path = tmp_path / "estimator.json"
    with pytest.raises(ProfileError, match="no latency estimator"):
        LatencyEstimator.load(path)
    random_estimator(np.random.default_rng(10)).save(path)
    whole = path.read_text()
    for damage in (
        lambda v: v["stages"]["vision_ms"]["coefficients"].update(units=-1.0),
        lambda v: v["stages"]["vision_ms"]["coefficients"].update(units="x"),
        lambda v: v["stages"]["vision_ms"]["coefficients"].update(units=float("nan")),
        lambda v: v["stages"]["vision_ms"]["coefficients"].update(units=1e300),
        lambda v: v["stages"]["vision_ms"]["coefficients"].update(units=True),
        lambda v: v["stages"]["vision_ms"].update(num_rows=1.5),
        lambda v: v["stages"]["vision_ms"].update(ape_p50=-1.0),
        lambda v: [
            fit["coefficients"].update(dict.fromkeys(fit["coefficients"], 0))
            for fit in (*v["stages"].values(), *(picture["read"] for picture in v["pictures"].values()))
        ],
        lambda v: v["pictures"].clear(),
        lambda v: [picture.update(max_pixels=-1) for picture in v["pictures"].values()],
        lambda v: v.update(max_text_tokens=1.5),
        lambda v: v["knob_space"].update(top_ks=[4, True]),
        lambda v: v["device"].update(num_threads=10**9),
        lambda v: v["stages"]["vision_ms"]["coefficients"].pop("units"),
        lambda v: v["stages"].pop("prefill_ms"),
        lambda v: v.update(trained_top_k=0),
        lambda v: v.update(stage2_after=13),
        lambda v: v.update(schema_version=0),
        lambda v: v.update(kind="profile"),
        lambda v: v.pop("device"),
    ):
        values = json.loads(whole)
        damage(values)
        reseal(path, values)
        with pytest.raises(ProfileError):
            LatencyEstimator.load(path)


def test_wrong_questions_are_refused(random_estimator: Any, random_sizes: Any) -> None:
    rng = np.random.default_rng(11)
    estimator, sizes = random_estimator(rng), random_sizes(rng)
    with pytest.raises(ConfigError, match="ttft"):
        estimator.predict_all(sizes, 3, "total")
    with pytest.raises(ProfileError, match="at least 1"):
        estimator.predict_all(sizes, 0)
    with pytest.raises(ProfileError, match="2 tiers"):
        estimator.predict_all(dataclasses.replace(sizes, vision=sizes.vision[:2]), 3)
    with pytest.raises(ProfileError, match="output lengths"):
        estimator.predict_many([sizes, sizes], [3])
    with pytest.raises(KnobError):
        estimator.predict(sizes, Knobs("high", 9, 16), 3)


# Other devices -------------------------------------------------------------------------------------------------------


def slower_samples(samples: tuple[Sample, ...], factor: float) -> tuple[Sample, ...]:
    """The same requests on a device that takes `factor` times as long for everything."""
    slower = []
    for sample in samples:
        times = sample.stages
        scaled = {name: factor * getattr(times, name) for name in times.__slots__ if name != "decode_ms"}
        stages = dataclasses.replace(times, **scaled, decode_ms=tuple(factor * step for step in times.decode_ms))
        slower.append(dataclasses.replace(sample, stages=stages))
    return tuple(slower)


def error(estimator: LatencyEstimator, samples: tuple[Sample, ...]) -> float:
    measured = np.array([sample.stages.e2e_ms for sample in samples])
    return float(np.abs(estimator.predict_samples(samples) / measured - 1).mean())


@pytest.mark.parametrize("factor", [0.25, 1.0, 6.0])
def test_few_samples_carry_an_estimator_over(make_device: Any, make_profile: Any, factor: float) -> None:
    rng = np.random.default_rng(5)
    estimator = LatencyEstimator.fit(make_profile(make_device(noise=0.03).measure(rng, 400)), trained_top_k=8)
    other = make_device(noise=0.03)
    few = slower_samples(other.measure(rng, 25), factor)
    held_out = slower_samples(other.measure(rng, 300), factor)
    facts = dataclasses.replace(make_profile(few).device, num_threads=2)
    moved = estimator.transfer(dataclasses.replace(make_profile(few), device=facts))
    full_refit = LatencyEstimator.fit(make_profile(slower_samples(other.measure(rng, 400), factor)), trained_top_k=8)
    assert moved.device == facts
    assert moved.fingerprint != estimator.fingerprint
    assert error(moved, held_out) <= 1.5 * error(full_refit, held_out)
    table = moved.predict_all(RequestSizes(tuple(VisionSizes(c, 144 * c) for c in (2, 6, 12)), 20, 10_000), 5)
    for axis in range(table.ndim):
        assert (np.diff(table, axis=axis) >= 0).all()


def test_an_estimator_is_not_carried_over_to_another_model(make_device: Any, make_profile: Any) -> None:
    rng = np.random.default_rng(6)
    profile = make_profile(make_device().measure(rng, 60))
    estimator = LatencyEstimator.fit(profile, trained_top_k=8)
    with pytest.raises(IdentityError, match="weights-b"):
        estimator.transfer(dataclasses.replace(profile, model_identity="weights-b"))


def test_turned_pictures_are_promised_as_far_as_turned_ones_were_profiled(random_estimator: Any) -> None:
    estimator = random_estimator(np.random.default_rng(7))
    sizes = RequestSizes(tuple(VisionSizes(c, 144 * c) for c in (2, 6, 12)), 20, 1_000_000, "turned jpeg", 400_000)
    upright = dataclasses.replace(sizes, picture_kind="jpeg")
    assert estimator.beyond(sizes) is None
    assert (estimator.predict_all(sizes, 2) >= estimator.predict_all(upright, 2)).all()
    pictures = {kind: dataclasses.replace(fit, max_turned_pixels=0) for kind, fit in estimator.pictures.items()}
    without = dataclasses.replace(estimator, pictures=pictures)
    assert "turned jpeg" in str(without.beyond(sizes))
    assert without.beyond(upright) is None
