"""The least that can be run."""

from __future__ import annotations

from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.knobs import Knobs


class CheapestPolicy(OneChoicePolicy):
    """Always the cheapest knobs, which the guardrail admits whenever it admits anything."""

    name = "cheapest"

    def choose(self, request: PolicyInput) -> Knobs:
        """The cheapest configuration."""
        return self.space.cheapest
