"""Latency profiles: measured requests of one model on one device, with all that is needed to read them later."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pacevlm.artefact import ADDED_LATER, MAX_COUNT, MAX_MS, Text, check_keys, load_artefact, save_artefact, typed
from pacevlm.devices import ACCELERATORS, resolve_device
from pacevlm.errors import ProfileError
from pacevlm.identity import Identity
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.launch import read_launch
from pacevlm.types import StageTimes

if TYPE_CHECKING:
    import torch

PROFILE_SCHEMA_VERSION = 6
MAX_NUM_THREADS = 1024


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What latencies depend on besides the model and the request.

    Attributes:
        device_type: `cpu`, `cuda` or `xpu`.
        device_name: the processor's or accelerator's own name.
        num_threads: threads that one CPU operation may use.
        dtype: number format of the model's weights, for example `float32`.
        compiler: what compiled what runs between the matrix products, and its version; None where nothing did.
        load_average: the machine's mean number of runnable processes over 1, 5 and 15 minutes, where it tells.
        clock_mhz: the processor's or accelerator's clock rate when the profile began, where it tells.
        clock: the timer that measured, and its resolution.
        num_idle_ranks: other processes of the launch that slept meanwhile, each with the model loaded, on all machines.
    """

    device_type: str
    device_name: str
    num_threads: int
    dtype: str
    torch_version: str
    transformers_version: str
    compiler: str | None
    python_version: str
    platform: str
    load_average: tuple[float, float, float] | None
    clock_mhz: float | None
    clock: str
    num_idle_ranks: int = field(default=0, metadata={ADDED_LATER: True})

    def __post_init__(self) -> None:
        if self.device_type not in ("cpu", *ACCELERATORS):
            raise ProfileError(f"device_type is {self.device_type!r}; it must be one of {('cpu', *ACCELERATORS)}")
        threads = self.num_threads
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_NUM_THREADS:
            raise ProfileError(f"num_threads is {threads!r}; it must be a whole number in 1..{MAX_NUM_THREADS}")
        for name, values in (("load_average", self.load_average or ()), ("clock_mhz", (self.clock_mhz or 0.0,))):
            if not all(_is_duration(value) for value in values):
                raise ProfileError(f"{name} is {values!r}; it must hold finite numbers from 0")

    @property
    def identity(self) -> tuple[str, str, int, str, str]:
        """The facts that must agree before latencies carry over: device type, name, threads, dtype, kind of loops."""
        loops = "not compiled" if self.compiler is None else "compiled"
        return self.device_type, self.device_name, self.num_threads, self.dtype, loops

    def to_dict(self) -> dict[str, Any]:
        """All facts, ready for JSON."""
        return {**asdict(self), "load_average": None if self.load_average is None else list(self.load_average)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeviceFacts:
        """Inverse of `to_dict`; raises ProfileError on unknown, missing or malformed facts."""
        facts: DeviceFacts = typed(cls, values, "device facts")
        return facts


def collect_device_facts(
    device: str | torch.device, dtype: str | torch.dtype, *, compiler: str | None = None
) -> DeviceFacts:
    """Describe the device that a model runs on, and the machine's state now.

    Args:
        compiler: the package that compiles what the model's family runs between matrix products there.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    resolved, launch = resolve_device(device), read_launch()
    module = torch.get_device_module(resolved)
    clock = time.get_clock_info("perf_counter")
    return DeviceFacts(
        device_type=resolved.type,
        device_name=_cpu_name() if resolved.type == "cpu" else module.get_device_name(resolved),
        num_threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        torch_version=str(torch.__version__),
        transformers_version=metadata.version("transformers"),
        compiler=None if compiler is None else f"{compiler} {_installed_version(compiler)}",
        python_version=platform.python_version(),
        platform=platform.platform(),
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        clock_mhz=_clock_mhz(resolved),
        clock=f"{clock.implementation}, resolution {clock.resolution:g} s",
        num_idle_ranks=0 if launch is None else launch.num_ranks - 1,
    )


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown"


def _cpuinfo(entry: str) -> str | None:
    """An entry of the first processor, where the system lists them."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == entry:
                return value.strip()
    except OSError:
        pass
    return None


def _clock_mhz(device: torch.device) -> float | None:
    import torch

    try:
        if device.type == "cpu":
            return float(_cpuinfo("cpu MHz") or "")
        return float(torch.get_device_module(device).clock_rate(device))
    except (ImportError, RuntimeError, ValueError):
        # The driver's library for clock rates may be missing, and not every system lists them.
        return None


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured request.

    Attributes:
        num_text_tokens: tokens of the prompt that are not image tokens, the first (BOS) included.
        num_pixels: pixels of the image as given.
        num_output_tokens: tokens generated, at least 1; the first comes from the prefill.
        picture_kind: what reading the picture costs depends on; see `Picture.kind`.
        num_bytes: of the picture's file; 0 for what is in memory.
        num_unit_pairs: see `VisionSizes`.

    Raises:
        ProfileError: the kind is no text, a size is out of range, a time is negative or not finite, or the number of
            decode times is not `num_output_tokens - 1`.
    """

    knobs: Knobs
    num_units: int
    num_image_tokens: int
    num_text_tokens: int
    num_pixels: int
    num_output_tokens: int
    stages: StageTimes
    picture_kind: str = "memory"
    num_bytes: int = 0
    num_unit_pairs: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.picture_kind, str) or not self.picture_kind:
            raise ProfileError(f"a sample's picture_kind is {self.picture_kind!r}; it must name a kind of picture")
        names = ("num_units", "num_unit_pairs", "num_image_tokens", "num_text_tokens", "num_pixels", "num_bytes")
        minimum = dict.fromkeys(names, 0)
        minimum["num_output_tokens"] = 1
        for name, least in minimum.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_COUNT:
                raise ProfileError(
                    f"a sample's {name} is {value!r}; it must be a whole number from {least} to {MAX_COUNT:g}"
                )
        times = {field.name: getattr(self.stages, field.name) for field in fields(self.stages)}
        decode_ms = times.pop("decode_ms")
        if not all(_is_duration(value) for value in (*times.values(), *decode_ms)) or self.stages.e2e_ms <= 0:
            raise ProfileError(f"a sample's times must be finite and not negative, and e2e_ms above 0: {self.stages}")
        if len(decode_ms) != self.num_output_tokens - 1:
            raise ProfileError(
                f"a sample of {self.num_output_tokens} output tokens has {len(decode_ms)} decode times; "
                "it must have one per token after the first"
            )

    @property
    def num_prompt_tokens(self) -> int:
        """Image and text tokens together."""
        return self.num_image_tokens + self.num_text_tokens

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        stages = {**asdict(self.stages), "decode_ms": list(self.stages.decode_ms)}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "knobs": str(self.knobs), "stages": stages}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sample:
        """Inverse of `to_dict`; raises ProfileError on unknown, missing or malformed values."""
        sample: Sample = typed(cls, values, "a sample")
        return sample


def _is_duration(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= MAX_MS


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """How much the end-to-end latency of one fixed request varies: no estimator can be more precise than this.

    Attributes:
        knobs: the configuration of the reference request.
        repeats_ms: end-to-end milliseconds of each repeat, in the order of measurement.

    Raises:
        ProfileError: fewer than two repeats, or a repeat that is not a positive number.
    """

    knobs: Knobs
    repeats_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "repeats_ms", tuple(self.repeats_ms))
        if len(self.repeats_ms) < 2 or not all(_is_duration(value) and value > 0 for value in self.repeats_ms):
            raise ProfileError(f"a noise floor needs two or more positive latencies, not {self.repeats_ms!r}")

    @property
    def cv(self) -> float:
        """Coefficient of variation: the repeats' sample standard deviation over their mean."""
        return statistics.stdev(self.repeats_ms) / statistics.fmean(self.repeats_ms)

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON; `cv` is there for readers and is computed anew when loaded."""
        return {"knobs": str(self.knobs), "repeats_ms": list(self.repeats_ms), "cv": self.cv}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseFloor:
        """Inverse of `to_dict`; raises ProfileError on unknown, missing or malformed values."""
        check_keys("a noise floor", values, {"knobs", "repeats_ms", "cv"})
        typed(float, values["cv"], "a noise floor's cv")
        floor: NoiseFloor = typed(cls, {key: values[key] for key in ("knobs", "repeats_ms")}, "a noise floor")
        return floor


@dataclass(frozen=True)
class Profile:
    """Measured requests of one model on one device.

    Attributes:
        model_identity: names the exact weights, for example a checkpoint's digest.
        samples: of the data set's requests.
        picture_samples: of self-made pictures of all kinds and sizes, with questions of all lengths.

    Raises:
        ProfileError: there are no samples of the data set, or a sample's knobs are not in the knob space.
    """

    model_identity: str
    knob_space: KnobSpace
    device: DeviceFacts
    samples: tuple[Sample, ...]
    noise_floor: NoiseFloor
    picture_samples: tuple[Sample, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", tuple(self.samples))
        object.__setattr__(self, "picture_samples", tuple(self.picture_samples))
        if not self.model_identity or not isinstance(self.model_identity, str):
            raise ProfileError(f"model_identity is {self.model_identity!r}; it must be text that names the weights")
        if not self.samples:
            raise ProfileError("a profile needs at least one sample")
        outside = sorted({str(sample.knobs) for sample in self.all_samples if sample.knobs not in self.knob_space})
        if outside:
            raise ProfileError(f"samples have knobs outside the profile's knob space: {', '.join(outside[:5])}")

    @property
    def made_for(self) -> Identity:
        """The model, knob space and device that were measured."""
        return Identity(self.model_identity, self.knob_space, device=self.device.identity)

    @property
    def all_samples(self) -> tuple[Sample, ...]:
        """Those of the data set, then those of self-made pictures."""
        return self.samples + self.picture_samples

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; raises StorageError if that fails."""
        content = {
            "model_identity": self.model_identity,
            "knob_space": self.knob_space.to_dict(),
            "device": self.device.to_dict(),
            "noise_floor": self.noise_floor.to_dict(),
            "samples": [sample.to_dict() for sample in self.samples],
            "picture_samples": [sample.to_dict() for sample in self.picture_samples],
        }
        save_artefact(path, "profile", PROFILE_SCHEMA_VERSION, content)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile; raises ProfileError if it is missing, corrupt or of another schema version."""
        values = load_artefact(path, "profile", PROFILE_SCHEMA_VERSION)
        try:
            check_keys("a profile", values, {field.name for field in fields(cls)})
            floor = NoiseFloor.from_dict(values.pop("noise_floor"))
            return cls(**typed(_Measured, values, "a profile"), noise_floor=floor)
        except ProfileError as error:
            raise ProfileError(f"the profile at {path} is corrupt: {error}; measure it anew") from error


class _Measured(TypedDict):
    """What a profile's file holds besides the noise floor."""

    model_identity: Text
    knob_space: KnobSpace
    device: DeviceFacts
    samples: tuple[Sample, ...]
    picture_samples: tuple[Sample, ...]


def load_knob_space(values: Any) -> KnobSpace:
    """Read a knob space out of an artefact; raises ProfileError if it is malformed."""
    space: KnobSpace = typed(KnobSpace, values, "the knob space")
    return space
