"""The one interface that every policy answers, learned or baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pacevlm.errors import KnobError
from pacevlm.knobs import Compute
from pacevlm.types import Objective, RequestView

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class PolicyInput:
    """What is known of a request, and what the guardrail says of it, before the vision encoder runs.

    Attributes:
        view: the request's looks.
        objective: what is asked for, as the machine that was profiled would have to keep it.
        bounds_ms: upper bound on the latency of every configuration on that machine, `(tiers, top_ks, num_blocks)`.
        feasible: which of them may run, bool, of the same shape; always something, the cheapest configuration where
            nothing fits the budget.
        any_feasible: whether anything fits the budget; false where `feasible` holds only that fallback.
        example_id: identity of the request, the seed of policies that draw at random.

    Raises:
        KnobError: `feasible` is not a three-dimensional bool array or admits nothing.
    """

    view: RequestView
    objective: Objective
    bounds_ms: NDArray[np.float64]
    feasible: NDArray[np.bool_]
    any_feasible: bool
    example_id: str = ""

    @property
    def budget_ms(self) -> float:
        """The budget, in milliseconds of the machine that was profiled."""
        return self.objective.budget_ms

    def __post_init__(self) -> None:
        if self.feasible.ndim != 3 or self.feasible.dtype != np.bool_:
            raise KnobError(
                f"the feasible mask has shape {self.feasible.shape} and type {self.feasible.dtype}; "
                "it must be a bool array (tiers, top_ks, num_blocks)"
            )
        if not self.feasible.any():
            raise KnobError(
                f"the feasible mask of example {self.example_id!r} admits nothing; "
                "where no configuration fits the budget it must admit the cheapest one"
            )


@runtime_checkable
class Policy(Protocol):
    """Chooses the knobs of one request in two stages; nothing else about a request may depend on the policy."""

    name: str

    def choose_tier(self, request: PolicyInput) -> str:
        """Stage 1: the vision tier, before any pixel reaches the vision encoder."""
        ...

    def latency_token(self, request: PolicyInput) -> torch.Tensor | None:
        """The objective encoded as one token `(d_model,)`, or None where the policy reads none.

        It depends on nothing else, so that requests of one objective may share it.
        """
        ...

    def choose_compute(self, request: PolicyInput, tier: str, latency_token_output: torch.Tensor | None) -> Compute:
        """Stage 2: top_k and num_blocks, after the first block turned the latency token into `(d_model,)`."""
        ...
