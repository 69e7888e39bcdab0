"""What stage 1 knows of a request before the vision encoder runs, as numbers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pacevlm.controller.policy_interface import PolicyInput
from pacevlm.errors import ImageError

THUMBNAIL_PX = 16
NUM_THUMBNAIL_FEATURES = THUMBNAIL_PX * THUMBNAIL_PX * 3

# Centre and spread of each logarithm. They are fixed, not fitted, so that a controller means the same wherever it runs;
# they only have to bring what requests usually have to the order of 1.
_SIDE_PX = (math.log(512), 1.0)
_ASPECT = (0.0, 0.5)
_TEXT_TOKENS = (math.log(32), 1.0)
_UNITS = (math.log(4), 1.0)
_IMAGE_TOKENS = (math.log(512), 1.0)


def num_size_features(num_tiers: int) -> int:
    """Length of `size_features`."""
    return 4 + 2 * num_tiers


def size_features(request: PolicyInput) -> list[float]:
    """Standardised logarithms of a request's sizes.

    Image height, width and aspect (width / height), text tokens, then units and image tokens of each tier.

    Raises:
        ImageError: there is no image, or it has no pixels.
    """
    if request.view.image_size is None:
        raise ImageError(f"example {request.example_id!r} came without an image; the controller reads its size")
    height, width = request.view.image_size
    if height < 1 or width < 1:
        raise ImageError(f"example {request.example_id!r} has an image of {height}x{width} px; it needs at least 1x1")
    sizes = request.view.sizes
    features = [
        _standardised(height, _SIDE_PX),
        _standardised(width, _SIDE_PX),
        _standardised(width / height, _ASPECT),
        _standardised(max(sizes.num_text_tokens, 1), _TEXT_TOKENS),
    ]
    features += [_standardised(max(vision.num_units, 1), _UNITS) for vision in sizes.vision]
    features += [_standardised(max(vision.num_image_tokens, 1), _IMAGE_TOKENS) for vision in sizes.vision]
    return features


def feasible_fractions(request: PolicyInput) -> list[float]:
    """Fraction of each tier's choices of stage 2 that the guardrail admits, `(tiers,)` numbers from 0 to 1."""
    return [np.count_nonzero(tier) / tier.size for tier in request.feasible]


def time_costs(request: PolicyInput) -> NDArray[np.float32]:
    """What the time of every configuration costs at the request's price, in accuracy, `(tiers, top_ks, num_blocks)`.

    In the place of predicted latencies stand bounds as shares of the full configuration's, whatever their tightness.
    Nothing costs anything where no latency is promised.
    """
    full_ms = float(request.bounds_ms[-1, -1, -1])
    if not request.objective.price or not 0 < full_ms < math.inf:
        return np.zeros(request.bounds_ms.shape, dtype=np.float32)
    return (request.objective.price / 100 / full_ms * request.bounds_ms).astype(np.float32)


def tier_costs(request: PolicyInput) -> NDArray[np.float32]:
    """Mean of `time_costs` over what the guardrail admits of each tier, `(tiers,)`; 0 for a tier of which nothing."""
    if not request.objective.price:  # as most requests ask, which wait for this
        return np.zeros(len(request.feasible), dtype=np.float32)
    costs = np.where(request.feasible, time_costs(request), np.float32(0)).sum(axis=(1, 2))
    return np.asarray(costs / np.maximum(np.count_nonzero(request.feasible, axis=(1, 2)), 1), dtype=np.float32)


def thumbnail_features(request: PolicyInput) -> NDArray[np.float32]:
    """The whole image, squeezed to 16x16 RGB, values in -1..1, `(768,)`.

    Raises:
        ImageError: the request carries no image.
    """
    picture = request.view.picture
    if picture is None:
        raise ImageError(
            f"example {request.example_id!r} came without its image, but this controller looks at a thumbnail; "
            "pass the image, or train a controller with thumbnail=False"
        )
    # The gap lets large images be shrunk by whole factors first, which is what keeps this quick.
    small = picture.decode().resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(small, dtype=np.float32).reshape(-1) / np.float32(127.5) - np.float32(1.0)


def _standardised(value: float, centre_and_spread: tuple[float, float]) -> float:
    centre, spread = centre_and_spread
    return (math.log(value) - centre) / spread
