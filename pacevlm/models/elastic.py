"""A frozen model made elastic: checkpoint, knob space and block order, and one request from image to answer."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor

from pacevlm.artefact import Range, Text, typed
from pacevlm.checks import as_int
from pacevlm.devices import keep_memory, resolve_device
from pacevlm.errors import CheckpointError, ConfigError, KnobError, QuestionError
from pacevlm.files import read_json, sha256_file, write_json_atomic
from pacevlm.images import ImageSource, Picture, PictureConfig, open_picture
from pacevlm.knobs import Knobs, KnobSpace
from pacevlm.models.adapter import Adapter, Prompt
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.decoder import ElasticDecoder
from pacevlm.models.embedded import EMBEDDED_DIR
from pacevlm.models.stage_clock import StageClock
from pacevlm.models.static_decode import StaticDecode
from pacevlm.types import RequestSizes, StageTimes, VisionSizes

ELASTIC_FILE = "elastic.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
DEFAULT_MAX_CROPS = {"low": 2, "medium": 6, "high": 12}


# More crops, or longer answers, than any model has positions for.
MaxCrops = dict[Text, Annotated[int, Range(1, 10_000)]]
NewTokens = Annotated[int, Range(1, 1_000_000)]


@dataclass(frozen=True)
class RequestView:
    """What is known of a request before any pixel reaches the vision encoder.

    Attributes:
        question_embedding: mean of the prompt's token embeddings, `(d_model,)`, float32 on the CPU.
        sizes: crops and tokens per tier.
        image_size: `(height, width)` in pixels.
        picture: the picture itself, for an optional thumbnail.
    """

    question_embedding: Tensor
    sizes: RequestSizes
    image_size: tuple[int, int]
    picture: Picture


@dataclass(frozen=True)
class RequestResult:
    """An answer, the knobs it was made with, and what it took.

    `num_output_tokens` counts generated tokens, end-of-text included.
    """

    answer: str
    token_ids: tuple[int, ...]
    knobs: Knobs
    num_crops: int
    num_image_tokens: int
    num_text_tokens: int
    num_pixels: int
    picture_kind: str
    num_bytes: int
    num_output_tokens: int
    times: StageTimes


class ElasticModel:
    """A frozen multimodal mixture-of-experts model whose tier, top_k and num_blocks are chosen per request.

    Args:
        adapter: the model behind the adapter interface.
        knob_space: configurations to choose from.
        max_crops: most high-resolution crops of every tier.
        order: which blocks each num_blocks keeps.
        identity: fingerprint of weights and settings; artefacts made for one identity are refused by another.
        stage2_after: blocks that always run before stage 2 decides.
        max_new_tokens: most generated tokens per answer.
        picture_config: how pictures are read.

    Raises:
        KnobError: the model cannot run a value of the knob space, or a tier has no crop limit.
        ConfigError: a crop limit or max_new_tokens is not a whole number of at least 1.
    """

    def __init__(
        self,
        adapter: Adapter[Any, Any],
        knob_space: KnobSpace,
        max_crops: Mapping[str, int],
        order: BlockOrder,
        identity: str,
        *,
        stage2_after: int = 1,
        max_new_tokens: int = 8,
        picture_config: PictureConfig | None = None,
    ) -> None:
        if not 1 <= stage2_after < adapter.num_blocks:
            raise KnobError(f"stage2_after is {stage2_after}; it must be 1..{adapter.num_blocks - 1}")
        knob_space.check_model(
            max_top_k=adapter.num_experts, max_num_blocks=adapter.num_blocks, min_num_blocks=stage2_after
        )
        if order.num_blocks != adapter.num_blocks:
            raise KnobError(f"the block order is of a model with {order.num_blocks} blocks, not {adapter.num_blocks}")
        missing = [tier for tier in knob_space.tiers if tier not in max_crops]
        if missing:
            raise KnobError(f"tiers {missing} have no crop limit; known are {dict(max_crops)}")
        limits = [_whole(f"crop limit of tier {tier!r}", max_crops[tier]) for tier in knob_space.tiers]
        if limits != sorted(limits):
            raise KnobError(f"crop limits {dict(max_crops)} must not fall from a cheaper tier to a dearer one")
        order.check_space(knob_space.num_blocks, stage2_after)
        for num_blocks in knob_space.num_blocks:
            order.kept(num_blocks)
        self.adapter, self.knob_space, self.order = adapter, knob_space, order
        self.max_crops = dict(zip(knob_space.tiers, limits, strict=True))
        self.identity = identity
        self.picture_config = picture_config or PictureConfig()
        self.stage2_after = stage2_after
        self.max_new_tokens = _whole("max_new_tokens", max_new_tokens)
        # A GPU waits for each small kernel of a decode step to be launched, unless a graph launches them together; only
        # CUDA has graphs.
        static = StaticDecode(adapter, order, stage2_after) if adapter.device.type == "cuda" else None
        self.decoder = ElasticDecoder(adapter, order, stage2_after, static)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.adapter.d_model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.adapter.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.adapter.dtype

    @property
    def trained_top_k(self) -> int:
        """Experts per token that the checkpoint was trained with."""
        return self.adapter.trained_top_k

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = "embedded",
        *,
        knob_space: KnobSpace | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        stage2_after: int = 1,
        policy: str = "importance",
        max_crops: Mapping[str, int] | None = None,
        max_new_tokens: int | None = None,
        picture_config: PictureConfig | None = None,
    ) -> ElasticModel:
        """Load a MolmoE checkpoint and the settings in its `elastic.json`, if it has one.

        Args:
            path: a directory written by `save_pretrained`, or `embedded` for the model inside the package.
            knob_space: configurations; those of `elastic.json` or the defaults if None.
            device: where to put the weights; see `resolve_device`.
            dtype: of the weights in memory.
            stage2_after: blocks before stage 2 decides.
            policy: `importance` (the measured order) or `prefix` (plain early exit).
            max_crops: crop limit of every tier.
            max_new_tokens: most generated tokens per answer.
            picture_config: how pictures are read.

        Raises:
            CheckpointError: the directory or a file in it is missing, truncated, corrupt or of another model.
            KnobError: the model cannot run the knob space.
            ConfigError: no such device, an unknown policy, or a limit that is not a whole number of at least 1.
        """
        from pacevlm.models.molmoe.runtime.loading import load_molmoe

        device = resolve_device(device)
        keep_memory()
        folder = EMBEDDED_DIR if str(path) == "embedded" else Path(path)
        if not folder.is_dir():
            raise CheckpointError(
                f"there is no model directory {str(path)!r}; give a directory with config.json and safetensors files, "
                "or 'embedded'"
            )
        if policy not in ("importance", "prefix"):
            raise ConfigError(f"block policy {policy!r} is unknown; use 'importance' or 'prefix'")
        settings = read_elastic_settings(folder)
        adapter = load_molmoe(folder, device, dtype)
        space = knob_space or KnobSpace.from_dict(settings.get("knob_space", KnobSpace().to_dict()))
        order = BlockOrder.prefix(adapter.num_blocks)
        if policy == "importance" and min(space.num_blocks) < adapter.num_blocks:
            if "removal" not in settings:
                raise CheckpointError(
                    f"{folder} has no measured block order; run `pacevlm importance` on it, or choose policy='prefix'"
                )
            try:
                order = BlockOrder(adapter.num_blocks, tuple(settings["removal"]))
            except KnobError as error:
                raise CheckpointError(f"{folder / ELASTIC_FILE}: {error}; measure it again") from error
        crops = dict(settings.get("max_crops", DEFAULT_MAX_CROPS) if max_crops is None else max_crops)
        new_tokens = settings.get("max_new_tokens", 32) if max_new_tokens is None else max_new_tokens
        # Whatever changes what the model answers, so that nothing remembered or measured outlives it.
        facts = {
            "dtype": str(dtype),
            "max_crops": crops,
            "max_new_tokens": new_tokens,
            "removal": list(order.removal),
            "stage2_after": stage2_after,
        }
        identity = model_fingerprint(folder, facts)
        return cls(
            adapter,
            space,
            crops,
            order,
            identity,
            stage2_after=stage2_after,
            max_new_tokens=new_tokens,
            picture_config=picture_config,
        )

    def _vision(self, picture: Picture) -> tuple[VisionSizes, ...]:
        """What every tier makes of a picture; raises ImageError for a shape that the model cannot take."""
        limits = self.max_crops.values()
        return tuple(self.adapter.vision_sizes(picture.height, picture.width, limit) for limit in limits)

    def _sizes(self, picture: Picture, prompt: Prompt, max_new_tokens: int) -> RequestSizes:
        vision = self._vision(picture)
        # The largest tier counts, so that the choice of tier never decides whether a question is accepted.
        num_image_tokens = max(sizes.num_image_tokens for sizes in vision)
        if prompt.num_text_tokens + num_image_tokens + max_new_tokens > self.adapter.max_positions:
            raise QuestionError(
                f"the prompt has {prompt.num_text_tokens:,} text tokens beside up to {num_image_tokens:,} image tokens "
                f"and {max_new_tokens:,} of the answer, but the model has {self.adapter.max_positions:,} positions; "
                "shorten the question or the answer"
            )
        return RequestSizes(
            vision=vision,
            num_text_tokens=prompt.num_text_tokens,
            num_pixels=picture.height * picture.width,
            picture_kind=picture.kind,
            num_bytes=picture.num_bytes,
        )

    def _view(self, picture: Picture, prompt: Prompt, max_new_tokens: int) -> RequestView:
        sizes = self._sizes(picture, prompt, max_new_tokens)
        return RequestView(self.adapter.question_embedding(prompt), sizes, (picture.height, picture.width), picture)

    def view(self, image: ImageSource, question: str) -> RequestView:
        """What a policy may know of a request before its pixels; raises ImageError and QuestionError."""
        picture = open_picture(image, self.picture_config)
        return self._view(picture, self.adapter.encode_question(question), self.max_new_tokens)

    @property
    def max_image_tokens(self) -> int:
        """Image tokens of the largest pictures at the dearest tier."""
        crops = max(self.max_crops.values())
        shapes = ((4096, 4096), (2048, 8192), (8192, 2048))
        return max(self.adapter.vision_sizes(*shape, crops).num_image_tokens for shape in shapes)

    def capture_decode(self) -> None:
        """Capture the CUDA graphs of all knobs and lengths, so that no request waits for one; nothing on a CPU."""
        static = self.decoder.static
        if static is not None:
            pairs = list(itertools.product(self.knob_space.top_ks, self.knob_space.num_blocks))
            static.capture_all(pairs, static.max_positions)

    def synchronise(self) -> None:
        """Wait until the device has finished what it was given."""
        torch.get_device_module(self.device).synchronize(self.device)

    @torch.inference_mode()
    def run_request(
        self,
        image: ImageSource,
        question: str,
        *,
        choose_tier: Callable[[RequestView], str],
        choose_compute: Callable[[str, Tensor | None], tuple[int, int]],
        latency_token: Tensor | None = None,
        max_new_tokens: int | None = None,
        num_output_tokens: int | None = None,
    ) -> RequestResult:
        """Answer one question at batch 1, timing every stage in the one run, from the source given to the answer.

        Args:
            image: path, bytes, PIL image or array.
            question: the user's text.
            choose_tier: stage 1; its time counts.
            choose_compute: stage 2: tier and latency-token output `(d_model,)` (None if there is no token) to
                (top_k, num_blocks); its time counts.
            latency_token: the encoded budget, `(d_model,)`.
            max_new_tokens: most generated tokens, end-of-text included; the model's own limit if None.
            num_output_tokens: generate exactly so many, for measurements; end-of-text then ends nothing, and
                `max_new_tokens` does not count.

        Raises:
            ImageError, QuestionError: the input cannot be used.
            KnobError: a chosen value is not in the knob space.
            ConfigError: `max_new_tokens` or `num_output_tokens` is not a whole number of at least 1.
        """
        limit = self.max_new_tokens if max_new_tokens is None else _whole("max_new_tokens", max_new_tokens)
        if num_output_tokens is not None:
            limit = _whole("num_output_tokens", num_output_tokens)
        clock = StageClock(self.device)
        picture = open_picture(image, self.picture_config)
        self._vision(picture)  # refuses what the model cannot take before anything is decoded
        pixels = picture.decode()
        picture = replace(picture, source=pixels)
        clock.mark()
        prompt = self.adapter.encode_question(question)
        clock.mark()
        tier = choose_tier(self._view(picture, prompt, limit))
        if tier not in self.max_crops:
            raise KnobError(f"tier {tier!r} was chosen, but this model has {tuple(self.max_crops)}")
        clock.mark()
        prepared = self.adapter.prepare(pixels, prompt, self.max_crops[tier])
        clock.mark()
        features = self.adapter.encode_vision([prepared])[0]
        clock.mark()
        prefix = self.decoder.prefix([self.adapter.embed(prepared, features)])[0]
        token_output = None
        if latency_token is not None:
            token_output = self.decoder.latency_token([prefix], [latency_token[None].to(prefix.hidden)])[0]
        top_k, num_blocks = choose_compute(tier, token_output)
        knobs = Knobs(tier, top_k, num_blocks)
        self.knob_space.index(knobs)
        clock.mark()
        generated, _ = self.decoder.generate(
            [prefix],
            [top_k],
            [num_blocks],
            limit,
            min_new_tokens=num_output_tokens or 0,
            on_token=lambda _: clock.mark(),
        )
        answer = self.adapter.decode(generated[0])
        spans, e2e_ms = clock.finish()
        times = StageTimes(
            read_ms=spans[0],
            prepare_ms=spans[1] + spans[3],
            stage1_ms=spans[2],
            vision_ms=spans[4],
            first_block_ms=spans[5],
            prefill_ms=spans[6],
            decode_ms=tuple(spans[7:]),
            e2e_ms=e2e_ms,
        )
        return RequestResult(
            answer=answer,
            token_ids=tuple(generated[0]),
            knobs=knobs,
            num_crops=prepared.vision_sizes.num_crops,
            num_image_tokens=prepared.vision_sizes.num_image_tokens,
            num_text_tokens=prepared.num_text_tokens,
            num_pixels=picture.width * picture.height,
            picture_kind=picture.kind,
            num_bytes=picture.num_bytes,
            num_output_tokens=len(generated[0]),
            times=times,
        )

    def run_static(
        self, image: ImageSource, question: str, knobs: Knobs, max_new_tokens: int | None = None
    ) -> RequestResult:
        """Answer one question with given knobs; raises KnobError if they are not in the knob space."""
        self.knob_space.index(knobs)
        return self.run_request(
            image,
            question,
            choose_tier=lambda _: knobs.tier,
            choose_compute=lambda *_: (knobs.top_k, knobs.num_blocks),
            max_new_tokens=max_new_tokens,
        )


class _ElasticSettings(TypedDict, total=False):
    """What `elastic.json` may hold; people write it, so all of it may be left out."""

    max_crops: MaxCrops
    removal: list[Annotated[int, Range(1, 10_000)]]
    importance: dict[str, Any]
    max_new_tokens: NewTokens
    knob_space: KnobSpace
    measured_on: str


def read_elastic_settings(folder: Path) -> dict[str, Any]:
    """The settings in a model directory's `elastic.json`, empty if it has none; raises CheckpointError if malformed."""
    file = folder / ELASTIC_FILE
    if not file.exists():
        return {}
    settings = read_json(file, "elastic settings", CheckpointError)
    typed(_ElasticSettings, settings, str(file), CheckpointError)
    return dict(settings)


def _whole(name: str, value: object) -> int:
    number = as_int(value)
    if number is None or number < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return number


def write_elastic_settings(folder: Path, **changes: Any) -> None:
    """Change entries of a model directory's `elastic.json`, whole or not at all."""
    write_json_atomic(folder / ELASTIC_FILE, read_elastic_settings(folder) | changes)


def model_fingerprint(folder: Path, facts: Mapping[str, Any]) -> str:
    """A short hash of all of a checkpoint and of the settings it runs with.

    Every file is read whole, which takes as long as loading it does: a single weight that differs is another model.

    Raises:
        CheckpointError: there is no safetensors file, or a file cannot be read.
    """
    digest = hashlib.sha256(sha256_file(folder / "config.json").encode())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors files; pickled checkpoints are not loaded")
    for file in files:
        digest.update(sha256_file(file).encode())
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            digest.update(f"{name} {sha256_file(folder / name)}".encode())
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()[:16]
