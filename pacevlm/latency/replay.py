"""A clock that is replayed: what a request would have taken on the profiled machine, the same wherever it is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from pacevlm.errors import ProfileError
from pacevlm.knobs import Knobs
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.profile import Sample
from pacevlm.types import BudgetKind


class ReplayedClock:
    """Draws how far a latency is off its prediction from what the profile's own measurements were off by.

    A draw follows from the example and its knobs alone, so two policies that choose the same take the same, and two
    machines give one table. What the clock leaves out: a machine that is slower than profiled, and errors that go with
    the knobs or the picture.

    Args:
        estimator: predicts latencies; fitted to the profile.
        samples: measured requests of the profile.
        kind: what latencies cover.
        seed: another seed draws otherwise.

    Raises:
        ProfileError: there are no samples.
    """

    def __init__(
        self, estimator: LatencyEstimator, samples: Sequence[Sample], kind: BudgetKind = "e2e", seed: int = 0
    ) -> None:
        if not samples:
            raise ProfileError("a replayed clock needs the measurements of a profile; it has none")
        measured_ms = np.array([sample.stages.covered_ms(kind) for sample in samples])
        # In order of size, so that the order of measurements decides nothing.
        self.ratios = np.sort(measured_ms / estimator.predict_samples(samples, kind))
        self.seed = seed

    def ratio(self, example_id: str, knobs: Knobs) -> float:
        """Measured over predicted latency, of one request with given knobs."""
        digest = hashlib.sha256(f"{self.seed}\n{knobs}\n{example_id}".encode()).digest()
        return float(self.ratios[int.from_bytes(digest[:8], "big") % len(self.ratios)])
