"""Competitors of `LatencyEstimator`: a calibrated roofline, linear regression, a random forest and a small network.

Each is fitted by `fit(samples, trained_top_k, stage2_after)` and answers `predict` and `predict_tpot`, so that one
comparison runs them all on the same splits. All predict the time to the first token and the decode time per token;
end to end is the first plus the second for every token after the first, output lengths known.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from pacevlm.errors import ConfigError, ProfileError
from pacevlm.latency.profile import Sample
from pacevlm.latency.stage_fit import MIN_MS
from pacevlm.types import BudgetKind

if TYPE_CHECKING:
    from pacevlm.models.elastic import ElasticModel
    from pacevlm.models.molmoe.configuration_molmoe import MolmoEConfig

Array = NDArray[np.float64]


class FittedModel(Protocol):
    """What every model of this file gives once it is fitted."""

    def predict(self, samples: Sequence[Sample], kind: BudgetKind = "e2e") -> Array:
        """Milliseconds of measured requests with the knobs and output lengths they had, shape `(samples,)`."""

    def predict_tpot(self, samples: Sequence[Sample]) -> Array:
        """Mean decode milliseconds per token after the first, shape `(samples,)`."""


class LatencyModel(Protocol):
    """A way to predict latencies that can be fitted to measured requests."""

    def fit(self, samples: Sequence[Sample], trained_top_k: int, stage2_after: int) -> FittedModel:
        """Fit to measured requests.

        Args:
            trained_top_k: experts per token that the model was trained with.
            stage2_after: number of leading blocks that always run, at `trained_top_k`.

        Raises:
            ProfileError: there are no samples, or none with more than one output token.
        """


# Roofline ------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Floating-point operations and bytes moved, numbers or arrays of shape `(samples,)`."""

    flops: Any
    num_bytes: Any

    def plus(self, *others: Work) -> Work:
        """The work of all together."""
        return Work(
            self.flops + sum(other.flops for other in others), self.num_bytes + sum(other.num_bytes for other in others)
        )


class Launch(NamedTuple):
    """A block of layers that is launched `count` times, each time with the same work."""

    count: Any
    work: Work


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """The widths of a mixture-of-experts vision-language model that its work is counted from.

    Every linear map reads its weights and its input and writes its output once; attention reads queries, keys and
    values and writes its result once, never its scores (Dao et al., "FlashAttention", 2022). Element-wise work and
    biases are left out. All causal scores are counted, as a masked kernel computes them.

    Attributes:
        d_model: width of the decoder, and of all its query heads together.
        kv_dim: width of all key heads together, which is that of all value heads.
        expert_dim: inner width of an expert.
        vocab_size: rows of the output head.
        vision_width: width of the vision tower.
        vision_attention_dim: width of all heads of the tower together.
        vision_mlp_dim: inner width of the tower's feed-forward layers.
        vision_blocks: blocks of the tower that run.
        vision_levels: blocks of the tower whose outputs are concatenated before pooling.
        num_patches: patches per crop, class token not counted.
        patch_dim: numbers per patch.
        num_cells: image features per crop after pooling.
        window: patches that are pooled into one feature.
        projector_dim: inner width of the projector from tower to decoder.
        bytes_per_number: of weights and activations, for example 4 for float32.

    Raises:
        ConfigError: a size is not a whole number from 1.
    """

    d_model: int
    kv_dim: int
    expert_dim: int
    num_experts: int
    vocab_size: int
    vision_width: int
    vision_attention_dim: int
    vision_mlp_dim: int
    vision_blocks: int
    vision_levels: int
    num_patches: int
    patch_dim: int
    num_cells: int
    window: int
    projector_dim: int
    bytes_per_number: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name} is {value!r}; it must be a whole number from 1")

    @classmethod
    def from_config(cls, config: MolmoEConfig, bytes_per_number: int = 4) -> ModelCosts:
        """The widths of a MolmoE model."""
        vision = config.vision_backbone
        side, depth = config.patches_per_side, vision["image_num_layers"]
        # A side that the window does not divide is padded.
        cells = -(-side // config.image_pooling_h) * -(-side // config.image_pooling_w)
        return cls(
            d_model=config.d_model,
            kv_dim=config.num_key_value_heads * config.head_dim_,
            expert_dim=config.expert_dim,
            num_experts=config.moe_num_experts,
            vocab_size=config.num_embeddings,
            vision_width=vision["image_emb_dim"],
            vision_attention_dim=vision["image_num_heads"] * vision["image_head_dim"],
            vision_mlp_dim=vision["image_mlp_dim"],
            vision_blocks=max(layer % depth for layer in config.vit_layers) + 1,
            vision_levels=len(config.vit_layers),
            num_patches=side**2,
            patch_dim=3 * vision["image_patch_size"] ** 2,
            num_cells=cells,
            window=config.image_pooling_h * config.image_pooling_w,
            projector_dim=config.expert_dim,
            bytes_per_number=bytes_per_number,
        )

    @classmethod
    def from_model(cls, model: ElasticModel) -> ModelCosts:
        """The widths of a loaded MolmoE model, and the size of its numbers."""
        return cls.from_config(model.adapter.config, model.dtype.itemsize)

    def vision(self, crops: Array) -> list[Launch]:
        """What encoding that many crops, shape `(samples,)`, launches; nothing where there are none."""
        any_crops = (crops > 0).astype(np.float64)
        width, inner = self.vision_width, self.vision_attention_dim
        rows, cells = crops * (self.num_patches + 1), crops * self.num_cells
        block = self._linear(rows, width, 3 * inner).plus(
            self._attention(rows, self.num_patches + 1, rows, inner, inner),
            self._linear(rows, inner, width),
            self._linear(rows, width, self.vision_mlp_dim),
            self._linear(rows, self.vision_mlp_dim, width),
        )
        features = width * self.vision_levels
        connector = self._linear(cells, features, inner).plus(
            self._linear(cells * self.window, features, 2 * inner),
            self._attention(cells, self.window, cells * self.window, inner, inner),
            self._linear(cells, inner, width),
            self._linear(cells, width, 2 * self.projector_dim),
            self._linear(cells, self.projector_dim, self.d_model),
        )
        return [
            Launch(any_crops, self._linear(crops * self.num_patches, self.patch_dim, width)),
            Launch(any_crops * self.vision_blocks, block),
            Launch(any_crops, connector),
        ]

    def decoder_block(self, tokens: Any, context: Any, top_k: Any) -> Work:
        """The work of one decoder block, all arguments numbers or of shape `(samples,)`.

        The weights of each expert that any token takes are read once; how many those are is the expectation under
        uniform routing, `experts * (1 - (1 - top_k / experts) ** tokens)`.

        Args:
            tokens: tokens that run through the block.
            context: keys that each of them attends to.
            top_k: experts per token.
        """
        d, e = self.d_model, self.expert_dim
        used_experts = self.num_experts * (1.0 - (1.0 - top_k / self.num_experts) ** tokens)
        expert_numbers = used_experts * 3 * d * e + tokens * top_k * (2 * d + 3 * e)
        experts = Work(6.0 * tokens * top_k * d * e, expert_numbers * self.bytes_per_number)
        return self._linear(tokens, d, d + 2 * self.kv_dim).plus(
            self._attention(tokens, context, context, d, self.kv_dim),
            self._linear(tokens, d, d),
            self._linear(tokens, d, self.num_experts),
            experts,
        )

    def decoder(
        self, tokens: Array, context: Array, top_k: Array, num_blocks: Array, trained_top_k: int, stage2_after: int
    ) -> list[Launch]:
        """What one pass through the decoder launches: leading blocks, later ones, and the head for the last token.

        Args:
            tokens, context: see `decoder_block`.
            top_k, num_blocks: the knobs, shape `(samples,)`.
        """
        return [
            Launch(float(stage2_after), self.decoder_block(tokens, context, float(trained_top_k))),
            Launch(num_blocks - stage2_after, self.decoder_block(tokens, context, top_k)),
            Launch(1.0, self._linear(1.0, self.d_model, self.vocab_size)),
        ]

    def _linear(self, rows: Any, fan_in: int, fan_out: int) -> Work:
        numbers = fan_in * fan_out + rows * (fan_in + fan_out)
        return Work(2.0 * rows * fan_in * fan_out, numbers * self.bytes_per_number)

    def _attention(self, queries: Any, keys_per_query: Any, keys: Any, dim: int, kv_dim: int) -> Work:
        numbers = 2 * queries * dim + 2 * keys * kv_dim
        return Work(4.0 * queries * keys_per_query * dim, numbers * self.bytes_per_number)


@dataclass(frozen=True, slots=True)
class FittedRoofline:
    """A roofline with its free parameters.

    Attributes:
        flops_per_ms: highest arithmetic rate.
        bytes_per_ms: highest memory bandwidth.
        overhead_ms: what every launched block costs besides.
        constant_ms: what every request costs besides; the preparation of the image is in it.
    """

    costs: ModelCosts
    trained_top_k: int
    stage2_after: int
    flops_per_ms: float
    bytes_per_ms: float
    overhead_ms: float
    constant_ms: float

    def predict(self, samples: Sequence[Sample], kind: BudgetKind = "e2e") -> Array:
        """See `FittedModel`; raises ConfigError if `kind` is neither `e2e` nor `ttft`."""
        prefill = _prefill_launches(self.costs, samples, self.trained_top_k, self.stage2_after)
        ttft_ms = self._time_ms(prefill) + self.constant_ms
        return _combine(samples, kind, ttft_ms, self.predict_tpot(samples))

    def predict_tpot(self, samples: Sequence[Sample]) -> Array:
        """See `FittedModel`."""
        return self._time_ms(_decode_launches(self.costs, samples, self.trained_top_k, self.stage2_after))

    def _time_ms(self, launches: Sequence[Launch]) -> Array:
        return _roofline_ms(launches, self.flops_per_ms, self.bytes_per_ms, self.overhead_ms)


@dataclass(frozen=True, slots=True)
class RooflineModel:
    """A roofline: each block takes as long as its arithmetic or its memory traffic, whichever is longer.

    Work is counted from the model's widths; rate, bandwidth, overhead per launched block and a constant are
    calibrated by least squares on the log error of time to first token and of decode time per token together.

    Method: Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
    Architectures", 2009.
    """

    costs: ModelCosts

    def fit(self, samples: Sequence[Sample], trained_top_k: int, stage2_after: int) -> FittedRoofline:
        """See `LatencyModel`."""
        ttft_ms, tpot_ms, decoded = _measured(samples)
        prefill = _prefill_launches(self.costs, samples, trained_top_k, stage2_after)
        decode = _decode_launches(self.costs, decoded, trained_top_k, stage2_after)
        measured = np.log(np.concatenate([ttft_ms, tpot_ms]))

        def residuals(log_parameters: Array) -> Array:
            *parameters, constant_ms = np.exp(log_parameters)
            times_ms = [_roofline_ms(prefill, *parameters) + constant_ms, _roofline_ms(decode, *parameters)]
            return np.log(np.concatenate(times_ms)) - measured

        # All of prefill bound by arithmetic and all of decode by memory, with overheads of a few per cent. The kink
        # where a block's bound changes makes local minima, so that rate and bandwidth also start above those.
        flops = sum(launch.count * launch.work.flops for launch in prefill)
        num_bytes = sum(launch.count * launch.work.num_bytes for launch in decode)
        start = np.log(
            [
                np.median(flops / ttft_ms),
                np.median(num_bytes / tpot_ms),
                0.05 * np.median(tpot_ms / sum(launch.count for launch in decode)),
                0.05 * np.median(ttft_ms),
            ]
        )
        bounds = (start - 25.0, start + 25.0)  # what the samples do not determine stays a finite number
        fits = [
            least_squares(residuals, start + np.log([rate, bandwidth, 1.0, 1.0]), bounds=bounds, x_scale="jac")
            for rate, bandwidth in itertools.product((1.0, 2.0, 5.0), repeat=2)
        ]
        best = min(fits, key=lambda result: float(result.cost))
        return FittedRoofline(self.costs, trained_top_k, stage2_after, *np.exp(best.x).tolist())


def _roofline_ms(launches: Sequence[Launch], flops_per_ms: float, bytes_per_ms: float, overhead_ms: float) -> Array:
    """Time of all launches together, shape `(samples,)`."""
    total_ms: Array = sum(
        launch.count
        * (np.maximum(launch.work.flops / flops_per_ms, launch.work.num_bytes / bytes_per_ms) + overhead_ms)
        for launch in launches
    )
    return total_ms


def _prefill_launches(
    costs: ModelCosts, samples: Sequence[Sample], trained_top_k: int, stage2_after: int
) -> list[Launch]:
    columns = _columns(samples)
    tokens = columns["prompt_tokens"]
    decoder = costs.decoder(tokens, tokens, columns["top_k"], columns["num_blocks"], trained_top_k, stage2_after)
    return [*costs.vision(columns["crops"]), *decoder]


def _decode_launches(
    costs: ModelCosts, samples: Sequence[Sample], trained_top_k: int, stage2_after: int
) -> list[Launch]:
    columns = _columns(samples)
    one = np.ones(len(samples))
    # Decode step i attends to the prompt and i generated tokens, i = 1..steps: this is the mean over the steps.
    context = columns["prompt_tokens"] + 0.5 * columns["output_tokens"]
    return costs.decoder(one, context, columns["top_k"], columns["num_blocks"], trained_top_k, stage2_after)


# Regressions ---------------------------------------------------------------------------------------------------------

FEATURES = ("crops", "prompt_tokens", "text_tokens", "pixels", "top_k", "num_blocks", "output_tokens")
# The first token cannot wait for those after it: their number would be noise to its time.
TTFT_FEATURES = FEATURES[:-1]


@dataclass(frozen=True, slots=True)
class FittedRegression:
    """Two fitted regressors of raw features, one per target.

    Attributes:
        ttft: predicts the time to the first token in milliseconds from `TTFT_FEATURES`.
        tpot: predicts decode milliseconds per token from `FEATURES`.
        least_ttft_ms, least_tpot_ms: the smallest times that were measured; a lower prediction, such as a negative
            one, is raised to these.
    """

    ttft: Any
    tpot: Any
    least_ttft_ms: float
    least_tpot_ms: float

    def predict(self, samples: Sequence[Sample], kind: BudgetKind = "e2e") -> Array:
        """See `FittedModel`; raises ConfigError if `kind` is neither `e2e` nor `ttft`."""
        ttft_ms = _predict(self.ttft, samples, TTFT_FEATURES, self.least_ttft_ms)
        return _combine(samples, kind, ttft_ms, self.predict_tpot(samples))

    def predict_tpot(self, samples: Sequence[Sample]) -> Array:
        """See `FittedModel`."""
        return _predict(self.tpot, samples, FEATURES, self.least_tpot_ms)


@dataclass(frozen=True, slots=True)
class LinearModel:
    """Ordinary linear regression on raw features.

    Attributes:
        relative: weight the squared error by the inverse square of the time, as the estimator's own fit does.
    """

    relative: bool = False

    def fit(self, samples: Sequence[Sample], trained_top_k: int, stage2_after: int) -> FittedRegression:
        """See `LatencyModel`; the model's own numbers are not used."""
        return _fit_regressions(LinearRegression(), LinearRegression(), samples, self.relative)


@dataclass(frozen=True, slots=True)
class ForestModel:
    """A random forest on raw features.

    Method: Breiman, "Random Forests", 2001.

    Attributes:
        relative: weight the squared error by the inverse square of the time, as the estimator's own fit does.
    """

    num_trees: int = 300
    seed: int = 0
    relative: bool = False

    def fit(self, samples: Sequence[Sample], trained_top_k: int, stage2_after: int) -> FittedRegression:
        """See `LatencyModel`; the model's own numbers are not used."""
        ttft, tpot = (RandomForestRegressor(self.num_trees, random_state=self.seed, n_jobs=1) for _ in range(2))
        return _fit_regressions(ttft, tpot, samples, self.relative)


@dataclass(frozen=True, slots=True)
class MLPModel:
    """A small fully connected network on standardised features and standardised log times.

    Training ends when the loss no longer falls; should `max_epochs` end it first, a ConvergenceWarning is shown, even
    where warnings are errors.

    Attributes:
        hidden: widths of the hidden layers.
        decay: strength of the squared penalty on weights.
    """

    hidden: tuple[int, ...] = (64, 64)
    decay: float = 1e-3
    max_epochs: int = 5000
    seed: int = 0

    def fit(self, samples: Sequence[Sample], trained_top_k: int, stage2_after: int) -> FittedRegression:
        """See `LatencyModel`; the model's own numbers are not used."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", ConvergenceWarning)
            return _fit_regressions(self._regressor(), self._regressor(), samples, relative=False)

    def _regressor(self) -> Any:
        network = MLPRegressor(
            hidden_layer_sizes=self.hidden,
            alpha=self.decay,
            learning_rate_init=3e-3,
            max_iter=self.max_epochs,
            n_iter_no_change=50,
            tol=1e-5,
            random_state=self.seed,
        )
        to_target = make_pipeline(FunctionTransformer(np.log, np.exp), StandardScaler())
        return TransformedTargetRegressor(make_pipeline(StandardScaler(), network), transformer=to_target)


def _fit_regressions(ttft: Any, tpot: Any, samples: Sequence[Sample], relative: bool) -> FittedRegression:
    ttft_ms, tpot_ms, decoded = _measured(samples)
    for regressor, rows, names, target_ms in (
        (ttft, samples, TTFT_FEATURES, ttft_ms),
        (tpot, decoded, FEATURES, tpot_ms),
    ):
        weights = {"sample_weight": target_ms**-2} if relative else {}
        regressor.fit(_features(rows, names), target_ms, **weights)
    return FittedRegression(ttft, tpot, float(ttft_ms.min()), float(tpot_ms.min()))


def _predict(regressor: Any, samples: Sequence[Sample], names: Sequence[str], least_ms: float) -> Array:
    if not samples:
        return np.zeros(0)
    return np.maximum(np.asarray(regressor.predict(_features(samples, names)), np.float64), least_ms)


# Every competitor by name, with its default settings; the roofline alone needs to know the model.
MODELS: dict[str, Callable[[ElasticModel], LatencyModel]] = {
    "roofline": lambda model: RooflineModel(ModelCosts.from_model(model)),
    "linear": lambda _: LinearModel(),
    "forest": lambda _: ForestModel(),
    "mlp": lambda _: MLPModel(),
}


# What all models share -----------------------------------------------------------------------------------------------


def _columns(samples: Sequence[Sample]) -> dict[str, Array]:
    """Every feature of measured requests by name, each of shape `(samples,)`."""
    rows = [
        (
            sample.num_units,
            sample.num_prompt_tokens,
            sample.num_text_tokens,
            sample.num_pixels,
            sample.knobs.top_k,
            sample.knobs.num_blocks,
            sample.num_output_tokens,
        )
        for sample in samples
    ]
    table = np.array(rows, dtype=np.float64).reshape(len(samples), len(FEATURES))
    return dict(zip(FEATURES, table.T, strict=True))


def _features(samples: Sequence[Sample], names: Sequence[str]) -> Array:
    """Shape `(samples, names)`."""
    columns = _columns(samples)
    return np.stack([columns[name] for name in names], axis=1)


def _measured(samples: Sequence[Sample]) -> tuple[Array, Array, list[Sample]]:
    """Time to first token, mean decode time per token, and the samples that the second is of: those that decoded."""
    if not samples:
        raise ProfileError("there are no samples to fit")
    decoded = [sample for sample in samples if sample.stages.decode_ms]
    if not decoded:
        raise ProfileError("no sample has more than one output token; measure longer answers")
    ttft_ms = np.array([sample.stages.ttft_ms for sample in samples])
    tpot_ms = np.array([np.mean(sample.stages.decode_ms) for sample in decoded])
    return np.maximum(ttft_ms, MIN_MS), np.maximum(tpot_ms, MIN_MS), decoded


def _combine(samples: Sequence[Sample], kind: BudgetKind, ttft_ms: Array, tpot_ms: Array) -> Array:
    if kind not in ("e2e", "ttft"):
        raise ConfigError(f"budget kind is {kind!r}; use 'e2e' (whole request) or 'ttft' (time to the first token)")
    if kind == "ttft":
        return ttft_ms
    return ttft_ms + tpot_ms * (np.array([sample.num_output_tokens for sample in samples], np.float64) - 1.0)
