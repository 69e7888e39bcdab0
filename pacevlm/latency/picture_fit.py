"""What reading a picture takes: a physical model of each kind, and how far it was profiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pacevlm.artefact import check_keys
from pacevlm.errors import ProfileError
from pacevlm.latency.profile import Sample
from pacevlm.latency.stage_fit import StageFit, check_coefficients, fit_stage

# What reading a picture is a non-negative sum of, for every kind apart: a PNG's pixels cost other than a JPEG's.
READ_TERMS = ("constant", "pixels", "bytes")
# A request may exceed the largest that was profiled by this share: a line that fits up to there goes on so far.
RANGE_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class PictureFit:
    """What reading pictures of one kind takes, and how far that was profiled.

    Attributes:
        read: coefficients of `READ_TERMS` in milliseconds, and their fit quality.
        max_pixels: of the largest picture that was profiled.
        max_bytes: of the largest file that was profiled; 0 for what is in memory.
    """

    read: StageFit
    max_pixels: int
    max_bytes: int

    def __post_init__(self) -> None:
        check_coefficients("read_ms", self.read, READ_TERMS)
        for name, value in (("max_pixels", self.max_pixels), ("max_bytes", self.max_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ProfileError(f"{name} is {value!r}; it must be a whole number from 0")

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> PictureFit:
        """Fit the reading times of pictures that are all of one kind; raises ProfileError if there are none."""
        terms = np.array([(1, sample.num_pixels, sample.num_bytes) for sample in samples], np.float64)
        read = fit_stage(terms, np.array([sample.stages.read_ms for sample in samples]))
        return cls(read, 0, 0).reaching(samples)

    def reaching(self, samples: Sequence[Sample]) -> PictureFit:
        """The same, good for pictures as large as these too."""
        return replace(
            self,
            max_pixels=max([self.max_pixels, *(sample.num_pixels for sample in samples)]),
            max_bytes=max([self.max_bytes, *(sample.num_bytes for sample in samples)]),
        )

    def read_ms(self, num_pixels: int, num_bytes: int) -> float:
        """Predicted milliseconds from the source given to pixels."""
        constant, per_pixel, per_byte = self.read.coefficients
        return constant + per_pixel * num_pixels + per_byte * num_bytes

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return {"read": self.read.to_dict(READ_TERMS), "max_pixels": self.max_pixels, "max_bytes": self.max_bytes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PictureFit:
        """Inverse of `to_dict`; raises ProfileError on unknown, missing or malformed values."""
        check_keys("a picture's fit", values, {"read", "max_pixels", "max_bytes"})
        return cls(StageFit.from_dict(values["read"], READ_TERMS), values["max_pixels"], values["max_bytes"])


def fit_pictures(samples: Sequence[Sample]) -> dict[str, PictureFit]:
    """What reading takes, for every kind of picture among the samples."""
    kinds = sorted({sample.picture_kind for sample in samples})
    return {kind: PictureFit.fit([sample for sample in samples if sample.picture_kind == kind]) for kind in kinds}
