"""The latency token: an objective, a budget and a price of time, encoded as the embedding of one extra token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pacevlm.errors import ConfigError
from pacevlm.knobs import check_budget_ms
from pacevlm.types import Objective

# Budgets are compared by their ratio to the reference, so the features live on ln(budget / reference). Beyond e^±4
# times the reference nothing or everything fits, and one such budget is like another.
MAX_LOG_RATIO = 4.0
LONGEST_PERIOD = 16.0  # half a period spans the whole range, so no two budgets share all their features
SHORTEST_PERIOD = 0.5  # tells budgets apart that differ by 5 %, about what one block more or less costs
# A price is seen as price / (price + half) for each of these: bounded and rising, 0 at no price, each telling prices
# near its own half apart. In points of accuracy per full latency.
HALF_PRICES = (2.0, 8.0, 32.0, 128.0)


class ObjectiveEncoder(nn.Module):
    """Encodes objectives as token embeddings of the model's width.

    Sines and cosines of the budget's logarithm at geometrically spaced periods (as Vaswani et al. 2017, 3.5, for
    positions) and a few curves of the price go through a small MLP. Its output is normalised to unit root mean square
    and multiplied by a learned positive scale, so that the token is as large as the embeddings that it stands among.

    Args:
        d_model: width of the model.
        reference_ms: the budget that counts as 1, for example the median latency of the full configuration.
        embedding_scale: root mean square of the elements of the model's token embeddings, where the scale starts.
        num_frequencies: sines, and as many cosines.
        hidden_dim: width of the MLP.

    Raises:
        BudgetError: `reference_ms` is not a positive, finite number.
        ConfigError: another argument is outside its range.
    """

    def __init__(
        self,
        d_model: int,
        reference_ms: float,
        embedding_scale: float,
        *,
        num_frequencies: int = 8,
        hidden_dim: int = 64,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("num_frequencies", num_frequencies), ("hidden_dim", hidden_dim)):
            if size < 1:
                raise ConfigError(f"{name} is {size}; it must be a whole number from 1")
        if not math.isfinite(embedding_scale) or embedding_scale <= 0:
            raise ConfigError(
                f"embedding_scale is {embedding_scale}; it must be a positive, finite number: the root mean square of "
                "the model's token embeddings"
            )
        self.d_model = d_model
        self.reference_ms = check_budget_ms(reference_ms)
        periods = np.geomspace(LONGEST_PERIOD, SHORTEST_PERIOD, num_frequencies)
        self._angular_frequencies = 2 * np.pi / periods
        self._last: tuple[float, float, NDArray[np.float32]] | None = None
        self.mlp = nn.Sequential(nn.Linear(self.num_features, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, d_model))
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False)
        # As a logarithm it stays positive, and a step of the optimiser means the same at every scale.
        self.log_scale = nn.Parameter(torch.tensor(math.log(embedding_scale)))

    @property
    def num_features(self) -> int:
        """Length of one objective's features."""
        return 1 + 2 * len(self._angular_frequencies) + len(HALF_PRICES)

    def feature_array(self, objective: Objective) -> NDArray[np.float32]:
        """Fixed features of an objective, which both stages read besides the token: `(num_features,)`, read-only.

        The first follow from the budget alone, the last from the price alone.
        """
        budget_ms, price = objective.budget_ms, objective.price
        # The latency token and both stages of one request ask for the same objective.
        if self._last is not None and self._last[:2] == (budget_ms, price):
            return self._last[2]
        log_ratio = math.log(budget_ms / self.reference_ms)
        log_ratio = min(max(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO)
        angles = log_ratio * self._angular_frequencies
        curves = [price / (price + half) for half in HALF_PRICES]
        features = np.concatenate([[log_ratio], np.sin(angles), np.cos(angles), curves], dtype=np.float32)
        features.flags.writeable = False
        self._last = budget_ms, price, features
        return features

    def features(self, objectives: Sequence[Objective]) -> Tensor:
        """`feature_array` of several objectives, `(batch, num_features)`."""
        values = np.array([self.feature_array(objective) for objective in objectives]).reshape(-1, self.num_features)
        return torch.from_numpy(values).to(self.log_scale)

    def forward(self, objectives: Sequence[Objective]) -> Tensor:
        """Latency tokens of objectives, `(batch, d_model)`."""
        token: Tensor = self.norm(self.mlp(self.features(objectives)))
        return token * self.log_scale.exp()
