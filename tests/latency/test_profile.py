"""Profiles keep every measurement exactly and refuse what could not have been measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from pacevlm.errors import ConfigError, IdentityError, ProfileError
from pacevlm.identity import ANYTHING, Identity
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.calibrate import fit_latency, full_p50_ms
from pacevlm.latency.profile import DeviceFacts, NoiseFloor, Profile, Sample, collect_device_facts
from pacevlm.types import StageTimes

STAGES = StageTimes(0.5, 0.5, 0.5, 3.0, 2.0, 4.0, (1.0, 1.1), 12.7)
SAMPLE = Sample(Knobs("high", 8, 16), 3, 432, 20, 90_000, 3, STAGES)


def test_round_trip_is_exact(tmp_path: Path, make_device: Any, make_profile: Any) -> None:
    profile = make_profile(make_device(noise=0.1).measure(np.random.default_rng(0), 30))
    path = tmp_path / "new" / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_noise_floor_is_the_coefficient_of_variation() -> None:
    repeats = (10.0, 12.0, 11.0, 10.5)
    assert NoiseFloor(SAMPLE.knobs, repeats).cv == pytest.approx(np.std(repeats, ddof=1) / statistics.fmean(repeats))
    for wrong in ((), (1.0,), (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(ProfileError, match="two or more"):
            NoiseFloor(SAMPLE.knobs, wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"num_output_tokens": 0},
        {"num_output_tokens": 2},
        {"num_units": -1},
        {"num_image_tokens": 1.5},
        {"num_pixels": True},
        {"stages": dataclasses.replace(STAGES, vision_ms=-1.0)},
        {"stages": dataclasses.replace(STAGES, vision_ms=float("nan"))},
        {"stages": dataclasses.replace(STAGES, decode_ms=(1.0, float("inf")))},
        {"stages": dataclasses.replace(STAGES, e2e_ms=0.0)},
    ],
)
def test_impossible_samples_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProfileError):
        dataclasses.replace(SAMPLE, **change)


def test_profile_refuses_foreign_knobs_and_emptiness(make_profile: Any) -> None:
    with pytest.raises(ProfileError, match="high/9/16"):
        make_profile((dataclasses.replace(SAMPLE, knobs=Knobs("high", 9, 16)),))
    with pytest.raises(ProfileError, match="at least one sample"):
        make_profile(())


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no profile at"):
        Profile.load(tmp_path / "nowhere.json")
    path = tmp_path / "other.json"
    for text in ("", "[1]", "{}", '{"kind": "latency estimator"}', "\x00"):
        path.write_text(text)
        with pytest.raises(ProfileError):
            Profile.load(path)


def damage(values: Any, *route: str | int, to: Any) -> None:
    for key in route[:-1]:
        values = values[key]
    values[route[-1]] = to


@pytest.mark.parametrize(
    ("route", "to"),
    [
        (("schema_version",), 99),
        (("samples",), 5),
        (("samples", 0), None),
        (("samples", 0, "stages"), 3),
        (("samples", 0, "stages", "decode_ms"), None),
        (("samples", 0, "stages", "decode_ms", 0), "fast"),
        (("samples", 0, "stages", "prepare_ms"), None),
        (("samples", 0, "knobs"), "high/8"),
        (("samples", 0, "knobs"), 7),
        (("samples", 0, "num_units"), "3"),
        (("knob_space",), []),
        (("knob_space", "top_ks"), ["x"]),
        (("device", "load_average"), [1.0]),
        (("device", "device_type"), "tpu"),
        (("device", "num_threads"), "1"),
        (("device", "dtype"), 32),
        (("device", "torch_version"), None),
        (("device", "compiler"), 0.6),
        (("noise_floor", "repeats_ms"), [1.0]),
        (("model_identity",), ""),
        (("extra",), 1),
    ],
)
def test_damaged_profiles_are_refused(tmp_path: Path, make_profile: Any, reseal: Any, route: Any, to: Any) -> None:
    path = tmp_path / "profile.json"
    make_profile((SAMPLE,)).save(path)
    values = json.loads(path.read_text())
    damage(values, *route, to=to)
    reseal(path, values)
    with pytest.raises(ProfileError):
        Profile.load(path)


def test_truncated_profiles_are_refused(tmp_path: Path, make_profile: Any) -> None:
    path = tmp_path / "profile.json"
    make_profile((SAMPLE,)).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ProfileError):
            Profile.load(path)


def test_device_facts_of_this_machine() -> None:
    facts = collect_device_facts("cpu", torch.bfloat16)
    assert facts == dataclasses.replace(
        collect_device_facts(torch.device("cpu"), "bfloat16"), load_average=facts.load_average
    )
    assert (facts.device_type, facts.dtype, facts.num_threads) == ("cpu", "bfloat16", torch.get_num_threads())
    assert facts.torch_version == torch.__version__
    assert facts.device_name
    assert DeviceFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts
    for device in ("meta", "nonsense"):
        with pytest.raises(ConfigError, match=r"--model\.device"):
            collect_device_facts(device, "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_absent_cuda_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch sees cpu here"):
        collect_device_facts("cuda", "float32")


def test_a_profile_says_how_many_other_ranks_slept(
    monkeypatch: pytest.MonkeyPatch, make_profile: Any, tmp_path: Path
) -> None:
    alone = collect_device_facts("cpu", torch.float32)
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    led = collect_device_facts("cpu", torch.float32)
    assert (alone.num_idle_ranks, led.num_idle_ranks) == (0, 2)
    assert led.identity == alone.identity
    path = tmp_path / "profile.json"
    dataclasses.replace(make_profile((SAMPLE,)), device=led).save(path)
    assert Profile.load(path).device == led


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_facts_name_the_cuda_device() -> None:
    facts = collect_device_facts("cuda", torch.float16)
    assert (facts.device_type, facts.device_name) == ("cuda", torch.cuda.get_device_name())


def test_identity(make_profile: Any, device_facts: DeviceFacts, space: KnobSpace) -> None:
    profile = make_profile((SAMPLE,))
    profile.made_for.check("it", ANYTHING)
    later = dataclasses.replace(device_facts, torch_version="1", load_average=None)
    profile.made_for.check("it", Identity("weights-a", space, device=later.identity))
    with pytest.raises(IdentityError, match="weights-b"):
        profile.made_for.check("it", Identity("weights-b"))
    with pytest.raises(IdentityError):
        profile.made_for.check("it", Identity(knob_space=KnobSpace(top_ks=(4, 8))))
    for change in ({"num_threads": 2}, {"dtype": "float16"}, {"device_name": "other"}, {"device_type": "cuda"}):
        other = Identity(device=dataclasses.replace(device_facts, **change).identity)
        with pytest.raises(IdentityError, match="profile this device"):
            profile.made_for.check("it", other)


def test_compiled_loops_count_where_they_run(device_facts: DeviceFacts) -> None:
    without = dataclasses.replace(device_facts, compiler=None)
    one, other = (dataclasses.replace(without, compiler=version).identity for version in ("1", "2"))
    assert one == other != without.identity
    assert collect_device_facts("cpu", "float32").compiler is None
    assert collect_device_facts("cpu", "float32", compiler="numba").compiler == f"numba {numba.__version__}"


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("profiles/*.json")), ids=lambda path: path.stem)
def test_profiles_of_the_project_are_read_and_fitted(path: Path) -> None:
    profile = Profile.load(path)
    top_k = max(profile.knob_space.top_ks)
    fit = fit_latency(profile, trained_top_k=top_k, stage2_after=1, alpha=0.1)
    assert fit.report.ape_p50 < 0.15
    assert full_p50_ms(profile) > 0
