"""What the front knows of a request before a worker has seen it: whether it can be taken, and how long it may take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pacevlm.errors import BudgetError, ConfigError
from pacevlm.evaluation.prices import PriceTable
from pacevlm.images import open_picture
from pacevlm.knobs import Knobs, KnobSpace, check_budget_ms, check_price
from pacevlm.latency.estimator import LatencyEstimator
from pacevlm.latency.guardrail import Guardrail
from pacevlm.latency.output_length import OutputLengthModel
from pacevlm.models.elastic import ElasticModel, choose_knobs, read_elastic_settings
from pacevlm.models.embedded import EMBEDDED_DIR
from pacevlm.models.folder import find_model_folder
from pacevlm.models.registry import load_adapter
from pacevlm.pacer import (
    ESTIMATOR_NAME,
    GUARDRAIL_NAME,
    OUTPUT_LENGTH_NAME,
    PRICES_NAME,
    bundle_folder,
    find_bundle_model,
    read_bundle,
)
from pacevlm.server.config import MAX_BUDGET_MS, ServeConfig
from pacevlm.server.job import Job
from pacevlm.types import BudgetKind, RequestSizes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Look:
    """What is known of one request; arrays are over the knob space, milliseconds of the machine as profiled.

    Attributes:
        budgets_ms: what it must keep, at least one.
        predicted_ms: of the whole request, for the longest answer that is expected.
        bounds_ms: by kind of budget; the whole request's always.
        least: place of the cheapest knobs that it may run with.
        most: place of the dearest.
        max_new_tokens: most tokens of its answer.
    """

    budgets_ms: dict[BudgetKind, float]
    predicted_ms: Array
    bounds_ms: dict[BudgetKind, Array]
    least: tuple[int, int, int]
    most: tuple[int, int, int]
    max_new_tokens: int

    def behind_ms(self, kind: BudgetKind) -> float:
        """What of the whole answer with the cheapest knobs lies behind what a kind of budget covers."""
        return float(self.bounds_ms["e2e"][self.least] - self.bounds_ms[kind][self.least])

    @property
    def binding(self) -> BudgetKind:
        """The kind of the tightest budget."""
        return min(self.budgets_ms, key=lambda kind: self.budgets_ms[kind] + self.behind_ms(kind))

    @property
    def whole_budget_ms(self) -> float:
        """Budget of the whole answer: so late it may be there if its cheapest knobs keep all of its budgets."""
        return self.budgets_ms[self.binding] + self.behind_ms(self.binding)


class Outlook:
    """A bundle without its model's weights; nothing in here runs a model.

    Args:
        config: of the server.

    Attributes:
        model: on the device `meta`.
        full_p50_ms: median milliseconds of the full configuration on the profiled device.
        kind: what the bundle's budgets cover.
        default_price: of time, where a request names none.
        is_embedded: whether it is the model that the package brings.

    Raises as `Pacer.from_pretrained`.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.folder = bundle_folder(config.run_dir)
        values = read_bundle(self.folder)
        settings = values["model"]
        source = find_model_folder(config.model_path or find_bundle_model(settings, self.folder))
        adapter = load_adapter(source, torch.device("meta"), torch.float32)
        space: KnobSpace = values["knob_space"]
        _, budgets, order = choose_knobs(
            adapter,
            source,
            read_elastic_settings(source),
            space,
            settings["vision_budgets"],
            settings["block_order"],
        )
        picture = values["picture"]
        if config.max_image_pixels is not None:
            picture = dataclasses.replace(picture, max_pixels=min(config.max_image_pixels, picture.max_pixels))
        self.model = ElasticModel(
            adapter,
            space,
            budgets,
            order,
            settings["identity"],
            stage2_after=settings["stage2_after"],
            max_new_tokens=settings["max_new_tokens"],
            picture_config=picture,
        )
        # Whether they belong together and to this device, the worker checks.
        self.estimator = LatencyEstimator.load(self.folder / ESTIMATOR_NAME)
        self.guardrail = Guardrail.load(self.folder / GUARDRAIL_NAME, self.estimator)
        self.lengths = (
            OutputLengthModel.load(self.folder / OUTPUT_LENGTH_NAME) if OUTPUT_LENGTH_NAME in values["files"] else None
        )
        prices = PriceTable.load(self.folder / PRICES_NAME) if PRICES_NAME in values["files"] else None
        self.default_price = 0.0 if prices is None else prices.default_price
        self.is_embedded = source == EMBEDDED_DIR
        self.full_p50_ms: float = values["full_p50_ms"]
        self.kind: BudgetKind = values["budget_kind"]
        self._scores: Array | None = None

    @property
    def knob_space(self) -> KnobSpace:
        """Configurations that can be asked for."""
        return self.model.knob_space

    @property
    def max_positions(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self.model.adapter.max_positions

    @property
    def kinds(self) -> tuple[BudgetKind, ...]:
        """Budgets that can be asked for."""
        return tuple(self.guardrail.calibrations)

    @property
    def default_budget_ms(self) -> float:
        """Budget of a request that names none."""
        return self.config.default_budget_ms or 4.0 * self.full_p50_ms

    def know_lengths(self, scores: Array) -> None:
        """Take over what every text token adds to the bound on the answer's length, `(vocabulary,)`.

        The bound is linear in the mean embedding of the question, so that these numbers, which a worker has made of the
        token embeddings, stand for them.
        """
        if self.lengths is not None:
            self.lengths = dataclasses.replace(self.lengths, weights=(1.0,))
            self._scores = scores

    @cached_property
    def lightest_ms(self) -> tuple[float, float]:
        """What no request with a picture takes less than, with its cheapest knobs: predicted, and at most."""
        model = self.model
        (least, _), one = self._knobs(None), np.array([1])
        sizes = [RequestSizes(model.vision_sizes(1, 1), num_text_tokens=1, num_pixels=1)]
        place = (0, *model.knob_space.place(least))
        bounds_ms = self.guardrail.upper_bounds_many_ms(sizes, one)
        return float(self.estimator.predict_many(sizes, one)[place]), float(bounds_ms[place])

    def look(self, job: Job) -> Look:
        """Check a request and bound how long it takes.

        Raises:
            ImageError, QuestionError: the input cannot be used.
            KnobError: the knobs are not in the knob space.
            BudgetError: a budget is no positive number up to an hour, or nothing is promised for such an input.
            ConfigError: the price is no number in its range, a kind of budget is unknown, or the answer's most tokens
                are no whole number from 1.
        """
        model, space = self.model, self.knob_space
        budgets_ms = self._check_budgets(job)
        if job.price is not None:
            check_price(job.price)
        most_tokens = model.max_new_tokens if job.max_new_tokens is None else job.max_new_tokens
        if isinstance(most_tokens, bool) or not isinstance(most_tokens, int) or most_tokens < 1:
            raise ConfigError(f"max_new_tokens is {most_tokens!r}; it must be a whole number of at least 1")
        most_tokens = min(most_tokens, model.max_new_tokens)
        if job.knobs is not None:
            space.index(job.knobs)
        picture = None if job.image is None else open_picture(job.image, model.picture_config)
        prompt = model.adapter.encode_question(job.question, picture is not None)
        sizes = model.request_sizes(picture, prompt, most_tokens)
        beyond = self.estimator.beyond(sizes)
        if beyond is not None:
            raise BudgetError(f"nothing can be promised: {beyond}")
        num_tokens = np.minimum(self._num_tokens(prompt.text_ids, sizes.num_text_tokens), most_tokens)
        kinds: set[BudgetKind] = {"e2e", *budgets_ms}
        bounds_ms = {kind: self.guardrail.upper_bounds_many_ms([sizes], num_tokens, kind)[0] for kind in kinds}
        predicted_ms = self.estimator.predict_many([sizes], num_tokens, "e2e")[0]
        least, most = self._knobs(job.knobs)
        return Look(budgets_ms, predicted_ms, bounds_ms, space.place(least), space.place(most), most_tokens)

    def _check_budgets(self, job: Job) -> dict[BudgetKind, float]:
        if not job.budgets_ms:
            return {"e2e": self.default_budget_ms}
        for kind, budget_ms in job.budgets_ms.items():
            if kind not in self.kinds:
                raise ConfigError(f"budget_kind is {kind!r}; this server promises {' and '.join(self.kinds)}")
            if check_budget_ms(budget_ms) > MAX_BUDGET_MS:
                raise BudgetError(f"budget_ms is {budget_ms:g}; it must be at most {MAX_BUDGET_MS:g}, which is an hour")
        return dict(job.budgets_ms)

    def _num_tokens(self, text_ids: Any, num_text_tokens: int) -> NDArray[np.int64]:
        """Bound on the answer's tokens, `(1,)`."""
        if self.lengths is None or self._scores is None:
            return np.array([self.model.max_new_tokens])
        text = None if self.lengths.text_weight is None else [num_text_tokens]
        return self.lengths.upper_many([[float(self._scores[list(text_ids)].mean())]], text)

    def _knobs(self, forced: Knobs | None) -> tuple[Knobs, Knobs]:
        """The cheapest and the dearest knobs that a request may run with."""
        space = self.knob_space
        if forced is not None:
            return forced, forced
        return (space.full if self.config.policy == "full" else space.cheapest), space.full
