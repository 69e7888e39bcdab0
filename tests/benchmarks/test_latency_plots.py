from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.latency_plots import (
    plot_calibration,
    plot_drift,
    plot_error_by_knob,
    plot_predicted_measured,
    plot_stage_shares,
)
from pacevlm.errors import DataError
from pacevlm.knobs import KnobSpace
from pacevlm.latency.estimator import StagePrediction

PLOTS: dict[str, Callable[..., tuple[Path, Path]]] = {
    "predictions": plot_predicted_measured,
    "errors": plot_error_by_knob,
    "stages": plot_stage_shares,
    "calibration": plot_calibration,
    "drift": plot_drift,
}
NUM_SAMPLES = 150


def arguments(name: str) -> dict[str, Any]:
    """Constructed values of one figure; every call makes them anew."""
    rng = np.random.default_rng(0)
    space = KnobSpace()
    knobs = [space[int(index)] for index in rng.integers(len(space), size=NUM_SAMPLES)]
    measured_ms = np.array([10 * k.num_blocks * (1 + space.tiers.index(k.tier)) + k.top_k for k in knobs], np.float64)
    predicted_ms = measured_ms * np.exp(0.06 * rng.standard_normal(NUM_SAMPLES))
    contended = (np.arange(NUM_SAMPLES) // 30) % 2 == 1
    nominal = np.array([0.9, 0.5, 0.99, 0.7])
    stages = dict(zip(StagePrediction.__dataclass_fields__, (4.0, 3.0, 0.3, 30.0, 2.0, 50.0, 20.0, 0.2), strict=True))
    return {
        "predictions": {
            "predicted_ms": predicted_ms,
            "measured_ms": measured_ms,
            "tiers": [one.tier for one in knobs],
        },
        "errors": {"knobs": knobs, "errors": predicted_ms / measured_ms - 1},
        "stages": {
            "stages_ms": {
                str(one): {stage: scale * time_ms for stage, time_ms in stages.items()}
                for one, scale in ((space.cheapest, 0.4), (space.full, 2.5))
            }
        },
        "calibration": {
            "nominal": nominal,
            "empirical": rng.binomial(NUM_SAMPLES, nominal) / NUM_SAMPLES,
            "num_requests": NUM_SAMPLES,
        },
        "drift": {
            "measured_over_budget": 0.9 * predicted_ms / measured_ms,
            "correction": 1.0 + 0.5 * contended,
            "cost": np.array([one.num_blocks for one in knobs]),
            "contention": [(30, 60), (90, 120)],
        },
    }[name]


@pytest.mark.parametrize("name", PLOTS)
def test_figures_are_drawn_and_equal_values_give_equal_files(name: str, tmp_path: Path) -> None:
    png, svg = PLOTS[name](**arguments(name), path_stem=tmp_path / "a" / "figure")
    again_png, again_svg = PLOTS[name](**arguments(name), path_stem=tmp_path / "b" / "figure")
    assert (png.name, svg.name) == ("figure.png", "figure.svg")
    assert png.read_bytes() == again_png.read_bytes()
    assert svg.read_bytes() == again_svg.read_bytes()
    with Image.open(png) as image:
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50
    assert "</svg>" in svg.read_text()
    assert len(list((tmp_path / "a").iterdir())) == 2


@pytest.mark.parametrize("name", PLOTS)
def test_figures_follow_the_values(name: str, tmp_path: Path) -> None:
    given, changed = arguments(name), arguments(name)
    if name == "stages":
        next(iter(changed["stages_ms"].values()))["vision_ms"] += 10.0
    elif name == "calibration":
        changed["empirical"][1] -= 0.05
    else:
        changed[{"predictions": "measured_ms", "errors": "errors", "drift": "measured_over_budget"}[name]][3] *= 1.2
    before = PLOTS[name](**given, path_stem=tmp_path / "before")[0]
    after = PLOTS[name](**changed, path_stem=tmp_path / "after")[0]
    assert before.read_bytes() != after.read_bytes()


@pytest.mark.parametrize("name", PLOTS)
def test_nothing_to_plot_is_named(name: str, tmp_path: Path) -> None:
    empty = {
        key: {} if key == "stages_ms" else value if key == "num_requests" else value[:0]
        for key, value in arguments(name).items()
    }
    with pytest.raises(DataError, match="nothing to plot"):
        PLOTS[name](**empty, path_stem=tmp_path / "figure")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("predictions", {"tiers": ["low"]}, "1 tiers given for 150 samples"),
        ("predictions", {"tiers": ["huge"] * NUM_SAMPLES}, "huge"),
        ("predictions", {"predicted_ms": np.zeros(NUM_SAMPLES)}, "must be positive"),
        ("predictions", {"measured_ms": np.ones(3)}, "of one length"),
        ("errors", {"knobs": [KnobSpace().full]}, "1 configurations given for 150 errors"),
        ("errors", {"errors": np.full(NUM_SAMPLES, np.nan)}, "errors holds values that are no finite"),
        ("stages", {"stages_ms": {"full": {}}}, "nothing to plot"),
        ("stages", {"stages_ms": {"full": {"lunch_ms": 1.0}}}, "lunch_ms"),
        ("stages", {"stages_ms": {"full": {"vision_ms": -1.0}}}, "finite milliseconds from 0"),
        ("stages", {"stages_ms": {"a": {"vision_ms": 1.0}, "b": {"decode_ms": 1.0}}}, "b has the stages"),
        ("calibration", {"num_requests": 0}, "at least one request"),
        ("calibration", {"nominal": np.array([0.5, 0.6, 0.7, 1.0])}, "strictly between 0 and 1"),
        ("drift", {"measured_over_budget": np.zeros(NUM_SAMPLES)}, "must be positive"),
        ("drift", {"contention": [(100, 200)]}, "must lie within the 150 requests"),
        ("drift", {"cost": np.ones((NUM_SAMPLES, 2))}, "one-dimensional"),
    ],
)
def test_wrong_values_are_named(name: str, change: dict[str, Any], fault: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=fault):
        PLOTS[name](**(arguments(name) | change), path_stem=tmp_path / "figure")


def test_a_single_sample_is_enough(tmp_path: Path) -> None:
    full = KnobSpace().full
    assert plot_predicted_measured([99.0], [101.0], ["high"], tmp_path / "predictions")[0].stat().st_size > 0
    assert plot_error_by_knob([full], [-0.02], tmp_path / "errors")[0].stat().st_size > 0
    assert plot_calibration([0.9], [1.0], 1, tmp_path / "calibration")[0].stat().st_size > 0
    assert plot_drift([0.98], [1.0], [16], [(0, 1)], tmp_path / "drift")[0].stat().st_size > 0
