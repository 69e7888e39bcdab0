"""Settings that people give: on the command line, in code, and in the `config.json` that every run stores."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pacevlm.checks import MAX_COUNT, MAX_SEED, as_float, as_int, check_path, check_real, check_whole, shown
from pacevlm.dataset_list import MADE_DATASETS as MADE_DATASETS
from pacevlm.dataset_list import check_shares, parse_datasets, parse_fields
from pacevlm.errors import ConfigError, KnobError
from pacevlm.files import read_json, write_json_atomic
from pacevlm.knobs import KnobSpace
from pacevlm.mixture import parse_mixture

ConfigT = TypeVar("ConfigT")
# The names of `data.metrics.METRICS`, which a test compares: settings load without what metrics need.
MetricName = Literal["exact_match", "vqa", "relaxed", "anls", "multiple_choice", "f1", "yes_no"]

WITHIN_PACKAGE = ("embedded", *MADE_DATASETS)
"""Words that stand for what is inside the package where a path may be given."""
BLOCK_ORDERS = ("importance", "early_exit")
"""Block orders that need no name; a measured one may have one of its own."""
MAX_KNOB = 1024
"""Most experts or blocks that a knob may ask for; no model comes near it."""
MAX_VISION_BUDGET = 10**9
"""Largest vision budget of a tier, in whatever unit the family counts, pixels for example."""
MAX_NEW_TOKENS = 32768
"""Most tokens that an answer may have."""
MAX_THREADS = 4096
"""Most CPU threads of a request, whatever the machine has."""
MIN_ALPHA = 1e-6
"""Rarest miss that is bounded; a bound needs more than 1 / alpha measurements."""
MAX_HIDDEN_DIM, MAX_FREQUENCIES = 4096, 32
"""Largest controller; its time counts inside every budget."""
MAX_FRACTION = 1000.0
"""Largest budget, as a fraction of the full configuration's latency."""


# Sections ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Which model runs, and which configurations of it.

    Attributes:
        path: model directory (config.json and safetensors files), `embedded` for the model inside the package, a hub id
            such as allenai/MolmoE-1B-0924, or the folder of one in a hub cache.
        tiers: vision tiers, cheapest first; what the model's elastic.json says if None.
        top_ks: experts per token to choose from; what elastic.json says, or what suits the model, if None.
        num_blocks: numbers of transformer blocks to choose from; the same.
        vision_budgets: what every tier means to the family (MolmoE: most image crops); what elastic.json or the family
            says if None.
        block_order: which blocks are left out first: the least important ones as measured (`importance`, or the name
            that an order was measured under), or plainly the last ones (`early_exit`).
        stage2_after: blocks that always run before stage 2 decides.
        max_new_tokens: most generated tokens per answer; if None the most that a benchmark among the data sets wants,
            or what elastic.json says where there is none.
        dtype: number type of the weights in memory.
        device: `cpu`, or `cuda` with an optional number such as `cuda:1`.

    Raises:
        ConfigError: a value is outside its range.
    """

    path: str = "embedded"
    tiers: tuple[str, ...] | None = None
    top_ks: tuple[int, ...] | None = None
    num_blocks: tuple[int, ...] | None = None
    vision_budgets: tuple[int, ...] | None = None
    block_order: str = "importance"
    stage2_after: int = 1
    max_new_tokens: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_path("path", self.path)
        _check_name("block_order", self.block_order)
        check_whole(self, 1, MAX_KNOB, "stage2_after")
        check_whole(self, 1, MAX_NEW_TOKENS, "max_new_tokens", optional=True)
        # What is left out is the model's own; the default lists are as good as any to check the others beside.
        given = {name: getattr(self, name) for name in ("tiers", "top_ks", "num_blocks")}
        space = KnobSpace(**{name: values for name, values in given.items() if values is not None})
        for name, values in given.items():
            if values is not None:
                object.__setattr__(self, name, getattr(space, name))
        if self.vision_budgets is None:
            return
        object.__setattr__(self, "vision_budgets", tuple(self.vision_budgets))
        most, given_budgets = [as_int(number) for number in self.vision_budgets], shown(self.vision_budgets)
        if not most or any(number is None or not 1 <= number <= MAX_VISION_BUDGET for number in most):
            raise ConfigError(
                f"vision_budgets {given_budgets} must be whole numbers from 1 to {MAX_VISION_BUDGET}, one a tier"
            )
        if self.tiers is not None and len(most) != len(self.tiers):
            raise ConfigError(f"vision_budgets {given_budgets} needs one number for each of the tiers {self.tiers}")


def _check_name(name: str, value: object) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value):
        raise ConfigError(
            f"{name} is {shown(value)}; it must be a name of up to 64 letters, digits, dots, dashes and underscores"
        )


def _check_mixture(mixture: str | None, dataset: str) -> None:
    if mixture is None:
        return
    parse_mixture(mixture)
    if dataset not in MADE_DATASETS:
        raise ConfigError(
            f"mixture is {mixture!r}, but dataset is {dataset!r}, which is asked as it is; leave mixture out, or give "
            f"one of {', '.join(MADE_DATASETS)} as dataset"
        )


def _check_fields(fields: tuple[str, ...], dataset: str) -> None:
    parse_fields(fields)
    if fields and all(entry.path is entry.hub is None or entry.benchmark for entry in parse_datasets(dataset)):
        raise ConfigError(f"fields are {shown(fields)}, but the columns of {dataset} are known; leave fields out")


@dataclass(frozen=True)
class DataConfig:
    """Which questions the controller learns from and is judged on; the three parts share no picture.

    Attributes:
        dataset: `digits`, the data set inside the package; a JSON-lines file (image, question, answer per line); a
            published benchmark (vqa2, textvqa, docvqa, chartqa, scienceqa, pope), from the Hugging Face hub or a local
            copy (`textvqa=/data/textvqa`); any other data set there (`hf:owner/name`) or a folder in its format, with
            `fields`. Several, between commas, are mixed by weight: `textvqa,vqa2:0.5`.
        fields: which columns hold what, as `image=img question=q answer=a`, for files and folders that name them
            otherwise; choices, id, split and context as well, and any other name is metadata.
        mixture: what `digits` asks: `crossed` (the default), the tasks detail, thought, overview and knowledge in equal
            shares; `uniform`, all kinds of questions on all kinds of scenes; or weights such as `detail=1,thought=2`.
        val_dataset: JSON-lines file of the validation examples; if None they are set aside from `dataset`.
        test_dataset: JSON-lines file of the test examples; if None they are set aside from `dataset`.
        metric: scores the answers; what each data set says if None: a benchmark's own, exact match for all others.
        num_train: examples to learn from, shared by weight; fewer if a file has fewer.
        num_val: examples to calibrate the guardrail on; about a tenth of a file's pictures are set aside.
        num_test: examples to judge on; about a fifth of a file's pictures are set aside.
        skip_test: test examples left out in front of these, for example those that settings were chosen on.
        skip_unreadable: leave lines out whose picture cannot be read, and list them, instead of stopping.
        seed: which examples are composed, or how a file is divided.

    Raises:
        ConfigError: a value is outside its range.
    """

    dataset: str = "digits"
    fields: tuple[str, ...] = ()
    mixture: str | None = None
    val_dataset: str | None = None
    test_dataset: str | None = None
    metric: MetricName | None = None
    num_train: int = 3000
    num_val: int = 400
    num_test: int = 1000
    skip_test: int = 0
    skip_unreadable: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        parse_datasets(self.dataset)
        _check_mixture(self.mixture, self.dataset)
        _check_fields(self.fields, self.dataset)
        check_whole(self, 1, MAX_COUNT, "num_train", "num_val", "num_test")
        check_shares(self.dataset, num_train=self.num_train, num_val=self.num_val, num_test=self.num_test)
        check_whole(self, 0, MAX_COUNT, "skip_test")
        check_whole(self, 0, MAX_SEED, "seed")
        for name, part in (("val_dataset", "validation"), ("test_dataset", "test")):
            given = getattr(self, name)
            if given is None:
                continue
            check_path(name, given)
            (first, *others) = parse_datasets(self.dataset)
            if others or first.benchmark or first.hub:
                raise ConfigError(
                    f"{name} is {given!r}, but dataset is {self.dataset!r}, and only a single JSON-lines file has such "
                    f"files beside it; leave {name} out"
                )
            if self.dataset in MADE_DATASETS:
                raise ConfigError(
                    f"{name} is {given!r}, but dataset is {self.dataset!r}, which has a {part} split of its own; "
                    f"leave {name} out, or give a file for both"
                )


@dataclass(frozen=True)
class PictureConfig:
    """How pictures are read; the same for training, evaluation, profiles and answers.

    Attributes:
        background: colour that transparent pictures are composed on, as `#rrggbb` or a name that CSS knows.
        max_pixels: largest accepted number of pixels; a small file can claim many more and fill the memory.

    Raises:
        ConfigError: a value is outside its range.
    """

    background: str = "#ffffff"
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        check_whole(self, 1, 10**9, "max_pixels")
        if not isinstance(self.background, str) or not _is_colour(self.background):
            raise ConfigError(
                f"background is {self.background!r}; it must be a colour as #rrggbb or by its CSS name, for example "
                "'#ffffff' or 'white'"
            )


def _is_colour(text: str) -> bool:
    if re.fullmatch("#[0-9a-fA-F]{6}", text):
        return True
    from PIL import ImageColor  # here, because the command line reads settings before anything else loads

    return text.lower() in ImageColor.colormap


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
        check_whole(self, 2, MAX_COUNT, "num_requests", "num_samples", "num_lengths")
        check_whole(self, 1, MAX_COUNT // self.num_samples, "repeats")
        check_whole(self, 0, MAX_COUNT, "max_warmup")
        check_whole(self, 1, MAX_THREADS, "num_threads", optional=True)
        check_real(self, 0.001, 100, "max_megapixels")
        check_real(self, MIN_ALPHA, 1, "alpha", below=True)
        check_whole(self, 0, MAX_SEED, "seed")
        if self.source is not None:
            check_path("source", self.source)
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
        check_whole(self, 2, MAX_COUNT, "num_examples")


@dataclass(frozen=True)
class ControllerSettings:
    """How the controller is built.

    Attributes:
        hidden_dim: width of all hidden layers.
        num_frequencies: sines, and as many cosines, of a budget.
        feasible_fractions: whether stage 1 reads how much of each tier the guardrail admits.
        thumbnail: whether stage 1 looks at the image, squeezed to 16x16.
        pairwise: whether stage 2 scores every (top_k, num_blocks) besides each on its own.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
    """

    hidden_dim: int = 64
    num_frequencies: int = 8
    feasible_fractions: bool = True
    thumbnail: bool = False
    pairwise: bool = True

    def __post_init__(self) -> None:
        check_whole(self, 1, MAX_HIDDEN_DIM, "hidden_dim")
        check_whole(self, 1, MAX_FREQUENCIES, "num_frequencies")
        for name in ("feasible_fractions", "thumbnail", "pairwise"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false")


@dataclass(frozen=True)
class CalibrateConfig:
    """What answers, and the guardrail's second calibration, on the knobs that it picks.

    Attributes:
        policy: what the bundle answers with: the `predictor`, fitted to the sweep of training questions, or the trained
            `controller`. An evaluation judges both.
        num_requests: validation requests timed, each at a random budget.
        seed: which examples and budgets are drawn.

    Raises:
        ConfigError: a value is outside its range.
    """

    policy: Literal["predictor", "controller"] = "predictor"
    num_requests: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in ("predictor", "controller"):
            raise ConfigError(f"policy is {self.policy!r}; use 'predictor' or 'controller'")
        check_whole(self, 2, MAX_COUNT, "num_requests")
        check_whole(self, 0, MAX_SEED, "seed")


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

    budgets: tuple[float, ...] = (0.5, 0.6, 0.7, 0.85, 1.0)
    num_timed: int = 200
    num_warmup: int = 100
    track_drift: bool = True
    oracle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, 0, MAX_COUNT, "num_timed", "num_warmup")
        check_whole(self, 0, MAX_SEED, "seed")
        budgets = [as_float(fraction) or 0.0 for fraction in self.budgets]
        if not budgets or budgets != sorted(set(budgets)) or not 0 < budgets[0] <= budgets[-1] <= MAX_FRACTION:
            raise ConfigError(
                f"budgets {shown(list(self.budgets))} must be strictly increasing fractions above 0, and at most "
                f"{MAX_FRACTION:g}, for example 0.5 0.75 1"
            )
        object.__setattr__(self, "budgets", tuple(budgets))


@dataclass(frozen=True)
class HeadroomConfig:
    """How it is measured what a controller could gain.

    Attributes:
        num_examples: training examples that run with every configuration, unless their outcomes are known; as many as
            the lookup table is fitted on if None.
        num_moved: how many of them also run with the picture moved by one pixel; 0 leaves that out.
        latency_token: also measure what is learnable from the latency token's output; every example's first block runs
            at every tier.
        margin: bounds are this many times the predicted latency instead of the run's, as a machine with little noise
            would have them, 1.2 for example.
        seed: of folds, trees, resamples and the untrained latency token.

    Raises:
        ConfigError: a value is outside its range.
    """

    num_examples: int | None = None
    num_moved: int = 200
    latency_token: bool = True
    margin: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, 5, MAX_COUNT, "num_examples", optional=True)
        check_whole(self, 0, MAX_COUNT, "num_moved")
        check_whole(self, 0, MAX_SEED, "seed")
        if self.margin is not None:
            check_real(self, 1, 100, "margin")


@dataclass(frozen=True)
class StudyConfig:
    """How much of a study is made; the defaults take hours on two CPU cores.

    Attributes:
        study_dir: folder that holds everything the study leaves behind.
        model: model directory, or `embedded`.
        traffics: mixtures of the embedded data set, each a part of its own; one after the other.
        num_seeds: trainings under each profile.
        num_profiles: profiles of the machine; those in STUDY/TRAFFIC/profiles come first, by name.
        num_train: training questions, all run with every configuration.
        num_test: test questions, the same.
        steps: of each training.
        batch_size: contexts of a step.
        num_samples, repeats: of a profile that is measured.
        alpha: how often a latency may exceed its bound.
        ablations: also train without some part, three seeds each, under the first profile: `no-mask`, `no-multiplier`,
            `no-latency-token`, `no-question` (in stage 1), `no-prices`, `no-tightening`, `group-scaling`, `reinforce`.

    Raises:
        ConfigError: a value is outside its range.
    """

    study_dir: Path = Path("runs/study")
    model: str = "embedded"
    traffics: tuple[str, ...] = ("crossed", "uniform")
    num_seeds: int = 5
    num_profiles: int = 3
    num_train: int = 2000
    num_test: int = 3000
    steps: int = 800
    batch_size: int = 256
    num_samples: int = 800
    repeats: int = 2
    alpha: float = 0.025
    ablations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_path("study_dir", self.study_dir)
        check_path("model", self.model)
        check_whole(self, 1, 100, "num_seeds", "num_profiles")
        check_whole(self, 5, MAX_COUNT, "num_train")
        check_whole(self, 1, MAX_COUNT, "num_test", "steps", "batch_size", "num_samples", "repeats")
        check_real(self, MIN_ALPHA, 1, "alpha", below=True)
        if not self.traffics:
            raise ConfigError("traffics names nothing; give crossed, uniform or both")
        for traffic in self.traffics:
            parse_mixture(traffic)


SMALL_STUDY = StudyConfig(
    num_seeds=2, num_profiles=1, num_train=500, num_test=500, steps=200, batch_size=128, num_samples=250, repeats=1
)
"""A first look of some twenty minutes."""


@dataclass(frozen=True)
class ImportanceConfig:
    """How the order in which blocks are given up is measured.

    Attributes:
        path: model directory, or `embedded`; its elastic.json gets the measured order.
        dataset: `digits`, or what `--data.dataset` of a run takes.
        fields: which columns hold what, as for `--data.fields` of a run.
        mixture: what `digits` asks, as for `--data.mixture` of a run.
        metric: scores the answers; what the data set says if None.
        num_examples: examples that every candidate set of blocks is scored on; of `digits`, from the validation split.
        min_num_blocks: the order ends where so many blocks are left; the fewest of the model's knob space if None.
        num_candidates: blocks tried per round after the first.
        name: what `--model.block-order` will call the order, beside others of the same model; None makes it the one of
            `importance`.
        group_by: metadata of the examples whose groups' own orders are compared with that of all; if None `task`, as
            `digits` has it, or the `benchmark` of a mixture.
        dtype: number type of the weights in memory.
        device: `cpu` or `cuda`.
        seed: which examples are drawn.
        picture: how pictures are read.

    Raises:
        ConfigError: a value is outside its range.
    """

    path: str = "embedded"
    dataset: str = "digits"
    fields: tuple[str, ...] = ()
    mixture: str | None = None
    metric: MetricName | None = None
    num_examples: int = 400
    min_num_blocks: int | None = None
    num_candidates: int = 6
    name: str | None = None
    group_by: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    seed: int = 0
    picture: PictureConfig = field(default_factory=PictureConfig)

    def __post_init__(self) -> None:
        check_path("path", self.path)
        parse_datasets(self.dataset)
        _check_mixture(self.mixture, self.dataset)
        _check_fields(self.fields, self.dataset)
        check_whole(self, 1, MAX_COUNT, "num_examples")
        check_whole(self, 1, MAX_KNOB, "num_candidates")
        check_whole(self, 1, MAX_KNOB, "min_num_blocks", optional=True)
        check_whole(self, 0, MAX_SEED, "seed")
        if self.name is not None:
            _check_name("name", self.name)
        if self.name in BLOCK_ORDERS:
            raise ConfigError(f"name is {self.name!r}, which no measured order can have; give another")


def is_hub_id(path: str) -> bool:
    """Whether a model's path can be OWNER/NAME on the Hugging Face hub; a relative path can look the same."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


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
        raise ConfigError(f"{label}: {shown(values)} is no mapping of settings")
    entries = {entry.name: entry for entry in dataclasses.fields(kind) if entry.init}  # type: ignore[arg-type]
    unknown = sorted(set(map(str, values)) - set(entries))
    if unknown:
        raise ConfigError(f"{label}: {shown(unknown)} are unknown; allowed are {sorted(entries)}")
    missing = [
        name
        for name, entry in entries.items()
        if name not in values and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{label}: {missing} are missing")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    settings = {name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()}
    try:
        return kind(**settings)
    except (ConfigError, KnobError) as error:  # which begins with the setting's name
        raise type(error)(f"{prefix}{error}") from error


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
            raise ConfigError(f"{where} is {shown(value)}; use one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is {shown(value)}; it must be a list")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and (number := as_float(value)) is not None:
        return number
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} is {shown(value)}; it must be of type {hint.__name__}")
    return value
