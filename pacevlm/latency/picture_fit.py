"""What reading a picture takes: a physical model of each kind, and how far it was profiled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pacevlm.artefact import check_keys
from pacevlm.errors import ProfileError
from pacevlm.images import TURNED
from pacevlm.latency.profile import Sample
from pacevlm.latency.stage_fit import StageFit, check_coefficients, fit_stage

# What reading a picture is a non-negative sum of, for every kind apart: a PNG's pixels cost other than a JPEG's. Pixels
# that the orientation turns cost once more.
READ_TERMS = ("constant", "pixels", "bytes", "turned_pixels")
# A request may exceed the largest that was profiled by this share: a line that fits up to there goes on so far.
RANGE_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class PictureFit:
    """What reading pictures of one kind takes, and how far that was profiled.

    Attributes:
        read: coefficients of `READ_TERMS` in milliseconds, and their fit quality.
        max_pixels: of the largest picture that was profiled.
        max_turned_pixels: of the largest one that its orientation turned; 0 if none did.
        max_bytes: of the largest file that was profiled; 0 for what is in memory.
    """

    read: StageFit
    max_pixels: int
    max_turned_pixels: int
    max_bytes: int

    def __post_init__(self) -> None:
        check_coefficients("read_ms", self.read, READ_TERMS)
        for name in ("max_pixels", "max_turned_pixels", "max_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ProfileError(f"{name} is {value!r}; it must be a whole number from 0")

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> PictureFit:
        """Fit the reading times of pictures that are all of one kind, turned or not; raises ProfileError if none."""
        terms = np.array([_terms(sample.picture_kind, sample.num_pixels, sample.num_bytes) for sample in samples])
        read = fit_stage(terms, np.array([sample.stages.read_ms for sample in samples]))
        return cls(read, 0, 0, 0).reaching(samples)

    def reaching(self, samples: Sequence[Sample]) -> PictureFit:
        """The same, good for pictures as large as these too."""
        return replace(
            self,
            max_pixels=max([self.max_pixels, *(sample.num_pixels for sample in samples)]),
            max_turned_pixels=max(
                [self.max_turned_pixels, *(s.num_pixels for s in samples if s.picture_kind.startswith(TURNED))]
            ),
            max_bytes=max([self.max_bytes, *(sample.num_bytes for sample in samples)]),
        )

    def read_ms(self, kind: str, num_pixels: int, num_bytes: int) -> float:
        """Predicted milliseconds from the source given to pixels."""
        terms = _terms(kind, num_pixels, num_bytes)
        return math.fsum(each * term for each, term in zip(self.read.coefficients, terms, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        limits = {name: getattr(self, name) for name in ("max_pixels", "max_turned_pixels", "max_bytes")}
        return {"read": self.read.to_dict(READ_TERMS), **limits}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PictureFit:
        """Inverse of `to_dict`; raises ProfileError on unknown, missing or malformed values."""
        check_keys("a picture's fit", values, {"read", "max_pixels", "max_turned_pixels", "max_bytes"})
        return cls(**{**values, "read": StageFit.from_dict(values["read"], READ_TERMS)})


def fit_pictures(samples: Sequence[Sample]) -> dict[str, PictureFit]:
    """What reading takes, for every kind of picture among the samples."""
    by_kind: dict[str, list[Sample]] = {}
    for sample in samples:
        by_kind.setdefault(upright_kind(sample.picture_kind), []).append(sample)
    return {kind: PictureFit.fit(by_kind[kind]) for kind in sorted(by_kind)}


def upright_kind(kind: str) -> str:
    """The kind of a picture that its orientation does not turn."""
    return kind.removeprefix(TURNED)


def _terms(kind: str, num_pixels: int, num_bytes: int) -> tuple[float, float, float, float]:
    return 1.0, float(num_pixels), float(num_bytes), float(num_pixels if kind.startswith(TURNED) else 0)
