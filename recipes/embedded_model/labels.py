"""Dense labels for the vision warm-up: what each pooled cell of each crop shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pacevlm.data.digits import COLOUR_NAMES, Digit
from pacevlm.models.molmoe.tiling import CropGeometry

NUM_DIGIT_CLASSES = 11
NUM_COLOUR_CLASSES = len(COLOUR_NAMES) + 1


@dataclass(frozen=True)
class CellLabels:
    """Labels of every cell, each `(crops, cells)`: 0 means background.

    `digit` is value + 1, `colour` the colour's place + 1, `centre` whether a digit's centre lies in the cell, and
    `log_height` the base-2 logarithm of the digit's height in pixels of the crop. `x` and `y` are the cell's centre
    in the image, 0 to 1, whatever it shows.
    """

    digit: npt.NDArray[np.int64]
    colour: npt.NDArray[np.int64]
    centre: npt.NDArray[np.float32]
    log_height: npt.NDArray[np.float32]
    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.float32]


def _crop_origins(tiling: tuple[int, int], window: int) -> npt.NDArray[np.float64]:
    rows, cols = tiling
    return np.array([(window * i, window * j) for i in range(rows) for j in range(cols)], dtype=np.float64)


def cell_labels(
    digits: Sequence[Digit], image_size: tuple[int, int], tiling: tuple[int, int], geometry: CropGeometry
) -> CellLabels:
    """Label the cells of the global crop (first) and of every tile, row by row.

    A cell shows the digit that covers most of it, if that covers 30 % of the cell or half of the digit's box.

    Args:
        digits: the scene's digits with boxes in image pixels.
        image_size: `(height, width)` of the image.
        tiling: `(rows, columns)` of the high-resolution crops.
        geometry: crop sizes.
    """
    side = geometry.cells_per_side
    cell_px = geometry.crop_size / side
    window = geometry.crop_size - 2 * geometry.margins[0] * geometry.patch_size
    margin_px = geometry.crop_size - window
    height, width = image_size
    parts = []
    for target, origins in (
        ((geometry.crop_size, geometry.crop_size), np.zeros((1, 2))),
        ((window * tiling[0] + margin_px, window * tiling[1] + margin_px), _crop_origins(tiling, window)),
    ):
        scale = min(target[0] / height, target[1] / width)
        offset = ((target[0] - int(height * scale)) // 2, (target[1] - int(width * scale)) // 2)
        grid = np.arange(side) * cell_px
        top = origins[:, 0, None] + grid[None]  # (crops, side)
        left = origins[:, 1, None] + grid[None]
        top = np.repeat(top, side, axis=1)  # (crops, cells)
        left = np.tile(left, (1, side))
        cell_area = cell_px * cell_px
        best = np.zeros(top.shape)
        fields = {name: np.zeros(top.shape) for name in ("digit", "colour", "centre", "log_height")}
        for digit in digits:
            x0, y0, x1, y1 = (v * scale for v in digit.box)
            x0, x1, y0, y1 = x0 + offset[1], x1 + offset[1], y0 + offset[0], y1 + offset[0]
            overlap = np.clip(np.minimum(left + cell_px, x1) - np.maximum(left, x0), 0, None) * np.clip(
                np.minimum(top + cell_px, y1) - np.maximum(top, y0), 0, None
            )
            cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
            centre = (left <= cx) & (cx < left + cell_px) & (top <= cy) & (cy < top + cell_px)
            shown = (overlap >= 0.3 * cell_area) | (overlap >= 0.5 * (x1 - x0) * (y1 - y0)) | centre
            # The cell of a digit's centre belongs to it whatever else it touches.
            score = np.where(centre, 2 * cell_area, overlap)
            wins = shown & (score > best)
            best = np.where(wins, score, best)
            fields["digit"][wins] = digit.value + 1
            fields["colour"][wins] = COLOUR_NAMES.index(digit.colour) + 1
            fields["log_height"][wins] = np.log2(max(1.0, (y1 - y0)))
            fields["centre"][centre] = 1
        fields["x"] = (left + cell_px / 2 - offset[1]) / (width * scale)
        fields["y"] = (top + cell_px / 2 - offset[0]) / (height * scale)
        parts.append(fields)
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return CellLabels(
        digit=merged["digit"].astype(np.int64),
        colour=merged["colour"].astype(np.int64),
        **{name: merged[name].astype(np.float32) for name in ("centre", "log_height", "x", "y")},
    )
