"""A simulated device: requests whose times follow a known law, step by step, with and without noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.picture_fit import READ_TERMS, PictureFit
from pacevlm.latency.profile import DeviceFacts, NoiseFloor, Profile, Sample
from pacevlm.latency.stage_fit import StageFit
from pacevlm.latency.stage_terms import STAGE_TERMS
from pacevlm.types import RequestSizes, StageTimes, VisionSizes

TRAINED_TOP_K = 8
TOKENS_PER_CROP = 144
# Milliseconds to read a picture: once, per pixel and per byte.
READING = {"memory": (0.02, 1e-8, 0.0), "jpeg": (0.4, 7e-6, 9e-6), "png": (0.3, 9e-6, 1e-5)}


@dataclasses.dataclass(frozen=True)
class SimulatedDevice:
    """Times a request by adding up what each block and each decode step would take."""

    space: KnobSpace
    noise: float = 0.0
    outlier_rate: float = 0.0

    def stages(self, rng: np.random.Generator, sample: dict[str, Any], knobs: Knobs) -> StageTimes:
        constant, per_pixel, per_byte = READING[sample["picture_kind"]]
        tokens = sample["num_image_tokens"] + sample["num_text_tokens"]
        times = {
            "read_ms": constant + per_pixel * sample["num_pixels"] + per_byte * sample["num_bytes"],
            "prepare_ms": 1.5 + 0.8 * sample["num_units"] + 4e-6 * sample["num_pixels"],
            "stage1_ms": 0.3,
            "vision_ms": 2.0 + 9.0 * sample["num_units"],
            "first_block_ms": 0.6 + 0.012 * tokens + 1.5e-6 * tokens**2,
            "prefill_ms": 1.0
            + sum(
                0.2
                + 0.003 * tokens
                + 0.02 * knobs.top_k
                # The last block attends and runs its experts for the last token alone.
                + (block < knobs.num_blocks - 2) * (1.5e-6 * tokens**2 + 0.001 * tokens * knobs.top_k)
                for block in range(knobs.num_blocks - 1)
            ),
        }
        decode = []
        for step in range(1, sample["num_output_tokens"]):
            experts = [TRAINED_TOP_K] + [knobs.top_k] * (knobs.num_blocks - 1)
            decode.append(0.5 + sum(0.1 + 2e-5 * (tokens + step) + 0.03 * top_k for top_k in experts))
        noisy = {name: value * self._noise(rng) for name, value in times.items()}
        decode_ms = tuple(value * self._noise(rng) for value in decode)
        overhead_ms = 0.25 * self._noise(rng)
        return StageTimes(**noisy, decode_ms=decode_ms, e2e_ms=sum(noisy.values()) + sum(decode_ms) + overhead_ms)

    def _noise(self, rng: np.random.Generator) -> float:
        slow = rng.uniform(5.0, 20.0) if rng.random() < self.outlier_rate else 1.0
        return float(slow * np.exp(self.noise * rng.standard_normal()))

    def measure(self, rng: np.random.Generator, num_samples: int, max_output_tokens: int = 12) -> tuple[Sample, ...]:
        samples = []
        for index in range(num_samples):
            # The first two are the ends of the space, so that small profiles can be fitted too.
            ends = {0: self.space.cheapest, 1: self.space.full}
            knobs = ends.get(index, self.space[int(rng.integers(len(self.space)))])
            ceiling = (2, 6, 12)[self.space.tiers.index(knobs.tier)]
            num_units = 1 + int(rng.integers(ceiling))
            kind = tuple(READING)[index % 3]
            sizes = {
                "picture_kind": kind,
                "num_bytes": 0 if kind == "memory" else int(rng.integers(10_000, 3_000_000)),
                "num_units": num_units,
                "num_image_tokens": num_units * TOKENS_PER_CROP,
                "num_text_tokens": int(rng.integers(8, 120)),
                "num_pixels": int(rng.integers(50_000, 4_000_000)),
                "num_output_tokens": 2 if index < 2 else int(rng.integers(1, max_output_tokens + 1)),
            }
            samples.append(Sample(knobs=knobs, **sizes, stages=self.stages(rng, sizes, knobs)))
        return tuple(samples)


@pytest.fixture
def space() -> KnobSpace:
    return KnobSpace()


@pytest.fixture
def device_facts() -> DeviceFacts:
    return DeviceFacts(
        device_type="cpu",
        device_name="simulated",
        num_threads=1,
        dtype="float32",
        torch_version="0",
        transformers_version="0",
        compiler=None,
        python_version="3",
        platform="none",
        load_average=(0.1, 0.2, 0.3),
        clock_mhz=2600.0,
        clock="counted",
    )


@pytest.fixture
def make_device(space: KnobSpace) -> Callable[..., SimulatedDevice]:
    return lambda **settings: SimulatedDevice(space, **settings)


@pytest.fixture
def make_profile(space: KnobSpace, device_facts: DeviceFacts) -> Callable[..., Profile]:
    def make(samples: tuple[Sample, ...]) -> Profile:
        return Profile("weights-a", space, device_facts, samples, NoiseFloor(space.full, (10.0, 10.2, 9.9)))

    return make


@pytest.fixture
def random_sizes() -> Callable[[np.random.Generator], RequestSizes]:
    """Sizes that grow weakly from tier to tier, as ceilings on the number of crops make them."""

    def make(rng: np.random.Generator) -> RequestSizes:
        crops = np.sort(rng.integers(1, 13, size=3)).tolist()
        vision = tuple(VisionSizes(count, count * TOKENS_PER_CROP) for count in crops)
        kind = tuple(READING)[int(rng.integers(3))]
        num_bytes = 0 if kind == "memory" else int(rng.integers(1_000, 2_900_000))
        return RequestSizes(vision, int(rng.integers(4, 110)), int(rng.integers(1_000, 3_900_000)), kind, num_bytes)

    return make


def random_fit(rng: np.random.Generator, num_terms: int) -> StageFit:
    """Coefficients of any order, some of them zero, as a fit gives them."""
    coefficients = 10.0 ** rng.uniform(-9, 1, size=num_terms) * (rng.random(num_terms) < 0.7)
    return StageFit(tuple(coefficients.tolist()), 1, 0, 0.0, 0.0)


@pytest.fixture
def random_estimator(space: KnobSpace, device_facts: DeviceFacts) -> Callable[..., LatencyEstimator]:
    def make(rng: np.random.Generator, stage2_after: int = 1) -> LatencyEstimator:
        stages = {}
        for stage, terms in STAGE_TERMS.items():
            stages[stage] = random_fit(rng, len(terms))
        pictures = {
            kind: PictureFit(random_fit(rng, len(READ_TERMS)), 5_000_000, 5_000_000, 4_000_000) for kind in READING
        }
        return LatencyEstimator("weights-a", space, device_facts, TRAINED_TOP_K, stage2_after, stages, pictures, 200)

    return make
