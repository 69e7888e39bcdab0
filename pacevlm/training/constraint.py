"""The price of violations: a Lagrange multiplier that a PID controller steers towards a target violation rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pacevlm.errors import CheckpointError, DataError
from pacevlm.training.train_config import ConstraintConfig


class PIDLagrangian:
    """Lagrange multiplier λ ≥ 0 for a constraint on the violation rate.

    Method: Stooke, Achiam and Abbeel 2020, "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods",
    algorithm 2: λ = max(0, k_p·Δ + k_i·I + k_d·∂), where Δ is the excess over the target, I the sum of Δ held in
    [0, integral_max], and ∂ the rise of the rate since the last update, never below 0. The paper's division of the
    objective by 1 + λ is left to the caller.
    """

    def __init__(self, config: ConstraintConfig) -> None:
        self.config = config
        self._integral = 0.0
        self._rate = 0.0
        self._multiplier = 0.0
        self._num_updates = 0

    @property
    def multiplier(self) -> float:
        """The current λ; 0 before the first update."""
        return self._multiplier

    def update(self, violation_rate: float) -> float:
        """Take in the rate measured since the last update and return the new λ.

        Raises DataError if the rate is negative or not finite.
        """
        if not math.isfinite(violation_rate) or violation_rate < 0:
            raise DataError(f"violation_rate is {violation_rate}; it must be a finite number from 0")
        config = self.config
        # The first measurement has no predecessor: it is its own average, and its rise is 0.
        previous = self._rate if self._num_updates else violation_rate
        rate = config.smoothing * previous + (1 - config.smoothing) * violation_rate
        self._integral = min(max(self._integral + violation_rate - config.target, 0.0), config.integral_max)
        rise = max(rate - previous, 0.0)
        proportional = config.k_p * (rate - config.target)
        self._multiplier = max(proportional + config.k_i * self._integral + config.k_d * rise, 0.0)
        self._rate = rate
        self._num_updates += 1
        return self._multiplier

    def state_dict(self) -> dict[str, float]:
        """All that changes, as plain numbers ready for JSON."""
        return {
            "integral": self._integral,
            "rate": self._rate,
            "multiplier": self._multiplier,
            "num_updates": self._num_updates,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state; raises CheckpointError, and changes nothing, if it is not one."""
        if set(state) != set(self.state_dict()):
            raise CheckpointError(f"multiplier state has keys {sorted(state)}; expected {sorted(self.state_dict())}")
        for name, value in state.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise CheckpointError(f"multiplier state {name} is {value!r}; it must be a finite number from 0")
        if int(state["num_updates"]) != state["num_updates"]:
            raise CheckpointError(
                f"multiplier state num_updates is {state['num_updates']!r}; it must be a whole number"
            )
        # A run may resume with a smaller limit than it was saved with: the limit in force holds.
        self._integral = min(float(state["integral"]), self.config.integral_max)
        self._rate = float(state["rate"])
        self._multiplier = float(state["multiplier"])
        self._num_updates = int(state["num_updates"])
