"""A draw among what the guardrail admits: what the mask alone achieves."""

from __future__ import annotations

import hashlib

import numpy as np

from pacevlm.baselines.one_choice import OneChoicePolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.knobs import Knobs, KnobSpace


class RandomFeasiblePolicy(OneChoicePolicy):
    """Uniform over the feasible configurations; seed, example and budget alone fix the draw."""

    name = "random"

    def __init__(self, space: KnobSpace, seed: int = 0) -> None:
        super().__init__(space)
        self.seed = seed

    def choose(self, request: PolicyInput) -> Knobs:
        """The configuration drawn for this example and budget."""
        admitted = np.flatnonzero(self.feasible(request))
        # A hash, unlike a generator's stream, is the same in every numpy version.
        key = f"{self.seed}\n{request.example_id}\n{float(request.budget_ms)!r}".encode()
        draw = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
        return self.space[int(admitted[draw % len(admitted)])]
