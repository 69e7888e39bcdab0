"""A frozen model made elastic: checkpoint, knob space and block order, and one request from image to answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch

from pacevlm.artefact import Range, Text, typed
from pacevlm.checks import shown, whole_number
from pacevlm.config import BLOCK_ORDERS
from pacevlm.devices import keep_memory, resolve_device
from pacevlm.errors import CheckpointError, ConfigError, ImageError, KnobError, QuestionError
from pacevlm.files import read_json, sha256_file, write_json_atomic
from pacevlm.identity import Identity
from pacevlm.images import ImageSource, Picture, PictureConfig, open_picture
from pacevlm.knobs import KnobSpace
from pacevlm.models.adapter import Adapter, Prompt
from pacevlm.models.block_order import BlockOrder
from pacevlm.models.decoder import ElasticDecoder
from pacevlm.models.folder import PROCESSOR_FILES, find_model_folder
from pacevlm.models.graph_decode import GraphDecode
from pacevlm.models.registry import load_adapter
from pacevlm.types import RequestSizes, RequestView, VisionSizes

ELASTIC_FILE = "elastic.json"
# More than any family counts in, pixels included, and longer answers than any model has positions for.
VisionBudgets = dict[Text, Annotated[int, Range(1, 10**9)]]
NewTokens = Annotated[int, Range(1, 1_000_000)]


class ElasticModel:
    """A frozen multimodal mixture-of-experts model whose tier, top_k and num_blocks are chosen per request.

    Args:
        adapter: the model behind the adapter interface.
        knob_space: configurations to choose from.
        vision_budgets: what every tier means to the family, for example a number of crops.
        order: which blocks each num_blocks keeps.
        identity: fingerprint of weights and settings; artefacts made for one identity are refused by another.
        stage2_after: blocks that always run before stage 2 decides.
        max_new_tokens: most generated tokens per answer.
        picture_config: how pictures are read.

    Raises:
        KnobError: the model cannot run a value of the knob space, or a tier has no vision budget.
        ConfigError: a vision budget is none that the family takes, or max_new_tokens is no whole number from 1.
    """

    def __init__(
        self,
        adapter: Adapter[Any, Any],
        knob_space: KnobSpace,
        vision_budgets: Mapping[str, int],
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
        missing = [tier for tier in knob_space.tiers if tier not in vision_budgets]
        if missing:
            raise KnobError(f"tiers {missing} have no vision budget; known are {dict(vision_budgets)}")
        limits = [whole_number(f"vision budget of tier {tier!r}", vision_budgets[tier]) for tier in knob_space.tiers]
        if limits != sorted(limits):
            raise KnobError(f"vision budgets {dict(vision_budgets)} must not fall from a cheaper tier to a dearer one")
        for limit in limits:
            with suppress(ImageError):  # of this picture; a family that takes some budgets alone raises ConfigError
                adapter.vision_sizes(336, 336, limit)
        order.check_space(knob_space.num_blocks, stage2_after, adapter.fixed_blocks)
        for num_blocks in knob_space.num_blocks:
            order.kept(num_blocks)
        self.adapter, self.knob_space, self.order = adapter, knob_space, order
        self.vision_budgets = dict(zip(knob_space.tiers, limits, strict=True))
        self.identity = identity
        self.picture_config = picture_config or PictureConfig()
        self.stage2_after = stage2_after
        self.max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
        # A GPU waits for each small kernel of a decode step to be launched, unless a graph launches them together; only
        # CUDA has graphs.
        graph = GraphDecode(adapter, order, stage2_after) if adapter.device.type == "cuda" else None
        self.decoder = ElasticDecoder(adapter, order, stage2_after, graph)

    @property
    def made_for(self) -> Identity:
        """What an artefact has to be made for to be used with this model."""
        return Identity(self.identity, self.knob_space, max_new_tokens=self.max_new_tokens, d_model=self.d_model)

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
        knob_space: KnobSpace | Mapping[str, Sequence[Any]] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        stage2_after: int = 1,
        block_order: str = "importance",
        vision_budgets: Mapping[str, int] | Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        picture_config: PictureConfig | None = None,
    ) -> ElasticModel:
        """Load a checkpoint of any known family and the settings in its `elastic.json`, if it has one.

        Args:
            path: a directory, `embedded` for the model inside the package, or what else `find_model_folder` takes.
            knob_space: configurations, or those of its lists that are not what `elastic.json` says; where that says
                nothing, `KnobSpace.for_model` does.
            device: where to put the weights; see `resolve_device`.
            dtype: of the weights in memory.
            stage2_after: blocks before stage 2 decides.
            block_order: `importance` (the measured order), the name of another one that `elastic.json` holds, or
                `early_exit` (the last blocks go first).
            vision_budgets: of tiers by name, or one per tier; others are what `elastic.json` or the family says.
            max_new_tokens: most generated tokens per answer.
            picture_config: how pictures are read.

        Raises:
            CheckpointError: the directory or a file in it is missing, truncated, corrupt or of another model.
            KnobError: the model cannot run the knob space.
            ConfigError: no such device, an unknown block order, or a limit that is not a whole number of at least 1.
        """
        device = resolve_device(device)
        keep_memory()
        folder = find_model_folder(path)
        settings = read_elastic_settings(folder)
        check_block_order(block_order, folder, settings)  # before anything long is loaded
        adapter = load_adapter(folder, device, dtype)
        space, budgets, order = choose_knobs(adapter, folder, settings, knob_space, vision_budgets, block_order)
        new_tokens = settings.get("max_new_tokens", 32) if max_new_tokens is None else max_new_tokens
        # Whatever changes what the model answers, so that nothing remembered or measured outlives it.
        facts = {
            "dtype": str(dtype),
            "end_token_ids": sorted(adapter.end_token_ids),
            "vision_budgets": budgets,
            "max_new_tokens": new_tokens,
            "removal": list(order.removal),
            "stage2_after": stage2_after,
        }
        identity = model_fingerprint(folder, facts)
        return cls(
            adapter,
            space,
            budgets,
            order,
            identity,
            stage2_after=stage2_after,
            max_new_tokens=new_tokens,
            picture_config=picture_config,
        )

    def vision_sizes(self, height: int, width: int) -> tuple[VisionSizes, ...]:
        """What every tier makes of a picture of so many pixels; raises ImageError for one that cannot be taken."""
        return tuple(self.adapter.vision_sizes(height, width, budget) for budget in self.vision_budgets.values())

    def look(self, picture: Picture | None, prompt: Prompt, max_new_tokens: int | None = None) -> RequestView:
        """What a policy may know of a picture and a tokenised question; raises ImageError and QuestionError.

        Args:
            picture: None for a question alone.
            max_new_tokens: most tokens of the answer; the model's own limit if None.
        """
        sizes = self.request_sizes(picture, prompt, max_new_tokens)
        ids = torch.tensor(prompt.text_ids, device=self.device)
        question = self.adapter.embed_tokens(ids).float().mean(0).cpu()
        size = None if picture is None else (picture.height, picture.width)
        return RequestView(question, sizes, size, picture)

    def request_sizes(self, picture: Picture | None, prompt: Prompt, max_new_tokens: int | None = None) -> RequestSizes:
        """What of `look` needs no weights; arguments and errors as there."""
        most = max_new_tokens or self.max_new_tokens
        vision = tuple(VisionSizes(0, 0) for _ in self.vision_budgets)
        if picture is not None:
            vision = self.vision_sizes(picture.height, picture.width)
        # The largest tier counts, so that the choice of tier never decides whether a question is accepted.
        num_image_tokens = max(sizes.num_image_tokens for sizes in vision)
        if prompt.num_text_tokens + num_image_tokens + most > self.adapter.max_positions:
            raise QuestionError(
                f"the prompt has {prompt.num_text_tokens:,} text tokens beside up to {num_image_tokens:,} image tokens "
                f"and {most:,} of the answer, but the model has {self.adapter.max_positions:,} positions; "
                "shorten the question or the answer"
            )
        return RequestSizes(
            vision=vision,
            num_text_tokens=prompt.num_text_tokens,
            num_pixels=0 if picture is None else picture.height * picture.width,
            picture_kind="memory" if picture is None else picture.kind,
            num_bytes=0 if picture is None else picture.num_bytes,
        )

    def view(self, image: ImageSource | None, question: str) -> RequestView:
        """What a policy may know of a request before its pixels; raises ImageError and QuestionError."""
        picture = None if image is None else open_picture(image, self.picture_config)
        return self.look(picture, self.adapter.encode_question(question, picture is not None))

    @property
    def max_image_tokens(self) -> int:
        """Image tokens of the largest pictures at the dearest tier."""
        return max(map(self.adapter.max_image_tokens, self.vision_budgets.values()))

    def capture_graphs(self) -> None:
        """Capture the CUDA graphs of all knobs and lengths, so that no request waits for one; nothing on a CPU."""
        graph = self.decoder.graph
        if graph is not None:
            computes = [self.knob_space.compute(action) for action in range(self.knob_space.num_stage2)]
            graph.capture_all(computes, graph.max_positions)

    def synchronise(self) -> None:
        """Wait until the device has finished what it was given."""
        torch.get_device_module(self.device).synchronize(self.device)


def choose_knobs(
    adapter: Adapter[Any, Any],
    folder: Path,
    settings: Mapping[str, Any],
    knob_space: KnobSpace | Mapping[str, Sequence[Any]] | None = None,
    vision_budgets: Mapping[str, int] | Sequence[int] | None = None,
    block_order: str = "importance",
) -> tuple[KnobSpace, dict[str, int], BlockOrder]:
    """What a model runs with: what is given, else what its `elastic.json` says, else what suits it.

    Args:
        adapter: the model.
        folder: where it lies, for messages.
        settings: what `read_elastic_settings` found.
        knob_space, vision_budgets, block_order: see `ElasticModel.from_pretrained`, which raises the same.
    """
    check_block_order(block_order, folder, settings)
    budgets = dict(settings.get("vision_budgets", adapter.default_vision_budgets))
    space = knob_space if isinstance(knob_space, KnobSpace) else knob_space_of(adapter, settings, knob_space or {})
    if vision_budgets is not None:
        if not isinstance(vision_budgets, Mapping):
            if len(vision_budgets) != len(space.tiers):
                raise ConfigError(
                    f"vision_budgets {vision_budgets} needs one number for each of the tiers {space.tiers}"
                )
            vision_budgets = dict(zip(space.tiers, vision_budgets, strict=True))
        # Those of tiers outside the knob space count in the model's identity too.
        budgets |= vision_budgets
    order = BlockOrder.early_exit(adapter.num_blocks, adapter.fixed_blocks)
    if block_order != "early_exit" and min(space.num_blocks) < adapter.num_blocks:
        measured = settings.get("orders", {}).get(block_order, settings)
        if "removal" not in measured:
            raise CheckpointError(
                f"{folder} has no measured block order; run `pacevlm importance` on it, or choose "
                "block_order='early_exit' (--model.block-order early_exit)"
            )
        try:
            order = BlockOrder(adapter.num_blocks, tuple(measured["removal"]), block_order)
        except KnobError as error:
            raise CheckpointError(f"{folder / ELASTIC_FILE}: {error}; measure it again") from error
    return space, budgets, order


def check_block_order(block_order: str, folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a model's `elastic.json` knows the block order."""
    known = (*BLOCK_ORDERS, *settings.get("orders", {}))
    if block_order not in known:
        raise ConfigError(
            f"block_order is {shown(block_order)}, which {folder / ELASTIC_FILE} does not hold; use one of "
            f"{', '.join(known)}, or measure it with `pacevlm importance --name`"
        )


def read_knob_space(path: str | Path, wanted: Mapping[str, Sequence[Any]]) -> KnobSpace:
    """The knob space that `from_pretrained` would give a model, without reading its weights.

    Args:
        path: as `find_model_folder` takes it.
        wanted: lists that are not what `elastic.json` says. If all three are given nothing is read.

    Raises:
        CheckpointError: there is no such model, or what describes it is malformed.
    """
    if {"tiers", "top_ks", "num_blocks"} <= set(wanted):
        return KnobSpace.from_dict({name: list(values) for name, values in wanted.items()})
    folder = find_model_folder(path)
    adapter = load_adapter(folder, torch.device("meta"), torch.float32)
    return knob_space_of(adapter, read_elastic_settings(folder), wanted)


def knob_space_of(
    adapter: Adapter[Any, Any], settings: Mapping[str, Any], wanted: Mapping[str, Sequence[Any]]
) -> KnobSpace:
    """The lists that are wanted, and the others as stored with the model or as suit it."""
    tiers = wanted.get("tiers", tuple(adapter.default_vision_budgets))
    suited = KnobSpace.for_model(tiers, adapter.trained_top_k, adapter.num_blocks)
    stored = settings.get("knob_space", suited.to_dict())
    return KnobSpace.from_dict({**stored, **{name: list(values) for name, values in wanted.items()}})


class _Order(TypedDict, total=False):
    """A block order: blocks from the first to be given up to the last, the figures that it rests on, and of what."""

    removal: list[Annotated[int, Range(1, 10_000)]]
    importance: dict[str, Any]
    measured_on: str


class _ElasticSettings(_Order, total=False):
    """What `elastic.json` may hold; people write it, so all of it may be left out.

    The order of `importance` stands at the top, others by their names.
    """

    vision_budgets: VisionBudgets
    max_new_tokens: NewTokens
    knob_space: KnobSpace
    orders: dict[Text, _Order]


def read_elastic_settings(folder: Path) -> dict[str, Any]:
    """The settings in a model directory's `elastic.json`, empty if it has none; raises CheckpointError if malformed."""
    file = folder / ELASTIC_FILE
    if not file.exists():
        return {}
    settings = read_json(file, "elastic settings", CheckpointError)
    typed(_ElasticSettings, settings, str(file), CheckpointError)
    return dict(settings)


def write_elastic_settings(folder: Path, **changes: Any) -> None:
    """Change entries of a model directory's `elastic.json`, whole or not at all."""
    write_json_atomic(folder / ELASTIC_FILE, read_elastic_settings(folder) | changes)


def store_block_order(folder: Path, name: str | None, **order: Any) -> None:
    """Store a measured block order in a model directory's `elastic.json`, the others left as they are.

    Args:
        name: what `block_order` calls it; None is the one of `importance`.
        order: its `removal`, `importance` and `measured_on`.
    """
    if name is None:
        write_elastic_settings(folder, **order)
        return
    named = read_elastic_settings(folder).get("orders", {})
    write_elastic_settings(folder, orders={**named, name: order})


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
