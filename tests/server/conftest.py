"""A bundle to serve, made once, and an engine that serves it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pacers import make_estimator, make_pacer
from PIL import Image

from pacevlm.baselines.lookup_table import LookupTable

if TYPE_CHECKING:
    from pacevlm.models.elastic import ElasticModel

# So slow a profile that a busy machine keeps every bound: the cheapest knobs are bound by 1.3 s, the full ones by 2.5.
COEFFICIENT, FULL_P50_MS = 0.05, 1700.0


@pytest.fixture(scope="session")
def served_run(tiny_elastic: ElasticModel, tiny_elastic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a bundle and a lookup table of the tiny model."""
    folder = tmp_path_factory.mktemp("served")
    estimator = make_estimator(tiny_elastic, COEFFICIENT)
    pacer = make_pacer(tiny_elastic, tiny_elastic_dir, estimator=estimator, full_p50_ms=FULL_P50_MS)
    pacer.save_pretrained(folder / "bundle")
    space = tiny_elastic.knob_space
    cheapest_first = np.arange(len(space))[None, None, None]
    LookupTable(space, [1.0], cheapest_first).save(folder / "lookup_table.json")
    return folder


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A small JPEG file."""
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()
