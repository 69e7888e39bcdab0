import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from pacevlm.errors import ConfigError, ProfileError
from pacevlm.knobs import KnobSpace
from pacevlm.latency.profile import Sample
from pacevlm.models.molmoe.configuration_molmoe import MolmoEConfig
from pacevlm.types import StageTimes

TRAINED_TOP_K, STAGE2_AFTER = 8, 1
NAMES = ("roofline", "linear", "forest", "mlp")


@pytest.fixture(scope="module")
def models():
    name = "latency_models"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    """What a loaded model tells of its widths, without its weights."""
    return SimpleNamespace(adapter=SimpleNamespace(config=MolmoEConfig()), dtype=torch.float32)


@pytest.fixture(scope="module")
def costs(models, model):
    return models.ModelCosts.from_model(model)


def make_sample(sizes, knobs, ttft_ms, tpot_ms):
    decode_ms = (tpot_ms,) * (sizes["num_output_tokens"] - 1)
    stages = StageTimes(0.0, 0.0, 0.0, 0.0, 0.0, ttft_ms, decode_ms, ttft_ms + sum(decode_ms))
    return Sample(knobs=knobs, **sizes, stages=stages)


def random_samples(num_samples, seed, noise=0.03):
    """Requests whose times add up what crops, blocks and decode steps would take."""
    space, rng, samples = KnobSpace(), np.random.default_rng(seed), []
    for _ in range(num_samples):
        knobs = space[int(rng.integers(len(space)))]
        crops = 1 + int(rng.integers((2, 6, 12)[space.tiers.index(knobs.tier)]))
        sizes = {
            "num_units": crops,
            "num_image_tokens": 144 * crops,
            "num_text_tokens": int(rng.integers(8, 120)),
            "num_pixels": int(rng.integers(50_000, 4_000_000)),
            "num_output_tokens": int(rng.integers(1, 13)),
        }
        tokens, top_k, later = 144 * crops + sizes["num_text_tokens"], knobs.top_k, knobs.num_blocks - 1
        block_ms = 0.2 + 0.003 * tokens + 1.5e-6 * tokens**2 + 0.001 * tokens * top_k + 0.02 * top_k
        ttft_ms = 4.0 + 9.8 * crops + 4e-6 * sizes["num_pixels"] + 0.012 * tokens + later * block_ms
        tpot_ms = 0.5 + knobs.num_blocks * (0.1 + 2e-5 * tokens) + 0.03 * (TRAINED_TOP_K + later * top_k)
        slow = np.exp(noise * rng.standard_normal(2))
        samples.append(make_sample(sizes, knobs, float(ttft_ms * slow[0]), float(tpot_ms * slow[1])))
    return samples


def measured_ms(samples, kind):
    return np.array([getattr(sample.stages, f"{kind}_ms") for sample in samples])


@pytest.fixture(scope="module")
def split():
    samples = random_samples(400, seed=0)
    return samples[:250], samples[250:]


@pytest.fixture(scope="module")
def fitted(models, model, split):
    return {name: make(model).fit(split[0], TRAINED_TOP_K, STAGE2_AFTER) for name, make in models.MODELS.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_model_predicts_held_out_requests_far_better_than_the_mean(fitted, split, name):
    for kind in ("e2e", "ttft"):
        fit_ms, held_out_ms = (measured_ms(part, kind) for part in split)
        predicted_ms = fitted[name].predict(split[1], kind)
        assert predicted_ms.shape == held_out_ms.shape
        assert predicted_ms.dtype == np.float64
        error = np.abs(predicted_ms / held_out_ms - 1).mean()
        assert error < 0.25 * np.abs(fit_ms.mean() / held_out_ms - 1).mean()
        assert error < 0.15
    decoded = [sample for sample in split[1] if sample.stages.decode_ms]
    tpot_ms = np.array([np.mean(sample.stages.decode_ms) for sample in decoded])
    assert np.abs(fitted[name].predict_tpot(decoded) / tpot_ms - 1).mean() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_end_to_end_is_the_first_token_and_all_others(fitted, split, name):
    model, samples = fitted[name], split[1]
    steps = np.array([sample.num_output_tokens - 1 for sample in samples])
    expected_ms = model.predict(samples, "ttft") + steps * model.predict_tpot(samples)
    np.testing.assert_allclose(model.predict(samples, "e2e"), expected_ms, rtol=1e-12)
    assert model.predict([], "e2e").shape == (0,)
    assert model.predict_tpot([]).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_positive_even_for_requests_smaller_than_any_measured(fitted, name):
    sizes = {"num_units": 0, "num_image_tokens": 0, "num_text_tokens": 1, "num_pixels": 0, "num_output_tokens": 2}
    tiny = [make_sample(sizes, KnobSpace().cheapest, 1.0, 1.0)]
    for predicted_ms in (fitted[name].predict(tiny, "e2e"), fitted[name].predict(tiny, "ttft")):
        assert np.isfinite(predicted_ms).all()
        assert (predicted_ms > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_predictions(models, model, fitted, split, name):
    again = models.MODELS[name](model).fit(split[0], TRAINED_TOP_K, STAGE2_AFTER)
    np.testing.assert_array_equal(again.predict(split[1], "e2e"), fitted[name].predict(split[1], "e2e"))


@pytest.mark.parametrize(("name", "kind"), [("forest", "ForestModel"), ("mlp", "MLPModel")])
def test_other_seeds_give_other_predictions(models, fitted, split, name, kind):
    other = getattr(models, kind)(seed=1).fit(split[0], TRAINED_TOP_K, STAGE2_AFTER)
    assert (other.predict(split[1], "e2e") != fitted[name].predict(split[1], "e2e")).any()


def test_relative_weights_lower_the_relative_error_of_linear_regression(models, fitted, split):
    weighted = models.LinearModel(relative=True).fit(split[0], TRAINED_TOP_K, STAGE2_AFTER)
    times_ms = measured_ms(split[0], "ttft")

    def squared_relative_error(model):
        return np.square(model.predict(split[0], "ttft") / times_ms - 1).mean()

    assert squared_relative_error(weighted) < squared_relative_error(fitted["linear"])


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_roofline_recovers_a_roofline(models, costs, noise):
    truth = models.FittedRoofline(costs, TRAINED_TOP_K, STAGE2_AFTER, 4e8, 3e7, 0.4, 25.0)
    rng = np.random.default_rng(1)
    samples = []
    for sample in random_samples(120, seed=2):
        slow = np.exp(noise * rng.standard_normal(2))
        ttft_ms, tpot_ms = truth.predict([sample], "ttft")[0] * slow[0], truth.predict_tpot([sample])[0] * slow[1]
        sizes = {name: getattr(sample, name) for name in Sample.__slots__ if name.startswith("num_")}
        samples.append(make_sample(sizes, sample.knobs, float(ttft_ms), float(tpot_ms)))
    found = models.RooflineModel(costs).fit(samples, TRAINED_TOP_K, STAGE2_AFTER)
    for name in ("flops_per_ms", "bytes_per_ms"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-3 if noise == 0 else 0.1)
    held_out = random_samples(50, seed=3)
    np.testing.assert_allclose(found.predict(held_out), truth.predict(held_out), rtol=1e-3 if noise == 0 else 0.03)


def test_roofline_predictions_never_fall_when_a_knob_grows(fitted):
    sizes = {"num_units": 3, "num_image_tokens": 432, "num_text_tokens": 20, "num_pixels": 9, "num_output_tokens": 5}
    space = KnobSpace()
    predicted_ms = fitted["roofline"].predict([make_sample(sizes, knobs, 1.0, 1.0) for knobs in space])
    table_ms = predicted_ms.reshape(len(space.tiers), len(space.top_ks), len(space.num_blocks))
    assert (np.diff(table_ms, axis=1) > 0).all()
    assert (np.diff(table_ms, axis=2) > 0).all()


def test_half_as_wide_numbers_move_half_as_many_bytes(models, model, costs):
    half = models.ModelCosts.from_model(SimpleNamespace(adapter=model.adapter, dtype=torch.bfloat16))
    wide, narrow = (one.decoder_block(9.0, 9.0, 4.0) for one in (costs, half))
    assert narrow.flops == wide.flops
    assert narrow.num_bytes == wide.num_bytes / 2


def test_counted_work_is_that_of_the_published_model(costs):
    # One decode step of MolmoE-1B reads its active weights once: 1.2 billion in 16 blocks of 8 experts and the head.
    step = costs.decoder(np.ones(1), np.ones(1), np.array([8.0]), np.array([16.0]), 8, 1)
    weights = 16 * (4 * 2048**2 + 64 * 2048 + 8 * 3 * 1024 * 2048) + 50304 * 2048
    num_bytes = sum(launch.count * launch.work.num_bytes for launch in step)
    flops = sum(launch.count * launch.work.flops for launch in step)
    assert num_bytes[0] == pytest.approx(4 * weights, rel=2e-3)
    assert flops[0] == pytest.approx(2 * weights, rel=2e-3)
    # 22 blocks of the tower run: the highest layer that is used is the last but one of 23.
    assert costs.vision_blocks == 22
    blocks = costs.vision(np.array([2.0]))[1]
    assert blocks.count[0] == 22
    expected = 2 * (2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024)
    assert blocks.work.flops[0] == pytest.approx(expected)


def test_a_long_prompt_reads_every_expert_once(costs):
    one, many = (costs.decoder_block(tokens, 1.0, 8.0).num_bytes for tokens in (1.0, 1000.0))
    experts_bytes = 4 * 3 * 1024 * 2048 * np.array([8, 64])
    assert 1 < one / experts_bytes[0] < 1.5
    assert 1 < many / experts_bytes[1] < 1.5


def test_no_crops_launch_nothing(costs):
    assert all(launch.count[0] == 0 for launch in costs.vision(np.zeros(1)))


@pytest.mark.parametrize("name", NAMES)
def test_samples_that_cannot_be_fitted_and_unknown_kinds_are_named(models, model, fitted, split, name):
    competitor = models.MODELS[name](model)
    with pytest.raises(ProfileError, match="no samples"):
        competitor.fit([], TRAINED_TOP_K, STAGE2_AFTER)
    single = [sample for sample in split[0] if sample.num_output_tokens == 1]
    with pytest.raises(ProfileError, match="more than one output token"):
        competitor.fit(single, TRAINED_TOP_K, STAGE2_AFTER)
    with pytest.raises(ConfigError, match="'total'"):
        fitted[name].predict(split[1], "total")


def test_a_network_that_is_stopped_early_says_so(models, split):
    with pytest.warns(ConvergenceWarning):
        models.MLPModel(max_epochs=2).fit(split[0], TRAINED_TOP_K, STAGE2_AFTER)


@pytest.mark.parametrize("value", [0, 2.5, True])
def test_impossible_widths_are_named(costs, value):
    with pytest.raises(ConfigError, match=f"expert_dim is {value}"):
        dataclasses.replace(costs, expert_dim=value)
