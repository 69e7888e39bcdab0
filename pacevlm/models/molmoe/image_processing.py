"""MolmoE's image processing: resizing, overlapping crops, patch masks and token placement.

An image becomes one global crop of the whole picture plus `rows x cols` overlapping high-resolution crops. All sizes
follow from a `CropGeometry`, and the number of crops and of image tokens follows from the image's size alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from pacevlm.errors import ConfigError, ImageError
from pacevlm.images import ImageSource, open_picture
from pacevlm.models.molmoe.tiling import CropGeometry, check_max_crops, fitted_size, select_tiling, vision_sizes
from pacevlm.types import VisionSizes

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Kinds of image token; a tokenizer's ids are looked up with a token pattern as index.
IM_START, IM_END, IM_PATCH, IM_COL = range(4)

UNUSED_CELL = -100
"""Index of a pooled cell that no token receives, because a neighbouring crop covers the same place."""

TOGETHER_PIXELS = 1 << 20
"""Up to here a picture's three channels are resized together, which is quicker where little is to be done."""

MASK_ROW_FILL = -1.0
"""Mask value of the last row, which has no high-resolution crop of its own."""


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One image, ready for the vision encoder, and where its features go.

    Attributes:
        images: flattened, normalised patches, the global crop first, `(crops, patches, patch_values)` float32.
        image_masks: how much of each patch is picture, `(crops, patches)` float32. Row k belongs to high-resolution
            crop k and the last row is -1: shifted by one against `images`, as the weights were trained.
        image_input_idx: sequence position of each pooled cell, `(crops, cells)` int64, negative where unused. The
            BOS token is at position 0 and the first image token at position 1.
        token_pattern: kind of every image token (`IM_START`, `IM_END`, `IM_PATCH`, `IM_COL`), `(tokens,)` int64.
        tiling: (rows, cols) of the high-resolution crops.
    """

    images: torch.Tensor
    image_masks: torch.Tensor
    image_input_idx: torch.Tensor
    token_pattern: torch.Tensor
    tiling: tuple[int, int]

    @property
    def vision_sizes(self) -> VisionSizes:
        """Crops and image tokens, counted on the tensors."""
        return VisionSizes(num_units=self.images.shape[0], num_image_tokens=self.token_pattern.shape[0])


@functools.lru_cache(maxsize=64)
def _token_layout(geometry: CropGeometry, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token pattern `(tokens,)` and cell positions `(crops, cells)` of a tiling; shared, so never write to them."""

    def grid(num_rows: int, num_cols: int) -> torch.Tensor:
        cells = torch.full((num_rows, num_cols + 1), IM_PATCH)
        cells[:, -1] = IM_COL
        return cells.flatten()

    side = geometry.cells_per_side
    canvas_rows, canvas_cols = geometry.canvas_cells(rows), geometry.canvas_cells(cols)
    start, end = torch.tensor([IM_START]), torch.tensor([IM_END])
    pattern = torch.cat([start, grid(side, side), end, start, grid(canvas_rows, canvas_cols), end])

    cell = torch.arange(side)
    # Position 0 is the BOS token, 1 the first start token.
    global_positions = 2 + (side + 1) * cell[:, None] + cell[None, :]
    first_position = 2 + (side + 1) * side + 2

    def kept_and_place(crops: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which cells of each crop along one side are kept, and where they lie on the canvas: `(crops, side)`."""
        crop = torch.arange(crops)[:, None]
        before, behind = (margin // geometry.pool for margin in geometry.margins)
        kept = ((cell >= before) | (crop == 0)) & ((cell < side - behind) | (crop == crops - 1))
        return kept, geometry.window_cells * crop + cell

    row_kept, row_place = kept_and_place(rows)
    col_kept, col_place = kept_and_place(cols)
    # (rows, cols, side, side): crop row, crop column, cell row, cell column
    positions = first_position + row_place[:, None, :, None] * (canvas_cols + 1) + col_place[None, :, None, :]
    kept = row_kept[:, None, :, None] & col_kept[None, :, None, :]
    positions = torch.where(kept, positions, UNUSED_CELL).reshape(rows * cols, side * side)
    return pattern, torch.cat([global_positions.reshape(1, -1), positions])


@functools.lru_cache(maxsize=16)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, deviation, and what black is normalised to, each `(3, 1, 1)`; shared, so never write to them."""
    with torch.inference_mode(False):
        means, stds = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
        return means, stds, -means / stds


def _channels(picture: np.ndarray[Any, Any] | Image.Image, channels: slice) -> np.ndarray[Any, Any]:
    """Some of a picture's channels, `(height, width, channels)` uint8."""
    if isinstance(picture, np.ndarray):
        return picture[..., channels]
    if channels == slice(0, 3):
        return np.asarray(picture)
    return np.asarray(picture.getchannel(channels.start))[..., None]


def _resize_and_pad(
    picture: np.ndarray[Any, Any] | Image.Image,
    targets: Sequence[tuple[int, int]],
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> list[tuple[torch.Tensor, tuple[int, int, int, int]]]:
    """Scale an image to fit each target `(height, width)`, centre it there on black, and normalise.

    Of a large picture one channel at a time is held as numbers of four bytes: three would fill the memory.

    Returns:
        For each target the canvas `(3, height, width)` and the picture's place on it as (top, left, height, width).

    Raises:
        ImageError: a side would have no pixel left.
    """
    height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)
    means, stds, black = _normalisation(tuple(image_mean), tuple(image_std))
    canvases = []
    for target_height, target_width in targets:
        new_height, new_width = fitted_size(height, width, target_height, target_width)
        top, left = (target_height - new_height) // 2, (target_width - new_width) // 2
        canvas = black.expand(3, target_height, target_width).contiguous()
        canvases.append((canvas, (top, left, new_height, new_width)))
    step = 3 if height * width <= TOGETHER_PIXELS else 1
    for first in range(0, 3, step):
        channels = slice(first, first + step)
        values = np.ascontiguousarray(_channels(picture, channels).transpose(2, 0, 1), dtype=np.float32)
        pixels = torch.from_numpy(values).div_(255.0)
        for canvas, (top, left, new_height, new_width) in canvases:
            scaled = pixels
            if (new_height, new_width) != (height, width):
                scaled = F.interpolate(
                    pixels[None], size=(new_height, new_width), mode="bilinear", align_corners=False, antialias=True
                )[0].clamp_(0.0, 1.0)
            place = canvas[channels, top : top + new_height, left : left + new_width]
            place.copy_(scaled).sub_(means[channels]).div_(stds[channels])
    return canvases


def _to_patches(canvas: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut `(3, height, width)` into `(patch rows, patch cols, values)`, values in the order row, column, channel."""
    _, height, width = canvas.shape
    grid = canvas.view(3, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(1, 3, 2, 4, 0).reshape(height // patch_size, width // patch_size, -1)


def _patch_coverage(start: int, length: int, num_patches: int, patch_size: int) -> torch.Tensor:
    """Picture pixels within each patch along one side, where the picture covers [start, start + length)."""
    edges = torch.arange(num_patches) * patch_size
    return ((edges + patch_size).clamp(max=start + length) - edges.clamp(min=start)).clamp(min=0)


@functools.lru_cache(maxsize=256)
def _crop_masks(geometry: CropGeometry, rows: int, cols: int, place: tuple[int, int, int, int]) -> torch.Tensor:
    """How much of each patch is picture, `(crops, patches)`, with the row that is shifted; never write to it.

    `place` is the picture's (top, left, height, width) on the canvas.
    """
    with torch.inference_mode(False):
        top, left, height, width = place
        size = geometry.patch_size
        row_coverage = _patch_coverage(top, height, geometry.canvas_px(rows) // size, size)
        col_coverage = _patch_coverage(left, width, geometry.canvas_px(cols) // size, size)
        coverage = (row_coverage[:, None] * col_coverage[None, :]).to(torch.float32) / float(size**2)
        masks = _overlapping_crops(coverage[..., None], geometry)[..., 0]
        # The extra row belongs in front, with the global crop, but the weights were trained with it at the end.
        return torch.cat([masks, torch.full((1, geometry.patches_per_crop), MASK_ROW_FILL)])


def _overlapping_crops(grid: torch.Tensor, geometry: CropGeometry) -> torch.Tensor:
    """Cut a canvas of patches `(patch rows, patch cols, values)` into crops `(crops, patches, values)`, row-major."""
    side, step = geometry.patches_per_side, geometry.window_patches
    crops = grid.unfold(0, side, step).unfold(1, side, step)
    return crops.permute(0, 1, 3, 4, 2).reshape(-1, side * side, grid.shape[-1])


def prepare_image(
    image: np.ndarray[Any, Any] | Image.Image,
    max_crops: int,
    geometry: CropGeometry,
    *,
    min_crops: int = 1,
    image_mean: Sequence[float] = CLIP_MEAN,
    image_std: Sequence[float] = CLIP_STD,
) -> PreparedImage:
    """Turn an RGB image into crops of patches, their masks and their places in the sequence.

    Beside the image it takes at most 6 bytes for each of its pixels, and what the crops need.

    Args:
        image: `(height, width, 3)` uint8, or a PIL image of mode RGB.
        max_crops: most high-resolution crops; the global crop is not counted.

    Raises:
        ImageError: the image is neither, or a side would have no pixel left.
        ConfigError: see `select_tiling`.
    """
    if isinstance(image, Image.Image) and image.mode == "RGB":
        height, width = image.height, image.width
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        height, width = image.shape[:2]
    else:
        given = f"{image.dtype} array of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"an image must be a uint8 array of shape (height, width, 3) or an RGB image, not {given}")
    rows, cols = select_tiling(height, width, max_crops, geometry, min_crops)
    vision_sizes(height, width, max_crops, geometry, min_crops)  # refuses what cannot be resized, before any work

    targets = [(geometry.canvas_px(rows), geometry.canvas_px(cols))]
    if (rows, cols) != (1, 1):  # otherwise one tile covers exactly what the global crop shows
        targets.append((geometry.crop_size, geometry.crop_size))
    (canvas, place), *others = _resize_and_pad(image, targets, image_mean, image_std)
    crops = _overlapping_crops(_to_patches(canvas, geometry.patch_size), geometry)
    global_crop = crops
    if others:
        global_crop = _to_patches(others[0][0], geometry.patch_size).reshape(1, geometry.patches_per_crop, -1)

    pattern, positions = _token_layout(geometry, rows, cols)
    return PreparedImage(
        images=torch.cat([global_crop, crops]),
        image_masks=_crop_masks(geometry, rows, cols, place).clone(),
        image_input_idx=positions.clone(),
        token_pattern=pattern.clone(),
        tiling=(rows, cols),
    )


class MolmoEImageProcessor(BaseImageProcessor):
    """MolmoE's image processor: the crop geometry, the most crops and the normalisation, with save and load.

    The names that the published checkpoint's file uses (`base_image_input_size`, `image_patch_size`,
    `overlap_margins`) are understood as well.

    Args:
        crop_size: side of a square crop in pixels.
        patch_size: side of a square patch in pixels.
        margins: patches shared with the neighbour (before, behind).
        pool: patches per side that one image token combines.
        max_crops: most high-resolution crops, unless a call says otherwise.
        image_mean: mean of each channel, in the range 0 to 1.
        image_std: standard deviation of each channel, in the range 0 to 1.

    Attributes:
        geometry: how crops are divided.

    Raises:
        ConfigError: a value is out of range.
    """

    model_input_names = ["images", "image_masks", "image_input_idx"]  # noqa: RUF012  (the base class declares it so)

    def __init__(
        self,
        crop_size: int = 336,
        patch_size: int = 14,
        margins: Sequence[int] = (4, 4),
        pool: int = 2,
        max_crops: int = 12,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        base_size = kwargs.get("base_image_input_size", crop_size)
        if isinstance(base_size, (list, tuple)):
            if len(set(base_size)) != 1:
                raise ConfigError(f"base_image_input_size is {base_size}; crops must be square")
            base_size = base_size[0]
        overlap = kwargs.get("overlap_margins", margins)
        if not isinstance(overlap, (list, tuple)) or len(overlap) != 2:
            raise ConfigError(f"margins is {overlap!r}; it must hold two numbers of patches: before and behind")
        check_max_crops(max_crops)
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != 3:
                raise ConfigError(f"{name} is {values!r}; it must hold one number for each of the 3 channels")
        if min(image_std) <= 0:
            raise ConfigError(f"image_std is {image_std!r}; every value must be above 0")
        # Lists, because they are what JSON gives back.
        self.crop_size: int = base_size
        self.patch_size: int = kwargs.get("image_patch_size", patch_size)
        self.margins: list[int] = list(overlap)
        self.pool = pool
        self.max_crops = max_crops
        self.image_mean: list[float] = [float(value) for value in image_mean]
        self.image_std: list[float] = [float(value) for value in image_std]
        # Refuses sizes that do not fit together; made once, because every request asks for it.
        self.geometry = CropGeometry(self.crop_size, self.patch_size, (overlap[0], overlap[1]), self.pool)

    def to_dict(self) -> dict[str, Any]:
        """The settings, ready for JSON."""
        names = ("crop_size", "patch_size", "margins", "pool", "max_crops", "image_mean", "image_std")
        settings = {name: getattr(self, name) for name in names}
        return {**settings, "image_processor_type": type(self).__name__}

    def vision_sizes(self, height: int, width: int, max_crops: int | None = None) -> VisionSizes:
        """Number of crops and image tokens of an image, from its size in pixels alone; see `vision_sizes`."""
        return vision_sizes(height, width, self.max_crops if max_crops is None else max_crops, self.geometry)

    def prepare(self, image: ImageSource, max_crops: int | None = None) -> PreparedImage:
        """Load and prepare one image; see `open_picture` for what is accepted and `prepare_image` for the result.

        Raises:
            ImageError: the image cannot be read or a side would have no pixel left; that is known before decoding.
            ConfigError: `max_crops` is below 1 or not a whole number.
        """
        picture = open_picture(image)
        self.vision_sizes(picture.height, picture.width, max_crops)
        return self.cut(picture.decode(), max_crops)

    def cut(self, image: Image.Image, max_crops: int | None = None) -> PreparedImage:
        """Prepare an RGB image that has been read already; raises as `prepare`."""
        return prepare_image(
            image,
            self.max_crops if max_crops is None else max_crops,
            self.geometry,
            image_mean=self.image_mean,
            image_std=self.image_std,
        )

    def preprocess(
        self,
        images: ImageSource | Sequence[ImageSource],
        max_crops: int | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare one image or several, one per prompt, padding missing crops with -1.

        Returns:
            `images` `(batch, crops, patches, patch_values)`, `image_masks` `(batch, crops, patches)` and
            `image_input_idx` `(batch, crops, cells)`.

        Raises:
            ConfigError: an unknown setting, or `return_tensors` other than "pt".
            ImageError: there is no image, or one cannot be read.
        """
        check_tensor_call(return_tensors, kwargs)
        sources: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        if not sources:
            raise ImageError("no image was given; give at least one")
        prepared = [self.prepare(source, max_crops) for source in sources]
        return BatchFeature({name: pad_stack([getattr(p, name) for p in prepared]) for name in self.model_input_names})


def check_tensor_call(return_tensors: str | None, unknown: dict[str, Any]) -> None:
    """Raise ConfigError for a tensor type other than PyTorch's, or for settings that a call does not have."""
    if unknown:
        raise ConfigError(f"unknown settings {sorted(unknown)}; images take max_crops and return_tensors")
    if return_tensors not in (None, "pt"):
        raise ConfigError(f"return_tensors is {return_tensors!r}; only 'pt' (PyTorch tensors) is supported")


def pad_stack(tensors: Sequence[torch.Tensor], value: int = -1) -> torch.Tensor:
    """Stack tensors that differ in their first dimension, padded behind with `value`: `(batch, longest, ...)`."""
    longest = max(tensor.shape[0] for tensor in tensors)
    stacked = tensors[0].new_full((len(tensors), longest, *tensors[0].shape[1:]), value)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[: tensor.shape[0]] = tensor
    return stacked
