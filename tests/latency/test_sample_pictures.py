"""Self-made pictures: every kind that can be written, from small to as large as asked for, the same for a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import features

from pacevlm.images import TURNED, open_picture
from pacevlm.latency import sample_pictures
from pacevlm.latency.picture_fit import upright_kind
from pacevlm.latency.sample_pictures import NUM_SIZES, make_sample_pictures

MAX_PIXELS = 40_000


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    return make_sample_pictures(MAX_PIXELS, seed=3)


def test_every_kind_has_a_ladder_of_sizes(pictures: list[Any]) -> None:
    opened = [open_picture(picture) for picture in pictures]
    kinds = [upright_kind(picture.kind) for picture in opened]
    assert list(dict.fromkeys(kinds)) == ["memory", "jpeg", "progressive jpeg", "png", "webp"]
    for kind in set(kinds):
        of_kind = [picture for picture in opened if upright_kind(picture.kind) == kind]
        sizes = [picture.width * picture.height for picture in of_kind]
        assert len(sizes) == 2 * NUM_SIZES
        assert sizes[::2] == sizes[1::2] == sorted(sizes[::2])
        assert max(sizes) == pytest.approx(MAX_PIXELS, rel=0.02)
        assert sizes[0] == pytest.approx(MAX_PIXELS / 2, rel=0.02)
        # Upright and lying, at a phone's aspect ratio.
        shapes = {round(picture.width / picture.height, 1) for picture in of_kind}
        assert shapes == {1.3, 0.8} or shapes == {1.3, 0.7, 0.8}
        if kind != "memory":
            # One of two equally large ones is turned, now the smooth and now the rough one.
            turned = np.array([picture.kind.startswith(TURNED) for picture in of_kind]).reshape(-1, 2)
            assert (turned.sum(axis=1) == 1).all()
            assert (turned.sum(axis=0) == NUM_SIZES // 2).all()
            # Of two equally large ones, the rough one has far more bytes.
            bytes_of = np.array([picture.num_bytes for picture in of_kind]).reshape(-1, 2)
            assert (bytes_of[:, 1] > 1.05 * bytes_of[:, 0]).all()
    assert all(picture.decode().size == (picture.width, picture.height) for picture in opened)


def test_small_pictures_are_there_whatever_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_pictures, "ENCODERS", {})
    sizes = [picture.shape[0] * picture.shape[1] for picture in make_sample_pictures(500_000)]  # type: ignore[union-attr]
    assert min(sizes) == pytest.approx(100_000, rel=0.01)
    assert max(sizes) == pytest.approx(500_000, rel=0.01)


def test_the_seed_decides(pictures: list[Any]) -> None:
    def as_bytes(made: list[Any]) -> list[bytes]:
        return [picture.tobytes() if isinstance(picture, np.ndarray) else picture for picture in made]

    assert as_bytes(make_sample_pictures(MAX_PIXELS, seed=3)) == as_bytes(pictures)
    assert not set(as_bytes(make_sample_pictures(MAX_PIXELS, seed=4))) & set(as_bytes(pictures))


def test_a_codec_that_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = features.check
    monkeypatch.setattr(features, "check", lambda name: name != "webp" and real(name))
    kinds = {upright_kind(open_picture(picture).kind) for picture in make_sample_pictures(MAX_PIXELS)}
    assert kinds == {"memory", "jpeg", "progressive jpeg", "png"}
