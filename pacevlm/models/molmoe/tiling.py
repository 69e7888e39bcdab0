"""How an image is divided into crops, and how many tokens that makes: from its size in pixels alone."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from pacevlm.errors import ConfigError, ImageError
from pacevlm.types import VisionSizes


@dataclass(frozen=True, slots=True)
class CropGeometry:
    """How a crop is divided: its size, its patches, its margins shared with neighbours, and its pooling.

    Attributes:
        crop_size: side of a square crop in pixels.
        patch_size: side of a square patch in pixels.
        margins: patches that a crop shares with its neighbour before (left, top) and behind it (right, bottom).
        pool: patches per side that one pooled cell (one image token) combines.

    Raises:
        ConfigError: a value is out of range, or the parts do not divide one another.
    """

    crop_size: int = 336
    patch_size: int = 14
    margins: tuple[int, int] = (4, 4)
    pool: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "margins", tuple(self.margins))
        if len(self.margins) != 2:
            raise ConfigError(f"margins {self.margins} must be two numbers of patches: before and behind")
        for name, value, least in (
            ("crop_size", self.crop_size, 1),
            ("patch_size", self.patch_size, 1),
            ("pool", self.pool, 1),
            ("margins[0]", self.margins[0], 0),
            ("margins[1]", self.margins[1], 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        if self.crop_size % self.patch_size:
            raise ConfigError(f"crop_size {self.crop_size} must be a multiple of patch_size {self.patch_size}")
        if self.patches_per_side % self.pool or any(margin % self.pool for margin in self.margins):
            raise ConfigError(
                f"the {self.patches_per_side} patches per side and the margins {self.margins} must be multiples of "
                f"pool {self.pool}"
            )
        if self.window_patches < 1:
            raise ConfigError(f"margins {self.margins} leave nothing of a crop of {self.patches_per_side} patches")

    @property
    def patches_per_side(self) -> int:
        """Patches along a crop's side."""
        return self.crop_size // self.patch_size

    @property
    def patches_per_crop(self) -> int:
        """Patches of one crop."""
        return self.patches_per_side**2

    @property
    def cells_per_side(self) -> int:
        """Pooled cells along a crop's side."""
        return self.patches_per_side // self.pool

    @property
    def margin_patches(self) -> int:
        """Patches of both margins together."""
        return sum(self.margins)

    @property
    def margin_px(self) -> int:
        """Pixels of both margins together."""
        return self.margin_patches * self.patch_size

    @property
    def window_patches(self) -> int:
        """Patches by which one crop is shifted from the next."""
        return self.patches_per_side - self.margin_patches

    @property
    def window_px(self) -> int:
        """Pixels by which one crop is shifted from the next."""
        return self.window_patches * self.patch_size

    @property
    def window_cells(self) -> int:
        """Pooled cells by which one crop is shifted from the next."""
        return self.window_patches // self.pool

    def canvas_px(self, crops: int) -> int:
        """Pixels along a side that `crops` overlapping crops cover."""
        return self.window_px * crops + self.margin_px

    def canvas_cells(self, crops: int) -> int:
        """Pooled cells along a side that `crops` overlapping crops cover, each place counted once."""
        return (self.window_patches * crops + self.margin_patches) // self.pool

    def num_image_tokens(self, rows: int, cols: int) -> int:
        """Image tokens of a tiling: both grids with a column token behind each row, and a start and end token each."""
        global_tokens = self.cells_per_side * (self.cells_per_side + 1) + 2
        return global_tokens + self.canvas_cells(rows) * (self.canvas_cells(cols) + 1) + 2


def check_max_crops(max_crops: object, min_crops: object = 1) -> None:
    """Raise ConfigError unless `1 <= min_crops <= max_crops` are whole numbers."""
    for name, value in (("max_crops", max_crops), ("min_crops", min_crops)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1, for example 12")
    if max_crops < min_crops:  # type: ignore[operator]
        raise ConfigError(f"max_crops {max_crops} is below min_crops {min_crops}")


@functools.lru_cache(maxsize=64)
def _candidate_tilings(max_crops: int, min_crops: int) -> tuple[tuple[int, int], ...]:
    """All (rows, cols) whose product lies in the range, fewest crops first, then fewest rows."""
    check_max_crops(max_crops, min_crops)
    candidates = [
        (rows, cols)
        for rows in range(1, max_crops + 1)
        for cols in range(1, max_crops // rows + 1)
        if rows * cols >= min_crops
    ]
    return tuple(sorted(candidates, key=lambda tiling: (tiling[0] * tiling[1], tiling[0])))


def select_tiling(
    height: int, width: int, max_crops: int, geometry: CropGeometry, min_crops: int = 1
) -> tuple[int, int]:
    """Choose (rows, cols) of the high-resolution crops for an image of `height` by `width` pixels.

    The smallest tiling that shows the image without shrinking it, or, if there is none, the one that shrinks it
    least. A side no longer than the margins makes every scale negative, so that the first tiling, (1, 1) unless
    `min_crops` forbids it, is chosen whatever the other side; the weights were trained with that.

    Raises:
        ConfigError: `max_crops` or `min_crops` is below 1 or not a whole number, or the range is empty.
    """
    check_max_crops(max_crops, min_crops)
    return _select_tiling(height, width, max_crops, geometry, min_crops)


# A request asks for every tier and once more when its image is cut, and images of one size come in numbers.
@functools.lru_cache(maxsize=4096)
def _select_tiling(height: int, width: int, max_crops: int, geometry: CropGeometry, min_crops: int) -> tuple[int, int]:
    candidates = _candidate_tilings(max_crops, min_crops)
    # Every step in float32: a wider type chooses differently where two scales almost tie.
    sizes = np.asarray(candidates, dtype=np.float32) * np.float32(geometry.window_px)
    available = np.asarray([height, width], dtype=np.float32) - np.float32(geometry.margin_px)
    with np.errstate(divide="ignore"):
        scales = np.min(sizes / available, axis=1)
    if np.all(scales < 1):
        return candidates[int(np.argmax(scales))]
    return candidates[int(np.argmin(np.where(scales < 1, np.float32(np.inf), scales)))]


def fitted_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Size in pixels of an image scaled to fit a target, its aspect ratio kept.

    Raises:
        ImageError: a side is below 1 pixel, before or after scaling.
    """
    if height < 1 or width < 1:
        raise ImageError(f"the image is {width}x{height} pixels; both sides must be at least 1")
    scale = min(np.float32(target_height) / np.float32(height), np.float32(target_width) / np.float32(width))
    new_height = math.floor(np.float32(height) * scale)
    new_width = math.floor(np.float32(width) * scale)
    if new_height < 1 or new_width < 1:
        raise ImageError(
            f"the image of {width}x{height} pixels is too elongated: scaled to fit {target_width}x{target_height}, "
            "one side would have no pixel left; crop it to a less extreme aspect ratio"
        )
    return new_height, new_width


def vision_sizes(height: int, width: int, max_crops: int, geometry: CropGeometry, min_crops: int = 1) -> VisionSizes:
    """Number of crops and image tokens of an image, from its size in pixels alone.

    Raises:
        ImageError: the image is empty or so elongated that a side would vanish.
        ConfigError: see `select_tiling`.
    """
    check_max_crops(max_crops, min_crops)
    return _vision_sizes(height, width, max_crops, geometry, min_crops)


@functools.lru_cache(maxsize=4096)
def _vision_sizes(height: int, width: int, max_crops: int, geometry: CropGeometry, min_crops: int) -> VisionSizes:
    rows, cols = _select_tiling(height, width, max_crops, geometry, min_crops)
    fitted_size(height, width, geometry.crop_size, geometry.crop_size)
    fitted_size(height, width, geometry.canvas_px(rows), geometry.canvas_px(cols))
    return VisionSizes(num_units=1 + rows * cols, num_image_tokens=geometry.num_image_tokens(rows, cols))


@functools.lru_cache(maxsize=64)
def most_image_tokens(geometry: CropGeometry, max_crops: int) -> int:
    """Image tokens of the largest tiling of at most so many crops."""
    return max(geometry.num_image_tokens(rows, max_crops // rows) for rows in range(1, max_crops + 1))
