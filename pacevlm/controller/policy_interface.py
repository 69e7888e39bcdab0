"""The one interface that every policy answers, learned or baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pacevlm.errors import KnobError
from pacevlm.types import RequestSizes

if TYPE_CHECKING:
    import torch

    from pacevlm.images import Picture


@dataclass(frozen=True, eq=False)
class PolicyInput:
    """What is known of a request before the vision encoder runs.

    Attributes:
        example_id: identity of the request, the seed of policies that draw at random.
        budget_ms: latency budget.
        question_embedding: mean of the prompt's token embeddings, `(d_model,)`.
        image_size: height and width in pixels.
        sizes: what the request's latency depends on besides its knobs.
        feasible: the guardrail's mask, bool `(tiers, top_ks, num_blocks)`; it always admits something, the cheapest
            configuration where nothing fits the budget.
        any_feasible: whether anything fits the budget; false where `feasible` holds only that fallback.
        picture: the picture itself, for policies that look at a thumbnail.

    Raises:
        KnobError: `feasible` is not a three-dimensional bool array or admits nothing.
    """

    example_id: str
    budget_ms: float
    question_embedding: torch.Tensor
    image_size: tuple[int, int]
    sizes: RequestSizes
    feasible: NDArray[np.bool_]
    any_feasible: bool
    picture: Picture | None = None

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

    def latency_token(self, budget_ms: float) -> torch.Tensor | None:
        """The budget encoded as one token `(d_model,)`, or None where the policy reads none."""
        ...

    def choose_compute(
        self, request: PolicyInput, tier: str, latency_token_output: torch.Tensor | None
    ) -> tuple[int, int]:
        """Stage 2: (top_k, num_blocks), after the first block turned the latency token into `(d_model,)`."""
        ...
