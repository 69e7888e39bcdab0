"""As much as fits, for requests that nothing was learned about."""

from __future__ import annotations

import numpy as np

from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.knobs import Knobs


class MostPolicy(OneChoicePolicy):
    """The configuration with the highest bound that the guardrail admits; the price does not count."""

    name = "most"

    def choose(self, request: PolicyInput) -> Knobs:
        """The dearest feasible configuration, the one with the lower tier where bounds are equal."""
        return self.first_feasible(request, np.argsort(-request.bounds_ms, axis=None, kind="stable"))
