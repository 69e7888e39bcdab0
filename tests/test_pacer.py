"""The public face: answers that account for themselves, and bundles that refuse what does not belong to them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pacers import NUM_THREADS, PRICES, make_estimator, make_pacer
from PIL import Image

import pacevlm
from pacevlm.baselines.cheapest import CheapestPolicy
from pacevlm.baselines.full import FullPolicy
from pacevlm.baselines.predictor import PredictorPolicy
from pacevlm.config import PictureConfig
from pacevlm.controller.features import num_size_features
from pacevlm.controller.policy import ControllerPolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    IdentityError,
    ImageError,
    ProfileError,
    QuestionError,
)
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.drift import DriftCorrection, DriftSettings
from pacevlm.models.elastic import ElasticModel, write_elastic_settings
from pacevlm.pacer import Pacer, read_prices
from pacevlm.request.run import run_forced

QUESTION = "How many red digits are there?"


def make_predictor(space: KnobSpace, d_model: int, favourite: Knobs) -> PredictorPolicy:
    """One that thinks best of some knobs, whatever the request."""
    num_features = num_size_features(len(space.tiers)) + d_model
    intercept = np.array([1.0 if knobs == favourite else 0.5 for knobs in space])
    zeros, ones = np.zeros(num_features), np.ones(num_features)
    return PredictorPolicy(space, zeros, ones, np.zeros((num_features, len(space))), intercept, 0 * intercept)


@pytest.fixture(scope="module")
def pacer(tiny_elastic: ElasticModel, tiny_elastic_dir: Path) -> Pacer:
    return make_pacer(tiny_elastic, tiny_elastic_dir)


@pytest.fixture(scope="module")
def bundle(pacer: Pacer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    pacer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture
def changed(bundle: Path, tmp_path: Path, reseal: Callable[[Path, Any], None]) -> Callable[..., Path]:
    """A copy of the bundle whose bundle.json differs in some entries, dotted names for nested ones."""

    def change(**changes: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        values = json.loads((folder / "bundle.json").read_text())
        for name, value in changes.items():
            entries = values
            *outer, last = name.split("__")
            for key in outer:
                entries = entries[key]
            if value is None:
                del entries[last]
            else:
                entries[last] = value
        reseal(folder / "bundle.json", values)
        return folder

    return change


# Answers -------------------------------------------------------------------------------------------------------------


def test_an_answer_accounts_for_itself(pacer: Pacer, image: Image.Image) -> None:
    estimates = {entry.knobs: entry for entry in pacer.estimate(image, QUESTION)}
    bounds_ms = sorted(entry.upper_bound_ms for entry in estimates.values())
    for budget_ms in (bounds_ms[len(bounds_ms) // 2], 1e9):
        answer = pacer.answer(image, QUESTION, budget_ms)
        assert answer.feasible
        assert answer.budget_ms == budget_ms
        assert answer.budget_met == (answer.measured_ms <= budget_ms)
        assert answer.measured_ms == answer.waited_ms + answer.times.e2e_ms > 0
        assert answer.upper_bound_ms == pytest.approx(estimates[answer.knobs].upper_bound_ms)
        assert answer.upper_bound_ms <= budget_ms
        assert len(answer.times.decode_ms) == answer.num_output_tokens - 1
        assert answer.answer == run_forced(pacer.model, image, QUESTION, answer.knobs).answer
        assert answer.predicted_ms > 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            answer.answer = "another"  # type: ignore[misc]


def test_a_hopeless_budget_runs_the_cheapest(pacer: Pacer, image: Image.Image) -> None:
    answer = pacer.answer(image, QUESTION, 1e-3)
    assert (answer.feasible, answer.budget_met) == (False, False)
    assert answer.why_infeasible is not None
    assert answer.knobs == pacer.model.knob_space.cheapest
    assert answer.answer == run_forced(pacer.model, image, QUESTION, answer.knobs).answer


def test_another_policy_may_choose(pacer: Pacer, image: Image.Image) -> None:
    space = pacer.model.knob_space
    assert pacer.answer(image, QUESTION, policy=FullPolicy(space)).knobs == space.full
    with pytest.raises(ConfigError, match="choose_tier"):
        pacer.answer(image, QUESTION, policy="full")  # type: ignore[arg-type]


def test_estimates_cover_the_knob_space_and_never_fall(pacer: Pacer, image: Image.Image) -> None:
    space = pacer.model.knob_space
    estimates = pacer.estimate(image, QUESTION)
    assert [entry.knobs for entry in estimates] == list(space)
    for name in ("predicted_ms", "upper_bound_ms"):
        table = np.array([getattr(entry, name) for entry in estimates]).reshape(space.shape)
        assert all((np.diff(table, axis=axis) >= 0).all() for axis in range(table.ndim))
    assert all(entry.predicted_ms < entry.upper_bound_ms for entry in estimates)


def test_a_question_alone_runs_the_most_that_fits(pacer: Pacer) -> None:
    space = pacer.model.knob_space
    result = pacer.answer(None, QUESTION, 1e9, price=50)
    assert (result.feasible, result.knobs.compute, result.vision.num_image_tokens) == (True, space.full.compute, 0)
    assert result.token_ids == run_forced(pacer.model, None, QUESTION, result.knobs).token_ids
    bounds_ms = {estimate.knobs: estimate.upper_bound_ms for estimate in pacer.estimate(None, QUESTION)}
    assert result.upper_bound_ms == pytest.approx(max(bounds_ms.values()))
    hopeless = pacer.answer(None, QUESTION, 1e-3)
    assert (hopeless.feasible, hopeless.knobs) == (False, space.cheapest)
    assert pacer.answer(None, QUESTION, 1e9, CheapestPolicy(space)).knobs == space.cheapest


@pytest.mark.parametrize("budget_ms", [0, -5.0, math.nan, math.inf, "80", None, True])
def test_bad_budgets_are_refused(pacer: Pacer, image: Image.Image, budget_ms: Any) -> None:
    with pytest.raises(BudgetError, match="positive, finite number of milliseconds"):
        pacer.answer(image, QUESTION, budget_ms)


@pytest.mark.parametrize("price", [-0.1, 1000.5, math.nan, math.inf, "5", b"5", True, [5.0], np.float32("nan")])
def test_bad_prices_are_refused(pacer: Pacer, image: Image.Image, price: Any) -> None:
    with pytest.raises(ConfigError, match=r"price is .* number from 0 to 1000"):
        pacer.answer(image, QUESTION, price=price)


def test_a_price_reaches_the_policy_and_the_answer(pacer: Pacer, image: Image.Image) -> None:
    seen = []

    class Watching(FullPolicy):
        def choose(self, request: PolicyInput) -> Knobs:
            seen.append(request.objective.price)
            return self.space.full

    policy = Watching(pacer.model.knob_space)
    for given, used in ((None, 2.0), (0, 0.0), (np.float32(7.5), 7.5), (1000.0, 1000.0)):
        seen.clear()
        assert pacer.answer(image, QUESTION, 1e9, policy, price=given).price == used
        assert set(seen) == {used}
    assert pacer.answer(image, QUESTION, price=3).to_dict()["price"] == 3.0


def test_the_default_price_is_the_calibrated_one_or_none(
    pacer: Pacer, tiny_elastic: ElasticModel, tiny_elastic_dir: Path, image: Image.Image, tmp_path: Path
) -> None:
    assert pacer.default_price == 2.0
    assert pacer.price_for(points=0.5) == PRICES.points[2]
    assert pacer.price_for(mean_ms=45.0) == PRICES.points[3]
    with pytest.raises(ConfigError, match="no price brings"):
        pacer.price_for(mean_ms=20.0)
    plain = make_pacer(tiny_elastic, tiny_elastic_dir, prices=None)
    assert plain.default_price == plain.answer(image, QUESTION).price == 0.0
    with pytest.raises(ConfigError, match="not calibrated"):
        plain.price_for(points=0.5)
    plain.save_pretrained(tmp_path)
    assert Pacer.from_pretrained(tmp_path).prices is None
    with pytest.raises(CheckpointError, match="no calibrated prices"):
        read_prices(tmp_path)


@pytest.mark.parametrize("source", ["no/such/file.png", b"", b"not an image", np.zeros((4, 4)), 7])
def test_bad_images_are_refused(pacer: Pacer, source: Any) -> None:
    for call in (pacer.answer, pacer.estimate):
        with pytest.raises(ImageError):
            call(source, QUESTION)


@pytest.mark.parametrize("question", ["", "   ", "why " * 5000, None])
def test_bad_questions_are_refused(pacer: Pacer, image: Image.Image, question: Any) -> None:
    for call in (pacer.answer, pacer.estimate):
        with pytest.raises(QuestionError):
            call(image, question)


# Threads -------------------------------------------------------------------------------------------------------------


class Waiting(FullPolicy):
    """Begins, and goes on when it is told to."""

    def __init__(self, space: Any) -> None:
        super().__init__(space)
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.running = self.most_running = 0

    def choose_tier(self, request: Any) -> str:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.begun.set()
        assert self.may_go_on.wait(30)
        self.running -= 1
        return super().choose_tier(request)


def held_up(pacer: Pacer, image: Image.Image, policy: Waiting, *later: Callable[[], Any]) -> list[Any]:
    """What later calls give that come while a request of this policy runs, and waits for a twentieth of a second."""
    with ThreadPoolExecutor(1 + len(later)) as pool:
        first = pool.submit(pacer.answer, image, QUESTION, 1e9, policy)
        assert policy.begun.wait(30)
        others = [pool.submit(call) for call in later]
        time.sleep(0.05)
        assert not any(other.done() for other in others)
        policy.may_go_on.set()
        return [first.result(30), *(other.result(30) for other in others)]


def test_waiting_is_inside_the_budget(pacer: Pacer, image: Image.Image) -> None:
    space = pacer.model.knob_space
    bounds_ms = [entry.upper_bound_ms for entry in pacer.estimate(image, QUESTION)]
    seen: dict[str, Any] = {}

    class Watching(FullPolicy):
        def choose_tier(self, request: Any) -> str:
            seen["request"] = request
            return super().choose_tier(request)

    # Enough for everything alone, too little for anything behind another request.
    budget_ms = max(bounds_ms) * 1.1 + 10.0
    alone = pacer.answer(image, QUESTION, budget_ms, Watching(space))
    assert alone.feasible
    assert seen["request"].feasible.all()
    first, second, patient = held_up(
        pacer,
        image,
        Waiting(space),
        lambda: pacer.answer(image, QUESTION, budget_ms, Watching(space)),
        lambda: pacer.answer(image, QUESTION, 1e9, FullPolicy(space)),
    )
    assert first.waited_ms < 30_000
    assert second.waited_ms >= 50 > budget_ms - min(bounds_ms)
    assert (second.feasible, second.budget_met) == (False, False)
    assert "ran out while waiting" in second.why_infeasible or "after waiting" in second.why_infeasible
    assert seen["request"].feasible.sum() == 1
    assert seen["request"].budget_ms < budget_ms
    assert second.measured_ms == second.waited_ms + second.times.e2e_ms
    # What is left is what counts: a budget that is large enough is kept all the same.
    assert patient.waited_ms >= 50
    assert patient.feasible
    assert patient.why_infeasible is None
    assert patient.answer == run_forced(pacer.model, image, QUESTION, space.full).answer


def test_a_spent_budget_runs_the_cheapest(pacer: Pacer, image: Image.Image) -> None:
    space = pacer.model.knob_space
    _, late = held_up(pacer, image, Waiting(space), lambda: pacer.answer(image, QUESTION, 20.0))
    assert late.knobs == space.cheapest
    assert "ran out while waiting" in late.why_infeasible
    assert late.budget_ms == 20.0
    assert late.measured_ms > 50


def test_threads_get_what_they_would_get_alone(pacer: Pacer, image: Image.Image) -> None:
    space, policy = pacer.model.knob_space, Waiting(pacer.model.knob_space)
    policy.may_go_on.set()
    questions = [QUESTION, "Which number is the largest?", "2?", "red?"] * 4
    alone = [pacer.answer(image, question, 1e9, FullPolicy(space)) for question in questions]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda question: pacer.answer(image, question, 1e9, policy), questions))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert policy.most_running == 1
    assert [answer.answer for answer in together] == [answer.answer for answer in alone]
    assert all(answer.feasible for answer in together)


def test_drift_learns_from_running_alone(
    tiny_elastic: ElasticModel, tiny_elastic_dir: Path, image: Image.Image, tmp_path: Path
) -> None:
    pacer = make_pacer(tiny_elastic, tiny_elastic_dir)
    drift, observed = pacer.track_drift(), []
    drift.observe = lambda bound_ms, measured_ms: observed.append(measured_ms)  # type: ignore[method-assign]
    space = tiny_elastic.knob_space
    answers = held_up(
        pacer,
        image,
        Waiting(space),
        lambda: pacer.answer(image, QUESTION, 1e9),
        lambda: pacer.save_drift(tmp_path / "drift.json"),
    )
    assert observed == [answer.times.e2e_ms for answer in answers[:2]]
    assert (tmp_path / "drift.json").exists()


def test_a_policy_may_ask_its_own_pacer(pacer: Pacer, image: Image.Image) -> None:
    class Asking(FullPolicy):
        def choose_tier(self, request: Any) -> str:
            self.inner = pacer.answer(image, "2?", 1e9)
            return super().choose_tier(request)

    policy = Asking(pacer.model.knob_space)
    assert pacer.answer(image, QUESTION, 1e9, policy).feasible
    assert policy.inner.feasible


# Drift ---------------------------------------------------------------------------------------------------------------


def test_drift_is_followed_and_remembered(
    tiny_elastic: ElasticModel, tiny_elastic_dir: Path, image: Image.Image, tmp_path: Path
) -> None:
    pacer, path = make_pacer(tiny_elastic, tiny_elastic_dir), tmp_path / "state" / "drift.json"
    assert pacer.answer(image, QUESTION, 1e9).drift_factor == 1.0
    plain = pacer.estimate(image, QUESTION)
    drift = pacer.track_drift(path, DriftSettings(max_factor=4.0))
    assert pacer.drift is drift
    assert not path.exists()
    for _ in range(3):
        drift.observe(1.0, 2.0)
    factor = drift.factor
    assert factor == pytest.approx(2.0)
    assert pacer.answer(image, QUESTION, 1e9).drift_factor == factor
    assert drift.num_observations == 4
    for before, now in zip(plain, pacer.estimate(image, QUESTION), strict=True):
        assert now.upper_bound_ms == before.upper_bound_ms * drift.factor
        assert now.predicted_ms == before.predicted_ms
    pacer.save_drift()

    later = make_pacer(tiny_elastic, tiny_elastic_dir)
    resumed = later.track_drift(path)
    assert (resumed.factor, resumed.to_dict()) == (drift.factor, drift.to_dict())
    assert later.answer(image, QUESTION, 1e9).drift_factor == drift.factor
    # Budgets from the corrected bound on admit the knobs.
    full = later.estimate(image, QUESTION)[-1].upper_bound_ms
    assert later.answer(image, QUESTION, full * (1 + 1e-9), policy=FullPolicy(tiny_elastic.knob_space)).feasible


def test_drift_that_does_not_belong_is_refused(
    tiny_elastic: ElasticModel, tiny_elastic_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(IdentityError, match="another latency estimator"):
        make_pacer(tiny_elastic, tiny_elastic_dir, drift=DriftCorrection("another"))
    other = make_pacer(tiny_elastic, tiny_elastic_dir, estimator=make_estimator(tiny_elastic, 2e-4))
    other.track_drift(tmp_path / "drift.json")
    other.save_drift()
    pacer = make_pacer(tiny_elastic, tiny_elastic_dir)
    with pytest.raises(ConfigError, match="track_drift"):
        pacer.save_drift(tmp_path / "nothing.json")
    with pytest.raises(IdentityError, match="another latency estimator"):
        pacer.track_drift(tmp_path / "drift.json")
    (tmp_path / "drift.json").write_text("{")
    with pytest.raises(ProfileError, match="not valid JSON"):
        pacer.track_drift(tmp_path / "drift.json")
    pacer.track_drift()
    with pytest.raises(ConfigError, match="no path"):
        pacer.save_drift()
    pacer.save_drift(tmp_path / "drift.json")
    assert pacer.track_drift(tmp_path / "drift.json").num_observations == 0


# Bundles -------------------------------------------------------------------------------------------------------------


def test_a_saved_pacer_answers_alike(pacer: Pacer, bundle: Path, image: Image.Image, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(bundle, run_dir / "bundle")
    for path in (bundle, run_dir):
        loaded = Pacer.from_pretrained(path)
        assert loaded.model.identity == pacer.model.identity
        assert (loaded.full_p50_ms, loaded.num_threads) == (pacer.full_p50_ms, NUM_THREADS)
        assert loaded.pacing == pacer.pacing
        assert loaded.prices == pacer.prices == read_prices(path)
        assert loaded.estimate(image, QUESTION) == pacer.estimate(image, QUESTION)
        for budget_ms in (0.05, 1.0, 1e9):
            first, second = (one.answer(image, QUESTION, budget_ms) for one in (pacer, loaded))
            assert (first.answer, first.knobs, first.feasible) == (second.answer, second.knobs, second.feasible)


def test_a_loaded_pacer_is_rebuilt_wherever_it_is_sent(bundle: Path, image: Image.Image, tmp_path: Path) -> None:
    loaded = Pacer.from_pretrained(bundle, any_device=True)
    loaded.track_drift(tmp_path / "drift.json")
    before = loaded.answer(image, "How many?", 1e6)
    for again in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded), copy.copy(loaded)):
        assert type(again) is Pacer
        assert again.drift is None
        after = again.answer(image, "How many?", 1e6)
        assert (after.answer, after.knobs, after.upper_bound_ms) == (
            before.answer,
            before.knobs,
            before.upper_bound_ms,
        )
    assert loaded.drift is not None
    # In a process of its own, started elsewhere.
    content = tmp_path / "pacer.pickle"
    content.write_bytes(pickle.dumps(loaded))
    program = "import pickle, sys; print(len(pickle.load(open(sys.argv[1], 'rb')).model.knob_space))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(content)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert int(done.stdout) == len(loaded.model.knob_space)


def test_a_pacer_made_in_memory_says_how_to_send_it(pacer: Pacer) -> None:
    for send in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ConfigError, match="save_pretrained and load it there"):
            send(pacer)


def test_requests_run_with_the_profiled_threads(pacer: Pacer, image: Image.Image) -> None:
    seen = []

    class Watching(FullPolicy):
        def choose_tier(self, request: Any) -> str:
            seen.append(torch.get_num_threads())
            return super().choose_tier(request)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pacer.answer(image, QUESTION, policy=Watching(pacer.model.knob_space))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [NUM_THREADS]


def test_a_bundle_keeps_how_pictures_are_read(tiny_elastic_dir: Path, tmp_path: Path) -> None:
    picture = PictureConfig("black", 5000)
    model = ElasticModel.from_pretrained(tiny_elastic_dir, picture_config=picture)
    make_pacer(model, tiny_elastic_dir, lengths=False).save_pretrained(tmp_path)
    assert Pacer.from_pretrained(tmp_path).model.picture_config == picture


def test_a_bundle_may_do_without_output_lengths(
    tiny_elastic: ElasticModel, tiny_elastic_dir: Path, image: Image.Image, tmp_path: Path
) -> None:
    make_pacer(tiny_elastic, tiny_elastic_dir, lengths=False).save_pretrained(tmp_path)
    loaded = Pacer.from_pretrained(tmp_path)
    assert loaded.pacing.output_length is None
    assert loaded.answer(image, QUESTION, 1e9).feasible


def test_model_and_bundle_move_together(
    bundle: Path, tiny_elastic_dir: Path, changed: Callable[..., Path], image: Image.Image
) -> None:
    folder = changed(model__path="model")
    shutil.copytree(tiny_elastic_dir, folder / "model")
    assert Pacer.from_pretrained(folder).answer(image, QUESTION, 1e9).feasible
    elsewhere = changed(model__path="/no/such/model", model__absolute_path="/no/such/model")
    with pytest.raises(CheckpointError, match="/no/such/model"):
        Pacer.from_pretrained(elsewhere)
    assert Pacer.from_pretrained(elsewhere, model_path=tiny_elastic_dir).model_path == str(tiny_elastic_dir)


def test_another_model_is_refused(
    bundle: Path, tiny_elastic_dir: Path, save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(IdentityError, match="made for model"):
        Pacer.from_pretrained(bundle, model_path=save_checkpoint(tmp_path / "other", seed=9))
    reordered = shutil.copytree(tiny_elastic_dir, tmp_path / "reordered")
    write_elastic_settings(reordered, removal=[3, 2, 4])
    with pytest.raises(IdentityError, match=r"elastic\.json"):
        Pacer.from_pretrained(bundle, model_path=reordered)


def test_another_device_is_refused(bundle: Path, changed: Callable[..., Path]) -> None:
    # As many threads as were not profiled are another device.
    folder = changed(num_threads=NUM_THREADS + 1)
    with pytest.raises(IdentityError, match="profile this device"):
        Pacer.from_pretrained(folder)
    assert Pacer.from_pretrained(folder, any_device=True).num_threads == NUM_THREADS + 1


def test_parts_that_do_not_belong_together_are_refused(
    tiny_elastic: ElasticModel,
    tiny_elastic_dir: Path,
    changed: Callable[..., Path],
    reseal: Callable[[Path, Any], None],
) -> None:
    with pytest.raises(IdentityError, match="another latency estimator"):
        make_pacer(tiny_elastic, tiny_elastic_dir, fingerprint="of-another")
    other = dataclasses.replace(make_estimator(tiny_elastic), model_identity="another")
    with pytest.raises(IdentityError, match="another"):
        make_pacer(tiny_elastic, tiny_elastic_dir, lengths=False, estimator=other)
    folder = changed()
    slower = make_estimator(tiny_elastic, 2e-4)
    slower.save(folder / "estimator.json")
    with pytest.raises(CheckpointError, match=r"estimator\.json is not the file"):
        Pacer.from_pretrained(folder)
    reseal(folder / "bundle.json", json.loads((folder / "bundle.json").read_text()))
    with pytest.raises(IdentityError, match="another latency estimator"):
        Pacer.from_pretrained(folder)
    # A guardrail of that estimator does not make the controller belong to it.
    swapped = make_pacer(tiny_elastic, tiny_elastic_dir, estimator=slower)
    swapped.pacing.guardrail.save(folder / "guardrail.json")
    reseal(folder / "bundle.json", json.loads((folder / "bundle.json").read_text()))
    with pytest.raises(IdentityError, match="latency estimator"):
        Pacer.from_pretrained(folder)


def test_missing_and_malformed_files_are_named(bundle: Path, changed: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no bundle\.json"):
        Pacer.from_pretrained(tmp_path / "nothing")
    for changes, message in (
        ({"schema_version": 99}, "99"),
        ({"schema_version": 3}, "has schema version 3, but this version of pacevlm reads 5; make it anew"),
        ({"kind": "controller"}, "controller"),
        ({"files": {}}, "lists the files"),
        ({"files": {"../../elsewhere": "0" * 64}}, "lists the files"),
        ({"full_p50_ms": 1e7}, "nothing|full_p50_ms"),
        ({"num_threads": 1.5}, "num_threads"),
        ({"model": None}, "model"),
        ({"model__dtype": "int8"}, "int8"),
        ({"budget_kind": "ttlt"}, "ttlt"),
        ({"full_p50_ms": -1.0}, "full_p50_ms"),
        ({"full_p50_ms": "fast"}, "full_p50_ms"),
        ({"knob_space": {"tiers": ["low"]}}, "knob_space"),
        ({"model__vision_budgets": None}, "vision_budgets"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Pacer.from_pretrained(changed(**changes))
        shutil.copy(bundle / "bundle.json", changed() / "bundle.json")
    folder = changed()
    for name in json.loads((folder / "bundle.json").read_text())["files"]:
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"lacks the file {name}"):
            Pacer.from_pretrained(folder)
        shutil.copy(bundle / name, folder / name)


def test_a_flipped_bit_anywhere_in_a_bundle_names_the_file(bundle: Path, tmp_path: Path) -> None:
    folder, rng = Path(shutil.copytree(bundle, tmp_path / "bundle")), np.random.default_rng(0)
    (folder / "notes.txt").write_text("mine")  # other files are nobody's business
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "notes.txt"]
    assert len(paths) == 7
    for path in paths:
        content = path.read_bytes()
        for place in rng.integers(len(content), size=40).tolist():
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=re.escape(str(path.relative_to(folder)))):
                Pacer.from_pretrained(folder)
        path.write_bytes(content)
    assert Pacer.from_pretrained(folder).num_threads == NUM_THREADS


def test_a_stop_while_a_bundle_is_written_never_mixes_two(
    pacer: Pacer, tiny_elastic: ElasticModel, tiny_elastic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_pacer(tiny_elastic, tiny_elastic_dir, estimator=make_estimator(tiny_elastic, 2e-4))
    replace = os.replace
    loaded, refused = [], []
    for number in range(6):
        folder = tmp_path / str(number)
        pacer.save_pretrained(folder)
        left = number

        def stop_late(source: Any, target: Any) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop_late)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(folder)
        monkeypatch.setattr(os, "replace", replace)
        try:
            loaded.append(Pacer.from_pretrained(folder).pacing.guardrail.estimator)
        except CheckpointError as error:
            refused.append(str(error))
    assert {estimator == pacer.pacing.guardrail.estimator for estimator in loaded} == {True}  # the old one, whole
    assert refused
    assert all("is not the file that the bundle was written with" in message for message in refused)


# The package ---------------------------------------------------------------------------------------------------------


def test_the_package_is_light_and_offers_its_names() -> None:
    program = (
        "import sys, pacevlm; assert not {'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules);"
        "assert set(pacevlm.__all__) <= set(dir(pacevlm)); pacevlm.KnobSpace(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(pacevlm.__file__).parents[1])
    assert pacevlm.Pacer is Pacer
    assert all(getattr(pacevlm, name) is not None for name in pacevlm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Packer'"):
        pacevlm.Packer  # noqa: B018


def test_the_version_is_the_projects() -> None:
    project = Path(pacevlm.__file__).parents[1] / "pyproject.toml"
    if not project.is_file():
        pytest.skip("installed without its project file")
    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    assert declared.get("version", pacevlm.__version__) == pacevlm.__version__


def test_a_predictor_answers_in_place_of_the_controller_and_goes_with_the_bundle(
    tiny_elastic: ElasticModel, tiny_elastic_dir: Path, image: Image.Image, tmp_path: Path
) -> None:
    space = tiny_elastic.knob_space
    predictor = make_predictor(space, tiny_elastic.d_model, space[5])
    pacer = make_pacer(tiny_elastic, tiny_elastic_dir, predictor=predictor)
    pacer.save_pretrained(tmp_path)
    read = Pacer.from_pretrained(tmp_path)
    for one in (pacer, read):
        assert one.policy is one.predictor
        assert one.answer(image, "How many?", 1e6, price=0.0).knobs == space[5]
        asked = one.answer(image, "How many?", 1e6, ControllerPolicy(one.controller), price=0.0)
        assert asked.answer == run_forced(one.model, image, "How many?", asked.knobs).answer
    assert "predictor.json" in json.loads((tmp_path / "bundle.json").read_text())["files"]
    (tmp_path / "predictor.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"predictor\.json is not the file that the bundle was written with"):
        Pacer.from_pretrained(tmp_path)
    other = KnobSpace(("low", "medium", "high"), (2, 3), (5, 6))
    with pytest.raises(IdentityError, match="the predictor was made for another knob space"):
        make_pacer(tiny_elastic, tiny_elastic_dir, predictor=make_predictor(other, tiny_elastic.d_model, other.full))
