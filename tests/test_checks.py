"""Numbers and paths that people give: any kind of number is taken, and both ends of every range are kept."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pacevlm.checks import as_float, as_int, check_path
from pacevlm.config import (
    CalibrateConfig,
    ControllerSettings,
    DataConfig,
    EvaluateConfig,
    ImportanceConfig,
    LookupConfig,
    ModelConfig,
    ProfileConfig,
)
from pacevlm.errors import BudgetError, ConfigError, KnobError
from pacevlm.knobs import KnobSpace, check_budget_ms
from pacevlm.latency.drift import DriftSettings
from pacevlm.latency.measuring import use_num_threads
from pacevlm.latency.profiler import ProfilerSettings
from pacevlm.rollout.limits import BatchLimits
from pacevlm.training.train_config import ConstraintConfig, GRPOConfig, RewardConfig, TrainConfig

CONFIGS: tuple[Any, ...] = (
    *(ModelConfig(max_new_tokens=4), DataConfig(), ProfileConfig(), LookupConfig(), ControllerSettings()),
    *(CalibrateConfig(), EvaluateConfig(), ImportanceConfig(), GRPOConfig(), RewardConfig(), ConstraintConfig()),
    *(ProfilerSettings(max_output_tokens=3), DriftSettings(), BatchLimits(4, 5, 6)),
    TrainConfig("train", final_lr=0.1, final_entropy_coef=0.1, num_examples=5, checkpoint_every_seconds=1.0),  # type: ignore[arg-type]
)
NUMBERS = [
    (config, entry.name)
    for config in CONFIGS
    for entry in dataclasses.fields(config)
    if isinstance(getattr(config, entry.name), (int, float)) and not isinstance(getattr(config, entry.name), bool)
]


@pytest.mark.parametrize(
    "value",
    [80, 80.0, np.float32(80), np.float64(80), np.float16(80), np.int64(80), np.uint8(80), Fraction(80), Decimal(80)],
    ids=lambda value: type(value).__name__,
)
def test_a_budget_is_any_real_number(value: Any) -> None:
    budget_ms = check_budget_ms(value)
    assert type(budget_ms) is float
    assert budget_ms == 80.0


@pytest.mark.parametrize(
    "value",
    [
        *(True, False, np.bool_(True), None, "80", b"80", [80], np.array(80.0), np.array([80.0]), 80j),
        *(
            0,
            -1,
            -0.0,
            float("nan"),
            float("inf"),
            np.float32("nan"),
            np.float64("inf"),
            Decimal("nan"),
            Decimal("sNaN"),
        ),
        *(10**400, Fraction(10**400), Decimal("1e400"), Fraction(1, 10**400)),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_budget_is_refused(value: Any) -> None:
    with pytest.raises(BudgetError, match="positive, finite number of milliseconds") as raised:
        check_budget_ms(value)
    assert ("not a text" in str(raised.value)) == isinstance(value, (str, bytes))


def test_kinds_of_numbers_are_told_apart() -> None:
    assert [as_int(value) for value in (3, np.int32(3), np.uint64(3))] == [3, 3, 3]
    assert [as_int(value) for value in (True, np.bool_(True), 3.0, np.float32(3), "3", None)] == [None] * 6
    assert [as_float(value) for value in (3, np.int8(3), np.float32(0.5))] == [3.0, 3.0, 0.5]
    assert [as_float(value) for value in (True, "3", None, math.nan, np.array(3))] == [None] * 5


@pytest.mark.parametrize(
    ("config", "name"), NUMBERS, ids=[f"{type(config).__name__}.{name}" for config, name in NUMBERS]
)
def test_every_number_has_both_ends_and_no_nan(config: Any, name: str) -> None:
    for value in (math.nan, math.inf, -math.inf, 10**30, -(10**30), 1e300, -1, True, "4", np.array(4)):
        with pytest.raises(ConfigError, match=name):
            dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
    ("config", "name"), NUMBERS, ids=[f"{type(config).__name__}.{name}" for config, name in NUMBERS]
)
def test_every_number_may_be_of_numpy(config: Any, name: str) -> None:
    value = getattr(config, name)
    given = np.int64(value) if isinstance(value, int) else np.float64(value)
    again = dataclasses.replace(config, **{name: given})
    assert again == config
    assert type(getattr(again, name)) is type(value)


def test_numbers_of_threads_may_be_of_numpy() -> None:
    with use_num_threads(np.int64(1)):  # type: ignore[arg-type]
        pass
    for wrong in (0, True, 1.0, "1", 10**6):
        with pytest.raises(ConfigError, match="num_threads"), use_num_threads(wrong):  # type: ignore[arg-type]
            pass


def test_knob_spaces_take_whole_numbers_alone() -> None:
    space = KnobSpace(("low",), tuple(np.arange(4, 7)), [np.int32(2)])  # type: ignore[arg-type]
    assert space == KnobSpace(("low",), (4, 5, 6), (2,))
    assert all(type(value) is int for value in (*space.top_ks, *space.num_blocks))
    for wrong in ((2.5,), ("2",), (True,), (math.nan,), "24", 24, (0,), (3, 3)):
        with pytest.raises(KnobError, match="top_ks"):
            KnobSpace(top_ks=wrong)  # type: ignore[arg-type]
    for tiers in ((), ("",), ("a", "a"), ("a/b",), (1,), "low"):
        with pytest.raises(KnobError, match="tiers"):
            KnobSpace(tiers=tiers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("\u202egnp", "control character"),
        ("a\x9bb", "control character"),
        ("~/runs", "only a shell"),
        ("caf\udce9", "not UTF-8"),
        (3, "must be a path"),
        (b"runs", "must be a path"),
        (None, "must be a path"),
    ],
)
def test_paths_that_cannot_be_kept_are_refused(path: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"run_dir is .*{message}|run_dir {message}"):
        check_path("run_dir", path)


def test_knob_settings_of_a_model_are_checked_before_it_is_loaded() -> None:
    model = ModelConfig(tiers=["low", "high"], top_ks=[np.int64(2)], vision_budgets=[1, 2])  # type: ignore[arg-type,list-item]
    assert (model.tiers, model.top_ks, model.vision_budgets) == (("low", "high"), (2,), (1, 2))
    for wrong in ({"top_ks": (4, 3)}, {"tiers": ()}, {"num_blocks": (0,)}):
        with pytest.raises(KnobError):
            ModelConfig(**wrong)  # type: ignore[arg-type]
    for budgets in ((), (0, 1), (1.5,), (10**10,)):
        with pytest.raises(ConfigError, match="vision_budgets"):
            ModelConfig(vision_budgets=budgets)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one number for each of the tiers"):
        ModelConfig(tiers=("low", "high"), vision_budgets=(1, 2, 3))
