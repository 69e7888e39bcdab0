"""The unmodified model."""

from __future__ import annotations

from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.knobs import Knobs


class FullPolicy(OneChoicePolicy):
    """Always the full knobs, whatever the budget and the guardrail say: what the unmodified model costs."""

    name = "full"

    def choose(self, request: PolicyInput) -> Knobs:
        """The full configuration."""
        return self.space.full
