"""What a run needs and can be seen to lack before its first long step."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from pacevlm.errors import ConfigError, DataError, ProfileError
from pacevlm.knobs import KnobSpace
from pacevlm.latency.calibrate import split_samples
from pacevlm.latency.conformal import min_num_scores
from pacevlm.latency.output_length import min_num_lengths
from pacevlm.latency.profile import Sample
from pacevlm.latency.profiler import Measurement, plan_workload
from pacevlm.pipeline.context import RunContext
from pacevlm.pipeline.steps import profiler_settings
from pacevlm.types import RequestSizes, StageTimes


def check_run(run: RunContext, steps: Sequence[str]) -> None:
    """Refuse settings that steps would fail on after minutes or hours.

    Args:
        steps: those that will run.

    Raises:
        ConfigError: a setting is too small for another, a library is missing, or the run directory cannot be used.
        DataError: the data set has too few examples.
        ImageError, QuestionError: a request to be profiled cannot be used.
        PacevlmError: the model or the data set cannot be loaded.
    """
    if "train" in steps and run.config.train.tensorboard:
        _check_library("tensorboard", "train", "train.tensorboard is on")
    if "evaluate" in steps:
        _check_library("jinja2", "report", "the report of an evaluation")
        _check_library("matplotlib", "report", "the report of an evaluation")
    check_settings(run, steps)
    if "profile" in steps:
        if run.model.max_new_tokens < 2:
            raise ConfigError(
                "model.max_new_tokens is 1, but what a token after the first one takes has to be measured; give 2 or "
                "more"
            )
        _check_profile(run)


def check_settings(run: RunContext, steps: Sequence[str]) -> None:
    """Refuse settings as `check_run` does, as far as they show without a model: a plan is of a run that can begin.

    Raises:
        ConfigError: a setting is too small for another.
        DataError: the data set has too few examples.
    """
    if not steps:
        return
    config = run.config
    for part in ("train", "val", "test"):
        if not len(getattr(run.splits, part)):
            raise DataError(
                f"the {part} part of {run.splits.name} is empty; give more examples, or smaller data.num_val, "
                "data.num_test and data.skip_test"
            )
    if "profile" in steps:
        _check_output_lengths(run)
    needed = min_num_scores(config.profile.alpha)
    if "calibrate" in steps and config.calibrate.num_requests < needed:
        raise ConfigError(
            f"calibrate.num_requests is {config.calibrate.num_requests}, but profile.alpha {config.profile.alpha:g} "
            f"needs at least {needed}; give more requests or a larger alpha"
        )


def _check_library(name: str, extra: str, what: str) -> None:
    if find_spec(name) is None:
        raise ConfigError(f"{name} is not installed, which is needed here: {what}; pip install 'pacevlm[{extra}]'")


def _check_output_lengths(run: RunContext) -> None:
    config, num_train = run.config.profile, len(run.splits.train)
    needed = min_num_lengths(config.alpha)
    if num_train < needed:
        raise DataError(
            f"{run.splits.name} has {num_train} training examples, but profile.alpha {config.alpha:g} needs at least "
            f"{needed} to learn how long answers get; give more examples, a larger data.num_train or a larger alpha"
        )
    if config.num_lengths < needed:
        raise ConfigError(
            f"profile.num_lengths is {config.num_lengths}, but profile.alpha {config.alpha:g} needs at least {needed}; "
            "give more or a larger alpha"
        )


def _check_profile(run: RunContext) -> None:
    """Divide the requests to be timed as the fit will, and see whether each part is large enough."""
    config, space = run.config.profile, run.model.knob_space
    needed = min_num_scores(config.alpha)
    settings = profiler_settings(run.config, len(run.splits.train))
    if settings is None:
        return  # is fitted at once
    examples = run.splits.train[: settings.num_requests]
    sizes = [run.model.view(example.source, example.question).sizes for example in examples]
    schedule = plan_workload(space, settings).schedule
    samples = [_planned(entry, sizes[entry.request], space) for entry in schedule if not entry.is_reference]
    advice = "give more of profile.num_requests and profile.num_samples, a larger profile.alpha, or pictures and "
    advice += "questions of more different sizes"
    try:
        split = split_samples(samples, seed=config.seed)
    except ProfileError as error:
        raise DataError(f"the profile cannot be fitted: {error}; {advice}") from error
    if len(split.calibration) < needed:
        raise ConfigError(
            f"of {len(samples)} timed requests {len(split.calibration)} would calibrate the bounds, but profile.alpha "
            f"{config.alpha:g} needs at least {needed}; {advice}"
        )
    if config.transfer:
        return
    for name, values in (("tier", space.tiers), ("top_k", space.top_ks), ("num_blocks", space.num_blocks)):
        if not {values[0], values[-1]} <= {getattr(sample.knobs, name) for sample in split.fit}:
            raise ConfigError(
                f"the {len(split.fit)} timed requests that would be fitted leave out an end of {name}; {advice}"
            )


def _planned(entry: Measurement, sizes: RequestSizes, space: KnobSpace) -> Sample:
    """A measurement to come, as far as it is known."""
    vision = sizes.vision[space.tiers.index(entry.knobs.tier)]
    return Sample(
        knobs=entry.knobs,
        num_units=vision.num_units,
        num_unit_pairs=vision.num_unit_pairs,
        num_image_tokens=vision.num_image_tokens,
        num_text_tokens=sizes.num_text_tokens,
        num_pixels=sizes.num_pixels,
        num_output_tokens=1,
        stages=StageTimes(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, (), 1.0),
    )
