"""Both stages on NumPy arrays, for one request at a time.

A decision is some ten products of a small matrix with a vector. Calling torch for each takes several times longer than
computing it, and a request waits for that; training, which wants gradients and batches, uses the modules themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor, nn

from pacevlm.controller.objective import ObjectiveEncoder
from pacevlm.controller.stages import MAX_LOG_SHARPNESS, Stage1, Stage2

Array = NDArray[np.float32]
Layer = Callable[[Array], Array]


class ArrayToken:
    """`ObjectiveEncoder.forward` of one objective: its features to the latency token."""

    def __init__(self, encoder: ObjectiveEncoder) -> None:
        self._layers, self._norm = _layers(encoder.mlp), _plain_layer_norm(encoder.norm)
        self._scale = np.exp(_array(encoder.log_scale))

    def __call__(self, objective_features: Array) -> Array:
        """`(num_features,)` to `(d_model,)`."""
        return self._norm(_run(self._layers, objective_features)) * self._scale


class ArrayStage1:
    """`Stage1.forward` of one request: features `(features,)` to tier logits `(tiers,)`."""

    def __init__(self, stage: Stage1) -> None:
        self._ends = np.cumsum(stage.split_sizes)[:-1].tolist()
        self._scalars, self._question = _linear(stage.scalars), _linear_of_norm(stage.question_norm, stage.question)
        self._thumbnail = _layers(stage.thumbnail) if isinstance(stage.thumbnail, nn.Sequential) else None
        self._hidden, self._head = _layers(stage.hidden), _linear(stage.head)
        self._sharpness = _linear(stage.sharpness)

    def __call__(self, features: Array) -> Array:
        """Tier logits, `(tiers,)`."""
        first, second, third = self._ends
        combined = self._scalars(features[:first]) + self._question(features[second:third])
        if self._thumbnail is not None:
            combined += _run(self._thumbnail, features[first:second])
        hidden = _run(self._hidden, combined)
        return self._head(hidden) - _sharpness_of(self._sharpness(hidden)) * features[third:]


class ArrayStage2:
    """`Stage2.forward` of one request: the latency token's output to logits."""

    def __init__(self, stage: Stage2) -> None:
        self._output = _linear_of_norm(stage.output_norm, stage.output)
        weight = _array(stage.scalars.weight)
        num_objective_features = weight.shape[1] - stage.num_tiers
        # The tier is one-hot: its column is added, the others are not.
        self._objective_weight = np.ascontiguousarray(weight[:, :num_objective_features])
        self._tier_bias = np.ascontiguousarray(weight[:, num_objective_features:].T) + _array(stage.scalars.bias)
        self._hidden = _layers(stage.hidden)
        # A logit is the sum of its top_k's, its num_blocks' and its pair's, so one product gives them all.
        self._logits, self._sharpness = _sum_of_heads(stage), _linear(stage.sharpness)
        self._shape = stage.top_k_head.out_features, stage.num_blocks_head.out_features

    def __call__(self, latency_token_output: Array, objective_features: Array, tier_index: int, costs: Array) -> Array:
        """Logits `(top_ks, num_blocks)`.

        Args:
            latency_token_output: `(d_model,)`.
            objective_features: `(num_features,)`.
            tier_index: of the tier that stage 1 chose.
            costs: what the time of each choice costs, in accuracy, `(top_ks, num_blocks)`.
        """
        combined = self._output(latency_token_output)
        combined += self._objective_weight @ objective_features + self._tier_bias[tier_index]
        hidden = _run(self._hidden, combined)
        return self._logits(hidden).reshape(self._shape) - _sharpness_of(self._sharpness(hidden)) * costs


def _sum_of_heads(stage: Stage2) -> Layer:
    parts = []
    for kind in ("weight", "bias"):
        top_k, num_blocks = (_array(getattr(head, kind)) for head in (stage.top_k_head, stage.num_blocks_head))
        total = (top_k[:, None] + num_blocks).reshape(-1, *top_k.shape[1:])
        parts.append(total if stage.pair_head is None else total + _array(getattr(stage.pair_head, kind)))
    weight, bias = parts
    return lambda x: weight @ x + bias


def _sharpness_of(logarithm: Array) -> Array:
    return np.exp(np.minimum(logarithm, np.float32(MAX_LOG_SHARPNESS)))


def _array(weight: Tensor) -> Array:
    # A copy: who goes on training does not change a policy that was made.
    return np.array(weight.detach().float().cpu().numpy())


def _run(layers: Sequence[Layer], x: Array) -> Array:
    for layer in layers:
        x = layer(x)
    return x


def _layers(sequence: nn.Sequential) -> list[Layer]:
    layers: list[Layer] = []
    for module in sequence:
        if isinstance(module, nn.Linear):
            layers.append(_linear(module))
        elif isinstance(module, nn.GELU) and module.approximate == "none":
            layers.append(_gelu)
        else:
            raise TypeError(f"{module} has no counterpart on arrays")
    return layers


def _linear(module: nn.Linear) -> Layer:
    weights = {name: _array(weight) for name, weight in module.named_parameters()}
    weight, bias = weights["weight"], weights.get("bias")
    return (lambda x: weight @ x) if bias is None else (lambda x: weight @ x + bias)


def _plain_layer_norm(module: nn.LayerNorm) -> Layer:
    """A LayerNorm without its weight and bias."""
    eps, size = module.eps, module.normalized_shape[0]
    mean = np.full(size, 1 / size, np.float32)

    def normalise(x: Array) -> Array:
        # Products with vectors, because NumPy's own sums take longer to be called.
        centred = x - mean @ x
        return np.asarray(centred / np.float32(math.sqrt(centred @ centred / size + eps)))

    return normalise


def _linear_of_norm(norm: nn.LayerNorm, linear: nn.Linear) -> Layer:
    """A LayerNorm and a product without bias; the norm's weight and bias become the product's."""
    matrix, normalise = _array(linear.weight), _plain_layer_norm(norm)
    weight, bias = np.ascontiguousarray(matrix * _array(norm.weight)), matrix @ _array(norm.bias)
    return lambda x: weight @ normalise(x) + bias


def _gelu(x: Array) -> Array:
    return np.asarray(x * ndtr(x))
