"""Image processing: parity with the reference's fixtures, and the laws that hold for every image size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from pacevlm.errors import ConfigError, ImageError
from pacevlm.models.molmoe.image_processing import (
    CLIP_MEAN,
    CLIP_STD,
    IM_COL,
    IM_END,
    IM_PATCH,
    IM_START,
    MolmoEImageProcessor,
    prepare_image,
)
from pacevlm.models.molmoe.tiling import CropGeometry, vision_sizes
from pacevlm.types import VisionSizes

FIXTURES = Path(
    os.environ.get("PACEVLM_FIXTURES", Path(__file__).resolve().parents[4] / "shared" / "fixtures"), "molmoe-tiny"
)
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"no reference fixtures at {FIXTURES}; set PACEVLM_FIXTURES to their folder"
)

RandomSizes = Callable[..., list[tuple[int, int]]]
REAL = CropGeometry()
TINY = CropGeometry(84, 14, (2, 2))
SMALL = CropGeometry(48, 6, (2, 2))
LOPSIDED = CropGeometry(60, 6, (2, 4))
GEOMETRIES = pytest.mark.parametrize(
    "geometry", [REAL, TINY, SMALL, LOPSIDED], ids=["real", "tiny", "small", "lopsided"]
)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def preproc_cases() -> list[dict]:
    return json.loads((FIXTURES / "preproc.json").read_text())["cases"] if FIXTURES.is_dir() else []


@needs_fixtures
@pytest.mark.parametrize("case", preproc_cases(), ids=lambda case: f"{case['case']:02d}-{case['image']}")
def test_real_size_parity_with_the_reference(case: dict) -> None:
    with Image.open(FIXTURES / "images" / f"{case['image']}.png") as file:
        image = np.array(file.convert("RGB"))
    if "error" in case:
        with pytest.raises(ImageError, match="elongated"):
            prepare_image(image, case["max_crops"], REAL)
        with pytest.raises(ImageError, match="elongated"):
            vision_sizes(*image.shape[:2], case["max_crops"], REAL)
        return
    prepared = prepare_image(image, case["max_crops"], REAL)
    special = json.loads((FIXTURES / "preproc.json").read_text())["special_tokens"]
    kinds = torch.tensor([special[name] for name in ("im_start", "im_end", "im_patch", "im_col")])
    with safe_open(FIXTURES / "preproc.safetensors", "pt") as stored:
        expected = {
            name: stored.get_tensor(f"{case['case']:02d}/{name}")
            for name in ("input_ids", "image_input_idx", "image_masks", "sample_index", "sample_value", "patch_mean")
        }
    num_prompt = len(case["prompt_token_ids"])
    assert list(prepared.tiling) == case["tiling"]
    assert torch.equal(
        kinds[prepared.token_pattern], expected["input_ids"][1 : len(expected["input_ids"]) - num_prompt]
    )
    assert torch.equal(prepared.image_input_idx, expected["image_input_idx"].long())
    assert torch.equal(prepared.image_masks, expected["image_masks"])
    assert list(prepared.images.shape) == case["images_shape"]
    samples = prepared.images.flatten()[expected["sample_index"].long()]
    torch.testing.assert_close(samples, expected["sample_value"], atol=1e-5, rtol=0)
    torch.testing.assert_close(prepared.images.mean(dim=-1), expected["patch_mean"], atol=1e-5, rtol=0)
    assert vision_sizes(*case["image_hw"], case["max_crops"], REAL) == VisionSizes(
        case["n_crops"], case["n_tokens"] - 1 - num_prompt
    )


@needs_fixtures
@pytest.mark.parametrize("name", ["img_one", "img_wide", "img_tall"])
def test_tiny_geometry_parity_with_the_reference(name: str) -> None:
    max_crops = json.loads((FIXTURES / "cases.json").read_text())["cases"][name]["max_crops"]
    with safe_open(FIXTURES / "cases.safetensors", "pt") as stored:
        prepared = prepare_image(stored.get_tensor(f"{name}/in/image_uint8").numpy(), max_crops, TINY)
        assert torch.equal(prepared.image_input_idx, stored.get_tensor(f"{name}/in/image_input_idx")[0])
        assert torch.equal(prepared.image_masks, stored.get_tensor(f"{name}/in/image_masks")[0])
        torch.testing.assert_close(prepared.images, stored.get_tensor(f"{name}/in/images")[0], atol=1e-5, rtol=0)


@GEOMETRIES
def test_sizes_alone_tell_the_crops_and_tokens(geometry: CropGeometry, random_sizes: RandomSizes) -> None:
    largest = geometry.crop_size * 4
    for number, (height, width) in enumerate(random_sizes(12 if geometry == REAL else 60, largest)):
        max_crops = 1 + number % 12
        try:
            sizes = vision_sizes(height, width, max_crops, geometry)
        except ImageError:
            with pytest.raises(ImageError):
                prepare_image(random_image(height, width), max_crops, geometry)
            continue
        prepared = prepare_image(random_image(height, width), max_crops, geometry)
        assert prepared.vision_sizes == sizes
        assert len(prepared.images) == len(prepared.image_masks) == len(prepared.image_input_idx) == sizes.num_units
        assert prepared.images.shape[1:] == (geometry.patches_per_crop, 3 * geometry.patch_size**2)
        assert prepared.image_input_idx.shape[1] == geometry.cells_per_side**2
        # Every patch token receives exactly one cell, and no other position any.
        used = prepared.image_input_idx[prepared.image_input_idx >= 0]
        patch_positions = 1 + torch.nonzero(prepared.token_pattern == IM_PATCH).flatten()
        assert torch.equal(used.sort().values, patch_positions)


def unpatch(patches: torch.Tensor, geometry: CropGeometry) -> torch.Tensor:
    """A crop `(patches, values)` as a picture `(side, side, 3)`, pixel by pixel."""
    side, patch = geometry.patches_per_side, geometry.patch_size
    picture = torch.empty(geometry.crop_size, geometry.crop_size, 3)
    for number, values in enumerate(patches):
        top, left = divmod(number, side)
        picture[top * patch : (top + 1) * patch, left * patch : (left + 1) * patch] = values.reshape(patch, patch, 3)
    return picture


@pytest.mark.parametrize("geometry", [TINY, SMALL, LOPSIDED], ids=["tiny", "small", "lopsided"])
def test_crops_overlap_as_the_geometry_says(geometry: CropGeometry) -> None:
    # An image that already has a canvas's size is neither resized nor padded.
    rows, cols = 2, 3
    image = random_image(geometry.canvas_px(rows), geometry.canvas_px(cols))
    prepared = prepare_image(image, rows * cols, geometry)
    assert prepared.tiling == (rows, cols)
    canvas = (torch.from_numpy(image) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    step, size = geometry.window_px, geometry.crop_size
    for number in range(rows * cols):
        top, left = (place * step for place in divmod(number, cols))
        crop = unpatch(prepared.images[1 + number], geometry)
        torch.testing.assert_close(crop, canvas[top : top + size, left : left + size], atol=1e-5, rtol=0)
    assert torch.equal(prepared.image_masks[:-1], torch.ones_like(prepared.image_masks[:-1]))


@pytest.mark.parametrize("size", [(96, 128), (40, 200), (200, 40), (7, 5), (84, 84), (300, 299)])
def test_masks_measure_the_picture_in_each_patch_shifted_by_one(size: tuple[int, int]) -> None:
    geometry, max_crops = TINY, 6
    # A white picture on black padding: the mask can be read off the pixels.
    prepared = prepare_image(np.full((*size, 3), 255, np.uint8), max_crops, geometry)
    white = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    pixels = prepared.images.reshape(*prepared.images.shape[:2], -1, 3)
    is_picture = torch.isclose(pixels, white, atol=1e-4).all(dim=-1).float().mean(dim=-1)
    torch.testing.assert_close(prepared.image_masks[:-1], is_picture[1:], atol=1e-6, rtol=0)
    assert torch.equal(prepared.image_masks[-1], torch.full((geometry.patches_per_crop,), -1.0))
    # Padding is normalised black.
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    outside = pixels[1:][prepared.image_masks[:-1] == 0]
    torch.testing.assert_close(outside, black.expand_as(outside), atol=1e-6, rtol=0)


def test_shrinking_averages_instead_of_dropping_pixels() -> None:
    # A fine checkerboard, shrunk threefold, is almost even grey; without antialias single squares would be picked.
    board = (np.indices((3 * TINY.crop_size,) * 2).sum(axis=0) % 2 * 255).astype(np.uint8)
    prepared = prepare_image(np.repeat(board[..., None], 3, axis=2), 1, TINY)
    values = unpatch(prepared.images[0], TINY) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    torch.testing.assert_close(values, torch.full_like(values, 0.5), atol=0.1, rtol=0)


def test_the_only_tile_is_the_global_crop() -> None:
    prepared = prepare_image(random_image(70, 60), 1, TINY)
    assert prepared.tiling == (1, 1)
    assert torch.equal(prepared.images[0], prepared.images[1])


def test_token_pattern_is_two_grids_with_a_column_token_behind_every_row() -> None:
    prepared = prepare_image(random_image(96, 128), 4, TINY)
    rows, cols = prepared.tiling

    def grid(height: int, width: int) -> list[int]:
        return [IM_START, *([*[IM_PATCH] * width, IM_COL] * height), IM_END]

    side = TINY.cells_per_side
    expected = grid(side, side) + grid(TINY.canvas_cells(rows), TINY.canvas_cells(cols))
    assert prepared.token_pattern.tolist() == expected


def test_results_are_never_shared_between_images() -> None:
    first = prepare_image(random_image(96, 128), 4, TINY)
    positions, pattern = first.image_input_idx.clone(), first.token_pattern.clone()
    first.image_input_idx.zero_()
    first.token_pattern.zero_()
    second = prepare_image(random_image(96, 128, seed=1), 4, TINY)
    assert torch.equal(second.image_input_idx, positions)
    assert torch.equal(second.token_pattern, pattern)


def test_the_input_is_left_unchanged_and_may_be_read_only() -> None:
    image = random_image(96, 128)
    before = image.copy()
    expected = prepare_image(image, 4, TINY)
    assert np.array_equal(image, before)
    image.flags.writeable = False
    assert torch.equal(prepare_image(image, 4, TINY).images, expected.images)
    # A view with other strides is the same picture.
    assert torch.equal(prepare_image(np.asfortranarray(before), 4, TINY).images, expected.images)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3), np.float32),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((1, 900, 3), np.uint8),
        np.zeros((900, 1, 3), np.uint8),
        None,
    ],
    ids=["grey", "rgba", "float", "empty", "wide", "tall", "none"],
)
def test_unfit_arrays_are_refused(image: object) -> None:
    with pytest.raises(ImageError):
        prepare_image(image, 4, REAL)


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_size": 0},
        {"crop_size": 335},
        {"crop_size": 336.0},
        {"patch_size": -14},
        {"margins": (12, 12)},
        {"margins": (3, 4)},
        {"margins": (4,)},
        {"margins": (4.0, 4)},
        {"margins": (-2, 2)},
        {"pool": 5},
        {"pool": True},
    ],
    ids=str,
)
def test_geometries_that_do_not_divide_are_refused(settings: dict) -> None:
    # Numbers that equal good ones are refused even after those have been used.
    MolmoEImageProcessor()
    with pytest.raises(ConfigError):
        CropGeometry(**settings)
    with pytest.raises(ConfigError):
        MolmoEImageProcessor(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"max_crops": 0}, {"image_mean": (0.5,)}, {"image_std": (1, 1, 0)}, {"base_image_input_size": [84, 98]}],
    ids=str,
)
def test_unusable_processor_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        MolmoEImageProcessor(**settings)


def test_image_processor_saves_and_loads(tmp_path: Path) -> None:
    processor = MolmoEImageProcessor(84, 14, (2, 2), max_crops=5, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7))
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["max_crops"] == 5
    loaded = MolmoEImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.geometry == processor.geometry == TINY
    image = random_image(90, 130)
    assert torch.equal(loaded.prepare(image).images, processor.prepare(image).images)


def test_image_processor_reads_the_published_names(tmp_path: Path) -> None:
    published = {
        "base_image_input_size": [84, 84],
        "image_patch_size": 14,
        "overlap_margins": [2, 2],
        "max_crops": 7,
        "image_token_length_h": 3,
        "image_padding_mask": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    loaded = MolmoEImageProcessor.from_pretrained(tmp_path)
    assert (loaded.geometry, loaded.max_crops) == (TINY, 7)


def test_image_processor_call_pads_missing_crops_with_minus_one() -> None:
    processor = MolmoEImageProcessor(84, 14, (2, 2), max_crops=4)
    images = [random_image(50, 64), random_image(70, 190)]
    batch = processor(images)
    for row, image in enumerate(images):
        alone = processor.prepare(image)
        num_crops = alone.vision_sizes.num_units
        for name in ("images", "image_masks", "image_input_idx"):
            assert torch.equal(batch[name][row, :num_crops], getattr(alone, name))
            assert (batch[name][row, num_crops:] == -1).all()
    assert processor.vision_sizes(70, 190) == processor.prepare(images[1]).vision_sizes
    assert torch.equal(processor(images[0], max_crops=1)["images"][0], processor.prepare(images[0], 1).images)
    with pytest.raises(ConfigError, match="do_resize"):
        processor(images, do_resize=False)
    with pytest.raises(ConfigError, match="return_tensors"):
        processor(images, return_tensors="np")
    with pytest.raises(ImageError):
        processor([])
