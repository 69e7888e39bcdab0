"""How an image is divided: the rules that choose a tiling, and what its size alone tells."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from pacevlm.errors import ConfigError, ImageError
from pacevlm.models.molmoe.tiling import CropGeometry, fitted_size, select_tiling, vision_sizes

RandomSizes = Callable[..., list[tuple[int, int]]]
REAL = CropGeometry()
GEOMETRIES = pytest.mark.parametrize(
    "geometry",
    [REAL, CropGeometry(84, 14, (2, 2)), CropGeometry(48, 6, (2, 2)), CropGeometry(60, 6, (2, 4))],
    ids=["real", "tiny", "small", "lopsided"],
)


@pytest.mark.parametrize(
    ("tiling", "num_tokens"),
    [((1, 1), 316), ((1, 2), 412), ((2, 1), 420), ((2, 2), 580), ((3, 4), 1196), ((4, 3), 1204), ((12, 1), 1460)],
)
def test_token_counts_of_the_real_geometry(tiling: tuple[int, int], num_tokens: int) -> None:
    assert REAL.num_image_tokens(*tiling) == num_tokens


@GEOMETRIES
def test_more_crops_allowed_never_gives_fewer_crops_or_tokens(
    geometry: CropGeometry, random_sizes: RandomSizes
) -> None:
    for height, width in random_sizes(150, 4000, seed=1):
        fits = []
        for max_crops in range(1, 16):
            try:
                fits.append(vision_sizes(height, width, max_crops, geometry))
            except ImageError:
                continue
        assert len(fits) in (0, 15), "whether an image is refused must not depend on the tier"
        assert [s.num_units for s in fits] == sorted(s.num_units for s in fits)
        assert [s.num_image_tokens for s in fits] == sorted(s.num_image_tokens for s in fits)
        assert all(s.num_units <= 1 + max_crops for max_crops, s in enumerate(fits, start=1))


def test_tiling_follows_the_shape_and_keeps_its_quirks() -> None:
    assert select_tiling(480, 640, 12, REAL) == (2, 3)
    assert select_tiling(640, 480, 12, REAL) == (3, 2)
    assert select_tiling(336, 336, 12, REAL) == (1, 1)
    # A side shorter than the margins: one tile, however long the other side.
    assert select_tiling(111, 5000, 12, REAL) == (1, 1)
    assert select_tiling(5000, 111, 12, REAL) == (1, 1)
    # Exactly as long as the margins: the scale of that side is infinite, so the other side decides.
    assert select_tiling(112, 500, 12, REAL) == (1, 2)
    assert select_tiling(112, 112, 12, REAL) == (1, 1)


def test_tiling_takes_the_smallest_scale_that_needs_no_shrinking() -> None:
    # The same rule, restated as a search with fractions in the regime of sides longer than the margins.
    rng = random.Random(3)
    for _ in range(100):
        height, width, max_crops = rng.randint(113, 2000), rng.randint(113, 2000), rng.randint(1, 12)
        best = None
        for rows, cols in sorted(
            ((r, c) for r in range(1, 13) for c in range(1, 13) if r * c <= max_crops),
            key=lambda t: (t[0] * t[1], t[0]),
        ):
            scale = np.float32(
                min(np.float32(224 * rows) / np.float32(height - 112), np.float32(224 * cols) / np.float32(width - 112))
            )
            rank = (scale >= 1, -scale if scale >= 1 else scale)
            if best is None or rank > best[0]:
                best = (rank, (rows, cols))
        assert best is not None
        assert select_tiling(height, width, max_crops, REAL) == best[1]


def test_a_lower_bound_on_crops_is_kept(random_sizes: RandomSizes) -> None:
    for height, width in random_sizes(50, 3000, seed=2):
        rows, cols = select_tiling(height, width, 8, REAL, min_crops=4)
        assert 4 <= rows * cols <= 8
    assert select_tiling(50, 50, 6, REAL, min_crops=6) in {(1, 6), (2, 3), (3, 2), (6, 1)}


@pytest.mark.parametrize(("max_crops", "min_crops"), [(0, 1), (-1, 1), (True, 1), (2.0, 1), ("2", 1), (2, 3), (2, 0)])
def test_unusable_crop_limits_are_refused(max_crops: object, min_crops: object) -> None:
    with pytest.raises(ConfigError, match="crops"):
        select_tiling(300, 300, max_crops, REAL, min_crops=min_crops)


def test_fitted_size_fills_the_target_and_keeps_the_aspect_ratio(random_sizes: RandomSizes) -> None:
    for height, width in random_sizes(200, 1500, seed=4):
        try:
            new_height, new_width = fitted_size(height, width, 300, 200)
        except ImageError:
            assert max(height / width, width / height) > 150
            continue
        assert new_height <= 300
        assert new_width <= 200
        assert new_height >= 299 or new_width >= 199
        scale = min(300 / height, 200 / width)
        assert abs(new_height - height * scale) <= 1
        assert abs(new_width - width * scale) <= 1
