"""What the profiler runs: requests that do all the work of a served one, with the knobs that the profiler wants."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from pacevlm.artefact import MAX_COUNT
from pacevlm.controller.policy import Controller, ControllerConfig, ControllerPolicy
from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import ProfileError, QuestionError
from pacevlm.images import ImageSource, open_picture
from pacevlm.knobs import Compute, Knobs
from pacevlm.latency.conformal import min_num_scores
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Calibration, Guardrail
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.latency.picture_fit import READ_TERMS, PictureFit, upright_kind
from pacevlm.latency.profile import Profile, collect_device_facts
from pacevlm.latency.profiler import ProfileProgress, ProfilerSettings, RunRequest, profile_requests
from pacevlm.latency.sample_pictures import make_sample_pictures
from pacevlm.latency.stage_fit import StageFit
from pacevlm.latency.stage_terms import STAGE_TERMS
from pacevlm.models.elastic import ElasticModel
from pacevlm.request.pacing import Pacing
from pacevlm.request.run import run_request
from pacevlm.types import Answer, Example, Objective

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

    def latency_token(self, request: PolicyInput) -> Tensor:
        """The policy's latency token."""
        return self.policy.latency_token(request)

    def choose_compute(self, request: PolicyInput, tier: str, latency_token_output: Tensor | None) -> Compute:
        """The forced top_k and num_blocks, after the policy's own choice has been made and dropped."""
        self.policy.choose_compute(request, tier, latency_token_output)
        return self.knobs.compute


def nominal_pacing(model: ElasticModel, picture_kinds: Collection[str] = ("memory",)) -> Pacing:
    """A guardrail with made-up coefficients, for timing only: what it costs does not depend on what it says.

    Args:
        picture_kinds: of the requests; their sizes are unlimited.
    """
    read = StageFit((1e-9,) * len(READ_TERMS), 1, 0, 0.0, 0.0)
    stages = {stage: StageFit((1e-9,) * len(terms), 1, 0, 0.0, 0.0) for stage, terms in STAGE_TERMS.items()}
    estimator = LatencyEstimator(
        model_identity=model.identity,
        knob_space=model.knob_space,
        device=collect_device_facts(model.device, model.dtype, compiler=model.adapter.compiler),
        trained_top_k=model.trained_top_k,
        stage2_after=model.stage2_after,
        stages=stages,
        pictures={kind: PictureFit(read, MAX_COUNT, MAX_COUNT, MAX_COUNT) for kind in map(upright_kind, picture_kinds)},
        max_text_tokens=MAX_COUNT,
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
    return Pacing(Guardrail(estimator, "none", {"e2e": calibration}, calibration), lengths, model.max_new_tokens)


def profiling_run(
    model: ElasticModel,
    requests: Sequence[tuple[ImageSource, str]],
    controller_config: ControllerConfig | None = None,
) -> RunRequest:
    """A callable for `profile_requests` whose requests also pay for a guardrail and a controller.

    A budget covers the controller's own time, so a profile without it would promise too much. An untrained controller
    over a nominal guardrail takes as long as a trained one.

    Args:
        requests: sources of pictures as requests give them, and questions; the profiler names them by position.
        controller_config: settings of the controller that will be trained; the defaults if None.

    Raises:
        ProfileError: there are no requests.
    """
    if not requests:
        raise ProfileError("there are no requests to profile; give at least one image and question")
    model.capture_graphs()
    kinds = {open_picture(source, model.picture_config).kind for source, _ in requests}
    pacing = nominal_pacing(model, kinds)
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
    # Far above every bound, so that any knobs may be forced on the policy; a price takes it a little longer.
    objective = Objective(1e12, price=1.0)

    def run(index: int, knobs: Knobs, num_output_tokens: int | None) -> Answer:
        source, question = requests[index]
        forced = ForcedPolicy(policy, knobs)
        return run_request(model, forced, source, question, objective, pacing, num_output_tokens=num_output_tokens)

    return run


def measure_profile(
    model: ElasticModel,
    requests: Sequence[tuple[ImageSource, str]],
    settings: ProfilerSettings,
    *,
    max_pixels: int,
    alpha: float,
    controller_config: ControllerConfig | None = None,
    path: str | os.PathLike[str] | None = None,
    keep_partial: bool = False,
    progress: Callable[[ProfileProgress], None] | None = None,
) -> Profile:
    """Time a data set's requests, and self-made pictures of all kinds and sizes with questions of all lengths.

    Args:
        requests: as many as `settings.num_requests`.
        settings: how much is measured; the number of pictures follows from what is made.
        max_pixels: of the largest picture; larger ones are promised nothing.
        alpha: how often bounds may be exceeded; pictures are timed as often as bounding the large ones takes.
        controller_config, path, keep_partial, progress: as `profiling_run` and `profile_requests` take them.

    Raises as `profile_requests` does, and:
        ProfileError: there are no requests.
    """
    pictures = make_sample_pictures(max_pixels, settings.seed)
    num_output_tokens = max(model.max_new_tokens, settings.max_output_tokens or 1)
    questions = questions_of_all_lengths(model, [question for _, question in requests], num_output_tokens)
    sampled = [(picture, question) for picture, question in zip(pictures, itertools.cycle(questions), strict=False)]
    return profile_requests(
        profiling_run(model, [*requests, *sampled], controller_config),
        model.knob_space,
        with_pictures(settings, len(sampled), alpha),
        model_identity=model.identity,
        device=model.device,
        dtype=model.dtype,
        compiler=model.adapter.compiler,
        request_ids=[
            Example("", source, question, (), picture_config=model.picture_config).content_id
            for source, question in requests
        ],
        path=path,
        keep_partial=keep_partial,
        progress=progress,
    )


def with_pictures(settings: ProfilerSettings, num_pictures: int, alpha: float) -> ProfilerSettings:
    """The settings with self-made pictures, each timed as often as bounding the large ones takes."""
    # One half of the pictures calibrates the bounds, and one half of those is large.
    samples_per_picture = math.ceil(min_num_scores(alpha) / max(1, num_pictures // 4))
    return dataclasses.replace(settings, num_pictures=num_pictures, samples_per_picture=samples_per_picture)


# Shares of the longest question that the model takes; an odd number, so that both pictures of a size get other ones.
QUESTION_SHARES = (0.02, 1.0, 0.05, 0.5, 0.1, 0.25, 0.02)


def questions_of_all_lengths(model: ElasticModel, questions: Sequence[str], num_output_tokens: int) -> list[str]:
    """Questions of a few words up to the longest that the model takes, from the words of given ones.

    Args:
        num_output_tokens: most tokens of an answer, which need positions too.
    """
    words = list(dict.fromkeys(word for question in questions for word in question.split())) or ["?"]
    room = model.adapter.max_positions - model.max_image_tokens - num_output_tokens

    def ask(num_words: int) -> str:
        return " ".join(itertools.islice(itertools.cycle(words), num_words))

    def fits(num_words: int) -> bool:
        try:
            return bool(model.adapter.encode_question(ask(num_words)).num_text_tokens <= room)
        except QuestionError:
            return False

    # Bisection: every word has a token at least.
    longest, too_many = 1, max(2, room)
    while too_many - longest > 1:
        middle = (longest + too_many) // 2
        longest, too_many = (middle, too_many) if fits(middle) else (longest, middle)
    return [ask(max(1, round(share * longest))) for share in QUESTION_SHARES]
