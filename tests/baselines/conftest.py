from collections.abc import Callable

import numpy as np
import pytest
import torch

from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.knobs import KnobSpace
from pacevlm.types import Objective, RequestSizes, RequestView, VisionSizes


@pytest.fixture(scope="session")
def space() -> KnobSpace:
    return KnobSpace(("low", "high"), (4, 8), (12, 14, 16))


@pytest.fixture(scope="session")
def make_request(space: KnobSpace) -> Callable[..., PolicyInput]:
    def build(
        mask: np.ndarray, example_id: str = "a", budget_ms: float = 50.0, price: float = 0.0, num_pixels: int = 8000
    ) -> PolicyInput:
        mask = np.array(mask, dtype=bool).reshape(-1)
        any_feasible = bool(mask.any())
        if not any_feasible:
            mask[0] = True
        sizes = RequestSizes((VisionSizes(1, 144),) * len(space.tiers), 9, num_pixels)
        return PolicyInput(
            view=RequestView(torch.zeros(4), sizes, (100, 80), None),
            objective=Objective(budget_ms, price=price),
            bounds_ms=np.where(mask, budget_ms, np.inf).reshape(space.shape),
            feasible=mask.reshape(space.shape),
            any_feasible=any_feasible,
            example_id=example_id,
        )

    return build


@pytest.fixture(scope="session")
def table(space: KnobSpace) -> dict[str, np.ndarray]:
    """Accuracies that rise with compute on average but not on every example, with nested masks at three budgets."""
    generator = np.random.default_rng(7)
    index = np.arange(len(space))
    latency_ms = (20 + 4 * index) * generator.uniform(0.7, 1.3, (400, 1))
    accuracy = (generator.uniform(size=(400, len(space))) < 0.3 + 0.04 * index).astype(float)
    budgets_ms = np.array([30.0, 45.0, 60.0])
    feasible = latency_ms[None] <= budgets_ms[:, None, None]
    return {"accuracy": accuracy, "latency_ms": latency_ms, "budgets_ms": budgets_ms, "feasible": feasible}
