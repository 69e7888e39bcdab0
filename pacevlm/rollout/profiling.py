"""What the profiler runs: requests that do all the work of a served one, with the knobs that the profiler wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pacevlm.controller.policy import Controller, ControllerConfig, ControllerPolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import ProfileError
from pacevlm.images import ImageSource
from pacevlm.knobs import Knobs
from pacevlm.latency.estimator import STAGE_TERMS, LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.profile import collect_device_facts
from pacevlm.latency.stage_fit import StageFit
from pacevlm.models.elastic import ElasticModel, RequestResult
from pacevlm.rollout.request import Pacing, run_with_policy

NOMINAL_MS = 1.0


class ForcedPolicy:
    """Asks a policy at both stages, as a served request would, and then runs the knobs it is told to."""

    name = "forced"

    def __init__(self, policy: ControllerPolicy, knobs: Knobs) -> None:
        self.policy, self.knobs = policy, knobs

    def choose_tier(self, request: PolicyInput) -> str:
        """The forced tier, after the policy's own choice has been made and dropped."""
        self.policy.choose_tier(request)
        return self.knobs.tier

    def latency_token(self, budget_ms: float) -> Tensor:
        """The policy's latency token."""
        return self.policy.latency_token(budget_ms)

    def choose_compute(self, request: PolicyInput, tier: str, latency_token_output: Tensor | None) -> tuple[int, int]:
        """The forced top_k and num_blocks, after the policy's own choice has been made and dropped."""
        self.policy.choose_compute(request, tier, latency_token_output)
        return self.knobs.top_k, self.knobs.num_blocks


def nominal_pacing(model: ElasticModel) -> Pacing:
    """A guardrail with made-up coefficients, for timing only: what it costs does not depend on what it says."""
    stages = {stage: StageFit((1e-9,) * len(terms), 1, 0, 0.0, 0.0) for stage, terms in STAGE_TERMS.items()}
    estimator = LatencyEstimator(
        model_identity=model.identity,
        knob_space=model.knob_space,
        device=collect_device_facts(model.device, model.dtype),
        trained_top_k=model.trained_top_k,
        stage2_after=model.stage2_after,
        stages=stages,
    )
    calibration = Calibration(alpha=0.5, log_margins={}, fallback_log_margin=0.0, num_samples={})
    lengths = OutputLengthModel(
        model_identity=model.identity,
        weights=(0.0,) * model.d_model,
        text_weight=None,
        bias=1.0,
        correction=0,
        max_new_tokens=model.max_new_tokens,
        alpha=0.5,
    )
    return Pacing(Guardrail(estimator, "none", {"e2e": calibration}), lengths, model.max_new_tokens)


def profiling_run(
    model: ElasticModel,
    requests: Sequence[tuple[ImageSource, str]],
    controller_config: ControllerConfig | None = None,
) -> Callable[[int, Knobs, int | None], RequestResult]:
    """A callable for `profile_requests` whose requests also pay for a guardrail and a controller.

    A budget covers the controller's own time, so a profile without it would promise too much. An untrained controller
    over a nominal guardrail takes as long as a trained one.

    Args:
        requests: images and questions; the profiler names them by position.
        controller_config: settings of the controller that will be trained; the defaults if None.

    Raises:
        ProfileError: there are no requests.
    """
    if not requests:
        raise ProfileError("there are no requests to profile; give at least one image and question")
    model.capture_decode()
    pacing = nominal_pacing(model)
    config = controller_config or ControllerConfig(reference_ms=NOMINAL_MS, embedding_scale=1.0)
    with torch.random.fork_rng(devices=[]):
        controller = Controller(
            config,
            model_identity=model.identity,
            knob_space=model.knob_space,
            estimator_fingerprint=pacing.guardrail.estimator.fingerprint,
            d_model=model.d_model,
        )
    policy = ControllerPolicy(controller.eval())
    # Far above every bound, so that any knobs may be forced on the policy.
    budget_ms = 1e12

    def run(index: int, knobs: Knobs, num_output_tokens: int | None) -> RequestResult:
        image, question = requests[index]
        forced = ForcedPolicy(policy, knobs)
        paced = run_with_policy(model, forced, image, question, budget_ms, pacing, num_output_tokens=num_output_tokens)
        return paced.result

    return run
