"""What the baselines share: they settle all three knobs at once, before the model runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import KnobError
from pacevlm.knobs import Compute, Knobs, KnobSpace

if TYPE_CHECKING:
    import torch


class OneChoicePolicy(ABC):
    """A policy whose stage 2 only repeats what was settled at stage 1; it reads no latency token."""

    name: str

    # What stage 1 settled, until stage 2 takes it: a request waits for its choice once. Other threads' are recomputed.
    _settled: tuple[PolicyInput, Knobs] | None = None

    def __init__(self, space: KnobSpace) -> None:
        self.space = space

    @abstractmethod
    def choose(self, request: PolicyInput) -> Knobs:
        """The whole configuration of a request, the same each time it is asked."""

    def choose_tier(self, request: PolicyInput) -> str:
        """Stage 1: the tier of the configuration chosen."""
        knobs = self.choose(request)
        self._settled = request, knobs
        return knobs.tier

    def latency_token(self, request: PolicyInput) -> torch.Tensor | None:
        """None: no latency token is needed."""
        return None

    def choose_compute(self, request: PolicyInput, tier: str, latency_token_output: torch.Tensor | None) -> Compute:
        """Stage 2: top_k and num_blocks of the configuration chosen; raises KnobError for another tier than chosen."""
        settled, self._settled = self._settled, None
        knobs = settled[1] if settled is not None and settled[0] is request else self.choose(request)
        if tier != knobs.tier:
            raise KnobError(
                f"policy {self.name} chose tier {knobs.tier!r} for example {request.example_id!r}, "
                f"so it cannot go on from tier {tier!r}; run stage 2 with the tier that stage 1 gave"
            )
        return knobs.compute

    def feasible(self, request: PolicyInput) -> NDArray[np.bool_]:
        """The request's mask, flat in the order of the knob space, `(configurations,)`.

        Raises:
            KnobError: the mask does not have the space's shape.
        """
        if request.feasible.shape != self.space.shape:
            raise KnobError(
                f"the feasible mask has shape {request.feasible.shape}, the knob space {self.space.shape}; "
                "build the mask for the policy's own knob space"
            )
        return request.feasible.reshape(-1)

    def first_feasible(self, request: PolicyInput, order: NDArray[np.int64]) -> Knobs:
        """The first configuration of a preference order, `(configurations,)` indices, that the guardrail admits."""
        return self.space[int(order[np.argmax(self.feasible(request)[order])])]
