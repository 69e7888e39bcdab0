"""What a checkpoint is, what of it is missing and how it would run: from headers and settings, without its weights."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pacevlm.errors import CheckpointError, ImageError, PacevlmError
from pacevlm.models.adapter import Adapter
from pacevlm.models.elastic import ElasticModel, choose_knobs, read_elastic_settings
from pacevlm.models.folder import find_model_folder
from pacevlm.models.registry import Family, find_family
from pacevlm.models.weights import StoredTensor, compare, nearest_layout, read_headers
from pacevlm.types import VisionSizes

# Sizes of pictures whose cost is told, (width, height) in pixels.
PICTURE_SIZES = ((336, 336), (640, 480), (1024, 768), (1920, 1080), (768, 1365))
QUESTION = "What is in this picture?"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Inspection:
    """What is known of a checkpoint; what could not be found out is None or empty, and `problems` says why.

    Attributes:
        folder: where it lies.
        model_type: as its `config.json` names it.
        problems: why it does not run, a sentence each; none if it runs.
        stored: its tensors by name, as the headers of its files have them.
        layout: the layout that it is in, one of its family's.
        num_tensors: tensors of that layout.
        model: without weights.
        num_parameters: of the model; the tensors that are stored if the family names none.
        question: what is asked about pictures.
        num_text_tokens: prompt tokens of the question that are no image tokens.
        vision: what every tier makes of a picture of `(width, height)`; empty for one that cannot be taken.
    """

    folder: Path
    model_type: str
    problems: list[str] = field(default_factory=list)
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    layout: str | None = None
    num_tensors: int | None = None
    model: ElasticModel | None = None
    num_parameters: int = 0
    question: str = QUESTION
    num_text_tokens: int = 0
    vision: dict[tuple[int, int], tuple[VisionSizes, ...]] = field(default_factory=dict)

    @property
    def stored_dtypes(self) -> dict[str, int]:
        """Tensors of each dtype, as safetensors names them."""
        return dict(Counter(tensor.dtype for tensor in self.stored.values()))

    @property
    def num_files(self) -> int:
        """Files that hold weights."""
        return len({tensor.file for tensor in self.stored.values()})

    @property
    def num_bytes(self) -> int:
        """Of those files."""
        return sum(file.stat().st_size for file in {tensor.file for tensor in self.stored.values()})

    @property
    def memory(self) -> dict[str, tuple[int, int]]:
        """By dtype, bytes of the weights, and of keys and values for the longest request about `PICTURE_SIZES`."""
        cache_values = 0
        if self.model is not None and any(self.vision.values()):
            adapter = self.model.adapter
            most = max(vision.num_image_tokens for sizes in self.vision.values() for vision in sizes)
            num_tokens = most + self.num_text_tokens + self.model.max_new_tokens
            cache_values = num_tokens * adapter.num_blocks * adapter.cache_bytes_per_token // adapter.dtype.itemsize
        return {
            str(dtype).removeprefix("torch."): (self.num_parameters * dtype.itemsize, cache_values * dtype.itemsize)
            for dtype in DTYPES
        }


def inspect_checkpoint(path: str | os.PathLike[str], block_order: str = "importance") -> Inspection:
    """Look at all of a checkpoint but its weights.

    Args:
        path: as `find_model_folder` takes it.
        block_order: see `ElasticModel.from_pretrained`.

    Raises:
        CheckpointError: there is no such folder, or it is of no known family.
    """
    folder = find_model_folder(path)
    model_type, family = find_family(folder)
    found = Inspection(folder, model_type)
    try:
        found.stored = read_headers(folder)
        found.num_parameters = sum(math.prod(tensor.shape) for tensor in found.stored.values())
    except PacevlmError as error:
        found.problems.append(str(error))
    try:
        _look_at_layout(found, family)
        _look_at_model(found, family.load(folder, torch.device("meta"), torch.float32), block_order)
    except PacevlmError as error:
        found.problems.append(str(error))
    return found


def _look_at_layout(found: Inspection, family: Family) -> None:
    if family.layouts is None:
        return
    layouts = family.layouts(found.folder)
    found.layout = nearest_layout(found.stored, layouts)
    layout = layouts[found.layout]
    found.num_tensors = len(layout)
    found.num_parameters = sum(math.prod(place.shape) for place in layout.values())
    if found.stored:
        found.problems += compare(found.stored, layout).sentences()


def _look_at_model(found: Inspection, adapter: Adapter[Any, Any], block_order: str) -> None:
    settings = read_elastic_settings(found.folder)
    try:
        space, budgets, order = choose_knobs(adapter, found.folder, settings, block_order=block_order)
    except CheckpointError as error:  # no order, or none of this model: the rest can be told all the same
        found.problems.append(str(error))
        space, budgets, order = choose_knobs(adapter, found.folder, settings, block_order="early_exit")
    model = ElasticModel(
        adapter, space, budgets, order, "without weights", max_new_tokens=settings.get("max_new_tokens", 32)
    )
    found.model = model
    found.num_text_tokens = adapter.encode_question(found.question).num_text_tokens
    for width, height in PICTURE_SIZES:
        try:
            found.vision[width, height] = model.vision_sizes(height, width)
        except ImageError:
            found.vision[width, height] = ()
