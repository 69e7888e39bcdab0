"""The controller: encoder of objectives and both stages, as one module that is trained and saved, and as a policy."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pacevlm.artefact import Range, Sha256, Text, typed
from pacevlm.checks import check_real
from pacevlm.config import ControllerSettings
from pacevlm.controller.array_stages import ArrayStage1, ArrayStage2, ArrayToken
from pacevlm.controller.checkpoint import JSON_NAME, read_content, read_weights, write_checkpoint
from pacevlm.controller.features import (
    NUM_THUMBNAIL_FEATURES,
    feasible_fractions,
    num_size_features,
    size_features,
    thumbnail_features,
    tier_costs,
    time_costs,
)
from pacevlm.controller.objective import ObjectiveEncoder
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.controller.sampling import best_action, mask_logits
from pacevlm.controller.stages import Stage1, Stage2
from pacevlm.errors import CheckpointError, ConfigError, DataError, IdentityError, KnobError
from pacevlm.identity import ANYTHING, Identity
from pacevlm.knobs import Compute, KnobSpace, check_budget_ms
from pacevlm.types import Objective

MAX_EMBEDDING_SCALE = 1e6
"""Largest root mean square of token embeddings, far beyond any model's."""


@dataclass(frozen=True, kw_only=True)
class ControllerConfig(ControllerSettings):
    """The settings of a controller, and what they count in.

    Attributes:
        reference_ms: the full latency, for example the median of the full configuration: the budget that counts as 1,
            and what prices of time are for.
        embedding_scale: root mean square of the elements of the model's token embeddings.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
        BudgetError: `reference_ms` is not a positive, finite number.
    """

    reference_ms: float
    embedding_scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "reference_ms", check_budget_ms(self.reference_ms))
        check_real(self, 0, MAX_EMBEDDING_SCALE, "embedding_scale", above=True)

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; raises ConfigError on unknown, missing or malformed settings."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise ConfigError(f"a controller has the settings {sorted(names)}, not {values!r}")
        return cls(**values)


class _Stored(TypedDict):
    """What `controller.json` holds."""

    model_identity: Text
    knob_space: KnobSpace
    estimator_fingerprint: Text
    d_model: Annotated[int, Range(1, 1_000_000)]
    config: ControllerConfig
    weights_sha256: Sha256


class Controller(nn.Module):
    """Decides, in two stages, which configuration of one model to run for each request.

    All methods work on batches and are differentiable in the weights, and through the latency token's output. Weights
    start from torch's global random state. They are trained where the model is: masks and latency token outputs may be
    on any device, and what the methods give is on the weights'. `ControllerPolicy` decides requests on the CPU.

    Args:
        config: the settings.
        model_identity: identity of the frozen model, whose embeddings and first block the controller reads.
        knob_space: the knobs it chooses from.
        estimator_fingerprint: fingerprint of the latency estimator whose masks and latencies it is trained with.
        d_model: width of the frozen model.
    """

    def __init__(
        self,
        config: ControllerConfig,
        *,
        model_identity: str,
        knob_space: KnobSpace,
        estimator_fingerprint: str,
        d_model: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.model_identity = model_identity
        self.knob_space = knob_space
        self.estimator_fingerprint = estimator_fingerprint
        self.d_model = d_model
        num_tiers, num_top_ks, num_num_blocks = knob_space.shape
        self.objective_encoder = ObjectiveEncoder(
            d_model,
            config.reference_ms,
            config.embedding_scale,
            num_frequencies=config.num_frequencies,
            hidden_dim=config.hidden_dim,
        )
        num_objective_features = self.objective_encoder.num_features
        num_fractions = num_tiers if config.feasible_fractions else 0
        self.stage1 = Stage1(
            num_scalars=num_objective_features + num_size_features(num_tiers) + num_fractions,
            num_thumbnail=NUM_THUMBNAIL_FEATURES if config.thumbnail else 0,
            d_model=d_model,
            num_tiers=num_tiers,
            hidden_dim=config.hidden_dim,
        )
        self.stage2 = Stage2(
            d_model=d_model,
            num_objective_features=num_objective_features,
            num_tiers=num_tiers,
            num_top_ks=num_top_ks,
            num_num_blocks=num_num_blocks,
            hidden_dim=config.hidden_dim,
            pairwise=config.pairwise,
        )

    def stage1_features(self, requests: Sequence[PolicyInput]) -> Tensor:
        """What stage 1 reads of requests, `(batch, features)`; it holds no weights, so it may be kept and reused.

        Raises:
            KnobError: a mask or the sizes belong to another knob space.
            IdentityError: a question embedding has another width than the model's.
            ImageError: an image is missing or empty.
            DataError: there are no requests.
        """
        if not requests:
            raise DataError("there are no requests; give at least one")
        return torch.from_numpy(np.stack([self.stage1_feature_array(request) for request in requests])).to(
            self.objective_encoder.log_scale
        )

    def stage1_feature_array(self, request: PolicyInput) -> NDArray[np.float32]:
        """What stage 1 reads of one request, `(features,)`; raises as `stage1_features` does."""
        self._check_request(request)
        sizes = size_features(request)
        if self.config.feasible_fractions:
            sizes += feasible_fractions(request)
        parts = [self.objective_encoder.feature_array(request.objective), np.array(sizes, dtype=np.float32)]
        if self.config.thumbnail:
            parts.append(thumbnail_features(request))
        parts += [request.view.question_embedding.detach().float().cpu().numpy(), tier_costs(request)]
        return np.concatenate(parts)

    def stage1_logits(self, features: Tensor, tier_mask: Tensor | None = None) -> Tensor:
        """Tier logits `(batch, tiers)`.

        Args:
            features: what `stage1_features` gave, `(batch, features)`.
            tier_mask: boolean `(batch, tiers)`; the logits of tiers that it rules out become -inf.

        Raises:
            DataError: shapes do not fit.
            KnobError: a row of the mask admits nothing.
        """
        expected = sum(self.stage1.split_sizes)
        if features.dim() != 2 or features.shape[1] != expected:
            raise DataError(f"stage-1 features have shape {tuple(features.shape)}; expected (batch, {expected})")
        logits: Tensor = self.stage1(features)
        return logits if tier_mask is None else mask_logits(logits, tier_mask)

    def latency_tokens(self, objectives: Sequence[Objective]) -> Tensor:
        """Latency tokens of objectives, `(batch, d_model)`."""
        tokens: Tensor = self.objective_encoder(objectives)
        return tokens

    def stage2_logits(
        self,
        latency_token_outputs: Tensor,
        requests: Sequence[PolicyInput],
        tier_indices: Sequence[int] | Tensor,
        compute_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits `(batch, top_ks, num_blocks)`; flattened, they follow `KnobSpace.compute`.

        Args:
            latency_token_outputs: the latency token behind the first block, `(batch, d_model)`, any float type.
            requests: one per row.
            tier_indices: the tier that stage 1 chose for each row, whole numbers `(batch,)`.
            compute_mask: boolean `(batch, top_ks, num_blocks)`; the logits of choices that it rules out become -inf.

        Raises:
            DataError: shapes do not fit.
            KnobError: a tier index is outside the knob space, or a row of the mask admits nothing.
        """
        objective_features = self.objective_encoder.features([request.objective for request in requests])
        tiers = torch.as_tensor(tier_indices, dtype=torch.long)
        expected = (len(objective_features), self.d_model)
        if latency_token_outputs.shape != expected or tiers.shape != expected[:1]:
            raise DataError(
                f"latency token outputs have shape {tuple(latency_token_outputs.shape)} and tier indices "
                f"{tuple(tiers.shape)}; {expected[0]} requests need {expected} and {expected[:1]}"
            )
        num_tiers = len(self.knob_space.tiers)
        if bool(((tiers < 0) | (tiers >= num_tiers)).any()):
            raise KnobError(f"tier indices {tiers.tolist()} must lie in 0..{num_tiers - 1}: {self.knob_space.tiers}")
        costs = np.stack([time_costs(request)[i] for request, i in zip(requests, tiers.tolist(), strict=True)])
        logits: Tensor = self.stage2(
            latency_token_outputs.to(objective_features),
            objective_features,
            tiers.to(objective_features.device),
            torch.from_numpy(costs).to(objective_features),
        )
        return logits if compute_mask is None else mask_logits(logits, compute_mask)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `controller.json` and `controller.safetensors`, with what this controller was trained for.

        Raises:
            StorageError: a file could not be written.
        """
        content = {
            "model_identity": self.model_identity,
            "knob_space": self.knob_space.to_dict(),
            "estimator_fingerprint": self.estimator_fingerprint,
            "d_model": self.d_model,
            "config": self.config.to_dict(),
        }
        write_checkpoint(folder, content, self.state_dict())

    @property
    def made_for(self) -> Identity:
        """The model, knob space and estimator that it was trained for."""
        return _made_for(self.model_identity, self.knob_space, self.estimator_fingerprint, self.d_model)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], wanted: Identity = ANYTHING, *, device: str | torch.device = "cpu"
    ) -> Self:
        """Read a controller and check what it was trained for, onto a device.

        The global random state stays as it is.

        Raises:
            CheckpointError: a file is missing, truncated or corrupt, or the two do not belong together.
            IdentityError: it was trained for another model, knob space or estimator; the message names which.
        """
        content = typed(_Stored, read_content(folder), os.path.join(folder, JSON_NAME), CheckpointError)
        stored_for = {
            name: content[name] for name in ("model_identity", "knob_space", "estimator_fingerprint", "d_model")
        }
        _made_for(**stored_for).check(f"the controller in {os.fspath(folder)}", wanted)
        with torch.random.fork_rng(devices=[]):
            controller = cls(content["config"], **stored_for)
        weights = read_weights(folder, content["weights_sha256"], controller.state_dict())
        controller.load_state_dict(weights)
        return controller.to(device)

    def rebased(self, reference_ms: float, estimator_fingerprint: str) -> Self:
        """The same controller with another full latency and another estimator, those of another device."""
        with torch.random.fork_rng(devices=[]):
            controller = type(self)(
                dataclasses.replace(self.config, reference_ms=reference_ms),
                model_identity=self.model_identity,
                knob_space=self.knob_space,
                estimator_fingerprint=estimator_fingerprint,
                d_model=self.d_model,
            )
        controller.load_state_dict(self.state_dict())
        return controller.to(next(self.parameters()).device)

    def _check_request(self, request: PolicyInput) -> None:
        shape = self.knob_space.shape
        if request.feasible.shape != shape or len(request.view.sizes.vision) != shape[0]:
            raise KnobError(
                f"example {request.example_id!r} has a feasible mask of shape {request.feasible.shape} and sizes of "
                f"{len(request.view.sizes.vision)} tiers, but the controller's knob space has the shape {shape}; "
                "build both for the controller's own knob space"
            )
        if request.view.question_embedding.shape != (self.d_model,):
            raise IdentityError(
                f"example {request.example_id!r} has a question embedding of shape "
                f"{tuple(request.view.question_embedding.shape)}, but the controller was made for a model of width "
                f"{self.d_model}; use the embeddings of that model"
            )


def _made_for(model_identity: str, knob_space: KnobSpace, estimator_fingerprint: str, d_model: int) -> Identity:
    return Identity(model_identity, knob_space, estimator_fingerprint, d_model=d_model)


class ControllerPolicy:
    """Runs a controller greedily: at each stage the admitted action with the highest logit, the cheapest of equal ones.

    It decides with the weights that the controller has when the policy is made. They are copied to the CPU: choosing
    knobs there takes microseconds, and of a request only the latency token and its output cross devices.
    """

    name = "controller"

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self._token = ArrayToken(controller.objective_encoder)
        self._stage1, self._stage2 = ArrayStage1(controller.stage1), ArrayStage2(controller.stage2)

    def choose_tier(self, request: PolicyInput) -> str:
        """Stage 1: the best tier in which the guardrail admits anything; raises as `Controller.stage1_features`."""
        logits = self._stage1(self.controller.stage1_feature_array(request))
        mask = np.array([tier.any() for tier in request.feasible])
        return self.controller.knob_space.tiers[best_action(logits, mask)]

    def latency_token(self, request: PolicyInput) -> Tensor:
        """The objective as one token, `(d_model,)`, single precision on the CPU."""
        return torch.from_numpy(self._token(self.controller.objective_encoder.feature_array(request.objective)))

    def choose_compute(self, request: PolicyInput, tier: str, latency_token_output: Tensor | None) -> Compute:
        """Stage 2: the best top_k and num_blocks that the guardrail admits at this tier.

        Raises:
            DataError: there is no latency token output, or it has another width than the model.
            KnobError: the tier is unknown or admits nothing, or the mask belongs to another knob space.
        """
        space = self.controller.knob_space
        if latency_token_output is None:
            raise DataError(
                "the controller reads the latency token's output, but none came; run the first block with the token "
                "that latency_token gives"
            )
        if tier not in space.tiers:
            raise KnobError(f"tier {tier!r} is not in the controller's knob space; use one of {space.tiers}")
        if request.feasible.shape != space.shape:
            raise KnobError(
                f"the feasible mask has shape {request.feasible.shape}, the controller's knob space {space.shape}; "
                "build the mask for the controller's own knob space"
            )
        tier_index = space.tiers.index(tier)
        mask = request.feasible[tier_index].reshape(-1)
        if not mask.any():
            raise KnobError(
                f"the guardrail admits nothing at tier {tier!r} for example {request.example_id!r}; run stage 2 with "
                "the tier that stage 1 gave"
            )
        if latency_token_output.shape != (self.controller.d_model,):
            raise DataError(
                f"the latency token output has shape {tuple(latency_token_output.shape)}; a model of width "
                f"{self.controller.d_model} gives ({self.controller.d_model},)"
            )
        output = latency_token_output.detach().float().cpu().numpy()
        features = self.controller.objective_encoder.feature_array(request.objective)
        logits = self._stage2(output, features, tier_index, time_costs(request)[tier_index])
        return space.compute(best_action(logits.reshape(-1), mask))
