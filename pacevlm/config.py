"""Settings that people give: on the command line, in code, and in the `config.json` that every run stores."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pacevlm.errors import ConfigError
from pacevlm.files import read_json, write_json_atomic

ConfigT = TypeVar("ConfigT")


# Sections ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Which model runs, and which configurations of it.

    Attributes:
        path: model directory (config.json and safetensors files), or `embedded` for the model inside the package.
        tiers: vision tiers, cheapest first; what the model's elastic.json says if None.
        top_ks: experts per token to choose from; what elastic.json says, or 4 to 8, if None.
        num_blocks: numbers of transformer blocks to choose from; what elastic.json says, or 12 to 16, if None.
        max_crops: most image crops of every tier; what elastic.json says, or 2 6 12, if None.
        block_policy: which blocks are left out: the least important ones as measured, or plainly the last ones.
        stage2_after: blocks that always run before stage 2 decides.
        max_new_tokens: most generated tokens per answer; what elastic.json says if None.
        dtype: number type of the weights in memory.
        device: `cpu`, or `cuda` with an optional number such as `cuda:1`.

    Raises:
        ConfigError: a value is outside its range.
    """

    path: str = "embedded"
    tiers: tuple[str, ...] | None = None
    top_ks: tuple[int, ...] | None = None
    num_blocks: tuple[int, ...] | None = None
    max_crops: tuple[int, ...] | None = None
    block_policy: Literal["importance", "prefix"] = "importance"
    stage2_after: int = 1
    max_new_tokens: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("model path is empty; give a model directory, or 'embedded'")
        check_whole_numbers(self, {"stage2_after": 1})
        if self.max_new_tokens is not None:
            check_whole_numbers(self, {"max_new_tokens": 1})


@dataclass(frozen=True)
class DataConfig:
    """Which questions the controller learns from and is judged on; the three parts share no image.

    Attributes:
        dataset: `digits`, the data set inside the package, or a JSON-lines file (image, question, answer per line).
        test_dataset: JSON-lines file of the test examples; if None they are set aside from `dataset`.
        num_train: examples to learn from; fewer if a file has fewer.
        num_val: examples to calibrate the guardrail on; at most a tenth of a file.
        num_test: examples to judge on; at most a fifth of a file.
        skip_test: test examples left out in front of these, for example those that settings were chosen on.
        seed: which examples are composed, or how a file is divided.

    Raises:
        ConfigError: a value is outside its range.
    """

    dataset: str = "digits"
    test_dataset: str | None = None
    num_train: int = 3000
    num_val: int = 400
    num_test: int = 1000
    skip_test: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_numbers(self, {"num_train": 1, "num_val": 1, "num_test": 1, "skip_test": 0, "seed": 0})
        if self.dataset == "digits" and self.test_dataset is not None:
            raise ConfigError(
                f"test_dataset is {self.test_dataset!r}, but dataset is 'digits', which has a test split of its own; "
                "leave test_dataset out, or give a file for both"
            )


@dataclass(frozen=True)
class ProfileConfig:
    """How latencies are measured and bounded.

    Attributes:
        num_requests: training examples whose requests are timed; the first is also the reference that tells the noise.
        num_samples: distinct pairs of request and knobs to time, spread over all knobs; a tenth of them have the full
            configuration, whose median is the budget of fraction 1.
        repeats: measurements of each pair.
        max_warmup: most requests that run before timing; fewer once their time has settled.
        max_megapixels: largest of the self-made pictures that every profile times besides the data set's; nothing is
            promised for larger ones.
        num_lengths: answers generated to learn how long answers get.
        num_threads: CPU threads of every measured request, here, in evaluation and when answering; None takes all.
        alpha: how often a latency may exceed its bound, and an answer its predicted length.
        group_by: which knobs share a bound.
        source: an existing profile.json of this model to fit instead of measuring; refused if it is of another device,
            number of threads or dtype.
        transfer: carry the latencies of `source` over to this device instead, from 25 measurements and some for the
            bounds.
        seed: which requests are drawn.

    Raises:
        ConfigError: a value is outside its range.
    """

    num_requests: int = 64
    num_samples: int = 800
    repeats: int = 2
    max_warmup: int = 50
    max_megapixels: float = 12.0
    num_lengths: int = 800
    num_threads: int | None = 1
    alpha: float = 0.025
    group_by: Literal["none", "tier", "top_k", "num_blocks", "knobs"] = "tier"
    source: str | None = None
    transfer: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_numbers(
            self, {"num_requests": 2, "num_samples": 2, "repeats": 1, "max_warmup": 0, "num_lengths": 2, "seed": 0}
        )
        if self.num_threads is not None:
            check_whole_numbers(self, {"num_threads": 1})
        size = self.max_megapixels
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0.001 <= size <= 100:
            raise ConfigError(f"max_megapixels is {size!r}; it must be a number from 0.001 to 100, for example 12")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha is {self.alpha}; it must lie between 0 and 1, for example 0.05")
        if self.transfer and self.source is None:
            raise ConfigError("transfer needs source, the profile.json of the device whose latencies are carried over")


@dataclass(frozen=True)
class LookupConfig:
    """The exhaustive sweep that the lookup table is fitted on; training finds its outcomes remembered.

    Attributes:
        num_examples: training examples that run with every configuration.

    Raises:
        ConfigError: the number is below 2.
    """

    num_examples: int = 3000

    def __post_init__(self) -> None:
        check_whole_numbers(self, {"num_examples": 2})


@dataclass(frozen=True)
class ControllerSettings:
    """How the controller is built.

    Attributes:
        hidden_dim: width of all hidden layers.
        num_frequencies: sines, and as many cosines, of a budget.
        feasible_fractions: whether stage 1 reads how much of each tier the guardrail admits.
        thumbnail: whether stage 1 looks at the image, squeezed to 16x16.
        pairwise: whether stage 2 scores pairs besides top_k and num_blocks on their own.
    """

    hidden_dim: int = 64
    num_frequencies: int = 8
    feasible_fractions: bool = True
    thumbnail: bool = False
    pairwise: bool = True

    def __post_init__(self) -> None:
        check_whole_numbers(self, {"hidden_dim": 1, "num_frequencies": 1})


@dataclass(frozen=True)
class CalibrateConfig:
    """The guardrail's second calibration, on the knobs that the trained controller picks.

    Attributes:
        num_requests: validation requests timed, each at a random budget.
        seed: which examples and budgets are drawn.

    Raises:
        ConfigError: a value is outside its range.
    """

    num_requests: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_numbers(self, {"num_requests": 2, "seed": 0})


@dataclass(frozen=True)
class EvaluateConfig:
    """How policies are compared on the test examples.

    Attributes:
        budgets: budgets, as fractions of the full configuration's median latency.
        num_timed: test examples timed alone, with every policy at every budget; 0 measures no latency.
        num_warmup: requests run before timing and not counted; the drift correction learns from them.
        track_drift: correct the guardrail's bounds, for all policies alike, by how slow the machine turns out to be.
        oracle: also run every configuration on every test example, to know the best possible.
        seed: which examples are timed, in which order, and what the random policy draws.

    Raises:
        ConfigError: a value is outside its range.
    """

    budgets: tuple[float, ...] = (0.35, 0.5, 0.7, 0.85, 1.0)
    num_timed: int = 200
    num_warmup: int = 100
    track_drift: bool = True
    oracle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(float(fraction) for fraction in self.budgets))
        check_whole_numbers(self, {"num_timed": 0, "num_warmup": 0, "seed": 0})
        finite = all(math.isfinite(fraction) and fraction > 0 for fraction in self.budgets)
        if not self.budgets or not finite or list(self.budgets) != sorted(set(self.budgets)):
            raise ConfigError(
                f"budgets {list(self.budgets)} must be strictly increasing fractions above 0, for example 0.5 0.75 1"
            )


@dataclass(frozen=True)
class ImportanceConfig:
    """How the order in which blocks are given up is measured.

    Attributes:
        path: model directory, or `embedded`; its elastic.json gets the measured order.
        dataset: `digits` or a JSON-lines file.
        num_examples: examples that every candidate set of blocks is scored on; of `digits`, from the validation split.
        min_num_blocks: the order ends where so many blocks are left.
        num_candidates: blocks tried per round after the first.
        dtype: number type of the weights in memory.
        device: `cpu` or `cuda`.
        seed: which examples are drawn.

    Raises:
        ConfigError: a value is outside its range.
    """

    path: str = "embedded"
    dataset: str = "digits"
    num_examples: int = 400
    min_num_blocks: int = 8
    num_candidates: int = 6
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_numbers(self, {"num_examples": 1, "min_num_blocks": 1, "num_candidates": 1, "seed": 0})


def check_whole_numbers(config: object, minimum: Mapping[str, int]) -> None:
    """Raise ConfigError unless the named settings are whole numbers from their minimum."""
    for name, least in minimum.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number from {least}")


# JSON ----------------------------------------------------------------------------------------------------------------


def config_to_dict(config: Any) -> dict[str, Any]:
    """All settings of a configuration dataclass, nested ones included, ready for JSON."""
    values = {entry.name: _to_json(getattr(config, entry.name)) for entry in dataclasses.fields(config) if entry.init}
    return values


def config_from_dict(kind: type[ConfigT], values: Any, where: str = "") -> ConfigT:
    """Inverse of `config_to_dict`; settings left out keep their defaults.

    Args:
        where: path of the settings inside larger ones, for messages.

    Raises:
        ConfigError: a setting is unknown, missing, of the wrong type or outside its range.
    """
    label = where or "the settings"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{label}: {values!r} is no mapping of settings")
    entries = {entry.name: entry for entry in dataclasses.fields(kind) if entry.init}  # type: ignore[arg-type]
    unknown = sorted(set(map(str, values)) - set(entries))
    if unknown:
        raise ConfigError(f"{label}: {unknown} are unknown; allowed are {sorted(entries)}")
    missing = [
        name
        for name, entry in entries.items()
        if name not in values and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{label}: {missing} are missing")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    return kind(**{name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def save_config(path: str | os.PathLike[str], config: Any) -> None:
    """Write a configuration as JSON with every default filled in; raises StorageError."""
    write_json_atomic(path, config_to_dict(config))


def load_config(path: str | os.PathLike[str], kind: type[ConfigT]) -> ConfigT:
    """Read what `save_config` wrote; raises ConfigError as `config_from_dict` does, with the file's name."""
    values = read_json(path, "configuration", ConfigError)
    try:
        return config_from_dict(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from error


def flatten_settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as pairs of dotted name and value."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested settings, each as `name was …, now …`."""
    before, after = dict(flatten_settings(old)), dict(flatten_settings(new))
    names = dict.fromkeys((*before, *after))
    return [
        f"{name} was {before.get(name)!r}, now {after.get(name)!r}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config_to_dict(value)
    if isinstance(value, Path):
        return os.fspath(value)
    return [_to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the type that a field asks for."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return config_from_dict(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        for choice in choices[:-1]:
            try:
                return _convert(choice, value, where)
            except ConfigError:
                continue
        return _convert(choices[-1], value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} is {value!r}; use one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is {value!r}; it must be a list")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} is {value!r}; it must be of type {hint.__name__}")
    return value
